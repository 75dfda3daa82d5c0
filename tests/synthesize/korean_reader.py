"""Reads the rules teacher's Korean, knowing nothing of how it writes, and compares what it says with the boxes."""

import random
import re
from functools import cache

import rules_reader

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene
from llava_jax.synthesize.rules import RulesTeacher

COLOURS = {"빨간": "red", "주황색": "orange", "노란": "yellow", "초록색": "green", "청록색": "cyan", "파란": "blue",
           "보라색": "purple", "분홍색": "pink"}  # fmt: skip
COLOUR_NOUNS = {"빨간색": "red", "주황색": "orange", "노란색": "yellow", "초록색": "green", "청록색": "cyan",
                "파란색": "blue", "보라색": "purple", "분홍색": "pink"}  # fmt: skip
NOUNS = {"원": "circle", "정사각형": "square", "삼각형": "triangle", "십자": "cross", "고리": "ring", "사람": "person",
         "개": "dog", "버스": "bus", "우산": "umbrella", "칼": "knife",
         "의자": "chair", "신호등": "traffic light"}  # fmt: skip
NUMBERS = ["", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열"]
NUM = rf"(?:{'|'.join(NUMBERS[1:])}) (?:개|명|마리|대)(?![가-힣]*게)"
PLACE = (r"(?:왼쪽|오른쪽) (?:위|아래)(?![가-힣]*쪽)|(?:위쪽|아래쪽|왼쪽|오른쪽) (?:가운데|부분)|한가운데")
NAME = (rf"(?:(?:{PLACE})에 있는 )?(?:(?:큰|작은) )?(?:(?:{'|'.join(COLOURS)}) )?"
        rf"(?<![가-힣])(?:{'|'.join([*NOUNS, '도형'])})"
        r"(?=(?:은|는|이|가|을|를|과|와|도|의|만|보다|마다|만큼|까지|인|에|로|으로|입니다|,| |이고|$))")  # fmt: skip
CONCLUSION = re.compile("^(?:따라서|그래서|그러니|그러므로)|짝|남|줄|(?:되|빼|더하|지|으|어지)면|셈입니다")
MISSING = re.compile(rf"(?:그림에 |도형 가운데 )?({NAME})[은는] (?:하나도 )?(?:없|보이지 않|찾을 수 없)")
SIDE = r"(?:왼쪽|오른쪽)(?: (?:위|아래))?|위쪽|아래쪽"
HALVES = {"왼쪽": "left", "오른쪽": "right", "위쪽": "upper", "아래쪽": "lower"}
COLOUR = "|".join(COLOUR_NOUNS)
A, B = rf"(?P<a>{NAME})", rf"(?P<b>{NAME})"
WHAT = rf"(?P<what>{COLOUR}|{NAME})"
LARGER = (rf"{A}[은는이가] {B}보다 (?:더 )?(?:큽|커|그림을)", rf"{B}[은는이가] {A}보다 (?:더 )?작",
          rf"{B}보다 {A}[이가] 큽", rf"{B}[은는] {A}만큼 크지 않", rf"{A}에 비해 {B}[은는] 작",
          rf"{A}[과와] {B} 중에서 (?P=a)[이가] 더 큽", rf"{B}[과와] {A} 중에서 (?P=a)[이가] 더 큽",
          rf"{A}[과와] {B} 가운데 작은 것은 (?P=b)", rf"{B}[과와] {A} 가운데 작은 것은 (?P=b)")  # fmt: skip
NEARER = (rf"(?P<near>{NAME})[이가] (?P<far>{NAME})보다 {A}에 더 가깝",
          rf"{A}에서 (?P<near>{NAME})까지가 (?P<far>{NAME})까지보다 짧",
          rf"(?P<far>{NAME})[은는] (?P<near>{NAME})보다 {A}에서 멉")  # fmt: skip


def find(name, boxes):
    place, _, name = name.rpartition("에 있는 ")
    *words, noun = name.split(" ")
    found = []
    for box in boxes:
        large = max(box.x2 - box.x1, box.y2 - box.y1) > 0.25
        colour, _, kind = box.category.partition(" ") if box.category != "traffic light" else ("", "", box.category)
        fits = noun == "도형" or NOUNS[noun] in (kind, box.category)
        fits &= all({"큰": large, "작은": not large}.get(word, COLOURS.get(word) == colour) for word in words)
        if fits and (not place or is_at(box, place)):
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


def is_a(box, word):
    """Whether a colour or a name fits a box."""
    return box.category.startswith(f"{COLOUR_NOUNS[word]} ") if word in COLOUR_NOUNS else box in find(word, [box])


def area(box):
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def distance(a, b):
    return (a.x1 + a.x2 - b.x1 - b.x2) ** 2 + (a.y1 + a.y2 - b.y1 - b.y2) ** 2


def all_of(patterns, sentence):
    return [match for pattern in patterns for match in re.finditer(pattern, sentence)]


def agrees(sentence):
    """Whether 은, 이, 을 and 과 follow a final consonant, 으로 one but ㄹ, and 는, 가, 를, 와 and 로 none (로 ㄹ too).

    The verbs 있는, 없는, 남는 and 닿는 have no particle.
    """
    particles = re.findall(r"(?![있없남닿])([가-힣])(으로|로|은|는|이|가|을|를|과|와)(?=[ ,.]|$)", sentence)
    vowels = {"로": (0, 8)} | dict.fromkeys("는가를와", (0,))
    consonants = {"으로": (0, 8)} | dict.fromkeys("은이을과", (0,))
    finals = [((ord(letter) - ord("가")) % 28, particle) for letter, particle in particles]
    return all(final in vowels[p] if p in vowels else final not in consonants[p] for final, p in finals)


def names_of(sentence):
    return re.findall(NAME, re.sub(NUM, "#", sentence))  # without numbers, since 개 also is a dog


def claims(sentence, boxes):
    """(what, whether it holds) of every number, place, side and size that a description's sentence tells.

    Raises ValueError or IndexError for an object that is not there or not the only one.
    """

    def one(name):
        [box] = find(name, boxes)
        return box

    names, places = names_of(sentence), re.findall(PLACE, sentence)
    # A name with a size says nothing of another such object elsewhere.
    if match := re.fullmatch(rf"({PLACE})에 ((?:큰|작은) {NAME}) 한 개가 있습니다\.", sentence):
        yield "place", any(is_at(box, match[1]) for box in find(match[2], boxes))
        return
    whole = rf"(?<!인 )(?<!쪽에 있는 )(?<!쪽에는 )({NAME})"  # "red ones" and "on the left" are parts of what is there
    counts = re.findall(rf"{whole}[은는이가도을를]? (?:모두 |단 |지금 )?({NUM})", sentence)
    counts += re.findall(rf"({NAME})(?:의 수는|[을를] 세면) ({NUM})", sentence)
    counts += [(name, number) for number, name in re.findall(rf"({NUM})의 ({NAME})", sentence)]
    for name, number in counts:
        yield "count", len(find(name, boxes)) == NUMBERS.index(number.split()[0])
    for number, word in re.findall(rf"도형 중 ({NUM})[은는] ({COLOUR}|{NAME})입니다", sentence):
        yield "count", sum(is_a(box, word) for box in boxes) == NUMBERS.index(number.split()[0])
    for word, number in re.findall(rf"({COLOUR}|{'|'.join(NOUNS)})인 도형은 ({NUM})", sentence):
        yield "count", sum(is_a(box, word) for box in boxes) == NUMBERS.index(number.split()[0])
    for side, number in re.findall(rf"(왼쪽|오른쪽)에(?:는| 있는) 도형은? ({NUM})", sentence):
        yield "count", sum(is_at(box, f"{side} 부분") for box in boxes) == NUMBERS.index(number.split()[0])
    if found := re.findall(rf"({NAME})[은는이가] ({NAME})의 ({SIDE})에", sentence):
        yield "side", all(is_beside(one(a), one(b), side) for a, b, side in found)
    elif match := re.search(rf"({NAME})(?:[이가] 있는 곳은|의 자리는) ({NAME})의 ({SIDE})입니다", sentence):
        yield "side", is_beside(one(match[1]), one(match[2]), match[3])
    elif match := re.search(rf"({NAME})의 ({SIDE})(?:에|에서|에는|을|를)(?: 있는 것은| 보면)? ({NAME})", sentence):
        yield "side", is_beside(one(match[3]), one(match[1]), match[2])
    elif match := re.search(rf"({NAME})(?:에서 볼 때|을 기준으로|를 기준으로) ({NAME})[은는] ({SIDE})에", sentence):
        yield "side", is_beside(one(match[2]), one(match[1]), match[3])
    elif match := re.search(rf"가장 ({SIDE})에|({SIDE})(?:으로|로) 가장", sentence):
        me = one(next((name for name in names if name != "도형"), "도형"))
        yield "furthest", all(is_beside(me, box, match[1] or match[2]) for box in boxes if box is not me)
    if "사이에" in sentence:
        c, a, b = map(one, names if re.match(rf"({NAME})[은는이가] ", sentence) else names[2:] + names[:2])
        yield "between", rules_reader.between(c, a, b)
    if places and set(names) <= {"도형"} and re.search("없|않|비어", sentence):
        yield "empty", not any(is_at(box, place) for box in boxes for place in places)
    elif places and "가장" not in sentence and len(set(names)) == 1:
        found = find(names[0], boxes)
        if len(places) > 1:
            yield "places", len(found) == len(places) and all(any(is_at(b, p) for b in found) for p in places)
        else:
            says_one = re.match("큰|작은", names[0]) and not re.search(NUM, sentence)
            yield "place", bool(found) and (any if says_one else all)(is_at(box, places[0]) for box in found)
    if match := re.search(rf"({'|'.join(HALVES)}) 절반", sentence):
        [name] = names
        seen = re.search("가려도|가려져도", sentence)
        assert not re.search("가[려리]", sentence) or bool(seen) == bool(re.search("그대로|지지 않|있습니다", sentence))
        yield "half", rules_reader.in_half(one(name), HALVES[match[1]]) != bool(seen)
    for match in all_of(LARGER, sentence):
        yield "size", area(one(match["a"])) > 1.3 * area(one(match["b"]))
    for match in all_of(NEARER, sentence):
        near, far = (distance(one(match["a"]), one(match[word])) for word in ("near", "far"))
        yield "near", near < far
    for match in re.finditer(rf"{A}도 {B}도 {WHAT}입니다", sentence):
        yield "both", all(is_a(one(match[i]), match["what"]) for i in "ab")
    for colours in re.findall(rf"(?:{COLOUR})(?:, (?:{COLOUR}))+", sentence):
        said = sorted(COLOUR_NOUNS[colour] for colour in colours.split(", "))
        yield "colours", said == sorted({box.category.split()[0] for box in boxes})
    for match in all_of((rf"{A}만 (?P<what>색|모양)이 다릅", rf"오직 {A}의 (?P<what>색|모양)이 다릅"), sentence):
        words = [box.category.split()[match["what"] == "모양"] for box in (one(match["a"]), *boxes)]
        yield "odd", words.count(words[0]) == 2
    if match := MISSING.match(sentence):
        yield "missing", not find(match[1], boxes)


def form(sentence):
    """A sentence with names, places, numbers and particles replaced by marks, lists of any length by one."""
    for pattern, mark in ((NUM, "#"), (NAME, "N"), (PLACE, "@"), (SIDE, "~"),
                          ("|".join(COLOUR_NOUNS), "C"), ("[은는]", "는"), ("[이가]", "가"), ("[을를]", "를"),
                          ("[과와]", "와"), (r"(?:N #|C)(?:, (?:N #|C))+", "L")):  # fmt: skip
        sentence = re.sub(pattern, mark, sentence)
    return sentence


@cache
def grammar():
    """The forms of all sentences of descriptions and reasoning that the teacher writes about drawn scenes."""
    rng, teacher, forms = random.Random(0), RulesTeacher("ko"), set()
    for _ in range(4000):
        scene = Scene(Context("", "", (), tuple(o.to_box() for o in scenes.sample(rng, scenes.PAIRS))))
        for one in (teacher.description(scene, rng), teacher.reasoning(scene, rng)):
            forms.update(map(form, re.split(r"(?<=[.?!]) ", one.answer) if one else ()))
    return forms


def unknown(sentence, boxes):
    """Whether a sentence names an object or a colour that no box has, unless it says that it is missing."""
    words = [*names_of(sentence), *re.findall(COLOUR, sentence)]
    return not MISSING.match(sentence) and any(not any(is_a(box, word) for box in boxes) for word in words)


def read(answer, context):
    """Returns (sentence, whether it is in the teacher's grammar and agrees, whether it is true) of an answer.

    A sentence that is not in the grammar, or names what is not there, is false. `claims` reads most sentences of a
    description, and no conclusions: the truth is None where it reads nothing.
    """
    found = []
    for text in re.split(r"(?<=[.?!])\s+", answer.strip()):
        parsed, holds = form(text) in grammar() and agrees(text), False
        try:
            told = [] if CONCLUSION.search(text) else [holds for _, holds in claims(text, context.boxes)]
            holds = False if unknown(text, context.boxes) else all(told) if told else None
        except (AssertionError, IndexError, KeyError, ValueError):
            pass  # it names an object that is not there, or one of several
        found.append((text, parsed, parsed and holds))
    return found
