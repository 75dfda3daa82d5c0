"""Makes the miniature's pre-trained parts from scratch: a BPE tokenizer, a tiny CLIP vision tower and a tiny LLaMA.

LLaVA starts from a CLIP and a LLaMA that others trained; the miniature's are made here, with the model code of the library:

    python scripts/train_mini_backbones.py [--out llava_jax/data/mini] [--part tokenizer vision language]

- `tokenizer`: LLaMA's kind (BPE over a text with a blank in front, bytes for what it has not seen), 512 pieces.
- `vision`: contrastive, as CLIP. Regions of pictures (patches of the layer that LLaVA reads, averaged) against captions that name some
  of an object's size, colour, shape and place ("a red object at the top"); every caption that fits is right. Whole pictures (class
  token) against whole captions. The held-back colour-shape pairs appear in no picture.
- `language`: next-token prediction on text of the domain: descriptions, captions, restatements and questions about them. A language
  model has read of every colour and shape, so its text names the held-back pairs too. In half of the samples the description is
  not a sentence but a grid of 36 places, each the sum of the embeddings of the words that hold there: the decoder meets there the
  kind of input that a projector will give it, several words at once, without ever seeing a picture.

Everything is seeded. `scores.json` records seconds, seed, sha256 and what probes and questions say of the parts.
"""

import argparse
import hashlib
import json
import random
import re
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from safetensors.numpy import save_file

from llava_jax.data import scenes
from llava_jax.images import CLIP_MEAN, CLIP_STD
from llava_jax.instruct import rules
from llava_jax.models.layers import scan
from llava_jax.models.llama import Llama, LlamaConfig
from llava_jax.models.llava import Parameters, merge, split
from llava_jax.models.vit import Vit, VitConfig
from llava_jax.weights import configs, tables

OUT = Path(__file__).parents[1] / "llava_jax" / "data" / "mini"
CATEGORIES = tuple(f"{colour} {shape}" for colour, shape in scenes.PAIRS)
BOS, EOS = 1, 2
VISION_STEPS, LANGUAGE_STEPS, LOOKUP_STEPS = 800, 3500, 0.3
VISION = VitConfig(image_size=scenes.SIZE, patch_size=10, width=128, mlp_width=384, layers=4, heads=4)
LANGUAGE = LlamaConfig(vocab_size=512, width=128, mlp_width=384, layers=4, heads=4, kv_heads=4, head_width=32, tied=True,
                       max_length=512)


def annotate(objects) -> rules.Annotation:
    """What the teacher would read of a scene that was never drawn."""
    things = tuple(rules.read_box(f"{o.colour} {o.shape}", o.box, scenes.SIZE, scenes.SIZE) for o in objects)
    return rules.Annotation("", tuple(scenes.captions(objects)), things)


# ---- tokenizer ----


def corpus(rng: random.Random, scenes_count: int = 3000):
    """Text of the domain, each sentence with and without a blank in front (a word after a newline has none)."""
    for _ in range(scenes_count):
        annotation = annotate(scenes.sample(rng, scenes.PAIRS))
        questions = rules.conversation(annotation.things, rng, CATEGORIES, 8)
        questions += [q for q in (rules.caption(annotation, rng), rules.detail(annotation, rng),
                                  rules.reasoning(annotation.things, rng)) if q]
        for q in questions:
            yield from (q.question, q.answer, f" [INST] {q.question} [/INST] {q.answer}")
        for caption in annotation.captions:
            yield from (caption, f" {caption}")


def make_tokenizer(folder: Path, seed: int) -> tokenizers.Tokenizer:
    """Trains LLaMA's kind of tokenizer and writes its two files."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    # No piece spans two words or a word and its punctuation; LLaMA's file itself names no pre-tokenizer.
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\u2581"), "merged_with_next"), pre_tokenizers.Split(Regex("[,.?;:]"), "isolated")])
    learner.train_from_iterator(corpus(random.Random(f"{seed} tokenizer")), trainers.BpeTrainer(
        vocab_size=LANGUAGE.vocab_size, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]],
                                                unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": LANGUAGE.max_length})
    return tokenizer


class Encoder:
    """Text to ids without BOS; remembers what it has seen, since the domain's sentences recur."""

    def __init__(self, folder: Path):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    @property
    def comma(self) -> int:
        return self.tokenizer.token_to_id(",")

    def word(self, text: str) -> int:
        [piece] = self(text)  # the domain's words are one piece each
        return piece


