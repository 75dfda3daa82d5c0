"""A tiny LLaMA: next-word prediction on descriptions, captions, restatements, questions and answers."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llava_jax.models.llama import Llama, rope_frequencies
from llava_jax.models.llava import Parameters, from_params, to_params
from llava_jax.synthesize import rules
from llava_jax.weights import configs
from mini_backbones import pages
from mini_backbones.common import (
    BOS,
    EOS,
    LANGUAGE,
    LATE_STEPS,
    LOOKUP_STEPS,
    Encoder,
    load,
    muon,
    save,
    start,
    train,
)

PHASES = ((10, 144), (8, 184))
"""Rows and row length of the two phases: looking up in long lists, then all of the text."""
SCORED = {
    "grid": ("grid", "en"), "text": ("text", "en"), "sentences": ("sentences", "en"),
    "plain sentences": ("plain", "en"),
    "Korean, grid": ("grid", "ko"), "Korean, sentences": ("sentences", "ko"),
}
"""Form of the description and language of the questions, whose answers are scored."""


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


def score_language(guess, encode: Encoder, form: str, language: str, seed: int, chat: bool = False,
                   rows: int = 40) -> dict[str, float]:
    """Share of answers of each kind whose every token, the end included, has the highest score after the right
    ones before it.
    """
    rng = random.Random(f"{seed} scores {form}")
    hits: dict[str, list[bool]] = {}
    page = partial(pages.question_page, encode, rng, form, language, mix=replace(pages.EARLY, chat=chat))
    batch, labels = pages.pack(page, rows, PHASES[1][1])
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


def look_back(parameters: Parameters, strength: float = 4.0) -> Parameters:
    """Sets biases so that three heads of the first layer look one, two and three positions back.

    Rotated by its position, a query's constant term is in phase with the keys' constant term that far back. Such heads
    gather the words of an object. Without this start they form with some seeds only.
    """
    query, key = (f"decoder/layers/attention/{name}_proj/bias" for name in "qk")
    angles = jnp.outer(jnp.arange(1, 4), rope_frequencies(LANGUAGE))
    queries = strength * jnp.concatenate([jnp.cos(angles), -jnp.sin(angles)], -1)
    keys = strength * (jnp.arange(LANGUAGE.head_dim) < LANGUAGE.head_dim // 2)
    return parameters | {query: parameters[query].at[0, :3].set(queries), key: parameters[key].at[0, :3].set(keys)}


class Language(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.decoder = Llama(LANGUAGE, rngs=rngs)


def make_language(out: Path, encode: Encoder, seed: int, steps: int, peak: float = 3e-3) -> dict:
    """Trains the decoder. Its text is not yet the template's."""
    graph, parameters = to_params(Language(nnx.Rngs(seed)))
    parameters = look_back(start(parameters, {r".*/kernel|decoder/embedding": 3}))
    rng = random.Random(f"{seed} text")

    def batches(step: int) -> dict:
        if step <= LOOKUP_STEPS:
            return pages.pack(lambda: pages.lookup_page(encode, rng, step / LOOKUP_STEPS), *PHASES[0])[0]
        mix = pages.LATE if step > LATE_STEPS else pages.EARLY
        return pages.pack(lambda: pages.domain_page(encode, rng, mix), *PHASES[1])[0]

    watch = Watch(out, graph, encode, seed)
    train("language", partial(language_loss, graph), parameters, batches, steps, peak, watch, muon())
    return watch.scores


def tune_language(out: Path, encode: Encoder, seed: int, steps: int, mix: pages.Mix, peak: float = 1e-3) -> dict:
    """Tunes the saved decoder on a mix in the chat template, as Vicuna is made from LLaMA."""
    graph, parameters = to_params(Language(nnx.Rngs(seed)))
    parameters = load(out / "language", parameters)
    rng, watch = random.Random(f"{seed} tuning"), Watch(out, graph, encode, seed, chat=True)

    def batches(step: int) -> dict:
        return pages.pack(lambda: pages.domain_page(encode, rng, mix), *PHASES[1])[0]

    train("tuning", partial(language_loss, graph), parameters, batches, steps, peak, watch, muon())
    return watch.scores


class Watch:
    """Scores answers and saves the decoder, called now and then."""

    def __init__(self, out: Path, graph, encode: Encoder, seed: int, chat: bool = False):
        self.folder, self.encode, self.options, self.scores = out / "language", encode, {"seed": seed, "chat": chat}, {}
        self.guess = jax.jit(lambda parameters, batch: next_word_scores(graph, parameters, batch).argmax(-1))

    def __call__(self, step: int, parameters: Parameters) -> None:
        right = partial(score_language, partial(self.guess, parameters), self.encode, **self.options)
        self.scores = {name: right(*how) for name, how in SCORED.items()}
        print(f"language step {step} {self.scores}", flush=True)
        names = {"architectures": ["LlamaForCausalLM"], "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
        save(self.folder, parameters, configs.hf_text(LANGUAGE, LANGUAGE.vocab_size) | names)
