"""Turns text into token ids and back, by the `tokenizer.model` or `tokenizer.json` of a checkpoint.

transformers' tokenizer classes are not used, because version 5 rebuilds LLaMA's pipeline instead of reading it, which
changes the ids around special tokens. The ids here are those that the checkpoints were trained on.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from sentencepiece import SentencePieceProcessor

from llava_jax.errors import UserError, user_path
from llava_jax.files import LARGEST_SMALL_FILE, check_fetched, parse_json, read_json, read_text, show_json, to_path

BYTE = "<0x[0-9A-F]{2}>"
"""Pattern of SentencePiece's pieces for single bytes."""
SPACE = "\u2581"
"""Character that SentencePiece writes for a space."""
MAX_IDS = 2**24
"""Largest number of ids. A larger id means a damaged file, and would fill the memory with empty tokens."""
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokens(NamedTuple):
    """Token ids, and the offsets [start, end) of every token in the text, in characters.

    If a character has several tokens, each may have the offsets of the character, or empty ones at its start.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Tokenizes and decodes in the same way for both kinds of files. Can be pickled.

    Attributes:
      bos_id, eos_id, unk_id: id of the token, or None if there is none.
      pad_id: id of the padding token; without one that of the unknown token, as in LLaVA; without that eos_id.
      adds_bos: whether a prompt starts with bos_id.
      adds_prefix_space: whether a space is added before a text, as LLaMA's tokenizers do.
      vocab_size: one more than the largest id.
    """

    @classmethod
    def load(cls, path: str | PathLike[str], legacy: bool | None = None) -> "Tokenizer":
        """Reads a tokenizer.

        Args:
          path: a directory, or one file, which is then the only one that is read. If a directory has both a
            `tokenizer.model` and a `tokenizer.json`, the model is used, because the other was converted from it,
            perhaps with another `legacy`. Special tokens are read from all files of the directory.
          legacy: where SentencePiece adds a space. True: before the text and after each special token in it. False:
            only before the text. None: as tokenizer_config.json sets it; if unset, True for a tokenizer.model, and
            as in the pipeline of a tokenizer.json. Byte-level BPE ignores it.

        Raises UserError if there is no tokenizer, if it is damaged, or if two files disagree.
        """
        path = to_path(path)
        candidates = [path / "tokenizer.model", path / "tokenizer.json"] if path.is_dir() else [path]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise UserError(f"{path}: no tokenizer here; expected a tokenizer.model or a tokenizer.json")
        declared = _read_declared(file) if path.is_dir() else _Declared({}, {}, {})
        if legacy is None:
            legacy = declared.config.get("legacy")
        read = _TokenizerJson if file.suffix == ".json" else _SentencePiece
        return cls(read(file, legacy, declared.added), declared, path)

    def __init__(self, backend: "_SentencePiece | _TokenizerJson", declared: "_Declared", path: Path):
        if backend.vocab_size > MAX_IDS:
            raise UserError(f"{path}: the tokenizer has ids up to {backend.vocab_size - 1:,}; a file of it is damaged")
        ids = {}
        for role in ROLES:
            name = declared.names.get(role, backend.names.get(role))
            ids[role] = backend.id_of(name) if name else None
            if ids[role] is None and role in declared.names:
                raise UserError(f"{path}: {role} {name!r} is not in the vocabulary; list it in added_tokens.json")
        self._backend = backend
        self._special_ids = {token.id for token in backend.added.values() if token.special} | {*ids.values()}
        self.bos_id, self.eos_id, self.unk_id = ids["bos_token"], ids["eos_token"], ids["unk_token"]
        pads = (ids["pad_token"], ids["unk_token"], self.eos_id)
        self.pad_id = next((pad for pad in pads if pad is not None), None)
        adds_bos = declared.config.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (backend.adds_bos if adds_bos is None else bool(adds_bos))
        self.adds_prefix_space = backend.prefixes
        self.vocab_size = backend.vocab_size

    def tokenize(self, text: str) -> Tokens:
        """Returns the tokens of a text, without BOS. Special tokens in the text, such as "</s>", become their ids."""
        if not text or not self._backend.prefix_once:
            return self._backend.tokenize(text)
        # LLaMA's slow tokenizer adds the space before the text, but not before a special token there.
        ids, offsets = self._backend.tokenize(SPACE + text)
        offsets = [(max(start - 1, 0), max(end - 1, 0)) for start, end in offsets]
        lone = len(ids) > 1 and ids[0] == self._backend.id_of(SPACE) and ids[1] in self._special_ids
        return Tokens(ids[lone:], offsets[lone:])

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Returns the ids of `tokenize`, after bos_id if `bos` is set and there is one."""
        ids = self.tokenize(text).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def special_id(self, token: str) -> int | None:
        """Returns the id of a special or added token such as "</s>" or "<image>", or None if there is no such token."""
        return self._backend.added[token].id if token in self._backend.added else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' content, and of all settings by which texts become tokens."""
        settings = (self.bos_id, self.adds_bos, self.adds_prefix_space, self._backend.prefix_once,
                    sorted(self._special_ids - {None}), sorted(self._backend.added.items()))
        return hashlib.sha256(self._backend.content() + repr(settings).encode()).hexdigest()

    def control_tokens(self, marks: Iterable[str] = ()) -> dict[str, int]:
        """Returns text and id of special tokens, of added tokens such as `<|im_end|>`, and of `marks` that are tokens.

        Files may list a control token without calling it special. Other added tokens, such as Gemma's `<table>`, are
        words of ordinary text.
        """
        special = {text: token.id for text, token in self._backend.added.items()
                   if token.id in self._special_ids or re.fullmatch(r"<\|.+\|>", text)}
        return {mark: i for mark in marks if (i := self._backend.id_of(mark)) is not None} | special

    def tokens_from(self, first: int) -> list[tuple[str, int]]:
        """Returns the tokens whose id is `first` or larger, with their ids, in order of the ids."""
        return sorted(((text, i) for text, i in self._backend.vocabulary() if i >= first), key=lambda pair: pair[1])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids. Bytes that form no character become U+FFFD; ids without a token become nothing."""
        stream = StreamDecoder(self, skip_special_tokens)
        return "".join([*map(stream.push, ids), stream.finish()])

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one token's text; none for an id without a token."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    @cached_property
    def longest_token(self) -> int:
        """Number of bytes of the longest token."""
        return max(map(len, self._bytes))

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, data in self._backend.bytes_of_tokens():
            table[token] = data
        for content, token in self._backend.added.items():
            table[token.id] = content.encode()
        return table


class StreamDecoder:
    """Decodes tokens one by one. The pieces join to `decode` of all ids, and no piece ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._bytes = tokenizer._bytes
        self._skipped = tokenizer._special_ids if skip_special_tokens else set()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.adds_prefix_space  # the one that tokenizing added before the text

    def push(self, token: int) -> str:
        """Returns the text that this token completes; "" while a character is incomplete."""
        if not 0 <= token < len(self._bytes) or token in self._skipped:
            return ""
        data = self._bytes[token]
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Returns U+FFFD if the last character is incomplete, otherwise ""."""
        return self._utf8.decode(b"", final=True)


class _Added(NamedTuple):
    id: int | None  # None: a file names the token without an id, so only the vocabulary can give one
    special: bool  # skipped by `skip_special_tokens`
    lstrip: bool = False  # includes the spaces before it
    rstrip: bool = False


class _SentencePiece:
    """Runs a tokenizer.model. Special tokens are cut out first; SentencePiece tokenizes the text between them."""

    adds_bos = True

    def __init__(self, file: Path, legacy: bool | None, added: Mapping[str, _Added]):
        model = _read_bytes(file)
        try:
            self.processor = processor = SentencePieceProcessor()
            processor.LoadFromSerializedProto(model)
            for i in range(processor.vocab_size()):
                processor.id_to_piece(i)  # UnicodeDecodeError in a damaged file
        except Exception as error:  # RuntimeError or OSError, by release
            reason = str(error).replace("\n", " ") or "empty"
            raise UserError(f"{file}: not a SentencePiece model ({reason}); copy the file again") from None
        self.prefixes = "".join(processor.encode("a", out_type=str)).startswith(SPACE)
        self.prefix_once = self.prefixes and legacy is False
        if self.prefix_once:
            # In protobuf the last value of a field counts: this appends normalizer_spec.add_dummy_prefix = 0.
            self.processor = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        control = (i for i in range(processor.vocab_size()) if processor.is_control(i) or processor.is_unknown(i))
        self.added = {processor.id_to_piece(i): _Added(i, special=True) for i in control}
        self.added |= _resolve(added, self.id_of, file)
        ids = zip(ROLES, (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id()), strict=True)
        self.names = {role: processor.id_to_piece(i) for role, i in ids if i >= 0}
        self.vocab_size = max([processor.vocab_size(), *(token.id + 1 for token in self.added.values())])
        longest_first = sorted(self.added.items(), key=lambda item: -len(item[0]))
        self.pattern = re.compile(
            "|".join(r"\s*" * token.lstrip + re.escape(text) + r"\s*" * token.rstrip for text, token in longest_first)
        )

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token].id
        piece = self.processor.piece_to_id(token)
        return piece if self.processor.id_to_piece(piece) == token else None

    def tokenize(self, text: str) -> Tokens:
        tokens = Tokens([], [])
        start = 0
        for match in self.pattern.finditer(text):
            self._extend(tokens, text[start : match.start()], start)
            special = match.group()
            tokens.ids.append(self.added[special if special in self.added else special.strip()].id)
            tokens.offsets.append(match.span())
            start = match.end()
        self._extend(tokens, text[start:], start)
        return tokens

    def _extend(self, tokens: Tokens, text: str, start: int) -> None:
        if text:
            encoded = self.processor.encode(text, return_type="offset_mapping")
            tokens.ids.extend(encoded["ids"])
            tokens.offsets.extend([(start + first, start + last) for first, last in encoded["offsets"]])

    def content(self) -> bytes:
        return self.processor.serialized_model_proto()

    def vocabulary(self) -> Iterator[tuple[str, int]]:
        known = {self.processor.id_to_piece(i): i for i in range(self.processor.vocab_size())}
        yield from (known | {text: token.id for text, token in self.added.items()}).items()

    def bytes_of_tokens(self) -> Iterator[tuple[int, bytes]]:
        for i in range(self.processor.vocab_size()):
            piece = self.processor.id_to_piece(i)
            is_byte = self.processor.is_byte(i) and re.fullmatch(BYTE, piece)
            yield i, bytes([int(piece[3:5], 16)]) if is_byte else _metaspace_bytes(piece)


class _TokenizerJson:
    """Runs a tokenizer.json with the tokenizers library."""

    def __init__(self, file: Path, legacy: bool | None, added: Mapping[str, _Added]):
        text = read_text(file)
        spec = parse_json(text, str(file))
        self.tokenizer = _from_str(text, file)  # checks the types of what is read below
        self.prefixes = _adds_prefix(spec)
        self.prefix_once = self.prefixes and legacy is False
        if self.prefixes and legacy is not None:
            self.tokenizer = _from_str(json.dumps(_with_prefix(spec, always=legacy)), file)
        self.decoders = {step["type"] for step in _steps(spec.get("decoder"), "decoders")}
        if not self.decoders & {"ByteLevel", "Metaspace", "Replace"}:
            kinds = ", ".join(sorted(self.decoders)) or "none"
            raise UserError(f"{file}: its decoder is {kinds}; only byte-level BPE and SentencePiece's kind are read")

        self.tokenizer.no_truncation()  # a file can carry both from the run that wrote it
        self.tokenizer.no_padding()
        leading = self.tokenizer.encode("").ids[:1]  # what the post-processor adds before every text
        self.adds_bos = bool(leading)
        self.tokenizer.post_processor = None  # some trim the space off a token's offsets

        self.added = {t.content: _Added(i, t.special) for i, t in self.tokenizer.get_added_tokens_decoder().items()}
        declared = _resolve(added, self.id_of, file)
        for content in sorted(declared.keys() - self.added.keys(), key=lambda content: declared[content].id):
            i, special, lstrip, rstrip = self.added[content] = declared[content]
            token = tokenizers.AddedToken(content, lstrip=lstrip, rstrip=rstrip, normalized=False, special=special)
            self.tokenizer.add_tokens([token])
            if self.id_of(content) != i:
                raise UserError(f"{file}: {content!r} would be {self.id_of(content)}, the files beside it say {i}")
        # LLaMA's names, unless a file gives others.
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.names = {role: name for role, name in names.items() if name in self.added}
        if leading:
            self.names["bos_token"] = self.tokenizer.id_to_token(leading[0])
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def tokenize(self, text: str) -> Tokens:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return Tokens(encoding.ids, encoding.offsets)

    def content(self) -> bytes:
        return self.tokenizer.to_str().encode()

    def vocabulary(self) -> Iterable[tuple[str, int]]:
        return self.tokenizer.get_vocab().items()

    def bytes_of_tokens(self) -> Iterator[tuple[int, bytes]]:
        byte_level = "ByteLevel" in self.decoders
        for piece, i in self.tokenizer.get_vocab().items():
            if byte_level:
                yield i, bytes(_BYTE_OF[char] for char in piece) if _BYTE_OF.keys() >= set(piece) else piece.encode()
            elif "ByteFallback" in self.decoders and re.fullmatch(BYTE, piece):
                yield i, bytes([int(piece[3:5], 16)])
            else:
                yield i, _metaspace_bytes(piece)


def _from_str(text: str, file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exceptions, and Rust's panics, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{file}: tokenizers {tokenizers.__version__} cannot read it ({error})") from None


def _metaspace_bytes(piece: str) -> bytes:
    return piece.replace(SPACE, " ").encode()


# Byte-level BPE writes a byte as a character: itself where it prints, else one from U+0100 on, in order.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED}
_BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTED)))}


def _steps(component: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    steps = (component or {}).get(key) or [component]
    return [step for step in steps if isinstance(step, Mapping) and "type" in step]


def _adds_prefix(spec: Mapping[str, Any]) -> bool:
    """Returns whether a tokenizer.json adds a space before a text, as LLaMA's do in one of two ways."""
    prepends = any(step["type"] == "Prepend" for step in _steps(spec.get("normalizer"), "normalizers"))
    metaspace = spec.get("pre_tokenizer") or {}
    return prepends or (metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme", "always") != "never")


def _with_prefix(spec: Mapping[str, Any], always: bool) -> dict[str, Any]:
    """Returns the pipeline with a space before every text between special tokens, or nowhere if `always` is False.

    Metaspace cannot do it: it adds no second space before a text that starts with one, but SentencePiece does.
    """
    steps = _steps(spec.get("normalizer"), "normalizers")
    kept = [step for step in steps if step["type"] != "Prepend"]
    prepend = [{"type": "Prepend", "prepend": SPACE}] * always
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    pre_tokenizer = spec.get("pre_tokenizer")
    if pre_tokenizer and pre_tokenizer.get("type") == "Metaspace":
        pre_tokenizer = {**pre_tokenizer, "prepend_scheme": "never"}
    normalizer = {"type": "Sequence", "normalizers": [*kept, *prepend, replace]}
    return {**spec, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


class _Declared(NamedTuple):
    """Settings and tokens from the other files of a tokenizer's directory."""

    config: dict[str, Any]  # tokenizer_config.json
    names: dict[str, str]  # bos_token -> "<s>"
    added: dict[str, _Added]


def _read_declared(file: Path) -> _Declared:
    """Reads the other files of the directory; from a tokenizer.json that is not `file`, only its added tokens."""

    def read(name: str, **kinds: type) -> dict[str, Any]:
        beside = file.parent / name
        found = read_json(beside) if beside != file and beside.is_file() else {}
        for field, kind in kinds.items():
            if found.get(field) is not None and not isinstance(found[field], kind):
                raise UserError(f"{beside}: {field} is {show_json(found[field])}, which it cannot be")
        return {field: value for field, value in found.items() if value is not None}

    config = read("tokenizer_config.json", legacy=bool, add_bos_token=bool, added_tokens_decoder=dict,
                  tokenizer_class=str)
    special_map = read("special_tokens_map.json", additional_special_tokens=list)
    names = {}
    for role in ROLES:
        for found, source in ((special_map, "special_tokens_map.json"), (config, "tokenizer_config.json")):
            if name := _content(found.get(role), f"{file.parent / source}: {role}"):
                names[role] = name
    map_file = file.parent / "special_tokens_map.json"
    special = {*names.values(), *(_content(token, f"{map_file}: additional_special_tokens")
                                  for token in special_map.get("additional_special_tokens", ()))}

    listed = [("tokenizer_config.json", i, token) for i, token in config.get("added_tokens_decoder", {}).items()]
    listed += [("added_tokens.json", i, {"content": text}) for text, i in read("added_tokens.json").items()]
    for token in read("tokenizer.json", added_tokens=list).get("added_tokens", ()):
        listed.append(("tokenizer.json", token.get("id") if isinstance(token, Mapping) else None, token))
    added: dict[str, _Added] = {}
    sources: dict[str | int, tuple[str, str, int]] = {}  # by text and by id: the first file that has it, text, id
    for name, i, token in listed:
        i, text = _id(i, file.parent / name), _content(token, f"{file.parent / name}: an added token")
        if not text or not isinstance(token, Mapping):
            raise UserError(f"{file.parent / name}: the added token {i} has no content")
        for key in (text, i):
            first, other, j = sources.setdefault(key, (name, text, i))
            if (other, j) != (text, i):
                raise UserError(
                    f"{file.parent}: {first} has {other!r} = {j}, {name} has {text!r} = {i}; make these files agree"
                )
        flags = [bool(token.get(flag)) for flag in ("lstrip", "rstrip")]
        added.setdefault(text, _Added(i, token.get("special", text in special), *flags))
    for name in names.values():
        added.setdefault(name, _Added(None, special=True))
    return _Declared(config, names, added)


def _resolve(added: Mapping[str, _Added], id_of: Callable[[str], int | None], file: Path) -> dict[str, _Added]:
    """Fills in ids from the vocabulary, and drops tokens without any. Raises UserError if the vocabulary disagrees."""
    resolved = {}
    for text, token in added.items():
        vocabulary_id = id_of(text)
        if None not in (vocabulary_id, token.id) and vocabulary_id != token.id:
            raise UserError(f"{file} has {text!r} = {vocabulary_id}, the files beside it {token.id}; make them agree")
        if vocabulary_id is not None or token.id is not None:
            resolved[text] = token._replace(id=vocabulary_id if token.id is None else token.id)
    return resolved


def _content(token: Any, where: str) -> str:
    """Returns a token's text, which files write as text or as the `content` of an object; "" for none."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where} is {show_json(token)}, which is no token")
    return text or ""


def _id(value: Any, file: Path) -> int:
    """Returns a token's id, which tokenizer_config.json writes as text."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value) else value
    if type(number) is not int or not 0 <= number < MAX_IDS:
        raise UserError(f"{file}: {show_json(value)} is no token id; ids are whole numbers below {MAX_IDS:,}")
    return number


def _read_bytes(file: Path) -> bytes:
    with user_path(file), file.open("rb") as opened:
        content = opened.read(LARGEST_SMALL_FILE)
    check_fetched(file, content)
    return content
