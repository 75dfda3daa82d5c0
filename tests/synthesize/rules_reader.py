"""Reads the rules teacher's English, knowing nothing of how it writes, and holds what it says against the boxes."""

import random
import re
from collections import Counter
from functools import cache

from english_grammar import agrees

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations import scene as scene_module
from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.synthesize.rules import RulesTeacher

PLURALS = {"person": "people", "dog": "dogs", "bus": "buses", "umbrella": "umbrellas", "chair": "chairs",
           "knife": "knives", "bench": "benches", "sheep": "sheep", "traffic light": "traffic lights",
           "cross": "crosses", "circle": "circles", "square": "squares", "triangle": "triangles", "ring": "rings",
           "object": "objects", "elephant": "elephants", "zebra": "zebras", "giraffe": "giraffes", "bear": "bears",
           "airplane": "airplanes", "train": "trains", "boat": "boats", "surfboard": "surfboards", "toilet": "toilets",
           "pizza": "pizzas", "kite": "kites"}  # fmt: skip
THINGS = ("person", "dog", "bus", "umbrella", "chair", "knife", "bench", "sheep", "traffic light")
CAPTIONS = ("Some of it can be seen on this ordinary day.", "The place looks like a place where many pass")
COLOURS, SHAPES = "|".join(scenes.COLOURS), "|".join(scenes.SHAPES)
NUMBERS = ["no", *"one two three four five six seven eight nine ten".split()]
NUM = "|".join(NUMBERS)
_NOUN = "|".join(sorted([*PLURALS, *PLURALS.values()], key=len, reverse=True))
POSITION = "top-left|top-right|bottom-left|bottom-right|top|bottom|left|right|centre"
NAME = rf"(?:object at the (?:{POSITION})(?! of)\b|(?:(?:large|small) )?(?:(?:{COLOURS}) )?(?:{_NOUN})\b)"
ACROSS = {"left": (0, 1 / 3), "right": (2 / 3, 1)}
PLACE = (
    r"(?:(?:at|in|on) the (?:(?:middle )?(?:left|right)|(?:top|upper|bottom|lower)[- ](?:left|right|middle)|top|bottom"
    r"|middle|centre)(?:-hand)?(?: (?:side|part|area))?|in the (?:upper|lower) (?:part|area))"
)  # fmt: skip
SIDE = (
    r"(?:(?:above|below) and )?to the (?:left|right) of|(?:left|right) of|above|below|higher up than|lower down than"
)
WAY = r"(?:(?:higher up|lower down|upwards|downwards)(?: and )?)?(?:to the (?:left|right))?"
NOTHING_SAID = """
that is all|that is everything|apart from that, the picture is empty|the rest of the picture is empty
there are no other objects|nothing more can be seen|this is all that the picture shows|no further object is to be seen
nothing else is to be seen|there is nothing else|there is nothing else in the picture|everything else is empty
nothing more is drawn|a mirror swaps left and right but keeps the height
left and right change places, while the height stays|only left and right are swapped
top and bottom change places, while left and right stay|what was high is then low
only the height changes""".strip().replace("\n", "|").split("|")


class Scene:
    """Boxes, asked by words."""

    def __init__(self, context):
        self.boxes = [box for box in context.boxes if not box.crowd]
        self.crowds = {box.category for box in context.boxes if box.crowd}

    def find(self, name):
        """Boxes that a name in words fits."""
        name, _, place = name.partition(" at the ")
        *front, noun = name.rsplit(" ", 1) if name not in PLURALS and name not in PLURALS.values() else (name,)
        one = next((o for o, m in PLURALS.items() if noun in (o, m)), noun)
        words = " ".join(front).split(" ") if front else []
        return [box for box in self.boxes if box.category not in self.crowds and _fits(box, words, one)
                and (not place or at(box, f"at the {place}"))]

    def one(self, name):
        [box] = self.find(name)
        return box


def _fits(box, words, noun):
    category = box.category.split(" ")
    size = "large" if max(box.x2 - box.x1, box.y2 - box.y1) > 0.25 else "small"
    if noun not in ("object", category[-1], box.category):
        return False
    return all(word == size if word in ("large", "small") else word == category[0] for word in words)


