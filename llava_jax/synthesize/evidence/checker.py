"""Comparison of claims with the captions and boxes of an image."""

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.vocabulary import NUMBERS, Vocabulary, plural
from llava_jax.synthesize.evidence.claims import Claim
from llava_jax.synthesize.evidence.reading import DETERMINERS, Mention, read

SLACK = 0.05
"""Distance that a centre may be on the wrong side, as a fraction of the image, before a position is wrong."""
SIMILAR_COLOURS = [set(group.split()) for group in (
    "grey silver white", "grey black", "brown tan beige orange", "gold golden yellow", "blue turquoise teal cyan",
    "green teal", "purple violet pink", "red maroon", "red orange", "beige white tan",
)]  # fmt: skip


class EvidenceChecker:
    """Compares claims with one image.

    A call returns None if the claim cannot be checked, () if it holds, and otherwise the kind of the contradiction, the
    claim, and what the image shows instead.
    """

    def __init__(self, context: Context, vocabulary: Vocabulary):
        self.boxes = context.boxes
        self.coloured = vocabulary.coloured
        self.caption_mentions = [mention for caption in context.captions
                     for mention in read(caption, vocabulary, caption=True).mentions]

    def __call__(self, claim: Claim) -> tuple[str, str, str] | tuple[()] | None:
        against = getattr(self, f"_{claim.kind}")(claim)
        if not against:
            return None if against is None else ()
        return "object" if claim.kind == "absent" else claim.kind, claim.text, against

    def _object(self, claim: Claim) -> str | None:
        mention = claim.a
        if mention.meaning.loose:
            return None
        if self._shown(mention, colours=False) or self._named(mention):
            return ""
        return f"no {_name(mention)} has a box or is in the captions"

    def _absent(self, claim: Claim) -> str | None:
        if claim.a.meaning.loose or not claim.a.meaning.exact:
            return None
        shown = self._shown(claim.a)
        return f"there {_are(len(shown), claim.a)}" if shown else ""

    def _count(self, claim: Claim) -> str | None:
        """Accepts a caption's number as well as that of the boxes, because small or hidden objects have no box."""
        mention, (number,) = claim.a, claim.values
        meaning = mention.meaning
        shown = self._shown(mention)
        if meaning.loose or any(box.crowd for box in shown) or (len(meaning.categories) > 1 and not meaning.exact):
            return None
        if not shown and (not self.coloured or number):
            return None  # a matter of _object
        named = () if self.coloured else self._named(mention)
        counts = [len(shown), *(other.number for other in named if other.number is not None)]
        colour_counts = not mention.colours or meaning.categories <= self.coloured
        total = claim.total and meaning.exact and colour_counts
        if min(counts) <= number <= max(counts) or (number < len(shown) and not total):
            return ""
        return f"there {_are(len(shown), mention)}"

    def _attribute(self, claim: Claim) -> str | None:
        mention, claimed = claim.a, set(claim.values)
        if mention.meaning.categories <= self.coloured:
            shown = self._shown(mention, colours=False)
            has = {box.category.partition(" ")[0] for box in shown}
            if not shown or (mention.colours and mention.colours != claim.values and not self._shown(mention)):
                return None
            if claim.values != mention.colours and mention.colours:  # "the red circle is blue"
                has = set(mention.colours)
        else:
            shown = self._shown(mention)
            has = {colour for other in self._named(mention) for colour in other.colours}
            if len(shown) > 1 or not has:
                return None
            has |= {colour for group in SIMILAR_COLOURS if group & has for colour in group}
        if claimed & has:
            return ""
        return f"its colour is {' or '.join(sorted(has))}"

    def _position(self, claim: Claim) -> str | None:
        shown = [box for box in self._shown(claim.a) if not box.crowd]
        if not shown or len(shown) < len(self._shown(claim.a)):
            return None
        slack = SLACK if len(claim.values) == 1 else 0  # who names a corner has looked twice
        right = [box for box in shown if all(_is_at(box, value, slack) for value in claim.values)]
        if claim.negated:
            return "it is there" if len(right) == len(shown) and all(map(_small, shown)) else ""
        return "" if right else f"it is {_where(shown[0])}"

    def _relation(self, claim: Claim) -> str | None:
        ones, others = self._shown(claim.a), self._shown(claim.b)
        pairs = [(a, b) for a in ones for b in others if a is not b]
        if not pairs or any(box.crowd for pair in pairs for box in pair):
            return None
        right = [pair for pair in pairs if all(_is_beside(*pair, value, SLACK) for value in claim.values)]
        if claim.negated:
            clear = all(_is_beside(*pair, value, -SLACK) for pair in pairs for value in claim.values)
            return "it is so" if clear else ""
        (a, b), *_ = pairs
        return "" if right else f"the {_name(claim.a)} is {_where(a)}, the {_name(claim.b)} {_where(b)}"

    def _shown(self, mention: Mention, colours: bool = True) -> list[Box]:
        boxes = [box for box in self.boxes if box.category in mention.meaning.categories]
        if colours and mention.colours and mention.meaning.categories <= self.coloured:
            boxes = [box for box in boxes if box.category.partition(" ")[0] in mention.colours]
        return boxes

    def _named(self, mention: Mention) -> list[Mention]:
        """Returns mentions in captions that can mean the same object.

        For coloured shapes the boxes suffice. "animals" supports a dog only if no animal has a box.
        """
        categories, found = mention.meaning.categories, []
        for other in self.caption_mentions if not categories <= self.coloured else ():
            if other.meaning.categories <= categories or (
                other.meaning.categories & categories and not self._shown(other)
            ):
                found.append(other)
        return found


def _is_at(box: Box, value: str, slack: float) -> bool:
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    if value in ("left", "right"):
        return box.x2 - box.x1 > 0.6 or (x < 0.5 + slack if value == "left" else x > 0.5 - slack)
    if value in ("above", "below"):
        return box.y2 - box.y1 > 0.6 or (y < 0.5 + slack if value == "above" else y > 0.5 - slack)
    return 0.2 < x < 0.8 and 0.2 < y < 0.8


def _is_beside(a: Box, b: Box, value: str, slack: float) -> bool:
    """Whether the centre of `a` is left of, right of, above or below that of `b`."""
    across = (b.x1 + b.x2 - a.x1 - a.x2) / 2
    down = (b.y1 + b.y2 - a.y1 - a.y2) / 2
    return {"left": across, "right": -across, "above": down, "below": -down}[value] > -slack


def _small(box: Box) -> bool:
    return box.x2 - box.x1 < 0.4 and box.y2 - box.y1 < 0.4


def _where(box: Box) -> str:
    return f"at {(box.x1 + box.x2) / 2:.0%} across and {(box.y1 + box.y2) / 2:.0%} down"


def _name(mention: Mention) -> str:
    """Returns the name without determiners and numbers."""
    words = mention.text.split(" ")
    while len(words) > 1 and words[0] in (*DETERMINERS, *NUMBERS):
        del words[0]
    return " ".join(words)


def _are(number: int, mention: Mention) -> str:
    categories = sorted(mention.meaning.categories)
    noun = categories[0] if len(categories) == 1 else "object"
    if mention.colours and len(categories) > 1:
        noun = f"{mention.colours[0]} {noun}"
    return f"is one {noun}" if number == 1 else f"are {number} {plural(noun)}"
