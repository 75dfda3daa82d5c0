"""Parses a teacher's answer into the turns of a conversation: tolerant in form, strict in content.

Conversations and complex questions come as blocks under the headers `Question:` and `Answer:`, with lines `===` between
them; a detailed description is plain text. An invalid answer raises Reject with one of REASONS. endpoint/wording.py
has the rules about wording.
"""

import hashlib
import re
from collections.abc import Sequence

from llava_jax.data.records import check_text
from llava_jax.endpoint.wording import find_leak, find_refusal, find_source
from llava_jax.errors import UserError
from llava_jax.synthesize.language import is_language

Turn = dict[str, str]  # {"from": "human" | "gpt", "value": text}, as in LLaVA's JSON

REASONS = ("truncated", "refusal", "empty", "wrong_kind", "odd_turns", "mentions_source", "leaks_answer", "too_short",
           "too_long", "wrong_language", "duplicate")

ANSWER_WORDS = {"conversation": (5, 1500), "detail_description": (20, 800), "complex_reasoning": (20, 800)}
"""Minimum and maximum number of words of all answers of a record.

A Korean syllable, or a letter of a language without spaces between its words, is half a word.
"""
QUESTION_WORDS = (2, 60)
"""Minimum and maximum number of words of a question."""
MAX_CHARACTERS = 50_000
"""Maximum number of characters of an answer."""


