"""Answers as no one would write them on purpose."""

import random

PIECES = (
    "yes", "Yes", "YES", "no", "No", "NO", "not", "Not", "none", "nothing", "know", "a", "An", "the", "one", "Two",
    "ten", "A", "B", "C", "D", "E", "A.", "(B)", "The answer is C.", "dont", "don't", "Im", "let's", "ow's'at",
    "somebody'd", "bus's", "1,000", "1,,2", "3.5", ".5", "5.", "...", "U.S.", "u.s.a.", "'s", "x.y", ",", "?", "!",
    "-", "(x)", ";", "/", '"', "`", "@", "_", "\\", "{", "}", "=1+1", "<", ">", "\n", "\t", "\r", "\x0b", "\x00",
    "\x85", "\u2028", "\u00a0", "\u3000", "\ufeff", "\u200b", "é", "İ", "ß", "ΑΣ", "中文", "한국어", "😀", "٣", "٣.٤",
    "१,२", "½", "nan", "None", "null", "." * 40, "x" * 300, "", " ", "  ",
)


def odd_texts(count: int, seed: int = 0, usual: tuple[str, ...] = ()) -> list[str]:
    """`count` texts: of `usual` ones, of the pieces above with or without blanks between, and of any characters."""
    draw, texts = random.Random(seed), []
    for number in range(count):
        if usual and number % 2:
            texts.append(draw.choice(usual))
        elif number % 3:
            length = draw.choice((0, 1, 1, 2, 3, 5, 12))
            texts.append("".join(draw.choice(PIECES) + draw.choice(("", "", " ")) for _ in range(length)))
        else:
            codes = (draw.choice((draw.randrange(32, 127), draw.randrange(0xD800))) for _ in range(draw.randrange(12)))
            texts.append("".join(map(chr, codes)))
    return texts