# ---- vision ----

REGIONS, REGION_TOKENS, SCENE_TOKENS = 5, 12, 40
ATTRIBUTES = {word: i + 1 for i, word in enumerate((*scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES, "background", *scenes.PLACES))}


class Clip(nnx.Module):
    """The tower and what is thrown away after training: a small text tower and the maps into the common space."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64):
        self.vision = Vit(VISION, rngs=rngs)
        self.text = Llama(LlamaConfig(vocab_size=LANGUAGE.vocab_size, width=width, mlp_width=2 * width, layers=2, heads=2,
                                      kv_heads=2, head_width=width // 2), rngs=rngs)
        matrix = lambda inputs: nnx.Param(jax.random.normal(rngs.params(), (inputs, width)) * inputs**-0.5)  # noqa: E731
        self.region, self.scene = matrix(VISION.width), matrix(VISION.width)
        self.region_text, self.scene_text = matrix(width), matrix(width)
        self.log_scale = nnx.Param(jnp.full(2, 2.3))

    def features(self, images):
        """The patches of the layer that LLaVA reads [B, P, D], and the class token after the last layer [B, D]."""
        x = self.vision((images.astype(jnp.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD), -2)
        last, _ = scan(jax.tree.map(lambda p: p[-1:], self.vision.layers), x, call=lambda block, x: (block(x), None))
        return x[:, 1:], self.vision.post_norm(last[:, 0])

    def embed_text(self, tokens, to_common):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.text(self.text.embed(tokens, jnp.float32), positions)
        there = (tokens > 0)[..., None]
        return unit((x * there).sum(1) / jnp.maximum(there.sum(1), 1) @ to_common[...])

    def loss(self, batch: dict):
        patches, pooled = self.features(batch["images"])
        regions = jnp.einsum("BRP,BPD->BRD", batch["weights"], patches).reshape(-1, VISION.width)
        regions = unit(standardise(regions) @ self.region[...])
        shown, said = batch["shown"].reshape(-1, 4), batch["said"].reshape(-1, 4)
        there = shown[:, 2] > 0
        fits = ((said[:, None] == 0) | (said[:, None] == shown)).all(-1) & there[:, None] & there
        texts = self.embed_text(batch["texts"].reshape(-1, REGION_TOKENS), self.region_text)
        scores = jnp.exp(self.log_scale[0]) * texts @ regions.T
        by_text, by_region = multi_positive(scores, fits, there), multi_positive(scores.T, fits.T, there)
        same = (batch["captions"][:, None] == batch["captions"]).all(-1)
        whole = jnp.exp(self.log_scale[1]) * self.embed_text(batch["captions"], self.scene_text) @ unit(pooled @ self.scene[...]).T
        all_there = jnp.ones(len(same), bool)
        by_scene = multi_positive(whole, same, all_there) + multi_positive(whole.T, same, all_there)
        return by_text + 0.5 * by_region + 0.1 * by_scene


def unit(x):
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def standardise(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def multi_positive(scores, fits, there):
    """Cross-entropy of each row's scores against an even share for all columns that fit; over rows and columns that are there."""
    logs = jax.nn.log_softmax(jnp.where(there, scores, -1e9), axis=-1)
    losses = -(jnp.where(fits, logs, 0).sum(-1) / jnp.maximum(fits.sum(-1), 1))
    return (losses * there).sum() / there.sum()


def covered(thing: scenes.Object) -> np.ndarray:
    """The patches, of the 36, of which the object's box covers more than 2 pixels in both directions."""
    x, y, w, h = thing.box
    edges = np.arange(0, scenes.SIZE, VISION.patch_size)
    across = np.minimum(x + w, edges + VISION.patch_size) - np.maximum(x, edges) > 2
    down = np.minimum(y + h, edges + VISION.patch_size) - np.maximum(y, edges) > 2
    return np.flatnonzero(down[:, None] & across)