def centre(box):
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def at(box, place):
    """Strictly by thirds: a part that is not named is the middle one, but of "side" and "part"."""
    x, y = centre(box)
    across = next((word for word in ("left", "right") if word in place), "")
    down = "top" if re.search("top|upper", place) else "bottom" if re.search("bottom|lower", place) else ""
    if not re.search(r"side|part|area", place):
        across, down = across or "middle", down or "middle"
    ranges = {"left": (0, 1 / 3), "top": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "right": (2 / 3, 1),
              "bottom": (2 / 3, 1)}  # fmt: skip
    return all(ranges[word][0] < value < ranges[word][1] for word, value in ((across, x), (down, y)) if word)


def beside(a, b, words):
    """Whether `a` is clearly left of, above, ... `b`, by its centre and mostly outside; every word counts."""

    def before(a, b, low, high):
        a, b = ((getattr(box, low), getattr(box, high)) for box in (a, b))
        return sum(b) / 2 - sum(a) / 2 > 0.09 and a[1] - b[0] < 0.25 * min(a[1] - a[0], b[1] - b[0])

    checks = {"left": before(a, b, "x1", "x2"), "right": before(b, a, "x1", "x2"),
              "above": before(a, b, "y1", "y2"), "below": before(b, a, "y1", "y2")}  # fmt: skip
    found = re.findall(
        r"left|right|above|below|higher|lower|upwards|downwards|\bup\b(?! than| and)|\bdown\b(?! than| and)", words
    )
    other_words = {"higher": "above", "upwards": "above", "up": "above", "lower": "below", "downwards": "below"}
    found = [{**other_words, "down": "below"}.get(word, word) for word in found]
    assert found, words
    return all(checks[word] for word in found)


def between(c, a, b):
    """Whether the way from `a` to `b` by `c` is hardly longer than the straight one, and none of the ends."""
    first, second, straight = (((p.x1 + p.x2 - q.x1 - q.x2) ** 2 + (p.y1 + p.y2 - q.y1 - q.y2) ** 2) ** 0.5
                               for p, q in ((a, c), (c, b), (a, b)))
    return first + second < 1.1 * straight and min(first, second) > 0.2 * straight


def area(box):
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def number(word):
    return 2 if word == "both" else NUMBERS.index(word)


