"""Writes the files beside the tensors: tokenizer, image processor, chat template, generation settings."""

import dataclasses
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llava_jax.errors import UserError
from llava_jax.files import read_json, show_json
from llava_jax.models.llava import LlavaConfig
from llava_jax.text import templates
from llava_jax.text.templates import IMAGE, VIDEO
from llava_jax.text.tokenizer import MAX_IDS, SPACE, Tokenizer
from llava_jax.weights import processors
from llava_jax.weights.files import write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt")
PAD = "<pad>"


def copy(source: Path, target: Path, template: str) -> None:
    """Writes the tokenizer of the native layout: its files, and the ids that start and end a text."""
    tokenizer = Tokenizer.load(source)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
    write_json(target / "generation_config.json", _generation(source, tokenizer, tokenizer.pad_id, template))


def export(source: Path, target: Path, config: LlavaConfig) -> dict[str, Any]:
    """Writes every file of Hugging Face's layout except config.json and tensors.

    Missing tokens become the tokenizer's next ids: `<image>`, without another padding token `<pad>`, and `<video>` for
    a OneVision. Returns the ids of "image", "pad", "video", "bos" and "eos" (a list if several tokens end a text).
    """
    tokenizer = Tokenizer.load(source)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
    file = target / "tokenizer.json"
    if file.exists():
        Tokenizer.load(source / "tokenizer.json")  # a check: it is read below, and the first call may not read it
    else:
        settings = target / "tokenizer_config.json"
        legacy = read_json(settings).get("legacy") if settings.exists() else None
        write_json(file, tokenizer_json(target / "tokenizer.model", legacy=legacy is not False))
    pad = _role(source, "pad_token")
    if pad in (None, *(_role(source, f"{role}_token") for role in ("bos", "eos", "unk"))):
        pad = PAD
    kind = processors.model_type(config)
    media = {"image": IMAGE} | ({"video": VIDEO} if kind == "llava_onevision" else {})
    ids = {name: tokenizer.special_id(name) for name in (IMAGE, pad, *media.values())}
    new = {name: tokenizer.vocab_size + i for i, name in enumerate(name for name, id in ids.items() if id is None)}
    ids |= new

    _add_tokens(target, new)
    _write_tokenizer_config(target, tokenizer, pad, config.template, kind, media)
    generation = _generation(source, tokenizer, ids[pad], config.template)
    write_json(target / "generation_config.json", generation)
    processors.write(target, config)
    return {name: ids[token] for name, token in (media | {"pad": pad}).items()} | {
        "bos": generation["bos_token_id"], "eos": generation["eos_token_id"]}