def cell_patches(cell: int) -> list[int]:
    row, column = divmod(cell, 3)
    return [(2 * row + down) * 6 + 2 * column + across for down in (0, 1) for across in (0, 1)]


def region_batch(pictures: tuple, encode: Encoder, rng: random.Random, size: int) -> dict[str, np.ndarray]:
    """Pictures, the patches of their regions (objects and one empty cell), and a caption of each that names some attributes."""
    scenes_, images = pictures
    weights = np.zeros((size, REGIONS, VISION.patches), np.float32)
    shown, said = (np.zeros((size, REGIONS, 4), np.int32) for _ in range(2))
    texts, captions = np.zeros((size, REGIONS, REGION_TOKENS), np.int32), np.zeros((size, SCENE_TOKENS), np.int32)
    chosen = [rng.randrange(len(images)) for _ in range(size)]
    for b, objects in enumerate(scenes_[i] for i in chosen):
        empty = rng.choice(sorted(set(range(9)) - {thing.cell for thing in objects}))
        regions = [((thing.size, thing.colour, thing.shape, thing.place), list(covered(thing))) for thing in objects]
        regions.append((("", "", "background", scenes.PLACES[empty]), cell_patches(empty)))
        for r, (words, patches) in enumerate(regions):
            # A part of the patches, so that each of them comes to tell of the whole object.
            some = rng.sample(patches, rng.randint(1, len(patches)))
            weights[b, r, some] = 1 / len(some)
            named = [rng.random() < share for share in (0.25, 0.5, 0.6, 0.45)]
            if words[2] == "background":
                named[2] = True
            elif not any(named):
                named[rng.randint(1, 3)] = True
            shown[b, r] = [ATTRIBUTES.get(word, 0) for word in words]
            said[b, r] = shown[b, r] * named
            ids = encode(region_caption(words, named))
            texts[b, r, : len(ids)] = ids
        ids = encode(rng.choice(scenes.captions(objects)))[:SCENE_TOKENS]
        captions[b, : len(ids)] = ids
    return {"images": images[chosen], "weights": weights, "shown": shown, "said": said, "texts": texts, "captions": captions}


def region_caption(words: tuple, named: list[bool]) -> str:
    """ "a red object at the top": the words of (size, colour, shape, place) that are named."""
    size, colour, shape, place = (word if name else "" for word, name in zip(words, named, strict=True))
    noun = shape if shape == "background" else " ".join(("a", size, colour, shape or "object")).replace("  ", " ").replace("  ", " ")
    return f"{noun} at the {place}" if place else noun


def draw(count: int, seed: str) -> tuple[list, np.ndarray]:
    rng = random.Random(seed)
    noise = np.random.default_rng(rng.getrandbits(64))
    objects = [scenes.sample(rng) for _ in range(count)]
    return objects, np.stack([np.asarray(scenes.render(thing, rng, noise)) for thing in objects])


