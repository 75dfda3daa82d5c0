"""The rules teacher's Korean: particles by the letters themselves, and what it says against the boxes."""

import random
import re
import unicodedata
from collections import Counter

import pytest
from drawn_scenes import shapes
from korean_reader import (
    COLOUR,
    COLOURS,
    HALVES,
    NAME,
    NOUNS,
    NUM,
    NUMBERS,
    PLACE,
    SIDE,
    claims,
    find,
    form,
    is_a,
    is_at,
    is_beside,
    read,
)
from rules_reader import in_half

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene
from llava_jax.errors import UserError
from llava_jax.synthesize.evidence import COCO
from llava_jax.synthesize.rules import RulesTeacher

KINDS = ("conversation", "detail_description", "complex_reasoning")
COUNTERS = {"person": "명", "dog": "마리", "bus": "대"}
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


@pytest.mark.parametrize("make", [shapes, things])
def test_descriptions_hold(make):
    seen, sentences = Counter(), 0
    for kind, text, context in replies(make, 400):
        if kind == "detail_description":
            for sentence in re.split(r"(?<=\.) ", text):
                sentences += 1
                for what, holds in claims(sentence, context.boxes):
                    assert holds, (what, sentence, context.boxes)
                    seen[what] += 1
    assert seen.total() > 0.6 * sentences, (seen, sentences)
    assert min(seen[what] for what in ("count", "side", "place", "size")) > 3, seen


def test_short_answers_and_conclusions_hold():
    seen = Counter()
    for kind, text, context in replies(shapes, 300):
        boxes = context.boxes
        for asked, answer in re.findall(r"Question:\n(.*)\n===\nAnswer:\n(.*)", text):
            names = re.findall(NAME, asked)
            if kind == "conversation" and re.search(r"몇 개 있나요|몇 개인가요|몇 개 볼|수를 세어", asked):
                number = "" if re.search("없|않", answer) else re.search(NUM, answer)[0].split()[0]
                assert NUMBERS.index(number) == len(find(names[0] if names else "도형", boxes)), (asked, answer, boxes)
                seen["count"] += 1
            elif kind == "conversation" and (match := re.search(rf"({'|'.join(HALVES)}) 절반", asked)):
                [box] = find(names[0], boxes)
                assert answer.startswith("네, " if in_half(box, HALVES[match[1]]) else "아니요, ")
                told = re.findall(rf"({'|'.join(HALVES)}) 절반", answer)
                assert all(in_half(box, HALVES[half]) for half in told), (asked, answer, boxes)
                seen["half"] += 1
            elif match := re.search("(색|모양)이 같나요|같은 (색|모양)인가요", asked):
                words = {find(name, boxes)[0].category.split()["모양" in match[0]] for name in names}
                assert answer.startswith("네, " if len(words) == 1 else "아니요, "), (asked, answer, boxes)
                assert all(any(is_a(box, word) for word in re.findall(rf"{COLOUR}|{NAME}", answer)) for box in
                           (find(name, boxes)[0] for name in names)), (asked, answer, boxes)
                seen["same"] += 1
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
                *_, last = re.findall(NUM, answer)
                assert ("_ 한 두 세 네".split()).index(last.split()[0]) == len(boxes) - 1
                seen["remove"] += 1
            elif re.search("좌우로|거울", asked):
                box, place = find(names[0], boxes)[0], re.findall(PLACE, answer)[-1]
                assert is_at(Box(box.category, 1 - box.x2, box.y1, 1 - box.x1, box.y2), place), (asked, answer, box)
                seen["mirror"] += 1
    assert len(seen) == 8 and min(seen.values()) > 10, seen


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


def test_more_than_160_forms_of_each_kind():
    forms = {kind: set() for kind in KINDS}
    for kind, text, _ in replies(shapes, 800):
        forms[kind].update(map(form, re.split(r"(?<=[.?])\s+|\n", text)))
    own = forms["complex_reasoning"] - forms["detail_description"]
    sizes = len(forms["conversation"]), len(forms["detail_description"]), len(own)
    assert min(sizes) >= 160, sizes


def test_a_category_without_a_korean_name_is_an_error():
    context = Context("1", "", ("A picture",), (Box("wombat", 0.1, 0.1, 0.2, 0.2),))
    with pytest.raises(UserError, match="no Korean name for the category 'wombat'"):
        RulesTeacher("ko").answer("detail_description", context)
    with pytest.raises(UserError, match="no Korean name for the category 'wombat'"):
        RulesTeacher("ko").check(["dog", "red circle", "wombat"])
    RulesTeacher("ko").check([*COCO, "red circle"])
    RulesTeacher("en").check(["wombat"])


