"""A BPE tokenizer of LLaMA's kind, trained on the domain's text."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.scene import Scene
from llava_jax.synthesize import rules
from mini_backbones.common import BOS, LANGUAGE, annotate, write_json

PARTICLES = "(?<=[가-힣])(은|는|이|가|을|를|과|와|의|에|에서|입니다)(?![가-힣])"
"""Korean particles, which are pieces of their own, so that a noun has one piece whatever its role."""


def corpus(rng: random.Random, scenes_count: int = 2000):
    """Text of the domain, each sentence with and without a blank in front (a word after a newline has none)."""
    teachers = rules.RulesTeacher("en"), rules.RulesTeacher("ko")
    for _ in range(scenes_count):
        context = annotate(scenes.sample(rng, scenes.PAIRS))
        scene = Scene(context)
        for teacher in teachers:
            questions = [*teacher.conversation(scene, rng, 8), *teacher.sentences(scene, rng, 4)]
            questions += [teacher.description(scene, rng), teacher.reasoning(scene, rng)]
            for q in filter(None, questions):
                yield from (q.question, q.answer, f" [INST] {q.question} [/INST] {q.answer}")
        for caption in context.captions:
            yield from (caption, f" {caption}")


def make_tokenizer(folder: Path, seed: int) -> tokenizers.Tokenizer:
    """Trains LLaMA's kind of tokenizer and writes its two files."""

    special = ["<unk>", "<s>", "</s>"]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    # No piece spans two words or a word and its punctuation; LLaMA's file itself names no pre-tokenizer.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\u2581"), "merged_with_next"),
            pre_tokenizers.Split(Regex("[,.?;:]"), "isolated"),
            pre_tokenizers.Split(Regex(PARTICLES), "isolated"),
        ]
    )
    learner.train_from_iterator(
        corpus(random.Random(f"{seed} tokenizer")),
        trainers.BpeTrainer(
            vocab_size=LANGUAGE.vocab_size,
            special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": LANGUAGE.max_length,
        },
    )
    return tokenizer