def probe(features, pictures: tuple) -> dict[str, float]:
    """How well ridge regression reads each attribute off single patches that an object covers; a third of the pictures is held out."""
    objects, images = pictures
    hidden = np.concatenate([features(images[i : i + 250]) for i in range(0, len(images), 250)])
    kinds = {"colour": tuple(scenes.COLOURS), "shape": scenes.SHAPES, "place": scenes.PLACES, "size": scenes.SIZES}
    rows = [(i, thing, patch) for i, scene in enumerate(objects) for thing in scene for patch in covered(thing)]
    x = np.stack([hidden[i, patch] for i, _, patch in rows]).astype(np.float64)
    x = np.concatenate([(x - x.mean(0)) / x.std(0).mean(), np.ones((len(x), 1))], axis=1)
    fit = np.array([i < len(images) * 2 // 3 for i, _, _ in rows])
    gram, scores = x[fit].T @ x[fit] + 3 * np.eye(x.shape[1]), {}
    for kind, names in kinds.items():
        y = np.array([names.index(getattr(thing, kind)) for _, thing, _ in rows])
        weights = np.linalg.solve(gram, x[fit].T @ np.eye(len(names))[y[fit]])
        scores[kind] = round(float((np.argmax(x[~fit] @ weights, 1) == y[~fit]).mean()), 4)
    return scores


def make_vision(out: Path, encode: Encoder, seed: int, steps: int, size: int = 64, peak: float = 1.5e-3) -> dict:
    pictures, held_out = draw(20_000, f"{seed} vision"), draw(1500, f"{seed} probe")
    graph, parameters = split(Clip(nnx.Rngs(seed)))
    parameters = start(parameters, {r"vision/position_embedding": 10, r".*/kernel": 3})
    rng = random.Random(f"{seed} regions")
    loss = lambda parameters, batch: merge(graph, parameters).loss(batch)  # noqa: E731
    parameters = train("vision", loss, parameters, lambda _: region_batch(pictures, encode, rng, size), steps, peak)
    features = jax.jit(lambda images: merge(graph, parameters).features(images)[0])
    scores = probe(features, held_out)
    print("vision", scores, flush=True)
    save(out / "vision", {k: v for k, v in parameters.items() if k.startswith("vision/")}, configs._hub_vision(VISION))
    write_json(out / "vision" / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": scenes.SIZE}, "do_center_crop": True,
        "crop_size": {"height": scenes.SIZE, "width": scenes.SIZE}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(map(float, CLIP_MEAN)), "image_std": list(map(float, CLIP_STD))})
    return scores


# ---- language ----

OTHER_WEIGHT = 0.05
"""Weight of what is not an answer, a caption or a looked-up word: a question, a description."""
PHASES = ((16, 64), (8, 184))
"""Rows and row length of the two phases: looking up in long lists, then all of the text."""


class Page:
    """A sample as it grows: words to sum per position, and the label (0, or the kind of text) that each position carries."""

    def __init__(self, encode: Encoder):
        self.encode = encode
        self.words: list[tuple[int, ...]] = [(BOS,)]
        self.labels: list[str] = [""]

    def add(self, ids, label: str = "") -> None:
        self.words += [(i,) for i in ids]
        self.labels += [label] * len(ids)

    def add_sums(self, sums: list[tuple[str, ...]]) -> None:
        self.words += [tuple(map(self.encode.word, words)) for words in sums]
        self.labels += [""] * len(sums)


def describe(page: Page, things: list[rules.Thing], rng: random.Random, form: str) -> None:
    """`text`: "top-left small red circle, centre ..."; `list`: one sum of words per object; `grid`: one per patch of a picture."""
    order = rng.sample(things, len(things)) if rng.random() < 0.5 else things
    words = [(thing.place, thing.size, thing.colour, thing.shape) for thing in order]
    if form == "text":
        page.add(page.encode(", ".join(map(" ".join, words))))
    elif form == "list":
        page.add_sums(words)
    else:
        by_cell = {(thing.row, thing.column): thing for thing in things}
        for row, column in ((i // 2, j // 2) for i in range(6) for j in range(6)):
            thing = by_cell.get((row, column))
            place = rules.Thing("", "", "", row, column).place
            page.add_sums([(place, thing.size, thing.colour, thing.shape) if thing else (place,)])


def restate(page: Page, things: list[rules.Thing], rng: random.Random) -> None:
    """All objects in a new order: the place and then what is there, or what it is and then its place."""
    for thing in rng.sample(things, len(things)):
        page.add([page.encode.comma])
        content = [thing.size, thing.colour, thing.shape]
        if rng.random() < 0.5:
            page.add([page.encode.word(thing.place)])
            page.add(map_words(page, content), "place to content")
        else:
            page.add(map_words(page, content if rng.random() < 0.7 else content[1:]))
            page.add(map_words(page, [thing.place]), "content to place")


def map_words(page: Page, words: list[str]) -> list[int]:
    return [page.encode.word(word) for word in words]


def crowd(rng: random.Random) -> list[rules.Thing]:
    """More objects than a picture holds: guessing among them pays little, so looking up is learned early."""
    cells = rng.sample(range(9), rng.choice((3, 6, 9)))
    return [rules.Thing(*rng.choice(scenes.PAIRS), rng.choice(scenes.SIZES), cell // 3, cell % 3) for cell in cells]


def lookup_page(encode: Encoder, rng: random.Random) -> Page:
    page, things = Page(encode), crowd(rng)
    describe(page, things, rng, rng.choice(("text", "list", "list")))
    restate(page, things, rng)
    return page


def domain_page(encode: Encoder, rng: random.Random, form: str = "") -> Page:
    """A description and what follows from it: a caption, or questions and answers in the template of stage 2."""
    kind = rng.random()
    if not form and kind < 0.2:
        return lookup_page(encode, rng)
    annotation = annotate(scenes.sample(rng, scenes.PAIRS))
    things, page = list(annotation.things), Page(encode)
    form = form or rng.choice(("text", "grid", "grid", "grid"))
    if kind < 0.3:
        describe(page, things, rng, form)
        page.add(encode(rng.choice(annotation.captions) + "\n"), "caption")
        return page
    questions = rules.conversation(things, rng, CATEGORIES, rng.choice((4, 12)))
    if kind < 0.42:
        extra = rng.choice((rules.caption(annotation, rng), rules.detail(annotation, rng), rules.reasoning(things, rng)))
        questions = [*questions[:3], *([extra] if extra else [])]
        rng.shuffle(questions)
    for i, question in enumerate(questions):
        if i == 0:
            page.add(encode("[INST] "))
            describe(page, things, rng, form)
        page.add(encode(f"\n{question.question} [/INST]" if i == 0 else f"[INST] {question.question} [/INST]"))
        page.add([*encode(question.answer), EOS], question.kind)
    return page


def pack(pages, rows: int, length: int) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Rows filled with pages, the last one of each cut: words [B, T, 4] (-1: none), positions, segments, weights; and the labels."""
    words = np.full((rows, length, 4), -1, np.int32)
    positions, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    weights, labels = np.zeros((rows, length), np.float32), [[""] * length for _ in range(rows)]
    for b in range(rows):
        begin, number = 0, 0
        while begin < length - 24:
            page, number = next(pages), number + 1
            count = min(len(page.words), length - begin)
            for t, ids in enumerate(page.words[:count], begin):
                words[b, t, : len(ids)] = ids
                # A sum of words cannot be predicted, nor what opens a page.
                weights[b, t] = 0 if len(ids) > 1 or t == begin else 1 if page.labels[t - begin] else OTHER_WEIGHT
            labels[b][begin : begin + count] = page.labels[:count]
            positions[b, begin : begin + count], segments[b, begin : begin + count] = range(count), number
            begin += count
    return {"words": words, "positions": positions, "segments": segments, "weights": weights}, labels


def next_word_scores(graph, parameters: Parameters, batch: dict):
    decoder = merge(graph, parameters).decoder
    there = batch["words"] >= 0
    x = (decoder.embedding[...][jnp.where(there, batch["words"], 0)] * there[..., None]).sum(2)
    return decoder.logits(decoder(x, batch["positions"], batch["segments"]))[:, :-1]


def language_loss(graph, parameters: Parameters, batch: dict):
    weights = batch["weights"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        next_word_scores(graph, parameters, batch), jnp.maximum(batch["words"][:, 1:, 0], 0))
    return (losses * weights).sum() / weights.sum()


def score_language(guess, encode: Encoder, form: str, seed: int, pages: int = 60) -> dict[str, float]:
    """Share of answers of each kind whose every token, the end included, has the highest score after the right ones before it."""
    rng = random.Random(f"{seed} scores {form}")
    hits: dict[str, list[bool]] = {}
    batch, labels = pack(iter(lambda: domain_page(encode, rng, form), None), pages, PHASES[1][1])
    right = np.asarray(guess(batch)) == batch["words"][:, 1:, 0]
    for b, row in enumerate(labels):
        begin = 1
        for t in range(2, len(row) + 1):
            ends = t == len(row) or row[t] != row[begin] or batch["words"][b, t - 1, 0] == EOS
            if ends:
                if row[begin] in rules.KINDS:
                    hits.setdefault(row[begin], []).append(bool(right[b, begin - 1 : t - 1].all()))
                begin = t
    return {kind: round(float(np.mean(hits[kind])), 3) for kind in rules.KINDS if kind in hits}


class Language(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.decoder = Llama(LANGUAGE, rngs=rngs)


def make_language(out: Path, encode: Encoder, seed: int, steps: int, peak: float = 2e-3) -> dict:
    graph, parameters = split(Language(nnx.Rngs(seed)))
    parameters = start(parameters, {r".*/kernel|decoder/embedding": 3})
    rng = random.Random(f"{seed} text")
    lookup = iter(lambda: lookup_page(encode, rng), None)
    domain = iter(lambda: domain_page(encode, rng), None)
    guess = jax.jit(lambda parameters, batch: next_word_scores(graph, parameters, batch).argmax(-1))
    scores = {}

    def batches(step: int) -> dict:
        first = step <= LOOKUP_STEPS * steps
        return pack(lookup if first else domain, *PHASES[0 if first else 1])[0]

    def watch(step: int, parameters: Parameters) -> None:
        scores.update({form: score_language(partial(guess, parameters), encode, form, seed) for form in ("text", "grid")})
        print(f"language step {step} {scores}", flush=True)
        save(out / "language", parameters, configs._hub_text(LANGUAGE, LANGUAGE.vocab_size) | {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0})

    train("language", partial(language_loss, graph), parameters, batches, steps, peak, watch)
    return scores


# ---- both ----


def start(parameters: Parameters, factors: dict[str, float]) -> Parameters:
    """The library's start (normal, 0.02) is made for wide models: matrices of narrow ones are scaled up."""
    scale = lambda path: next((f for pattern, f in factors.items() if re.fullmatch(pattern, path)), 1)  # noqa: E731
    return {path: value * scale(path) for path, value in parameters.items()}


def train(name: str, loss, parameters: Parameters, batches, steps: int, peak: float, watch=None) -> Parameters:
    """AdamW with warm-up and cosine. `batches(step)` gives what `loss` takes beside the parameters; `watch` looks on now and then."""
    schedule = optax.warmup_cosine_decay_schedule(0, peak, 100, steps, 0.02 * peak)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, batch):
        value, gradient = jax.value_and_grad(loss)(parameters, batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, began = optimizer.init(parameters), time.perf_counter()
    for number in range(1, steps + 1):
        parameters, state, value = step(parameters, state, batches(number))
        if number % 50 == 0 or number == steps:
            seconds = time.perf_counter() - began
            print(f"{name} step {number}/{steps} loss {float(value):.3f} {seconds:.0f} s", flush=True)
        if watch and (number % 500 == 0 or number == steps):
            watch(number, parameters)
    return parameters


def save(folder: Path, parameters: Parameters, config: dict) -> None:
    """Hugging Face's layout of a part alone, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.asarray(value) for path, value in parameters.items()}
    tensors = {}
    for name, place in tables.places({path: array.shape for path, array in arrays.items()}).items():
        array = arrays[place.path] if place.layer is None else arrays[place.path][place.layer]
        name = name.replace("vision_tower.", "").replace("language_model.", "")
        tensors[name] = np.ascontiguousarray(place.transform.to_hub(array))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--part", nargs="+", choices=("tokenizer", "vision", "language"), default=["tokenizer", "vision", "language"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS)
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "scores.json"
    makers = {"vision": partial(make_vision, steps=args.vision_steps), "language": partial(make_language, steps=args.language_steps)}
    if "tokenizer" in args.part:
        make_tokenizer(args.out / "language", args.seed)
    for part in ("vision", "language"):
        if part in args.part:
            began = time.perf_counter()
            scores = makers[part](args.out, Encoder(args.out / "language"), args.seed)
            seconds = round(time.perf_counter() - began)
            digest = hashlib.sha256((args.out / part / "model.safetensors").read_bytes()).hexdigest()
            known = json.loads(record.read_text()) if record.exists() else {}
            write_json(record, known | {part: {"seed": args.seed, "seconds": seconds, "sha256": digest, "scores": scores}})


if __name__ == "__main__":
    main()
