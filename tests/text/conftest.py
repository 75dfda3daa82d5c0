"""Tokenizers of every kind, from the golden SentencePiece model or trained here; and texts that are hard to cut."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from llava_jax.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]
PIECES = ["The", " dog", "USER", ": ", " ", "  ", "\n", "\n\n", "\t", "a", "\u2581", "\u00a0", "\x00", "1234", "~"]
PIECES += ["é", "ﬁ", "한국", "🦙", "👩\u200d🚀", "<", "</", "s>", "###", "Yes.", "[/INST] ", " ASSISTANT: "]


def hard_texts(seed: int, count: int, extra: tuple[str, ...] = ()) -> list[str]:
    """Random strings of words, blanks, controls, emoji and things that look like a template's."""
    rng = random.Random(seed)
    return ["".join(rng.choices([*PIECES, *extra], k=rng.randrange(1, 9))) for _ in range(count)]


def metaspace(scheme: str) -> tokenizers.Tokenizer:
    """The golden model as a tokenizer.json, in the way of transformers 4 ("prepend") or 5 ("first", "always")."""
    vocab, _, merges = SentencePieceExtractor(str(GOLDEN / "tokenizer.model")).extract(vocab_scores=True)
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    if scheme == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE as Qwen2 and Llama 3 have, with a post-processor that trims blanks off offsets."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    steps = [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    corpus = ["The dog sees a user\n\nThe assistant answers:\nYes\n\n한국 🦙"] * 9
    special = ["<|endoftext|>", "</s>", *CHAT_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def texts():
    return hard_texts


@pytest.fixture(scope="session")
def raw() -> dict[str, tokenizers.Tokenizer]:
    """tokenizer.json files as the tokenizers library itself reads them."""
    return {scheme: metaspace(scheme) for scheme in ("prepend", "first", "always")} | {"bytes": byte_level()}


@pytest.fixture(scope="session")
def slow_ids():
    """LLaMA's slow tokenizer in transformers 4.37, followed to the letter, without BOS.

    slow_ids(text, legacy, added={}) -> ids, `added` being added tokens and their ids.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString((GOLDEN / "tokenizer.model").read_bytes())
    legacy_model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    proto.normalizer_spec.add_dummy_prefix = False
    model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    unknown = model.encode("<unk>", out_type=str)

    def between_specials(text: str, legacy: bool) -> list[str]:
        if legacy:
            return legacy_model.encode(text, out_type=str)
        if not text.startswith(("\u2581", " ")):
            return model.encode(text, out_type=str)
        return model.encode("<unk>" + text, out_type=str)[len(unknown) :]

    def slow_ids(text: str, legacy: bool, added: dict[str, int] | None = None) -> list[int]:
        added = {"<unk>": 0, "<s>": 1, "</s>": 2, **(added or {})}
        if not legacy and text:
            text = "\u2581" + text.replace("\u2581", " ")
        tokens = []
        for part in re.split("(" + "|".join(map(re.escape, added)) + ")", text):
            tokens += [part] if part in added else between_specials(part, legacy) if part else []
        if not legacy and len(tokens) > 1 and tokens[0] == "\u2581" and tokens[1] in ("<unk>", "<s>", "</s>"):
            tokens = tokens[1:]
        return [added[token] if token in added else model.piece_to_id(token) for token in tokens]

    return slow_ids


@pytest.fixture(scope="session")
def kinds(raw, tmp_path_factory) -> dict[str, Tokenizer]:
    """One tokenizer of every kind that is read."""
    made = {}
    for name, tokenizer in raw.items():
        directory = tmp_path_factory.mktemp(name)
        tokenizer.save(str(directory / "tokenizer.json"))
        if name == "bytes":
            (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        made[name] = Tokenizer.load(directory)
    directory = tmp_path_factory.mktemp("chat")
    shutil.copy(GOLDEN / "tokenizer.model", directory)
    added = {token: 2000 + i for i, token in enumerate(CHAT_TOKENS)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    made["chat"] = Tokenizer.load(directory)
    made["sentencepiece"] = Tokenizer.load(GOLDEN / "tokenizer.model")
    made["sentencepiece, not legacy"] = Tokenizer.load(GOLDEN / "tokenizer.model", legacy=False)
    return made