class Reject(UserError):
    """Raised for an answer that gives no record, with a `reason` in REASONS and one line of `detail`."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, " ".join(detail.split())
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self):
        return Reject, (self.reason, self.detail)


def parse(
    kind: str, text: str, finish_reason: str | None = "stop", question: str | None = None, language: str = "en"
) -> tuple[Turn, ...]:
    """Returns the turns of an answer, alternating and human first, without `<image>`, which the caller adds.

    `kind` is one of prompts.KINDS. `question` is the question of a detailed description. Raises Reject.
    """
    if finish_reason == "length":
        raise Reject("truncated", "the reply hit the limit of tokens (finish_reason length)")
    if finish_reason == "content_filter":
        raise Reject("refusal", "the endpoint's content filter stopped the reply")
    text = _clean(text)
    if kind == "detail_description":
        turns = _pair(question or "", _description(text))
    else:
        turns = _dialogue(kind, text)
    _check(kind, turns, language)
    return turns


class Seen:
    """Remembers the answers of all records so far, as hashes of 16 bytes."""

    def __init__(self):
        self._digests: set[bytes] = set()

    def add(self, kind: str, turns: Sequence[Turn]) -> None:
        """Raises Reject("duplicate") if a record of this kind had the same answers, up to case and punctuation.

        Several images may have the same questions.
        """
        answers = "\n".join(_normal(turn["value"]) for turn in turns if turn["from"] == "gpt")
        digest = hashlib.blake2b(f"{kind}\n{answers}".encode(), digest_size=16).digest()
        if digest in self._digests:
            raise Reject("duplicate", "another image has the same answers")
        self._digests.add(digest)


THINKING = re.compile(r"\A\s*<think>.*?</think>", re.S)  # the start of some local models' answers
FENCE = re.compile(r"\A```[a-z]*\n(.*?)\n?```\Z", re.S | re.I)
SEPARATOR = re.compile(r"\s*={3,}\s*")
RULE = re.compile(r"\s*(?:[-*_]\s?){3,}\s*")  # a Markdown line across
HEADERS = {
    "human": "question|q|질문|質問|问题|問題|pregunta|frage|pergunta|domanda|вопрос|vraag|pytanie|soru|câu hỏi|سؤال",
    "gpt": "answer|a|답변|대답|답|回答|答案|答え|réponse|respuesta|antwort|resposta|risposta|ответ|antwoord|odpowiedź"
           "|cevap|trả lời|إجابة|الجواب",
}
# "Question:", "**Question 1:**", "## 2. Answer：the text", "Q:".
HEADER = re.compile(
    rf"[ \t#>*_]{{0,9}}(?:\d{{1,3}}[.)] ?)?[*_]{{0,3}}(?:(?P<human>{HEADERS['human']})|(?P<gpt>{HEADERS['gpt']}))"
    r" ?(?:#?\d{1,3})? ?[*_]{0,3} ?[:：][ \t]*(?:\*\*|__)?(?P<rest>.*)",
    re.I,
)
DESCRIPTION = re.compile(r"\A[\s#*_]*(?:answer|(?:detailed |image )?description|답변|설명)\s*[*_]*:[*_]*", re.I)
# "Sure! Here is a detailed description of the image:", and at the end "Let me know if you want more!", as paragraphs.
PREAMBLE = re.compile(
    r"\A(?:(?:sure|certainly|of course|absolutely|okay)\b[!.,]*\s*)?"
    r"(?:here(?: is|['’]s)|below is|this is|I(?: will|['’]ll| would|['’]d| can))\b"
    r"[^\n]{0,100}\b(?:description|describe|image|picture|photo|scene)\b[^\n]{0,60}:\s*\n\s*"
    r"|\A(?:네|물론)?[^\n]{0,20}다음은 [^\n]{0,60}(?:설명|묘사)[^\n]{0,20}[:.]\s*\n\s*", re.I)
CLOSING = re.compile(
    r"\n\s*\n(?:i hope (?:this|that) |(?:please )?let me know if |(?:please )?feel free to )[^\n]*\Z", re.I)
CHATTER = 200  # maximum characters before the first header, as in "Sure, here is a conversation:", or at the end
UNFINISHED = re.compile(r"(?:,|\b(?:and|or|the|an?|of|with|in|to|is|are))\Z")


def _clean(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise Reject("too_long", f"the reply has {len(text):,} characters")
    try:
        check_text(text, "the reply")
    except ValueError as error:
        raise Reject("wrong_kind", str(error)) from None
    text = THINKING.sub("", text.replace("\r\n", "\n")).strip()
    text = text[:-CHATTER] + CLOSING.sub("", text[-CHATTER:])
    if fenced := FENCE.fullmatch(text):
        text = fenced[1].strip()
    if not text:
        raise Reject("empty", "the reply is empty")
    return text


def _description(text: str) -> str:
    """Returns a description without its title and preamble. Raises Reject if it has questions and answers."""
    text = DESCRIPTION.sub("", PREAMBLE.sub("", text, count=1), count=1).strip()
    if any(match and match["human"] and len(match["human"]) > 1 for match in map(HEADER.fullmatch, text.split("\n"))):
        raise Reject("wrong_kind", "questions and answers, where a description was asked for")
    return "\n".join(line for line in text.split("\n") if not SEPARATOR.fullmatch(line)).strip()


def _dialogue(kind: str, text: str) -> tuple[Turn, ...]:
    """Returns questions and answers in turn.

    Raises Reject("wrong_kind") without headers or with more pairs than requested, and Reject("odd_turns") if they do
    not alternate or if text is under no header.
    """
    blocks: list[tuple[str, list[str]]] = []
    open_block = True  # no separator since the last header
    for line in text.split("\n"):
        header = HEADER.fullmatch(line)
        if header:
            blocks.append(("human" if header["human"] else "gpt", [header["rest"]]))
            open_block = True
        elif SEPARATOR.fullmatch(line):
            open_block = not blocks
        elif open_block and blocks:
            blocks[-1][1].append("" if RULE.fullmatch(line) else line)
        elif line.strip() and not RULE.fullmatch(line):
            if blocks:
                raise Reject("odd_turns", f"text under no header: {line.strip():.60}")
            chatter = text[: text.index(line) + len(line)]
            if len(chatter) > CHATTER:
                break
    if not blocks:
        if found := find_refusal(text):
            raise Reject("refusal", found)
        raise Reject("wrong_kind", f"no Question: and Answer: in it: {text:.80}")
    turns = tuple({"from": role, "value": _plain("\n".join(lines))} for role, lines in blocks)
    for number, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[number % 2]:
            raise Reject("odd_turns", f"block {number + 1} is {'a question' if number % 2 else 'an answer'}")
    if len(turns) % 2:
        raise Reject("odd_turns", "the last question has no answer")
    if any("===" in turn["value"] for turn in turns):
        raise Reject("odd_turns", "a separator within a line")
    if kind == "complex_reasoning" and len(turns) > 2:
        raise Reject("wrong_kind", f"{len(turns) // 2} questions, where one was asked for")
    return turns


def _check(kind: str, turns: tuple[Turn, ...], language: str) -> None:
    """Raises Reject if the content breaks a rule."""
    questions, answers = ([turn["value"] for turn in turns if turn["from"] == role] for role in ("human", "gpt"))
    written = answers if kind == "detail_description" else [turn["value"] for turn in turns]
    if UNFINISHED.search(answers[-1]):
        raise Reject("truncated", f"the last answer ends in the middle of a sentence: …{answers[-1][-40:]}")
    if found := next(filter(None, map(find_refusal, answers)), None):
        raise Reject("refusal", found)
    if not all(turn["value"].strip() for turn in turns):
        raise Reject("empty", "a question or an answer is empty")
    if found := next(filter(None, map(find_source, written)), None):
        raise Reject("mentions_source", found)
    if kind != "detail_description":
        for question, answer in zip(questions, answers, strict=True):
            if found := find_leak(kind, question, answer):
                raise Reject("leaks_answer", found)
        if len(set(map(_normal, questions))) < len(questions):
            raise Reject("duplicate", "the same question twice")
        for question in questions:
            _check_length("a question", _words(question), QUESTION_WORDS)
    _check_length("the answer" if len(answers) == 1 else "all answers", sum(map(_words, answers)), ANSWER_WORDS[kind])
    for value in (*written, "\n".join(written)):
        if not is_language(value, language):
            raise Reject("wrong_language", f"not in the language {language}: {value:.80}")


def _check_length(what: str, words: int, limits: tuple[int, int]) -> None:
    if not limits[0] <= words <= limits[1]:
        reason = "too_short" if words < limits[0] else "too_long"
        raise Reject(reason, f"{words} words in {what}; {limits[0]} to {limits[1]} are allowed")


def _pair(question: str, answer: str) -> tuple[Turn, ...]:
    return {"from": "human", "value": question}, {"from": "gpt", "value": answer}


def _plain(text: str) -> str:
    """Returns a text without blank lines around it, repeated blank lines, and bold print of the complete text."""
    text = re.sub(r"\n\s*\n\s*", "\n\n", text.strip())
    bold = re.fullmatch(r"\*\*([^*]+)\*\*|__([^_]+)__", text)
    return (bold[1] or bold[2]).strip() if bold else text


SYLLABLES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")


def _words(text: str) -> int:
    return len(re.findall(r"\w+(?:['’-]\w+)*", SYLLABLES.sub(" ", text))) + len(SYLLABLES.findall(text)) // 2


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
