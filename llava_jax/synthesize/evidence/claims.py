"""Claims of answers about objects: that they exist, their number, colour, position and relation."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llava_jax.annotations.vocabulary import COLOURS, NUMBERS, Vocabulary
from llava_jax.synthesize.evidence.general import is_claimed, is_general
from llava_jax.synthesize.evidence.reading import Mention, Sentence, colours, numbers, read, sentences

_IMAGE = r"(?:picture|image|photo|photograph|scene|frame|view|shot)"
_IN_IT = rf"(?:in|within) (?:the|this) {_IMAGE}"
_END = (
    rf"(?= ?[.,;:!?]| ?$| (?:visible |shown |present )?{_IN_IT}| (?:in all|altogether|in total|here|now|anywhere"
    r"|to be seen|visible|too)\b)"
)
_HEDGED = re.compile(
    r"\b(?:if|would|could|might|may|must|should|can|perhaps|probably|possibly|maybe|likely|unlikely|suppose|imagine|such"
    r" as|usually|often|typically|generally|sometimes|whether|like|resembl\w+|as though|wants?|need(?:s|ed)?|will"
    r"|suggest\w*|impl(?:y|ies)|ensur\w+|avoid\w*|potential\w*|for example|another|remind\w*|flipped|reflected"
    r"|more|without|left over|any|helps? to)\b"
)
_SEEING = re.compile(
    r"\b(?:can|could|will) (?:§\d+ |you |i |we |one )?(?:also |clearly )?"
    r"(?:be (?:seen|found|spotted|observed)|see|find|spot|count|tell me|make out)\b"
)
_NEGATED = re.compile(
    r"\b(?:no|not|never|neither|nor|none|cannot|instead of|rather than|nothing|absent|lack\w*|missing|except)\b"
)

_OPENER = (
    rf"(?:there (?:is|are)|(?:i|we|you|one) (?:can )?(?:also )?(?:see|sees|count)|(?:{_IMAGE}|^it) (?:shows|has|holds"
    r"|contains|features|depicts|is made of)|^how many|^count)(?: only| just| exactly| a total of)?"
)
_TOTALS = re.compile(rf"{_OPENER}(?P<list>(?:,? ?(?:and )?(?:only |just )?§\d+)+){_END}")
_TOTAL_FIRST = re.compile(
    rf"^(?P<list>§\d+(?:(?:,| and|, and) §\d+)*)(?:$|[.!]| (?:is|are|can be seen)(?: there| visible| shown)?{_END})"
)
_HOW_MANY = re.compile(
    r"^(?:how many|(?:please |can you )?count) §0(?: (?:(?:are|is) (?:there|visible|shown)|there are"
    r"|can (?:you|be) seen?|(?:do|can) (?:you|we) (?:see|count)|for me|appear"
    rf"|(?:does|do) the {_IMAGE} (?:show|contain|have)))?"
    rf"(?: (?:(?:are|is) )?{_IN_IT}| in all)?[?.]?$"
)
_EXISTS = re.compile(
    rf"^(?:(?:is|are) there|(?:can|do) you see|does the {_IMAGE} (?:show|contain)) (?:any )?§0"
    rf"(?: (?:{_IN_IT}|anywhere|to be seen|visible|here))?\?$"
)
_ABSENT = re.compile(
    rf"(?:there (?:is|are) (?:no|not)|(?:cannot|can not|do not) see|^(?:no, )?no) §(\d+){_END}"
    rf"|\bno §(\d+) (?:is|are) (?:to be seen|visible|{_IN_IT}|there)"
)
_LEVEL = (
    rf"(?:to the |on the |at the |just )?(?P<across>left|right)(?: hand)?(?: side)? of(?! the {_IMAGE}\b)|"
    r"(?P<down>above|below|higher up than|lower down than)(?: and to the (?P<also>left|right) of)?"
)
_SHOWN = (
    r"(?:is|are|can be seen|there is|there are|(?:i|you|we|one|and you) (?:can )?(?:sees?|finds?|make out)|sits|stands"
    r"|lies|hangs)"
)
_RELATIONS = (
    re.compile(rf"§(?P<a>\d+)(?P<gap>[^§.,;:]*?)\b(?:{_LEVEL}) §(?P<b>\d+)"),
    re.compile(rf"(?:^|[.,;:] )(?:yes, |no, )?(?:{_LEVEL}) §(?P<b>\d+),? {_SHOWN} §(?P<a>\d+)"),
    re.compile(
        r"seen from §(?P<b>\d+), §(?P<a>\d+) (?:is|are|lies) (?:(?P<down>higher up|lower down)(?: and )?)?"
        r"(?:to the (?P<across>left|right)|on the (?P<also>left|right))?"
    ),
    re.compile(
        r"§(?P<b>\d+) (?:has|have) §(?P<a>\d+) (?:(?P<down>higher up|lower down)(?: and )?)?"
        r"(?:(?:to|on) the (?P<across>left|right))?(?: of (?:it|them))?"
    ),
)
_POSITION = re.compile(
    r"\b(?:at|in|on|towards?|near|within) the (?:far |very )?(?:"
    r"(?P<down>top|upper|bottom|lower)(?: hand)?(?: (?P<across>left|right|middle|centre|center))?(?: hand)?|"
    r"(?:middle )?(?P<side>left|right)(?: hand)?|(?P<middle>centre|center|middle))"
    rf"(?: (?:corner|side|part|area|half|edge|portion|section))?(?: of the {_IMAGE}\b|(?= ?[.,;:?!§]| ?$"
    r"| (?:and|there|is|are|i|one|you|we|while|lies|stands|sits)\b))"
)
_BARE = re.compile(r"(?:at|in|on) the (?:far )?(?:left|right|middle|centre|center)")  # "the dog on the left" of several
_HALF = re.compile(
    rf"(?:(?:^|[.,;:] )the (?P<one>left|right|upper|lower) half of the {_IMAGE} (?:has|holds|shows) §(?P<a>\d+))"
    r"|§(?P<b>\d+) belongs? to the (?P<other>left|right|upper|lower) half"
)
_THEN = re.compile(rf",? {_SHOWN}(?: also)? §(\d+)")
_SO_MANY = re.compile(
    rf"(?:(?P<n>{'|'.join(NUMBERS)}) of §(?P<of>\d+)|among §(?P<among>\d+), (?P<m>{'|'.join(NUMBERS)})"
    rf"|^§(?P<all>\d+)) are (?:(?P<colour>{'|'.join(COLOURS)})|§(?P<kind>\d+))(?=[.,]|$)"
)
_PREDICATE = re.compile(rf"§(\d+) (?:is|are|looks?)(?: both| all| also)? (?P<colour>{'|'.join(COLOURS)})\b(?! §)")
_WORDS = {"higher up": "above", "higher up than": "above", "lower down": "below", "lower down than": "below",
          "top": "above", "upper": "above", "bottom": "below", "lower": "below", "center": "middle",
          "centre": "middle"}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
      kind: object, absent, count, attribute, position or relation.
      text: The sentence.
      values: The number of a count, the colours of an attribute, otherwise some of "left", "right", "above", "below"
        and "middle".
      total: Whether a count includes all objects.
      negated: Whether the claim is denied.
    """

    kind: str
    text: str
    a: Mention
    values: tuple = ()
    b: Mention | None = None
    total: bool = False
    negated: bool = False


