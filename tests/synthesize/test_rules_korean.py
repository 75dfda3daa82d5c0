"""The rules teacher's Korean: particles by the letters themselves, and what it says against the boxes."""

import random
import re
import unicodedata
from collections import Counter

import pytest
from drawn_scenes import shapes

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.errors import UserError
from llava_jax.synthesize.evidence import COCO
from llava_jax.synthesize.rules import RulesTeacher

KINDS = ("conversation", "detail_description", "complex_reasoning")
COLOURS = {"빨간": "red", "주황색": "orange", "노란": "yellow", "초록색": "green", "청록색": "cyan", "파란": "blue",
           "보라색": "purple", "분홍색": "pink"}  # fmt: skip
COLOUR_NOUNS = {"빨간색": "red", "주황색": "orange", "노란색": "yellow", "초록색": "green", "청록색": "cyan",
                "파란색": "blue", "보라색": "purple", "분홍색": "pink"}  # fmt: skip
NOUNS = {"원": "circle", "정사각형": "square", "삼각형": "triangle", "십자": "cross", "고리": "ring", "사람": "person",
         "개": "dog", "버스": "bus", "우산": "umbrella", "칼": "knife",
         "의자": "chair", "신호등": "traffic light"}  # fmt: skip
COUNTERS = {"person": "명", "dog": "마리", "bus": "대"}
NUMBERS = ["", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열"]
NUM = rf"(?:{'|'.join(NUMBERS[1:])}) (?:개|명|마리|대)(?![가-힣]*게)"
NAME = (rf"(?:(?:큰|작은) )?(?:(?:{'|'.join(COLOURS)}) )?(?<![가-힣])(?:{'|'.join([*NOUNS, '도형'])})"
        r"(?=(?:은|는|이|가|을|를|과|와|도|의|만|보다|마다|인|에서|입니다|,| |이고|$))")  # fmt: skip
PLACE = (r"(?:왼쪽|오른쪽) (?:위|아래)(?![가-힣]*쪽)|(?:위쪽|아래쪽|왼쪽|오른쪽) (?:가운데|부분)|한가운데")
SIDE = r"(?:왼쪽|오른쪽)(?: (?:위|아래))?|위쪽|아래쪽"


def things(number, rng):
    boxes = []
    for _ in range(rng.randint(1, 7)):
        width, height = rng.uniform(0.03, 0.6), rng.uniform(0.03, 0.6)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        boxes.append(Box(rng.choice([*NOUNS.values()][5:]), x, y, x + width, y + height))
    return Context(f"t{number}", "", ("A picture",), tuple(boxes))


def replies(make, number):
    rng, teacher = random.Random(0), RulesTeacher("ko")
    for index in range(number):
        context = make(index, rng)
        for kind in KINDS:
            yield kind, teacher.answer(kind, context), context


def find(name, boxes):
    *words, noun = name.split(" ")
    found = []
    for box in boxes:
        large = max(box.x2 - box.x1, box.y2 - box.y1) > 0.25
        colour, _, kind = box.category.partition(" ") if box.category != "traffic light" else ("", "", box.category)
        fits = noun == "도형" or NOUNS[noun] in (kind, box.category)
        fits &= all({"큰": large, "작은": not large}.get(word, COLOURS.get(word) == colour) for word in words)
        if fits:
            found.append(box)
    return found


def is_at(box, place):
    ranges = {"left": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "right": (2 / 3, 1)}
    across = "left" if "왼쪽" in place else "right" if "오른쪽" in place else ""
    down = "left" if "위" in place else "right" if "아래" in place else ""
    if "부분" not in place:
        across, down = across or "middle", down or "middle"
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return all(not word or ranges[word][0] < value < ranges[word][1] for word, value in ((across, x), (down, y)))


def is_beside(a, b, side):
    checks = {"왼쪽": a.x1 < b.x1 and a.x2 < b.x2, "오른쪽": a.x1 > b.x1 and a.x2 > b.x2,
              "위": a.y1 < b.y1 and a.y2 < b.y2, "아래": a.y1 > b.y1 and a.y2 > b.y2}  # fmt: skip
    return all(checks[word] for word in re.findall("왼쪽|오른쪽|위|아래", side))


def claims(sentence, boxes):
    """(what, whether it holds) of every number, place, side and size that a description's sentence tells."""
    one = lambda name: find(name, boxes)[0]  # noqa: E731
    size = lambda box: (box.x2 - box.x1) * (box.y2 - box.y1)  # noqa: E731
    for name, number in re.findall(rf"(?<!인 )({NAME})(?:[은는이가도])? (?:모두 |단 )?({NUM})", sentence):
        yield "count", len(find(name, boxes)) == NUMBERS.index(number.split()[0])
    for name, number in re.findall(rf"({NAME})의 수는 ({NUM})", sentence):
        yield "count", len(find(name, boxes)) == NUMBERS.index(number.split()[0])
    if match := re.search(rf"({NAME})[은는이가] ({NAME})의 ({SIDE})에", sentence):
        yield "side", is_beside(one(match[1]), one(match[2]), match[3])
    elif match := re.search(rf"({NAME})의 ({SIDE})(?:에|에서|에는|을|를)(?: 있는 것은| 보면)? ({NAME})", sentence):
        yield "side", is_beside(one(match[3]), one(match[1]), match[2])
    elif match := re.search(rf"({NAME})(?:에서 볼 때|을 기준으로|를 기준으로) ({NAME})[은는] ({SIDE})에", sentence):
        yield "side", is_beside(one(match[2]), one(match[1]), match[3])
    elif match := re.search(rf"가장 ({SIDE})에", sentence):
        me = one(next(name for name in re.findall(NAME, sentence) if name != "도형"))
        yield "furthest", all(is_beside(me, box, match[1]) for box in boxes if box is not me)
    if "가장" not in sentence and len(set(names := re.findall(NAME, sentence))) == 1:
        places = re.findall(PLACE, sentence)
        found = find(names[0], boxes)
        if places and re.search("없|않", sentence):
            yield "empty", not any(is_at(box, places[0]) for box in boxes)
        elif len(places) > 1:
            yield "places", len(found) == len(places) and all(any(is_at(b, p) for b in found) for p in places)
        elif places:
            yield "place", all(is_at(box, places[0]) for box in found)
    for big, small in re.findall(rf"({NAME})[은는이가] ({NAME})보다 (?:더 )?(?:큽|커|그림을)", sentence):
        yield "size", size(one(big)) > 1.3 * size(one(small))
    for small, big in re.findall(rf"({NAME})[은는이가] ({NAME})보다 (?:더 )?작", sentence):
        yield "size", size(one(big)) > 1.3 * size(one(small))
    both = rf"({NAME})[과와] ({NAME})[은는의] .*?({'|'.join(COLOUR_NOUNS)})입니다"
    for first, other, colour in re.findall(both, sentence):
        yield "colour", all(one(name).category.startswith(COLOUR_NOUNS[colour]) for name in (first, other))
    if match := re.match(rf"(?:그림에 |도형 가운데 )?({NAME})[은는] (?:하나도 )?(?:없|보이지 않|찾을 수 없)", sentence):
        yield "missing", not find(match[1], boxes)


@pytest.mark.parametrize("make", [shapes, things])
def test_descriptions_hold(make):
    seen, sentences = Counter(), 0
    for kind, text, context in replies(make, 250):
        if kind == "detail_description":
            for sentence in re.split(r"(?<=\.) ", text):
                sentences += 1
                for what, holds in claims(sentence, context.boxes):
                    assert holds, (what, sentence, context.boxes)
                    seen[what] += 1
    assert seen.total() > 0.6 * sentences, (seen, sentences)
    assert min(seen[what] for what in ("count", "side", "place", "size")) > 12, seen


def test_short_answers_and_conclusions_hold():
    seen = Counter()
    for kind, text, context in replies(shapes, 300):
        boxes = context.boxes
        for asked, answer in re.findall(r"Question:\n(.*)\n===\nAnswer:\n(.*)", text):
            names = re.findall(NAME, asked)
            if kind == "conversation" and re.search(r"몇 개 있나요|몇 개인가요|몇 개 볼|수를 세어", asked):
                number = re.search(NUM, answer)[0].split()[0]
                assert NUMBERS.index(number) == len(find(names[0] if names else "도형", boxes)), (asked, answer, boxes)
                seen["count"] += 1
            elif kind == "conversation" and "어느" not in asked and re.fullmatch(
                rf".*({NAME})(?:이|가|을|를|도) ?(?:있나요|보이나요|찾을 수 있나요)\?", asked
            ):
                if len(names) == 1:
                    assert answer.startswith("네" if find(names[0], boxes) else "아니요"), (asked, answer, boxes)
                    seen["exists"] += 1
            elif match := re.fullmatch(rf"({NAME})[이가] ({NAME})의 ({SIDE})에 있나요\?", asked):
                a, b = (find(name, boxes)[0] for name in names)
                assert answer.startswith("네" if is_beside(a, b, match[3]) else "아니요"), (asked, answer, boxes)
                seen["side"] += 1
            elif re.search("무슨 색인가요|의 색은 무엇", asked):
                said = next(word for word in COLOURS if word in answer)
                assert all(box.category.startswith(COLOURS[said]) for box in find(names[0], boxes))
                seen["colour"] += 1
            elif re.search("(치우면|없다면|사라지면|가져가면) 도형", asked):
                *_, last = re.findall(rf"{NUM}|영 개", answer)
                assert ("영 한 두 세 네".split()).index(last.split()[0]) == len(boxes) - 1
                seen["remove"] += 1
            elif re.search("좌우로|거울", asked):
                box, place = find(names[0], boxes)[0], re.findall(PLACE, answer)[-1]
                assert is_at(Box(box.category, 1 - box.x2, box.y1, 1 - box.x1, box.y2), place), (asked, answer, box)
                seen["mirror"] += 1
    assert len(seen) == 6 and min(seen.values()) > 10, seen


def test_particles_follow_their_last_letter():
    """은, 이, 을, 과 and 으로 after a consonant, 는, 가, 를, 와 and 로 after a vowel (로 after ㄹ too)."""
    pairs = {"은": "는", "이": "가", "을": "를", "과": "와"}
    checked = Counter()
    for make in (shapes, things):
        for _, text, _ in replies(make, 300):
            assert "/" not in text and "{" not in text and "[" not in text
            for word, particle in re.findall(rf"({NAME})(은|는|이|가|을|를|과|와)(?= |$|,)", text):
                closed = len(unicodedata.normalize("NFD", word[-1])) == 3
                assert (particle in pairs) == closed, word + particle
                checked[particle] += 1
            for word, particle in re.findall(r"([가-힣])(으로|로) (?:가려면|같|가야|이어|다릅|서로)", text):
                letters = unicodedata.normalize("NFD", word)
                assert (particle == "으로") == (len(letters) == 3 and letters[2] != "ᆯ"), word + particle
                checked[particle + (letters[2:] == "ᆯ") * " after ㄹ"] += 1
    assert len(checked) == 11, checked


def test_counters_belong_to_their_nouns():
    for _, text, _ in replies(things, 300):
        for name, number in re.findall(rf"({NAME}) ({NUM})", text):
            assert number.split()[1] == COUNTERS.get(NOUNS[name], "개"), (name, number)


def test_more_than_two_hundred_forms_of_each_kind():
    forms = {kind: set() for kind in KINDS}
    for kind, text, _ in replies(shapes, 800):
        for sentence in re.split(r"(?<=[.?])\s+|\n", text):
            for pattern, mark in ((rf"({NAME})", "N"), (PLACE, "@"), (SIDE, "~"), (NUM, "#"),
                                  ("|".join(COLOUR_NOUNS), "C"), ("[은는]", "는"), ("[이가]", "가"), ("[을를]", "를"),
                                  ("[과와]", "와"), (r"(?:N #|C)(?:, (?:N #|C))+", "L")):  # fmt: skip
                sentence = re.sub(pattern, mark, sentence)
            forms[kind].add(sentence)
    own = forms["complex_reasoning"] - forms["detail_description"]
    sizes = len(forms["conversation"]), len(forms["detail_description"]), len(own)
    assert min(sizes) >= 200, sizes


def test_a_category_without_a_korean_name_is_an_error():
    context = Context("1", "", ("A picture",), (Box("wombat", 0.1, 0.1, 0.2, 0.2),))
    with pytest.raises(UserError, match="no Korean name for the category 'wombat'"):
        RulesTeacher("ko").answer("detail_description", context)
    with pytest.raises(UserError, match="no Korean name for the category 'wombat'"):
        RulesTeacher("ko").check(["dog", "red circle", "wombat"])
    RulesTeacher("ko").check([*COCO, "red circle"])
    RulesTeacher("en").check(["wombat"])
