"""The page of an evaluation, or of two side by side: figures, and questions with images, answers and scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.pages import page
from llava_jax.pages.thumbnails import Thumbnail, load_thumbnail

MAX_QUESTIONS, MAX_WRONG_QUESTIONS = 1000, 700
"""Number of questions on a page, and number of them that are not right if there are more."""

MAX_IMAGE_SIDE = 288


class ShownAnswer(NamedTuple):
    """An answer. `parsed` is the text that was scored, `score` is 0..1 or None."""

    name: str
    text: str
    parsed: str
    score: float | None

    @property
    def state(self) -> str:
        if self.score is None:
            return "not scored"
        return {1: "right", 0: "wrong"}.get(self.score, "partly right")


class QuestionCard(NamedTuple):
    """A question with its answers. Readers filter by `state` and `category`."""

    id: Any
    prompt: str
    category: str
    reference: str
    state: str
    answers: Sequence[ShownAnswer]
    images: Sequence[str | bytes]


def make_card(row: Mapping[str, Any], images: Sequence[str | bytes]) -> QuestionCard:
    """Makes the card of a row of items.jsonl."""
    answer = ShownAnswer("", row["text"], row["read"], row["score"])
    return QuestionCard(row["id"], row["prompt"], row["category"], row["reference"], answer.state, [answer], images)


def render_page(title: str, about: Mapping[str, str], table: Sequence[Sequence[str]], figures: Sequence[Sequence[str]],
                notes: Sequence[str], cards: Sequence[QuestionCard], root: str,
                good: Sequence[str] = ("right",)) -> str:
    """Renders the page.

    Args:
      about: Names and values of the run.
      table, figures: Rows of two tables, the head first. The page folds the second.
      root: Folder of the images. The page shows no image from elsewhere, whatever paths a file of questions has.
      good: States of which fewer cards are shown if there are too many.
    """
    chosen = choose_cards(cards, good)
    thumbnails: dict[str | bytes, Thumbnail] = {}
    for image in (image for card in chosen for image in card.images):
        if image not in thumbnails:
            thumbnails[image] = load_thumbnail(image, root, MAX_IMAGE_SIDE, min_side=MAX_IMAGE_SIDE)
    notes = list(notes)
    if len(chosen) < len(cards):
        notes.append(f"The page shows {len(chosen):,} of {len(cards):,} questions; items.jsonl has all.")
    counts = {name: Counter(getattr(card, name) for card in chosen) for name in ("state", "category")}
    return page.render(
        "evaluate/runner/results_page.html", title=title, about=about, main_table=table, figures=figures, notes=notes,
        cards=chosen, classes={image: f"p{number}" for number, image in enumerate(thumbnails)}, thumbnails=thumbnails,
        filters={name: sorted(found.items()) for name, found in counts.items() if len(found) > 1})


def choose_cards(cards: Sequence[QuestionCard], good: Sequence[str]) -> list[QuestionCard]:
    """Chooses at most MAX_QUESTIONS cards in their order, evenly spaced: first those that are not good."""
    if len(cards) <= MAX_QUESTIONS:
        return list(cards)
    bad_indices = [i for i, card in enumerate(cards) if card.state not in good]
    good_indices = [i for i, card in enumerate(cards) if card.state in good]
    bad_indices = _choose_evenly(bad_indices, max(MAX_QUESTIONS - len(good_indices), MAX_WRONG_QUESTIONS))
    good_indices = _choose_evenly(good_indices, MAX_QUESTIONS - len(bad_indices))
    return [cards[i] for i in sorted(bad_indices + good_indices)]


def _choose_evenly(indices: list[int], count: int) -> list[int]:
    return indices if len(indices) <= count else [indices[i * len(indices) // count] for i in range(count)]
