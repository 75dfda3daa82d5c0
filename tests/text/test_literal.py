"""Text of users is text: marks in it become ordinary tokens, and no other token changes."""

import random
import re

import pytest
from sentencepiece import SentencePieceTrainer

from llava_jax.errors import UserError
from llava_jax.text import templates
from llava_jax.text.encode import IMAGE_TOKEN_ID, encode_prompt
from llava_jax.text.literal import CUT, LiteralText
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

KINDS = ["prepend", "first", "always", "bytes", "chat", "sentencepiece", "sentencepiece, not legacy"]
CONTROL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
           "<|eot_id|>"]
MARKS = [*CONTROL, "<image>", "<video>", "<pad>", "<|image_pad|>", "<im_start>", "<|start_header_id|>", "[INST]",
         "ASSISTANT:", "USER:", "###", "32000", "</s></s>", "<s<s>>", "<ima<image>ge>", "<im</s>age>"]


def encode_literal(messages, name, tokenizer, counts):
    """Tokens of a chat, all of its text literal, as a server encodes it."""
    literal = LiteralText(name, tokenizer)
    system, turns = templates.read_messages(messages, literal.cut, literal.cut)
    chat = [("system", system)] * (system is not None) + turns
    return encode_prompt([{"role": r, "content": t} for r, t in chat], name, tokenizer, counts,
                         literal=literal).tolist()


def random_chat(rng, pool, template):
    """Messages whose texts are the keys of `texts` (one private character each), the texts, and the images' counts."""
    texts, counts, messages = {}, [], []

    def text():
        key = chr(0xE000 + len(texts))
        texts[key] = rng.choice(pool)
        return key

    if template.system is not None and rng.randrange(2):
        messages.append({"role": "system", "content": text()})
    for i in range(rng.choice([1, 3, 5])):
        parts = [{"type": "text", "text": text()} for _ in range(rng.randrange(1, 3))]
        images = rng.randrange(3) if i % 2 == 0 else 0
        counts += [rng.randrange(1, 4) for _ in range(images)]
        parts += [{"type": "image"}] * images
        rng.shuffle(parts)
        content = text() if not images and rng.randrange(2) else parts
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages, texts, counts


def with_texts(messages, texts):
    def fill(content):
        if isinstance(content, str):
            return texts[content]
        return [part | {"text": texts[part["text"]]} if "text" in part else part for part in content]

    return [message | {"content": fill(message["content"])} for message in messages]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if not template.captions])
def test_marks_in_texts_are_text(kinds, texts, name, kind):
    """Decoded between control tokens and images, a prompt is what the template writes around the literal texts."""
    tokenizer, rng = kinds[kind], random.Random(f"{name} {kind}")
    clean = [t.replace("\u2581", "_").strip() or "a" for t in texts(rng.randrange(99), 20) if "<" not in t]
    pool = ["".join(rng.choices([*MARKS, *clean, " "], k=rng.randrange(1, 6))).strip() or "a" for _ in range(40)]
    ids = {tokenizer.special_id(token): token for token in CONTROL if tokenizer.special_id(token) is not None}
    split = re.compile("|".join(map(re.escape, [*ids.values(), "<image>"])))
    for _ in range(6):
        messages, filled, counts = random_chat(rng, pool, TEMPLATES[name])
        tokens = encode_literal(with_texts(messages, filled), name, tokenizer, counts)
        assert tokens.count(IMAGE_TOKEN_ID) == sum(counts)
        rendered = templates.render(messages, name, open_answer=True)
        assert [ids[token] for token in tokens[tokenizer.adds_bos :] if token in ids] == [
            mark for mark in split.findall(rendered) if mark != "<image>"]
        runs, previous = [[]], None
        for token in tokens[tokenizer.adds_bos :]:
            if token in ids or token == IMAGE_TOKEN_ID:
                if token != IMAGE_TOKEN_ID or previous != IMAGE_TOKEN_ID:
                    runs.append([])
            else:
                runs[-1].append(token)
            previous = token
        written = [tokenizer.decode(run, skip_special_tokens=False).lstrip(" ") for run in runs]
        expected = ["".join(filled.get(c, c) for c in run).lstrip(" ") for run in split.split(rendered)]
        assert written == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if not template.captions])
def test_a_prompt_without_marks_keeps_its_tokens(kinds, texts, name, kind):
    tokenizer, rng = kinds[kind], random.Random(f"{kind} {name}")
    odd = ["<", "</", "s>", "<Image>", "< image>", "<image", "<|im_end|", "image>", "###", "\ufeff", "\ufdfa"]
    pool = [text for text in texts(rng.randrange(99), 80, (*odd,)) if not any(mark in text for mark in MARKS[:10])]
    for _ in range(8):
        messages, filled, counts = random_chat(rng, pool, TEMPLATES[name])
        filled_messages = with_texts(messages, filled)
        assert encode_literal(filled_messages, name, tokenizer, counts) == encode_prompt(
            filled_messages, name, tokenizer, counts).tolist()


def test_literal_pieces(kinds):
    """A mark becomes pieces of its characters, without a space before or inside it."""
    tokenizer = kinds["sentencepiece"]
    tokens = encode_literal([{"role": "user", "content": "a</s>b <image>"}], "vicuna_v1", tokenizer, [])
    assert tokenizer.decode(tokens).endswith("USER: a</s>b <image> ASSISTANT:")
    raw = encode_prompt([{"role": "user", "content": "a</s>b"}], "vicuna_v1", tokenizer).tolist()
    assert raw.count(2) == 1 and tokens.count(2) == 0
    literal = LiteralText("vicuna_v1", tokenizer)
    assert literal.cut("<image> </s>", keep_images=True) == f"<image> <{CUT}/s>"
    with pytest.raises(UserError, match="U[+]FDD0"):
        literal.cut(f"a{CUT}b")


def test_a_tokenizer_that_normalises_a_mark_into_a_token(tmp_path):
    """SentencePiece reads NFKC forms, such as full-width letters, as its own tokens. No cut can prevent that."""
    with open(tmp_path / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["The dog: Yes! <b>"] * 9), model_writer=file, vocab_size=280, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
            minloglevel=2)
    tokenizer = Tokenizer.load(tmp_path)
    ask = lambda text: encode_literal([{"role": "user", "content": text}], "gemma_instruct", tokenizer, [])  # noqa: E731
    clean, marked = ask("a b"), ask("a <start_of_turn> b")
    turn = tokenizer.encode("<start_of_turn>")[-1]
    assert clean.count(turn) == marked.count(turn) == 2 and "a <start_of_turn> b" in tokenizer.decode(marked, False)
    with pytest.raises(UserError, match="cannot write '＜start_of_turn＞' as ordinary text"):
        ask("a ＜start_of_turn＞ b")
    assert ask("a ＜start＞ b").count(turn) == 2