def test_read_tells_grammar_from_truth():
    """No sentence of the teacher is read as false, and most of a description are read."""
    rng, teacher, described = random.Random(7), RulesTeacher("ko"), []
    for number in range(150):
        context = shapes(number, rng)
        for one in (teacher.description(Scene(context), rng), teacher.reasoning(Scene(context), rng)):
            found = read(one.answer, context) if one else []
            assert all(parsed and holds is not False for _, parsed, holds in found), found
            described += [holds for *_, holds in found if one.kind == "description"]
    assert described.count(True) > 0.9 * len(described) > 600
    context = Context("", "", (), (Box("red circle", 0.1, 0.1, 0.3, 0.3), Box("blue square", 0.7, 0.1, 0.9, 0.3)))
    for text, parsed, holds in (
        ("도형이 두 개 있습니다.", True, True), ("도형이 세 개 있습니다.", True, False),
        ("빨간 원은 파란 정사각형의 왼쪽에 있습니다.", True, True),
        ("빨간 원은 파란 정사각형의 오른쪽에 있습니다.", True, False),
        ("초록색 고리는 초록색 고리의 왼쪽에 있습니다.", True, False), ("도형이 있습니다 두 개 있.", False, False),
        ("빨간 원은 파란 정사각형 사이에 있습니다.", False, False), ("가장 왼쪽에 도형이 있습니다.", True, False),
        ("빨간 원는 왼쪽 위에 있습니다.", False, False), ("빨간 원가 왼쪽 위에 있습니다.", False, False),
        ("빨간 원와 파란 정사각형가 보입니다.", False, False), ("빨간 원를 볼 수 있습니다.", False, False),
        ("빨간 원도 파란 정사각형도 원입니다.", True, False), ("원은 없습니다.", True, False),
        ("고리는 없습니다.", True, True), ("왼쪽 절반이 가려지므로 빨간 원은 보이지 않게 됩니다.", True, True),
        ("왼쪽 절반이 가려져도 빨간 원은 그대로 보입니다.", True, False),
        ("왼쪽 절반을 가려도 파란 정사각형은 사라지지 않습니다.", True, True),
        ("빨간 원도 파란 정사각형도 빨간색입니다.", True, False),
        ("빨간 원은 그림의 오른쪽 절반 안에 있습니다.", True, False), ("색은 노란색, 분홍색입니다.", True, False),
        ("빨간 원은 그림의 왼쪽 절반 안에 있습니다.", True, True), ("색은 빨간색, 파란색입니다.", True, True),
        ("도형 중 두 개는 노란색입니다.", True, False), ("도형 중 두 개는 빨간색입니다.", True, False),
        ("노란 고리만 색이 다릅니다.", True, False),
        ("따라서 답은 노란 고리입니다.", True, False), ("따라서 답은 빨간 원입니다.", True, None),
        ("왼쪽 위에는 아무것도 없습니다.", True, False), ("왼쪽 아래에는 아무것도 없습니다.", True, True),
        ("둘 다 노란색입니다.", True, False), ("그것이 전부입니다.", True, None), ("고리은 없습니다.", False, False),
        ("모양이 원로 같습니다.", False, False), ("모양이 고리으로 같습니다.", False, False),
    ):  # fmt: skip
        assert read(text, context) == [(text, parsed, holds)]
    context = Context("", "", (), (*context.boxes, Box("green circle", 0.1, 0.6, 0.5, 0.95)))
    for text, holds in (
        ("색은 빨간색, 파란색입니다.", False), ("색은 빨간색, 파란색, 초록색입니다.", True),
        ("도형은 왼쪽 위에 있습니다.", False),
        ("왼쪽 위에 작은 빨간 원 한 개가 있습니다.", True), ("오른쪽 위에 작은 빨간 원 한 개가 있습니다.", False),
        ("초록색 원만 모양이 다릅니다.", False), ("파란 정사각형만 모양이 다릅니다.", True),
        ("초록색 원은 빨간 원만큼 크지 않습니다.", False), ("빨간 원은 초록색 원만큼 크지 않습니다.", True),
        ("오른쪽으로 가장 멀리 있는 도형은 초록색 원입니다.", False),
        ("오른쪽으로 가장 멀리 있는 도형은 파란 정사각형입니다.", True),
        ("파란 정사각형이 초록색 원보다 빨간 원에 더 가깝습니다.", False),
    ):  # fmt: skip
        assert read(text, context) == [(text, True, holds)]
