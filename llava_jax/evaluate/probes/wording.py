"""Wording of the probes in English and Korean, and the forms of their answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.annotations import english, korean
from llava_jax.annotations.scene import Count, Name

LANGUAGES = ("en", "ko")
SIDES = ("left", "right", "above", "below")
NUMBERS = ("one", "two", "three", "four")

_WORDS = {"en": english, "ko": korean}
_TEXTS = {
    "en": {
        "side": "On which side of the {b} is the {a}?",
        "inside": "Is the {a} within the area that the {b} takes up in the picture?",
        "between": "Is the {c} between the {a} and the {b}?",
        "order": "Are the {a}, the {b} and the {c} in this order from left to right?",
        "count": "How many {n_names} are there?",
        "exists": "Is there a/an {a}?",
    },
    "ko": {
        "side": "{a}은/는 {b}의 어느 쪽에 있나요?",
        "inside": "그림에서 {a}은/는 {b}이/가 차지하는 영역 안에 있나요?",
        "between": "{c}은/는 {a}과/와 {b} 사이에 있나요?",
        "order": "왼쪽부터 {a}, {b}, {c}의 순서로 있나요?",
        "count": "{n_name}이/가 몇 {n_unit} 있나요?",
        "exists": "{a}이/가 있나요?",
    },
}
_KOREAN = {"left": "왼쪽", "right": "오른쪽", "above": "위쪽", "below": "아래쪽", "yes": "네", "no": "아니요",
           "one": "1", "two": "2", "three": "3", "four": "4"}  # fmt: skip
_ONE_OF = {"en": "\nAnswer with one of these words: {}.", "ko": "\n다음 중 하나로만 답하세요: {}."}

_COUNTED = r"\s*(?:개|명|마리|대|척|권|사람)"
FORMS = {
    "en": {
        "left": "left", "right": "right", "yes": "yes", "no": "no|not", "above": "above|over|top|higher|upper",
        "below": "below|under|underneath|beneath|bottom|lower", "none": "zero|none|no|0", "one": "one|1",
        "two": "two|2", "three": "three|3", "four": "four|4", "more": r"five|six|seven|eight|nine|ten|\d+",
    },
    "ko": {
        "왼쪽": "왼|좌측", "오른쪽": "오른|우측", "위쪽": "위(?!치)|상단", "아래쪽": "아래|밑|하단",
        "네": "(?:네|예)(?![가-힣])|있(?!지)", "아니요": "아니|아뇨|없|않", "0": f"0|없|영{_COUNTED}",
        "1": f"1|하나|한{_COUNTED}", "2": f"2|둘|두{_COUNTED}", "3": f"3|셋|세{_COUNTED}", "4": f"4|넷|네{_COUNTED}",
        "more": rf"\d+|다섯|여섯|일곱|여덟|아홉|열{_COUNTED}",
    },
}  # fmt: skip
"""Regular expressions of the answers. Korean words take endings, so the end of a word is not checked."""
_NUMBERS = {"en": ("none", *NUMBERS, "more"), "ko": ("0", "1", "2", "3", "4", "more")}


def wording(language: str, key: str, values: Mapping[str, Name | Count], answer: str, choices: Sequence[str]
            ) -> dict[str, Any] | None:
    """Returns a question as {text, answer, choices}, or None if one of its names has no word in the language."""
    words, fields = _WORDS[language], {}
    try:
        for name, value in values.items():
            fields |= words.fields(name, value)
    except ValueError:
        return None
    translation = _KOREAN if language == "ko" else {choice: choice for choice in choices}
    return {"text": words.finish(_TEXTS[language][key].format_map(fields)), "answer": translation[answer],
            "choices": [translation[choice] for choice in choices]}


def instruction(language: str, choices: Sequence[str]) -> str:
    """Returns the line that asks for one of these answers."""
    return _ONE_OF[language].format(", ".join(choices))


def parse_answer(language: str, text: str, choices: Sequence[str]) -> str:
    """Returns the choice that a text names first, or "" if it names none.

    A number that is no choice gives "none", "0" or "more". English words are separate words ("on the left-hand side"),
    Korean ones start a word ("왼쪽에 있습니다").
    """
    forms = FORMS[language]
    candidates = _NUMBERS[language] if set(choices) <= set(_NUMBERS[language]) else choices
    either = "|".join(f"(?P<_{number}>{forms[choice]})" for number, choice in enumerate(candidates))
    edge = r"\b" if language == "en" else r"(?!\d)"
    match = re.search(rf"(?<!\w)(?:{either}){edge}", text.lower())
    return candidates[int(match.lastgroup[1:])] if match else ""