def _generation(source: Path, tokenizer: Tokenizer, pad: int | None, template: str) -> dict[str, Any]:
    """Returns the ids that start, end and pad a text: those of the source, and the template's end of an answer."""
    file = source / "generation_config.json"
    settings = read_json(file) if file.exists() else {}
    for role in ("bos_token_id", "eos_token_id"):
        value = settings.get(role, [])
        ids = value if isinstance(value, list) and role == "eos_token_id" else [] if value in (None, []) else [value]
        if any(type(i) is not int or not 0 <= i < MAX_IDS for i in ids):
            raise UserError(f"{file}: {role} is {show_json(value)}, which is no token id")
    if tokenizer.bos_id is not None and settings.get("bos_token_id") not in (None, tokenizer.bos_id):
        settings = {}  # early conversions of LLaMA 1, and the LLaVAs made of them, have ids of another vocabulary
    ends = settings.get("eos_token_id", tokenizer.eos_id)
    ends = [*ends] if isinstance(ends, list) else [] if ends is None else [ends]
    end = tokenizer.special_id(templates.get(template).end)
    ends += [] if end is None or end in ends else [end]
    return {"bos_token_id": settings.get("bos_token_id", tokenizer.bos_id),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": pad}


def _role(directory: Path, role: str) -> str | None:
    """Returns the token that a tokenizer's files give a role such as `pad_token`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(directory / name).get(role) if (directory / name).exists() else None
        if token:
            return token["content"] if isinstance(token, dict) else token
    return None


def _add_tokens(directory: Path, new: dict[str, int]) -> None:
    """Adds special tokens to added_tokens.json, and all tokens that it lists to tokenizer.json.

    A tokenizer.model cannot contain tokens that were added later, so only the files beside it list them.
    """
    file, added_file = directory / "tokenizer.json", directory / "added_tokens.json"
    added = (read_json(added_file) if added_file.exists() else {}) | new
    write_json(added_file, added)
    tokenizer = read_json(file)
    listed = tokenizer.get("added_tokens") or []
    known_ids = {*range(len(tokenizer["model"]["vocab"])), *(token["id"] for token in listed)}
    later = sorted((id, name) for name, id in added.items() if id not in known_ids)
    tokenizer["added_tokens"] = [*listed, *(_special(id, name) for id, name in later)]
    write_json(file, tokenizer)


def _special(id: int, name: str) -> dict[str, Any]:
    return {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True}


def _write_tokenizer_config(directory: Path, tokenizer: Tokenizer, pad: str, template: str, kind: str,
                            media: dict[str, str]) -> None:
    file, map_file = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    spec = read_json(directory / "tokenizer.json")
    chat_template = _chat_template(template, spec, media.get("video"))
    settings = read_json(file) if file.exists() else {}
    # A class is set, because transformers would otherwise choose one by the model's type with its own pipeline.
    settings.setdefault("tokenizer_class", "LlamaTokenizer" if (directory / "tokenizer.model").exists()
                        else "PreTrainedTokenizerFast")
    if settings["tokenizer_class"].startswith("LlamaTokenizer") and settings.get("legacy") is None:
        settings["legacy"] = not _prefixes_once(spec)
    if kind == "llava_onevision" and settings["tokenizer_class"].startswith("LlamaTokenizer"):
        # For a OneVision, transformers 5 would build LLaMA's pipeline anew, with other ids after an image.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("add_bos_token", tokenizer.adds_bos)
    settings.setdefault("clean_up_tokenization_spaces", False)
    names = {token["id"]: token["content"] for token in spec["added_tokens"]}
    roles = {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id)}
    for role, name in roles.items():
        settings[role] = settings.get(role) or name
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in spec["added_tokens"]
    } | (settings.get("added_tokens_decoder") or {})
    marks = {f"{name}_token": token for name, token in media.items()}
    settings |= {"pad_token": pad, **marks, "extra_special_tokens": marks,
                 "processor_class": f"{processors.CLASSES[kind]}Processor", "chat_template": chat_template}
    write_json(file, settings)
    roles |= read_json(map_file) if map_file.exists() else {}
    write_json(map_file, roles | {"pad_token": pad, **marks})
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _prefixes_once(spec: dict[str, Any]) -> bool:
    """Returns whether a tokenizer.json adds SentencePiece's space only before the first text (not `legacy`)."""
    return (spec.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"


def _chat_template(name: str, spec: dict[str, Any], video: str | None) -> str:
    template = templates.get(name)
    if _prefixes_once(spec):
        # LLaVA tokenizes the text after an image separately, with a space before it; here the template must write it.
        template = dataclasses.replace(template, image=template.image.replace(IMAGE, f"{IMAGE} "))
    return templates.chat_template(template, video)


def tokenizer_json(file: Path, legacy: bool) -> dict[str, Any]:
    """Returns the tokenizer.json of a LLaMA-type tokenizer.model.

    `legacy`: a space precedes every text between special tokens, not only the first. SentencePiece's BPE joins the
    neighbours whose piece has the highest score, so its scores order the merges.
    """
    model = SentencePieceProcessor(model_file=str(file))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special = [i for i in range(len(vocab)) if model.is_control(i) or model.is_unknown(i)]
    merges = []
    for piece, i in vocab.items():
        if i in special or model.is_byte(i):
            continue
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(-model.get_score(i), vocab[left], vocab[right], left, right)
                   for left, right in splits if left in vocab and right in vocab]
    bos = model.id_to_piece(model.bos_id())
    return {
        "version": "1.0",
        "added_tokens": [_special(i, model.id_to_piece(i)) for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]} if legacy else None,
        "pre_tokenizer": None if legacy else {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "unk_token": model.id_to_piece(model.unk_id()), "fuse_unk": True,
                  "byte_fallback": True, "vocab": vocab,
                  "merges": [[left, right] for *_, left, right in sorted(merges)]},
    }
