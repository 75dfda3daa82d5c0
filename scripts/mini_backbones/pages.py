"""Text of the language backbone: scenes described in several forms, and what follows from a description."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene, SceneObject
from llava_jax.synthesize import rules
from mini_backbones.common import BOS, EOS, Encoder, annotate

OTHER_WEIGHT = 0.05
"""Weight of tokens that are no answer, caption or looked-up word: a question, a description."""
LONG_WEIGHT, REASON_WEIGHT, FACT_WEIGHT = 0.3, 1.0, 2.0
"""Weights of captions and long answers, of which many wordings are right: of most words; of the words of
reasoning, any of which may decide a conclusion; and of words that say a size, colour, shape, place or number."""
FORMS = {"grid": 0.6, "list": 0.1, "text": 0.15, "sentences": 0.15}
"""Forms of descriptions, with their share. `grid`: one sum of words for each patch of a picture. `text`: "top-left
small red circle, centre ...". `list`: the same with neighbouring words summed. `sentences`: as the teacher writes, or
plain: "A small red circle is at the top-left." Scores have the form `plain`, of such sentences alone."""
LOOKUP_FORMS = {"1": 0.0, "grid": 0.15, "2": 0.25, "text": 0.35, "sentences": 0.5}
"""Forms of the lists to look up in, and the part of this phase after which they join: at first one sum of words for an
object, then a picture's grid, then an object's words in two groups, all apart, in sentences. Sentences take longest."""


@dataclass(frozen=True)
class Mix:
    """Says which shares of a text are made of what.

    Attributes:
      lookup: Share of pages with a list to look up in.
      in_order: Share of these that are restated in reading order.
      caption: Share of pages with a caption. All others have questions.
      crowd: Share of question pages about more objects than a picture holds: guessing among them pays little.
      korean: Share of question pages in Korean.
      long: Share of question pages with long answers.
      kinds: Kinds of questions about a picture's objects, as often as they stand here.
      chat: Whether answers end exactly as in stage 2, "answer </s>".
      forms: Forms of descriptions, with their share.
      long_answers: Number of long answers in a page that has them.
      word_weight: Weight of the words of long answers that say no fact, but for reasoning.
      short_forms: Forms of descriptions that have short answers alone, half of them about more objects.
      reasoning_pages: Share of the pages with long answers that have one short answer and reasoning alone. A page of
        three short and three long answers is longer than a row, and there are some twenty kinds of conclusions.
      compared: Share of the conclusions on these pages drawn from `COMPARISONS`, the others from all kinds.
    """

    lookup: float
    in_order: float
    caption: float
    crowd: float
    korean: float
    long: float
    kinds: tuple[str, ...] = rules.KINDS
    chat: bool = False
    forms: dict[str, float] = field(default_factory=lambda: FORMS)
    long_answers: int = 1
    word_weight: float = LONG_WEIGHT
    short_forms: tuple[str, ...] = ()
    reasoning_pages: float = 0.6
    compared: float = 0.0


EARLY = Mix(lookup=0.15, in_order=0, caption=0.06, crowd=0.25, korean=0.3, long=0.25)
# What is learned last comes often.
LATE = Mix(lookup=0.03, in_order=0.4, caption=0.04, crowd=0.15, korean=0.45, long=0.3,
           kinds=(*rules.KINDS, "count", "count", "count", "existence", "existence", "colour"))
TUNING = replace(LATE, lookup=0, caption=0, crowd=0.1, korean=0.3, long=0.95, chat=True, long_answers=3,
                 word_weight=1.0, forms={"grid": 0.65, "list": 0.05, "text": 0.1, "sentences": 0.2},
                 short_forms=("sentences",))  # looking up in the teacher's sentences is learned last
COMPARING = replace(TUNING, reasoning_pages=0.85, compared=0.75)
CROWD_KINDS = ("position", "position", "relation", "relation", "relation", "between", "order", "colour", "shape")
"""Kinds of questions about many objects, as often as they stand here."""
LONG_KINDS = {"caption": 1, "description": 4, "reasoning": 2, "sentences": 1}
"""Kinds of long answers on pages that are not of reasoning alone, as often as their numbers say."""
COMPARISONS = (
    *2 * ("covered", "open", "way", "share_nothing", "look", "nearest"), "share_colour", "share_shape", "enough",
    "too_few", "left_heavy", "right_heavy", "balance", "sort", "corners", "odd_colour", "odd_noun",
)
"""Conclusions that compare what was read, which are learned last: as often as they stand here."""
TEACHERS = {language: rules.RulesTeacher(language) for language in ("en", "ko")}


class Page:
    """A sample as it grows: words to sum per position, and the label (empty, or the kind of text) and weight that each
    position carries.
    """

    def __init__(self, encode: Encoder):
        self.encode = encode
        self.words: list[tuple[int, ...]] = [(BOS,)]
        self.labels: list[str] = [""]
        self.weights: list[float] = [0.0]

    def add(self, ids: Sequence[int], label: str = "") -> None:
        self.words += [(i,) for i in ids]
        self.labels += [label] * len(ids)
        self.weights += [1.0 if label else OTHER_WEIGHT] * len(ids)

    def add_long(self, ids: Sequence[int], label: str, weight: float = LONG_WEIGHT) -> None:
        """Adds a text of which many wordings are right, so that what says a fact weighs more."""
        self.add(ids, label)
        weight = REASON_WEIGHT if label == "reasoning" else weight
        self.weights[-len(ids) :] = [FACT_WEIGHT if i in self.encode.facts else weight for i in ids]

    def add_sums(self, sums: list[tuple[str, ...]]) -> None:
        self.words += [tuple(map(self.encode.word, words)) for words in sums]
        self.labels += [""] * len(sums)
        self.weights += [0.0 if len(words) > 1 else OTHER_WEIGHT for words in sums]  # no sum can be predicted


def describe(page: Page, scene: Scene, rng: random.Random, form: str, language: str = "en",
             sized: bool = True) -> None:
    things = scene.objects
    order = rng.sample(things, len(things)) if rng.random() < 0.5 else things
    if form == "grid":
        by_position = {thing.position: thing for thing in things}
        for position in (scenes.POSITIONS[i // 2 * 3 + j // 2] for i in range(6) for j in range(6)):
            thing = by_position.get(position)
            page.add_sums([(position, *name_words(thing, True)) if thing else (position,)])
    elif form == "sentences" and (language == "ko" or (sized and len(things) < 5 and rng.random() < 0.5)):
        page.add(page.encode(TEACHERS[language].description(scene, rng).answer))
    elif form in ("sentences", "plain"):
        named = ((scenes.with_article(" ".join(name_words(thing, sized))), thing.position) for thing in order)
        page.add([i for name, place in named for i in page.encode(f"{name.capitalize()} is at the {place}.")])
    else:
        pieces = {"text": 4, "list": rng.choice((1, 2, 3))}.get(form) or int(form)
        place_first = rng.random() < 0.5
        for number, thing in enumerate(order):
            words = list(name_words(thing, sized))
            words = [thing.position, *words] if place_first else [*words, thing.position]
            if number and pieces > 1:
                page.add([page.encode.comma])
            page.add_sums(split(words, min(pieces, len(words)), rng))


def split(words: list[str], pieces: int, rng: random.Random) -> list[tuple[str, ...]]:
    """Cuts words into `pieces` groups of neighbours."""
    cuts = [0, *sorted(rng.sample(range(1, len(words)), pieces - 1)), len(words)]
    return [tuple(words[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def name_words(thing: SceneObject, sized: bool) -> tuple[str, ...]:
    return (thing.name.size, thing.name.colour, thing.name.noun)[not sized :]


def restate(page: Page, things: list[SceneObject], rng: random.Random, sized: bool, short: bool) -> None:
    """All objects in a new order: the place and then what is there, or what it is and then its place.

    `short`: what it is may be its colour or its shape alone, where that is unique.
    """
    nouns, colours = (Counter(getattr(t.name, a) for t in things) for a in ("noun", "colour"))
    for thing in rng.sample(things, len(things)):
        page.add([page.encode.comma])
        if rng.random() < 0.4:
            page.add(map_words(page, [thing.position]))
            page.add(map_words(page, name_words(thing, sized)), "place to content")
            continue
        names = [name_words(thing, sized), *2 * [(thing.name.colour, thing.name.noun)]]
        names += [(thing.name.noun,)] * (2 * (short and nouns[thing.name.noun] == 1))
        names += [(thing.name.colour,)] * (2 * (short and colours[thing.name.colour] == 1))
        page.add(map_words(page, rng.choice(names)))
        page.add(map_words(page, [thing.position]), "content to place")


def restate_in_order(page: Page, things: list[SceneObject], rng: random.Random, sized: bool) -> None:
    """Names all objects in reading order. Both place and content are predicted, as in a description."""
    place_first = rng.random() < 0.5
    for thing in sorted(things, key=lambda thing: scenes.POSITIONS.index(thing.position)):
        page.add([page.encode.comma])
        name = name_words(thing, sized)
        page.add(map_words(page, [thing.position, *name] if place_first else [*name, thing.position]), "in order")


def map_words(page: Page, words: Iterable[str]) -> list[int]:
    return [page.encode.word(word) for word in words]


def crowd(rng: random.Random, most: int = 9) -> Scene:
    """More objects than a picture holds, of different names."""
    cells = rng.sample(range(9), rng.choice([n for n in (3, 5, 7, 9) if n <= most]))
    objects = []
    for cell, pair in zip(cells, rng.sample(scenes.PAIRS, len(cells)), strict=True):
        size = rng.choice(scenes.SIZES)
        x, y = (scenes.CELL * (i + 0.5) for i in (cell % 3, cell // 3))
        objects.append(scenes.Object(*pair, size, cell, x, y, scenes.RADII[size][0]))
    return Scene(Context("", "", (), tuple(thing.to_box() for thing in objects)))


def draw_form(rng: random.Random, forms: dict[str, float]) -> str:
    return rng.choices(list(forms), list(forms.values()))[0]


def lookup_page(encode: Encoder, rng: random.Random, progress: float = 1.0, in_order: float = 0.0) -> Page:
    """A list and its restatement; of the forms, those that `progress` (0..1) has reached, the last one most often."""
    reached = [form for form, begin in LOOKUP_FORMS.items() if progress >= begin]
    form = rng.choice((*reached, *reached[-1:]))
    sized = form == "grid" or rng.random() < 0.7
    page, scene = Page(encode), crowd(rng, 7 if form == "sentences" else 9)
    describe(page, scene, rng, form, sized=sized)
    if in_order and rng.random() < in_order:
        restate_in_order(page, scene.objects, rng, sized)
    else:
        restate(page, scene.objects, rng, sized, short=progress > 0.15)
    return page


def question_page(encode: Encoder, rng: random.Random, form: str, language: str = "en", crowded: bool = False,
                  long: int = 0, mix: Mix = EARLY) -> Page:
    """A description, then questions and answers. Unless it is about a crowd, long ones are drawn `long` times. Of a
    mix with `chat` they are exactly in the template of stage 2, "answer </s>".
    """
    page, teacher, context = Page(encode), TEACHERS[language], annotate(scenes.sample(rng, scenes.PAIRS))
    scene = crowd(rng, 5 if form == "sentences" else 9) if crowded else Scene(context)
    if crowded:
        questions = teacher.conversation(scene, rng, 12, CROWD_KINDS)
    elif long:
        reasoning = rng.random() < mix.reasoning_pages
        questions = teacher.conversation(scene, rng, 1 if reasoning else 3, mix.kinds)
        kinds, compared = ({"reasoning": 1}, mix.compared) if reasoning else (LONG_KINDS, 0)
        for _ in range(long):
            questions += long_answers(teacher, context, scene, rng, kinds, compared)
        rng.shuffle(questions)
    else:
        questions = teacher.conversation(scene, rng, rng.choice((4, 12)), mix.kinds)
    for i, question in enumerate(questions):
        if i == 0:
            page.add(encode("[INST] "))
            describe(page, scene, rng, form, language)
        page.add(encode(f"\n{question.question} [/INST]" if i == 0 else f"[INST] {question.question} [/INST]"))
        add = page.add if question.kind in rules.KINDS else partial(page.add_long, weight=mix.word_weight)
        add([*encode(question.answer), *([encode.space, EOS] if mix.chat else [EOS])], question.kind)
    return page


def long_answers(teacher: rules.RulesTeacher, context: Context, scene: Scene, rng: random.Random,
                 kinds: dict[str, int], compared: float) -> list[rules.QuestionAnswer]:
    match rng.choices(list(kinds), list(kinds.values()))[0]:
        case "caption" if teacher.language == "en":
            return [teacher.caption(context, rng)]
        case "reasoning":
            keys = COMPARISONS if compared and rng.random() < compared else ()
            return [answer] if (answer := teacher.reasoning(scene, rng, keys=keys)) else []
        case "sentences":
            return teacher.sentences(scene, rng, 3)
    return [teacher.description(scene, rng)]


def domain_page(encode: Encoder, rng: random.Random, mix: Mix = EARLY) -> Page:
    kind = rng.random()
    if kind < mix.lookup:
        return lookup_page(encode, rng, in_order=mix.in_order)
    form = draw_form(rng, mix.forms)
    if kind < mix.lookup + mix.caption:
        context = annotate(scenes.sample(rng, scenes.PAIRS))
        page = Page(encode)
        describe(page, Scene(context), rng, form)
        page.add_long(encode(rng.choice(context.captions) + "\n"), "caption")
        return page
    language = "ko" if rng.random() < mix.korean else "en"
    short = form in mix.short_forms
    crowded = rng.random() < (0.5 if short else mix.crowd)
    long = mix.long_answers if rng.random() < mix.long and not short else 0
    return question_page(encode, rng, form, language, crowded, long, mix)


def pack(pages: Callable[[], Page], rows: int, length: int) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Rows filled with pages, the last one of each cut: words [B, T, 4] (-1: none), positions, segments,
    weights; and the labels.
    """
    words = np.full((rows, length, 4), -1, np.int32)
    positions, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    weights, labels = np.zeros((rows, length), np.float32), [[""] * length for _ in range(rows)]
    for b in range(rows):
        begin, number = 0, 0
        while begin < length - 24:
            page, number = pages(), number + 1
            count = min(len(page.words), length - begin)
            for t, ids in enumerate(page.words[:count], begin):
                words[b, t, : len(ids)] = ids
            end = begin + count
            weights[b, begin:end], labels[b][begin:end] = page.weights[:count], page.labels[:count]
            positions[b, begin:end], segments[b, begin:end] = range(count), number
            begin = end
    return {"words": words, "positions": positions, "segments": segments, "weights": weights}, labels
