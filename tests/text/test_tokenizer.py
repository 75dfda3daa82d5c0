import json
import pickle
import random
import shutil

import pytest
import tokenizers
from transformers import LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from llava_jax.errors import UserError
from llava_jax.text.tokenizer import StreamDecoder, Tokenizer

SPECIAL = ("</s>", "<s>", "<unk>")


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_ids_are_those_of_the_slow_tokenizer(golden, texts, slow_ids, legacy):
    tokenizer = Tokenizer.load(golden / "tokenizer.model", legacy=legacy)
    for text in texts(0, 2000, SPECIAL):
        assert tokenizer.encode(text) == slow_ids(text, legacy), repr(text)
        assert tokenizer.encode(text, bos=True) == [1, *slow_ids(text, legacy)]


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "bytes"])
def test_json_ids_and_text_are_those_of_the_library(kinds, raw, texts, kind):
    tokenizer = kinds[kind]
    for text in texts(1, 1000, ("</s>", "<|im_end|>")):
        ids = raw[kind].encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids, repr(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == raw[kind].decode(ids, skip_special_tokens=skip), repr(text)


@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_overrules_a_json_pipeline(raw, texts, slow_ids, tmp_path, kind, legacy):
    raw[kind].save(str(tmp_path / "tokenizer.json"))
    asked = Tokenizer.load(tmp_path, legacy=legacy)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    told = Tokenizer.load(tmp_path)
    for text in texts(2, 1000, SPECIAL):
        assert asked.encode(text) == told.encode(text) == slow_ids(text, legacy), repr(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_transformers_agrees_where_its_pipeline_is_llamas(golden, kinds, legacy):
    vocab, _, merges = SentencePieceExtractor(str(golden / "tokenizer.model")).extract(vocab_scores=True)
    oracle = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer = Tokenizer.load(golden / "tokenizer.model", legacy=legacy)
    text = "USER: Is the dog red?\nAnswer. ASSISTANT: Yes.</s>USER: And 한국?</s>\nfine"
    assert tokenizer.encode(text, bos=True) == oracle.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), False) == oracle.decode(oracle.encode(text)[1:])


def test_places_cover_the_text(kinds, texts):
    for kind, tokenizer in kinds.items():
        for text in texts(3, 300, ("</s>",)):
            ids, places = tokenizer.tokenize(text)
            assert len(ids) == len(places)
            assert places == sorted(places, key=lambda place: place[0]), (kind, text)
            covered = {position for begin, end in places for position in range(begin, end)}
            assert covered == set(range(len(text))), (kind, text)
        ids, places = tokenizer.tokenize("The dog</s>The dog")
        assert places[ids.index(tokenizer.special_id("</s>"))] == (7, 11), kind
        assert 3 in [begin for begin, _ in places], kind  # the blank belongs to "dog"


def test_decode_gives_the_text_back(kinds, texts):
    for kind, tokenizer in kinds.items():
        for text in texts(4, 500):
            if "s>" in text:
                continue  # may spell a special token
            if kind != "bytes":
                text = text.replace("\u2581", " ")  # SentencePiece's blank reads back as one
            if kind in ("first", "always"):
                text = text.lstrip(" ")  # puts no second blank before a first one
            assert tokenizer.decode(tokenizer.encode(text)) == text, (kind, text)


def test_decode_skips_special_and_unknown_ids(kinds):
    tokenizer = kinds["sentencepiece"]
    ids = [1, *tokenizer.encode("The dog"), 2, 0, -200, 10**6]
    assert tokenizer.decode(ids) == "The dog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> The dog</s><unk>"


@pytest.mark.parametrize("kind", ["prepend", "bytes", "sentencepiece"])
def test_streaming(kinds, texts, kind):
    """On texts no piece holds half a character; on any ids the pieces join to the text of all."""
    tokenizer = kinds[kind]
    for text in texts(5, 300):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token) for token in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(pieces)
        assert stream.finish() == ""
    rng = random.Random(6)
    sizes = []
    for _ in range(300):
        ids = rng.choices(range(-1, tokenizer.vocab_size + 2), k=20)
        if kind != "bytes":  # mostly bytes, most of them no character
            ids = rng.choices(range(3, 259), k=20) + ids[:3]
        stream = StreamDecoder(tokenizer, skip_special_tokens=False)
        pieces = [*map(stream.push, ids), stream.finish()]
        whole = b"".join(tokenizer._bytes[i] for i in ids if 0 <= i < tokenizer.vocab_size)
        blank = kind != "bytes" and whole.startswith(b" ")
        assert "".join(pieces) == tokenizer.decode(ids, False) == whole[blank:].decode("utf-8", "replace")
        sizes.append(len(pieces[-1]))
    assert 1 in sizes and 0 in sizes  # some ended in the middle of a character


