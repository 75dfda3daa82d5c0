"""English words of the rules teacher, for the fields of the phrases in english.txt."""

import re
from typing import Any

from llava_jax.annotations.scene import Count, Name, Position, Side
from llava_jax.annotations.vocabulary import NUMBERS, plural

CONSTANTS = {"left": "[to the left of|left of]"}
PLACES = {
    "top-left": "[at the top-left|in the upper left]",
    "top": "[at the top|in the top middle]",
    "top-right": "[at the top-right|in the upper right]",
    "left": "[at the left|in the middle left]",
    "centre": "[at the centre|in the centre|in the middle]",
    "right": "[at the right|in the middle right]",
    "bottom-left": "[at the bottom-left|in the lower left]",
    "bottom": "[at the bottom|in the bottom middle]",
    "bottom-right": "[at the bottom-right|in the lower right]",
    "left side": "[on the left side|on the left-hand side]",
    "right side": "[on the right side|on the right-hand side]",
    "upper part": "[in the upper part|in the upper area]",
    "lower part": "[in the lower part|in the lower area]",
}
_LEVEL = {"left": "[to the left of|left of]", "right": "[to the right of|right of]", "above": "[above|higher up than]",
          "below": "[below|lower down than]"}  # fmt: skip
_DIAGONAL = {"above": "above and", "below": "below and"}
_GO = {"left": "to the left", "right": "to the right", "above": "upwards", "below": "downwards"}
_SEEN = {"left": "to the left", "right": "to the right", "above": "higher up", "below": "lower down"}
_FAR = {"left": "to the left", "right": "to the right", "above": "up", "below": "down"}
_HALF = {"left": "left", "right": "right", "top": "upper", "bottom": "lower"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NOUNS = {"tv": "TV", "scissors": "pair of scissors", "skis": "pair of skis", "broccoli": "piece of broccoli"}


def fields(key: str, value: Any) -> dict[str, str]:
    """Returns the fields of a value: {n} the number, {n_of} "two dogs", {n_is} the verb, and so on.

    Alternatives such as [a|b] stay open.
    """
    match value:
        case Name():
            name = _name(value)
            return {key: name, f"{key}s": plural(name), f"{key}_colour": value.colour}
        case Count():
            number, name = _NUMBERS[value.number], _name(value.name)
            named = name if value.number == 1 else plural(name)
            return {key: number if value.number else "none", f"{key}_of": f"{number} {named}",
                    f"{key}_a": f"a/an {name}", f"{key}_is": "is" if value.number == 1 else "are",
                    f"{key}_number": NUMBERS[value.number], f"{key}_name": name,
                    f"{key}_names": plural(name), f"{key}_colour": value.name.colour,
                    f"{key}_all": "both" if value.number == 2 else f"all {number}",
                    f"{key}_more": f"{number} more {named}"}  # fmt: skip
        case Position():
            return {key: PLACES[value.word], f"{key}_short": value.word}
        case Side():
            return _side(key, value.word)
        case (Count(), *_):
            return {key: _join([f"a/an {_name(c.name)}" if c.number == 1 else fields("n", c)["n_of"] for c in value]),
                    f"{key}_is": "is" if value[0].number == 1 else "are"}  # fmt: skip
        case (Position(), *_):
            return {key: _join([f"one {PLACES[place.word]}" for place in value]),
                    "corners": _join([f"at the {place.word}" for place in value], "or")}  # fmt: skip
        case (Name(), *_):
            return {key: _join([name.colour for name in value]), f"{key}_nouns": " ".join(name.noun for name in value)}
    return {key: value.strip() if value.strip().endswith((".", "!", "?")) else value.strip() + "."}


def finish(text: str) -> str:
    """Fixes articles by the next word, and gives every sentence a capital."""
    text = re.sub(r"\b([Aa])/an (\w)", lambda m: m[1] + "n" * (m[2] in "aeiou") + " " + m[2], text)
    return re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda match: match[0].upper(), text)


def _name(name: Name) -> str:
    at = f"at the {name.at}" if name.at else ""
    return " ".join(word for word in (name.size, name.colour, _NOUNS.get(name.noun, name.noun), at) if word)


def _side(key: str, word: str) -> dict[str, str]:
    if word in _HALF and word not in _LEVEL:
        return {f"{key}_half": _HALF[word]}
    down, _, across = word.partition("-")
    if across:
        return {key: f"{_DIAGONAL[down]} to the {across} of", f"{key}_way": f"{_SEEN[down]} and {_SEEN[across]}",
                f"{key}_go": f"{_GO[down]} and {_GO[across]}"}  # fmt: skip
    return {key: _LEVEL[word], f"{key}_way": _SEEN[word], f"{key}_go": _GO[word], f"{key}_far": _FAR[word],
            f"{key}_short": word, f"{key}_half": _HALF.get(word, "")}  # fmt: skip


def _join(parts: list[str], last: str = "and") -> str:
    return f"{', '.join(parts[:-1])} {last} {parts[-1]}" if len(parts) > 1 else parts[0]