def statement(text, scene):
    """Asserts what a sentence says. Returns whether anything was understood."""
    text, claims = text.lower().rstrip(".!").replace("a single", "one"), 0

    def claim(holds, what):
        nonlocal claims
        claims += 1
        assert holds, (what, text, scene.boxes)

    if text in NOTHING_SAID or text in [caption.lower().rstrip(".") for caption in CAPTIONS]:
        return True
    if match := re.fullmatch(
        rf"there (?:is|are) ({NUM}) objects? on the left side and ({NUM}) objects? on the right side|"
        rf"on the left side there (?:is|are) ({NUM}) objects?, on the right side ({NUM}) objects?",
        text,
    ):
        left, right = filter(None, match.groups())
        claim(number(left) == sum(centre(b)[0] < 1 / 3 for b in scene.boxes), "left side")
        claim(number(right) == sum(centre(b)[0] > 2 / 3 for b in scene.boxes), "right side")
        return True
    if match := re.search(r"(?:further|furthest) (to the (?:left|right)|up|down)\b", text):
        [name] = re.findall(NAME, re.sub("objects?", "", text))
        me = scene.one(name)
        claim(all(beside(me, box, match[1]) for box in scene.boxes if box is not me), "furthest")
        return True
    if re.search("nothing|no object|is empty", text) and re.search(PLACE, text):
        for place in re.findall(PLACE, text):
            claim(not any(at(box, place) for box in scene.boxes), "empty")
        return claims > 0
    if match := re.search(
        rf"(?:no|cannot see an?|look for an?) ({NAME})(?: is to be seen| in it| in the picture| in vain|$)", text
    ):
        claim(not scene.find(match[1]), "missing")
        return True
    if match := re.match(rf"(?:among the objects, )?({NUM})(?: of the)?(?: objects)? are ({COLOURS}|{NAME})$", text):
        name = match[2] if match[2] not in scenes.COLOURS else f"{match[2]} objects"
        claim(len(scene.find(name)) == number(match[1]), "count")
        return True
    if match := re.match(rf"({COLOURS}) is the colour of ({NUM}) objects$", text):
        claim(len(scene.find(f"{match[1]} objects")) == number(match[2]), "count")
        return True
    if match := re.match(rf"the ({NAME}) is ({COLOURS}), and so is the ({NAME})$", text):
        claim(all(scene.one(match[i]).category.startswith(match[2]) for i in (1, 3)), "colour")
    if match := re.match(rf"the ({NAME}) is an? ({NAME}), and so is the ({NAME})$", text):
        claim(all(scene.one(match[i]) in scene.find(match[2]) for i in (1, 3)), "shape")
        return True
    if match := re.search("share their (colour|shape)", text):
        one, other = (scene.one(name).category.split() for name in re.findall(rf"the ({NAME})", text))
        claim(one[match[1] == "shape"] == other[match[1] == "shape"], "alike")
        return True
    if match := re.fullmatch(
        rf"(?:there are |a lot of |)(?:many )?({NAME}) ?(?:in the picture|are in the picture|can be seen|)", text
    ):
        if re.search("many|a lot of", text):
            noun = next(o for o, m in PLURALS.items() if m == match[1])
            claim(noun in scene.crowds or sum(b.category == noun for b in scene.boxes) > 10, "crowd")
    if "between" in text and "smaller one" not in text:
        names = re.findall(rf"the ({NAME})", text)
        c, a, b = names if re.match("the .*(?:is|lies|seen) between", text) else names[2:] + names[:2]
        claim(between(*map(scene.one, (c, a, b))), "between")
        return True
    # counts and presence
    for first, one, second, other in re.findall(
        rf"(?<!are )\b(both|all (?:{NUM})|{NUM}) ({NAME})|(?<=there are )({NUM}) ({NAME})", text
    ):
        word, name = (first or second).removeprefix("all "), one or other
        claim(len(scene.find(name)) == number(word), "count")
    for name in re.findall(rf"\b(?:an?|the) ({NAME})", text):
        claim(scene.find(name), "presence")
    # one of another
    if match := re.search(rf"the ({NAME})(?! and you)[a-z ]*? ({SIDE}) (?:the )?({NAME})", text):
        claim(beside(scene.one(match[1]), scene.one(match[3]), match[2]), "side")
        for again in re.finditer(rf"the ({NAME}) is ({SIDE}) the ({NAME})", text[match.end() - len(match[3]) - 4 :]):
            claim(beside(scene.one(again[1]), scene.one(again[3]), again[2]), "side")
    if match := re.match(rf"(?:look )?({SIDE}) the ({NAME}) (?:is|one can see|and you see) the ({NAME})$", text):
        claim(beside(scene.one(match[3]), scene.one(match[2]), match[1]), "side")
    from_one = r"(?:(?:as )?seen from|from|relative to|compared with|look from|start at) the"
    if match := re.match(rf"{from_one} ({NAME}),(?: and)? the ({NAME}) (?:is|lies) ({WAY})$", text):
        claim(beside(scene.one(match[2]), scene.one(match[1]), match[3]), "side")
    if match := re.match(rf"of the ({NAME}) and the ({NAME}), the ({NAME}) (?:is|lies) ({WAY})$", text):
        [other] = {match[1], match[2]} - {match[3]}
        claim(beside(scene.one(match[3]), scene.one(other), match[4]), "side")
    more = r"is (?:larger|bigger) than|takes up more of the picture than|looks larger than|beats"
    less = r"is smaller than|takes up less of the picture than|is not as large as"
    pairs = re.findall(rf"the ({NAME}) (?:{more}) the ({NAME})", text)
    pairs += re.findall(rf"(?:beside|compared with) the ({NAME}), the ({NAME}) (?:looks|is) small", text)
    pairs += [(b, a) for a, b in re.findall(rf"the ({NAME}) (?:{less}) the ({NAME})", text)]
    for a, b, c, word in re.findall(rf"the ({NAME}) and the ({NAME}), the ({NAME}) is the (small|larg)er one", text):
        other = a if a != c else b
        pairs.append((other, c) if word == "small" else (c, other))
    for big, small in pairs:
        claim(area(scene.one(big)) > 1.3 * area(scene.one(small)), "size")
    if match := re.search(
        rf"the ({NAME}) (?:takes up a l|fills much)|(?:much|part) of the picture (?:belongs to|shows) the ({NAME})",
        text,
    ):
        claim(area(scene.one(match[1] or match[2])) > 0.25, "fills")
    # colours and shapes
    for match in re.finditer(rf"(?:the ({NAME}) and the ({NAME})|both) are (?:both )?({COLOURS})$", text):
        claim(all(scene.one(match[i]).category.startswith(match[3]) for i in (1, 2) if match[i]), "colours")
    for match in re.finditer(rf"the ({NAME}) and the ({NAME}) (?:are both|both are) ({NAME})$", text):
        claim(all(scene.one(match[i]) in scene.find(match[3]) for i in (1, 2)), "shapes")
    if match := re.search(
        rf"(?:colours are|objects are|see the colours|picture uses|^) ?((?:{COLOURS})(?:(?:, | and )(?:{COLOURS}))+)"
        r"(?: are the colours)?$",
        text,
    ):
        claim(set(re.findall(COLOURS, match[1])) == {box.category.split()[0] for box in scene.boxes}, "colours")
    if match := re.search(
        rf"only the ({NAME}) has another (colour|shape)|the ({NAME}) alone is of another (colour|shape)", text
    ):
        what = (match[2] or match[4]) == "shape"
        odd = scene.one(match[1] or match[3]).category.split()[what]
        claim(Counter(box.category.split()[what] for box in scene.boxes)[odd] == 1, "odd")
    for pattern, order in ((rf"the ({NAME}) is nearer to the ({NAME}) than the ({NAME})", (2, 1, 3)),
                           (rf"the way from the ({NAME}) to the ({NAME}) is shorter than to the ({NAME})", (1, 2, 3)),
                           (rf"the ({NAME}) is further from the ({NAME}) than the ({NAME})", (2, 3, 1))):  # fmt: skip
        if match := re.search(pattern, text):
            claim(near(scene, *(match[i] for i in order)), "near")
    # places
    if match := re.search(
        r"(?:in|of|to|within|leaves) the (left|right|upper|lower) half|^the (left|right|upper|lower) half", text
    ):
        [name] = re.findall(rf"(?:the|whole|of the) ({NAME})", text)
        claim(in_half(scene.one(name), match[1] or match[2]), "half")
        return True
    places = re.findall(PLACE, re.sub(rf"(?:{SIDE}) the (?={NAME})", "", text))
    found = re.findall(NAME, text)
    if places and len(set(found)) == 1:
        boxes = scene.find(found[0])
        if " one " in text and len(places) > 1:
            claim(len(places) == len(boxes), "a place for each")
            claim(all(any(at(box, place) for box in boxes) for place in places), "places")
            return True
        says_one = re.search(rf"\ban? (?={found[0]})(?:large|small)", text)  # and nothing of another one elsewhere
        claim(len(places) == 1 and (any if says_one else all)(at(box, places[0]) for box in boxes), "place")
    return claims > 0