def test_streaming_shows_a_character_with_its_last_byte(kinds):
    tokenizer = kinds["sentencepiece"]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("a한b")] == ["a", "", "", "한", "b"]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("한")[:-1]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_pickle(kinds):
    for kind, tokenizer in kinds.items():
        copy = pickle.loads(pickle.dumps(tokenizer))
        text = "</s>The dog\n</s> 한국"
        assert copy.encode(text) == tokenizer.encode(text), kind
        assert copy.decode(copy.encode(text)) == tokenizer.decode(tokenizer.encode(text)), kind
        assert (copy.bos_id, copy.pad_id, copy.adds_bos) == (tokenizer.bos_id, tokenizer.pad_id, tokenizer.adds_bos)


def test_special_ids(kinds):
    for kind in ("sentencepiece", "prepend"):
        tokenizer = kinds[kind]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)  # padded with <unk>, as LLaVA does
        assert tokenizer.adds_bos and tokenizer.vocab_size == 2000
        assert tokenizer.special_id("</s>") == 2 and tokenizer.special_id("foo") is None
    tokenizer = kinds["bytes"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (None, 0, 0, False)


def hub_directory(golden, directory, **config):
    """As llava-hf lays out a LLaMA tokenizer, with its two added tokens."""
    directory.mkdir(exist_ok=True)
    shutil.copy(golden / "tokenizer.model", directory)
    (directory / "added_tokens.json").write_text('{"<image>": 2000, "<pad>": 2001}')
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoder = {str(i): {"content": name, **flags} for i, name in enumerate(["<unk>", "<s>", "</s>"])}
    decoder |= {"2000": {"content": "<image>", **flags}, "2001": {"content": "<pad>", **flags}}
    config = {"added_tokens_decoder": decoder, "bos_token": "<s>", "pad_token": "<pad>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    named = {"eos_token": {"content": "</s>", **flags}, "bos_token": "<s>", "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    return directory


def test_directory_with_added_tokens(golden, tmp_path, slow_ids):
    tokenizer = Tokenizer.load(hub_directory(golden, tmp_path / "a", legacy=False))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.adds_bos) == (2001, 2, 2002, True)
    assert tokenizer.encode("<image>\nhi") == [2000, *slow_ids("</s>\nhi", False)[1:]]
    assert tokenizer.decode(tokenizer.encode("<image>hi"), False) == "<image>hi"
    assert tokenizer.decode(tokenizer.encode("a<image>hi")) == "ahi"
    assert Tokenizer.load(tmp_path / "a", legacy=True).encode("</s>hi") == slow_ids("</s>hi", True)
    assert not Tokenizer.load(hub_directory(golden, tmp_path / "b", add_bos_token=False)).adds_bos
    assert Tokenizer.load(tmp_path / "b").encode("</s>hi") == slow_ids("</s>hi", True)  # not said: legacy


def test_tokens_that_take_blanks_along(golden, tmp_path, slow_ids):
    decoder = {"2000": {"content": "<|end|>", "lstrip": True, "rstrip": True, "special": True}}
    directory = hub_directory(golden, tmp_path, added_tokens_decoder=decoder, pad_token=None)
    (directory / "added_tokens.json").unlink()
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.tokenize("a \n<|end|>  b").offsets[1] == (1, 12)
    assert tokenizer.encode("a \n<|end|>  b") == [*slow_ids("a", True), 2000, *slow_ids("b", True)]


def test_the_longer_of_two_added_tokens_wins(golden, tmp_path, slow_ids):
    directory = hub_directory(golden, tmp_path)
    (directory / "added_tokens.json").write_text('{"<image": 2002, "<image><image>": 2003}')
    assert Tokenizer.load(directory).encode("<image><image><image><imagea") == [2003, 2000, 2002, *slow_ids("a", True)]


def test_a_named_token_is_special_whatever_its_flag(raw, tmp_path):
    written = raw["bytes"].from_str(raw["bytes"].to_str())
    written.add_tokens(["<|done|>"])
    written.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.load(tmp_path).encode("a<|done|>")
    assert Tokenizer.load(tmp_path).decode(ids) == "a<|done|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|done|>"}')
    assert Tokenizer.load(tmp_path).decode(ids) == "a" and Tokenizer.load(tmp_path).eos_id == ids[-1]