def all_claims(turns: Sequence[dict[str, str]], vocabulary: Vocabulary) -> Iterator[Claim]:
    """Yields the claims of all answers of a record."""
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield from claims(question["value"], answer["value"], vocabulary)


def claims(question: str, answer: str, vocabulary: Vocabulary) -> Iterator[Claim]:
    """Yields the claims of an answer, and of its question if the answer is yes, no, a number or a colour.

    Sentences that suppose, guess, deny a part or speak in general make no claim.
    """
    *_, asked = sentences(question, vocabulary) or [read("", vocabulary)]
    yield from _replies(asked, answer, vocabulary)
    for number, sentence in enumerate(sentences(_resolved(asked, answer), vocabulary)):
        if number or not _EXISTS.search(asked.marked):
            yield from _absences(sentence)
        stated = not _is_hedged(sentence) and not _NEGATED.search(re.sub("^no, ", "", sentence.marked))
        if stated and not is_general(asked, sentence):
            # "Is it between them?" "Yes, it is in the middle" is no position in the image.
            relative = ("middle",) if re.search(r"\bbetween\b", asked.marked) else ()
            yield from (claim for claim in _statements(sentence) if not relative or claim.values != relative)


def _statements(sentence: Sentence) -> Iterator[Claim]:
    text, marked, mentions = sentence.text, sentence.marked, sentence.mentions
    totals = {
        int(number)
        for pattern in (_TOTALS, _TOTAL_FIRST)
        for match in pattern.finditer(marked)
        if not _POSITION.search(marked[: match.start()])
        for number in re.findall(r"§(\d+)", match["list"])
    }
    for index, mention in enumerate(mentions):
        claimed = index in totals or is_claimed(sentence, index)
        if (mention.named or mention.colours) and claimed:
            yield Claim("object", text, mention)
        if mention.colours:
            yield Claim("attribute", text, mention, mention.colours)
        part = re.search(rf"\b(?:of|out of) §{index}\b(?!\d)", marked)
        if mention.number is not None and not part:
            yield Claim("count", text, mention, (mention.number,), total=index in totals and not mention.narrowed)
    for match in _SO_MANY.finditer(marked):
        group = mentions[int(match["of"] or match["among"] or match["all"])]
        number = numbers(match["n"] or match["m"]) if match["all"] is None else [group.number]
        some = mentions[int(match["kind"])] if match["kind"] else replace(group, colours=(match["colour"],))
        if number != [None]:
            yield Claim("count", text, some, tuple(number), total=not some.narrowed)
    for match in _PREDICATE.finditer(marked):
        yield Claim("attribute", text, mentions[int(match[1])], colours(match["colour"]))
    yield from _relations(sentence)
    yield from _positions(sentence)