def near(scene, a, b, c):
    """Whether b is nearer to a than c is."""
    (x, y), *others = (centre(scene.one(name)) for name in (a, b, c))
    first, second = ((x - u) ** 2 + (y - v) ** 2 for u, v in others)
    return first < second


def in_half(box, half):
    return {"left": box.x2 < 0.5, "right": box.x1 > 0.5, "upper": box.y2 < 0.5, "lower": box.y1 > 0.5}[half]


def short_answer(question, answer, scene):
    """Asserts a pair of a conversation; returns whether its question was understood."""
    question, answer = question.lower(), answer.lower().rstrip(".")
    names = re.findall(NAME, question)
    if question.startswith("how many") or re.match("(can you|please)? ?count", question):
        found = re.search(rf"\b({NUM})\b", answer)
        said = 1 if "single" in answer else number(found[1])
        assert said == len(scene.find(names[0])), (question, answer, scene.boxes)
    elif question.startswith("is there more than one"):
        assert answer.startswith("no, ") and len(scene.find(names[0])) == 1
    elif re.match(
        rf"(?:is there|can you see|are there|does the picture show) (?:an? |any )?({NAME})(?! (?:{SIDE}))", question
    ):
        boxes = scene.find(names[0])
        assert answer.startswith("yes, " if boxes else "no, "), (question, answer, scene.boxes)
        for place in re.findall(PLACE, answer):
            assert at(boxes[0], place), (question, answer, scene.boxes)
        for word in re.findall(rf"(?:are|see|shows) ({NUM})\b(?! {PLACE})", answer) if boxes else ():
            assert number(word) == len(boxes), (question, answer, scene.boxes)
    elif re.match(r"(?:where|in which part|can you tell me where)", question) and len(set(names)) == 1:
        [place] = re.findall(PLACE, answer)
        assert all(at(box, place) for box in scene.find(names[0])), (question, answer, scene.boxes)
    elif re.match(rf"(?:what|which object)(?! (?:is the )?(?:colour|shape|kind))[a-z ]* {PLACE}", question):
        [place], [name] = re.findall(PLACE, question), re.findall(NAME, answer.replace("the object there", ""))
        assert [box for box in scene.boxes if at(box, place)] == scene.find(name) or any(
            at(box, place) for box in scene.find(name)
        ), (question, answer, scene.boxes)
    elif re.search("between the", question):
        inside = between(*map(scene.one, names))
        assert answer.startswith("yes, " if inside else "no, "), (question, answer, scene.boxes)
        assert ("not" in answer or "else" in answer) != inside
    elif "from left to right" in question:
        boxes = [scene.one(name) for name in names]
        in_order = sorted(boxes, key=lambda box: centre(box)[0])
        assert answer.startswith("yes, " if boxes == in_order else "no, "), (question, answer, scene.boxes)
        told = [scene.one(name) for name in re.findall(NAME, answer)]
        told = [told[1], told[0], told[2]] if "after" in answer else told
        assert not told or told == in_order, (question, answer, scene.boxes)
    elif match := re.search("colour|shape", question):
        words = [scene.one(name).category.split()[match[0] == "shape"] for name in names]
        assert all(word in answer for word in words), (question, answer)
        assert len(words) == 1 or answer.startswith("yes, " if words[0] == words[1] else "no, ")
    elif match := re.search("in the (left|right|upper|lower) half", question):
        box = scene.one(names[0])
        assert answer.startswith("yes, " if in_half(box, match[1]) else "no, ")
        assert all(in_half(box, half) for half in re.findall("the (left|right|upper|lower) half", answer))
    elif match := re.search("further ((?:to the )?(?:left|right|up|down))", question):
        winner = re.findall(NAME, answer)[0]
        assert beside(scene.one(winner), scene.one(next(n for n in names if n != winner)), match[1])
    elif re.match("which.*(?:larger|bigger|takes up more)", question):
        first = re.findall(NAME, answer)
        winner = first[1] if "smaller" in answer else first[0]
        assert area(scene.one(winner)) > area(scene.one(next(n for n in names if n != winner))), (question, answer)
    elif re.match("is the.*(?:larger|bigger) than", question):
        one, other = map(scene.one, names)
        assert answer.startswith("yes" if area(one) > area(other) else "no")
        smaller = rf"it is smaller|the {names[1]} is (?:the )?smaller|the {names[0]} is the smaller one"
        assert "smaller" not in answer or re.search(smaller, answer), (question, answer)
    elif match := re.match(rf"(?:is|do you see|can) the ({NAME})[a-z ]*? ({SIDE}) the", question):
        holds = beside(scene.one(names[0]), scene.one(names[1]), match[2])
        assert answer.startswith("yes" if holds else "no"), (question, answer, scene.boxes)
        if told := re.search(rf"({SIDE}) the ", answer):
            assert beside(scene.one(names[0]), scene.one(names[1]), told[1]), (question, answer, scene.boxes)
    elif len(names) == 2 and re.match("where is|on which side|how do", question):
        a, b = re.search(rf"the ({NAME})[a-z, ]*?the ({NAME})", question).groups()
        a, b = (b, a) if question.startswith("on which side") else (a, b)
        way = re.search(rf"({SIDE}) the|has the (?:{NAME}) ({WAY}) of it", answer)
        assert beside(scene.one(a), scene.one(b), way[1] or way[2]), (question, answer, scene.boxes)
    elif re.match(r"what|which things|can you (?:name|describe)|how would you", question) and not names:
        return statement(answer, scene)
    else:
        return False
    return True


