"""A tiny LLaMA: next-word prediction on descriptions, captions, restatements, questions and answers."""

import random
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene, SceneObject
from llava_jax.models.llama import Llama
from llava_jax.models.llava import Parameters, from_params, to_params
from llava_jax.synthesize import rules
from llava_jax.weights import configs
from mini_backbones.common import (
    BOS,
    CATEGORIES,
    EOS,
    LANGUAGE,
    LOOKUP_STEPS,
    Encoder,
    annotate,
    save,
    start,
    train,
)

OTHER_WEIGHT = 0.05
"""Weight of what is not an answer, a caption or a looked-up word: a question, a description."""
PHASES = ((16, 64), (8, 184))
"""Rows and row length of the two phases: looking up in long lists, then all of the text."""


class Page:
    """A sample as it grows: words to sum per position, and the label (empty, or the kind of text) that each
    position carries.
    """

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


def describe(page: Page, things: list[SceneObject], rng: random.Random, form: str) -> None:
    """`text`: "top-left small red circle, centre ..."; `list`: one sum of words per object; `grid`: one per
    patch of a picture.
    """
    order = rng.sample(things, len(things)) if rng.random() < 0.5 else things
    words = [(thing.position, *name_words(thing)) for thing in order]
    if form == "text":
        page.add(page.encode(", ".join(map(" ".join, words))))
    elif form == "list":
        page.add_sums(words)
    else:
        by_position = {thing.position: thing for thing in things}
        for position in (scenes.POSITIONS[i // 2 * 3 + j // 2] for i in range(6) for j in range(6)):
            thing = by_position.get(position)
            page.add_sums([(position, *name_words(thing)) if thing else (position,)])


def name_words(thing: SceneObject) -> tuple[str, str, str]:
    return thing.name.size, thing.name.colour, thing.name.noun


def restate(page: Page, things: list[SceneObject], rng: random.Random) -> None:
    """All objects in a new order: the place and then what is there, or what it is and then its place."""
    for thing in rng.sample(things, len(things)):
        page.add([page.encode.comma])
        content = list(name_words(thing))
        if rng.random() < 0.5:
            page.add([page.encode.word(thing.position)])
            page.add(map_words(page, content), "place to content")
        else:
            page.add(map_words(page, content if rng.random() < 0.7 else content[1:]))
            page.add(map_words(page, [thing.position]), "content to place")


def map_words(page: Page, words: list[str]) -> list[int]:
    return [page.encode.word(word) for word in words]


def crowd(rng: random.Random) -> list[SceneObject]:
    """More objects than a picture holds: guessing among them pays little, so looking up is learned early."""
    cells = rng.sample(range(9), rng.choice((3, 6, 9)))
    objects = []
    for cell in cells:
        pair, size = rng.choice(scenes.PAIRS), rng.choice(scenes.SIZES)
        x, y = (scenes.CELL * (i + 0.5) for i in (cell % 3, cell // 3))
        objects.append(scenes.Object(*pair, size, cell, x, y, scenes.RADII[size][0]))
    return Scene(Context("", "", (), tuple(thing.to_box() for thing in objects))).objects


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
    context = annotate(scenes.sample(rng, scenes.PAIRS))
    scene, page = Scene(context), Page(encode)
    form = form or rng.choice(("text", "grid", "grid", "grid"))
    if kind < 0.3:
        describe(page, scene.objects, rng, form)
        page.add(encode(rng.choice(context.captions) + "\n"), "caption")
        return page
    questions = rules.conversation(scene, rng, CATEGORIES, rng.choice((4, 12)))
    if kind < 0.42:
        extra = rng.choice(
            (rules.caption(context, rng), rules.detail(scene, rng), rules.reasoning(scene, rng))
        )
        questions = [*questions[:3], *([extra] if extra else [])]
        rng.shuffle(questions)
    for i, question in enumerate(questions):
        if i == 0:
            page.add(encode("[INST] "))
            describe(page, scene.objects, rng, form)
        page.add(encode(f"\n{question.question} [/INST]" if i == 0 else f"[INST] {question.question} [/INST]"))
        page.add([*encode(question.answer), EOS], question.kind)
    return page


def pack(pages, rows: int, length: int) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Rows filled with pages, the last one of each cut: words [B, T, 4] (-1: none), positions, segments,
    weights; and the labels.
    """
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
                weights[b, t] = (
                    0 if len(ids) > 1 or t == begin else 1 if page.labels[t - begin] else OTHER_WEIGHT
                )
            labels[b][begin : begin + count] = page.labels[:count]
            positions[b, begin : begin + count], segments[b, begin : begin + count] = range(count), number
            begin += count
    return {"words": words, "positions": positions, "segments": segments, "weights": weights}, labels


def next_word_scores(graph, parameters: Parameters, batch: dict):
    decoder = from_params(graph, parameters).decoder
    there = batch["words"] >= 0
    x = (decoder.embedding[...][jnp.where(there, batch["words"], 0)] * there[..., None]).sum(2)
    return decoder.logits(decoder(x, batch["positions"], batch["segments"]))[:, :-1]


def language_loss(graph, parameters: Parameters, batch: dict):
    weights = batch["weights"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        next_word_scores(graph, parameters, batch), jnp.maximum(batch["words"][:, 1:, 0], 0)
    )
    return (losses * weights).sum() / weights.sum()


def score_language(guess, encode: Encoder, form: str, seed: int, pages: int = 60) -> dict[str, float]:
    """Share of answers of each kind whose every token, the end included, has the highest score after the right
    ones before it.
    """
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
    graph, parameters = to_params(Language(nnx.Rngs(seed)))
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
        scores.update(
            {form: score_language(partial(guess, parameters), encode, form, seed) for form in ("text", "grid")}
        )
        print(f"language step {step} {scores}", flush=True)
        save(
            out / "language",
            parameters,
            configs.hf_text(LANGUAGE, LANGUAGE.vocab_size)
            | {
                "architectures": ["LlamaForCausalLM"],
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": 0,
            },
        )

    train("language", partial(language_loss, graph), parameters, batches, steps, peak, watch)
    return scores