def _relations(sentence: Sentence) -> Iterator[Claim]:
    for pattern in _RELATIONS:
        for match in pattern.finditer(sentence.marked):
            found = match.groupdict()
            if re.search(r"\b(?:and|with|while)\b", found.get("gap") or ""):
                continue
            words = [found.get(name) or "" for name in ("across", "down", "also")]
            values = tuple(_WORDS.get(word, word) for word in words if word)
            a, b = sentence.mentions[int(found["a"])], sentence.mentions[int(found["b"])]
            if values:
                yield Claim("relation", sentence.text, a, values, b)


def _positions(sentence: Sentence) -> Iterator[Claim]:
    """Yields positions. Each belongs to the mention before it, or to the mention after "at the left there is"."""
    for match in _POSITION.finditer(sentence.marked):
        before, after = sentence.marked[: match.start()], sentence.marked[match.end() :]
        clause = re.search(r"§(\d+)[^;§]*$", before)
        then = _THEN.match(after)
        subject = then if then and (not clause or re.search(r"(?:[,:]|\band) $", before)) else clause or then
        if subject:
            mention = sentence.mentions[int(subject[1])]
            is_selector = before.endswith(f"§{subject[1]} ") and mention.text.startswith("the ")
            if not (is_selector and _BARE.fullmatch(match[0])):
                yield Claim("position", sentence.text, mention, _position_values(match))
    for match in _HALF.finditer(sentence.marked):
        half = match["one"] or match["other"]
        subject = sentence.mentions[int(match["a"] or match["b"])]
        yield Claim("position", sentence.text, subject, (_WORDS.get(half, half),))


def _position_values(match: re.Match) -> tuple[str, ...]:
    words = [match[name] for name in ("down", "across", "side", "middle") if match[name]]
    values = tuple(_WORDS.get(word, word) for word in words)
    return values if values == ("middle",) else tuple(value for value in values if value != "middle")


def _absences(sentence: Sentence) -> Iterator[Claim]:
    for match in _ABSENT.finditer(sentence.marked):
        mention = sentence.mentions[int(match[1] or match[2])]
        if not mention.narrowed and not _POSITION.search(sentence.marked):
            yield Claim("absent", sentence.text, mention)


def _replies(asked: Sentence, answer: str, vocabulary: Vocabulary) -> Iterator[Claim]:
    """Yields claims of a question and its answer together: "How many dogs are there?" "Two." """
    first, *_ = sentences(answer, vocabulary) or [read("", vocabulary)]
    text, mentions = f"{asked.text} {first.text}", asked.mentions
    yes_or_no = re.match(r"(yes|no)\b", first.marked)
    if _HOW_MANY.search(asked.marked) and (found := numbers(first.text)):
        yield Claim("count", text, mentions[0], (found[0],), total=not mentions[0].narrowed)
    if yes_or_no and _EXISTS.search(asked.marked) and not mentions[0].narrowed:
        yield Claim("object" if yes_or_no[1] == "yes" else "absent", text, mentions[0])
    elif yes_or_no and re.match(r"(?:is|are|do you see|can) ", asked.marked):
        for claim in (*_relations(asked), *_positions(asked)):
            yield Claim(claim.kind, text, claim.a, claim.values, claim.b, negated=yes_or_no[1] == "no")
    if re.search(r"\bcolou?r\b", asked.marked) and len(mentions) == 1 and colours(first.text) and not yes_or_no:
        yield Claim("attribute", text, mentions[0], colours(first.text)[:1])
    position = _POSITION.search(asked.marked)
    if position and not mentions and first.mentions and re.match(r"what|who|which (?!is|are)", asked.marked):
        yield Claim("position", text, first.mentions[0], _position_values(position))


def _resolved(asked: Sentence, answer: str) -> str:
    """Replaces the first "it" or "they" of an answer by what the question asks about."""
    about = asked.mentions
    first_of_two = re.match(r"(?:where|is|are|on which|do|can) ", asked.marked)
    if not about or _is_hedged(asked) or (len(about) > 1 and not first_of_two):
        return answer
    name = "the " + re.sub(r"^(?:an?|any|some|the) ", "", about[0].text)
    return re.sub(r"^((?:yes|no), )?((?:\w+ ){0,4}?)(?:it|they|them)\b", rf"\1\2{name}", answer, count=1, flags=re.I)


def _is_hedged(sentence: Sentence) -> bool:
    return bool(_HEDGED.search(_SEEING.sub(" ", sentence.marked)))