def premise(text, question, scene):
    """Asserts what a sentence before the last says, where "both" and "they" are the objects of the question."""
    text, names = text.lower(), re.findall(NAME, question.lower())
    if re.match("they share|both are", text):
        text = re.sub("^(they|both)", "the {} and the {}".format(*names), text)
    if match := re.match(
        rf"(?:one is|their colours are) ({COLOURS})(?:, the other| and) ({COLOURS}), and (?:one is a|their "
        rf"shapes are) ({SHAPES})(?:, the other a| and) ({SHAPES})\.",
        text,
    ):
        found = [scene.one(name).category.split() for name in names]
        assert [*match.groups()] == [found[0][0], found[1][0], found[0][1], found[1][1]]
        return True
    return statement(text, scene)


def conclusion(end, question, scene):
    """Asserts the last sentence of an answer with reasons, by what was asked. Returns whether it was understood."""
    end, question = end.lower(), question.lower()
    names, told = re.findall(NAME, question), re.findall(NAME, end)
    numbers = [number(word) for word in re.findall(rf"\b({NUM})\b", end)]
    count = lambda name: len(scene.find(name))  # noqa: E731
    if re.search("one of the|if one of them went", question) and "objects" not in names[1:]:
        assert numbers[-1] == count(names[0]) - 1
    elif match := re.search(rf"({NUM}) more(?! object to| object\?)", question.replace("one more object", "")):
        assert numbers[-1] == count(names[-1]) + number(match[1])
    elif re.search("more .* or more|more of,|group is larger|win if you count", question):
        one, other = map(count, names)
        if one == other:
            assert re.search("neither|as many|the same", end)
        else:
            assert told[0] == names[one < other] and all(n == abs(one - other) for n in numbers), (question, end)
    elif re.search("paired with|enough .* for every|matched with", question):
        a, b = names[:2] if "enough" not in question else names[1::-1]
        spare = count(b) - count(a)
        assert bool(re.search("not enough|go without|too few|no partner", end)) == (spare < 0), (question, end)
        assert not spare or [n for n in numbers if n][-1] == abs(spare), (question, end)
    elif re.search("taken away|without|disappears|removes", question):
        assert numbers[-1] == len(scene.boxes) - 1
    elif re.search("left and right (?:change|were)|mirror|top and bottom|upper and the lower|water", question):
        [place] = re.findall(PLACE, end)
        box = scene.one(names[0])
        flat = re.search("left and right|mirror", question)
        flipped = Box(box.category, 1 - box.x2, box.y1, 1 - box.x1, box.y2) if flat else Box(
            box.category, box.x1, 1 - box.y2, box.x2, 1 - box.y1)  # fmt: skip
        assert at(flipped, place), (question, end, scene.boxes)
    elif match := re.search("the (left|right|upper|lower) half", question):
        inside = in_half(scene.one(names[0]), match[1])
        opposite = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}[match[1]]
        assert inside or in_half(scene.one(names[0]), opposite)
        assert re.findall("the (left|right|upper|lower) half", end) == [match[1]], (question, end)
        seeing, hidden = "stay in sight|still be|not disappear", "be hidden|out of sight|(?<!not )disappear|not be seen"
        assert re.search(hidden if inside else seeing, end) and "not be hidden" not in end, (question, end)
    elif "straight" in question:
        assert told[0] not in names[:2] and between(*map(scene.one, (told[0], *names[:2]))), (question, end)
    elif "left to right" in question:
        boxes = [scene.one(name) for name in told]
        assert len(boxes) == 3 and sorted(boxes, key=lambda box: centre(box)[0]) == boxes
    elif re.search("which way|in which direction", question):
        assert beside(scene.one(names[1]), scene.one(names[0]), end), (question, end)
    elif re.search("reach first|nearer|short way|sooner", question):
        a = names[0] if re.search("reach first|short way|sooner", question) else names[2]
        assert near(scene, a, told[0], next(n for n in names if n not in (a, told[0])))
    elif re.search("make out|overlook|paint|cover more", question):
        assert area(scene.one(told[0])) > area(scene.one(next(n for n in names if n != told[0])))
    elif re.search("in common|shares with|alike|agree", question):
        (c, s), (d, t) = (scene.one(name).category.split() for name in names)
        assert (c == d) == bool(re.search("shapes differ|only the colour|in shape they|nothing but colour", end))
        assert (s == t) == bool(re.search("colours differ|only the shape|in colour they|nothing but shape", end))
    elif re.search("odd one|fit in|differs|shape of its own|would you take away", question):
        words = [box.category.split()["colour" not in question] for box in scene.boxes]
        odd = [box for box, word in zip(scene.boxes, words, strict=True) if words.count(word) == 1]
        assert odd and all(scene.one(name) in odd for name in told[:1]), (question, end)
        assert re.search("does not fit|odd one|differs|take the", end)
    elif "corner" in question:
        free = sum(not any(at(box, f"at the {corner}") for box in scene.boxes)
                   for corner in ("top-left", "top-right", "bottom-left", "bottom-right"))  # fmt: skip
        assert numbers[0] == free > 0
    elif re.search("left or on the right|tip over|balanced|same number", question):
        left, right = (sum(low < centre(box)[0] < high for box in scene.boxes) for low, high in ACROSS.values())
        side = "left" if left > right else "right" if left < right else ""
        assert re.search(side and rf"\b{side}\b" or "balanced|neither|same number|equal", end), (question, end)
    else:
        return False
    return True