def test_the_model_is_preferred_and_both_files_count(golden, raw, tmp_path, slow_ids):
    directory = hub_directory(golden, tmp_path, legacy=False)
    converted = raw["prepend"].from_str(raw["prepend"].to_str())
    converted.add_special_tokens(["<image>", "<pad>", "<extra>"])
    converted.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("a</s>b") == slow_ids("a</s>b", False)
    assert tokenizer.special_id("<extra>") == 2002 and tokenizer.vocab_size == 2003
    (directory / "tokenizer.model").unlink()
    assert Tokenizer.load(directory).encode("a</s>b<image>") == [*slow_ids("a</s>b", False), 2000]


def test_a_json_gets_the_tokens_that_only_other_files_name(raw, tmp_path):
    raw["prepend"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 2001, "<image>": 2000}')
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_id == 2001 and 2000 in tokenizer.encode("a<image>b")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 2001, "<image>": 3000}')
    with pytest.raises(UserError, match="tokenizer.json: '<pad>' would be 2000, the files beside it say 2001"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_of_the_run_that_wrote_a_json_are_ignored(raw, tmp_path):
    written = raw["bytes"].from_str(raw["bytes"].to_str())
    written.enable_truncation(4)
    written.enable_padding(length=8)
    written.save(str(tmp_path / "tokenizer.json"))
    text = "The dog sees a user."
    assert Tokenizer.load(tmp_path).encode(text) == raw["bytes"].encode(text).ids
    assert Tokenizer.load(tmp_path).encode("a") == raw["bytes"].encode("a").ids


def test_disagreeing_files(golden, raw, tmp_path):
    directory = hub_directory(golden, tmp_path)
    (directory / "added_tokens.json").write_text('{"<image>": 2001, "<pad>": 2000}')
    line = r"tokenizer_config.json has '<image>' = 2000, added_tokens.json has '<image>' = 2001; make these files agree"
    with pytest.raises(UserError, match=line):
        Tokenizer.load(directory)
    (directory / "added_tokens.json").write_text('{"[PAD]": 2000}')
    with pytest.raises(UserError, match=r"has '<image>' = 2000, added_tokens.json has '\[PAD\]' = 2000"):
        Tokenizer.load(directory)
    (directory / "added_tokens.json").write_text('{"foo": 2002}')
    with pytest.raises(UserError, match="tokenizer.model has 'foo' = 1049, the files beside it 2002"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the file"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.json", b'{"model": {"type": "BP', "not JSON"),
        ("tokenizer.json", b'{"model": {"type": "BPX"}}', f"tokenizers {tokenizers.__version__} cannot read it"),
        ("tokenizer.json", b"[]", "must be an object, and is a list"),
        ("tokenizer.json", b"\xff\xfe", "byte 1 is not UTF-8"),
    ],
)
def test_broken_files(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name}.*{line}") as error:
            Tokenizer.load(path)
        assert "\n" not in str(error.value)


def test_truncated_model(golden, tmp_path):
    model = (golden / "tokenizer.model").read_bytes()
    for size in (1, 100, len(model) // 2, len(model) - 1):
        (tmp_path / "tokenizer.model").write_bytes(model[:size])
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer.load(tmp_path)


def test_other_mistakes(golden, raw, tmp_path):
    with pytest.raises(UserError, match="expected a tokenizer.model or a tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path / "nowhere" / "tokenizer.model")
    directory = hub_directory(golden, tmp_path / "named", eos_token="<|end|>")
    with pytest.raises(UserError, match=r"eos_token '<\|end\|>' is not in the vocabulary"):
        Tokenizer.load(directory)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="its decoder is none"):
        Tokenizer.load(tmp_path)