def evaluate(kind, text, scene):
    """Asserts all of a reply. Raises AssertionError, too, for a sentence that is not understood."""
    if kind == "detail_description":
        for sentence in re.split(r"(?<=[.!?]) ", text):
            assert statement(sentence, scene), ("not understood", sentence)
        return
    blocks = text.split("\n===\n")
    for asked, answered in zip(blocks[::2], blocks[1::2], strict=True):
        (head, question), (other, answer) = asked.split("\n"), answered.split("\n")
        assert (head, other) == ("Question:", "Answer:")
        if kind == "conversation":
            assert short_answer(question, answer, scene), ("not understood", question, answer)
            continue
        *premises, end = re.split(r"(?<=\.) ", answer)
        assert all(premise(text, question, scene) for text in premises), ("not understood", question, premises)
        assert conclusion(end, question, scene), ("not understood", question, end)


def form(sentence):
    """A sentence with numbers, names and places replaced by marks, lists of any length by one."""
    text = sentence.lower()
    for pattern, mark in ((SIDE, "~"), (PLACE, "@"), (NAME, "N"), (rf"\b(?:both|{NUM})\b", "#"),
                          (rf"\b(?:{COLOURS}|{SHAPES})\b", "C"), (r"\b(?:left|right|upper|lower)\b", "S"),
                          (r"\ban?\b|\bthe\b", "a"), (r"\b(?:is|are)\b", "is")):  # fmt: skip
        text = re.sub(pattern, mark, text)
    text = re.sub(r"(?:# N|a N|# @|@)(?:(?:, | and | or )(?:# N|a N|# @|@))+", "L", text)
    text = re.sub("C(?:(?:, | and )C)+", "Q", text)
    return re.sub(r"(?:higher up|lower down|upwards|downwards|up|down)(?: and)?(?: to a S)?|to a S", "W", text)


@cache
def grammar():
    """The forms of all sentences of descriptions and reasoning that the teacher writes about drawn scenes."""
    rng, teacher, forms = random.Random(0), RulesTeacher(), set()
    for _ in range(8000):
        scene = scene_module.Scene(Context("", "", (), tuple(o.to_box() for o in scenes.sample(rng, scenes.PAIRS))))
        for one in (teacher.description(scene, rng), teacher.reasoning(scene, rng)):
            forms.update(map(form, re.split(r"(?<=[.?!]) ", one.answer) if one else ()))
    return forms


def read(answer, context, question=""):
    """Returns (sentence, whether it is in the teacher's grammar and agrees, whether it holds too) of a description.

    With its question, an answer with reasons is read as well.
    """
    scene, found = Scene(context), []
    texts = re.split(r"(?<=[.?!])\s+", answer.strip())
    for text in texts:
        parsed, holds = form(text) in grammar() and agrees(text), False
        try:
            reads = conclusion if text is texts[-1] else premise
            holds = reads(text, question, scene) if question else statement(text, scene)
        except (AssertionError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
            pass  # false, or not understood
        found.append((text, parsed, parsed and bool(holds)))
    return found
