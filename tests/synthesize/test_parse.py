"""Replies of teachers, good and bad; each rule is tested on both of its sides."""

import json
import pickle
import random
import re
import time

import pytest

from llava_jax.endpoint.wording import find_leak, find_refusal, find_source
from llava_jax.synthesize import parse as parse_module
from llava_jax.synthesize.parse import REASONS, Reject, Seen, parse
from llava_jax.synthesize.prompts import KINDS

QUESTION, ANSWER = "What is the man doing?", "He is riding a red bicycle along the beach."
SECOND, REPLY = "Is there a dog?", "No, there is no dog on the beach."
LONG = ("The photo shows a man who rides a red bicycle along a wide beach. He wears a straw hat and looks at the sea,"
        " where two sailing boats pass by. The sky is blue.")
WANTED = ({"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER},
          {"from": "human", "value": SECOND}, {"from": "gpt", "value": REPLY})
PLAIN = f"Question:\n{QUESTION}\n===\nAnswer:\n{ANSWER}\n===\nQuestion:\n{SECOND}\n===\nAnswer:\n{REPLY}"


def reason(kind: str, text: str, **options) -> str | None:
    options = {"question": "Describe it."} | options if kind == "detail_description" else options
    try:
        parse(kind, text, **options)
    except Reject as reject:
        assert reject.reason in REASONS and reject.detail and "\n" not in str(reject)
        return reject.reason
    return None


def pair(question: str, answer: str) -> str:
    return f"Question:\n{question}\n===\nAnswer:\n{answer}"


FORMS = {
    "plain": PLAIN,
    "blank lines": PLAIN.replace("\n", "\n\n") + "\n\n===\n",
    "windows": PLAIN.replace("\n", "\r\n"),
    "on one line": PLAIN.replace(":\n", ": "),
    "lower case": PLAIN.replace("Question", "question").replace("Answer", "ANSWER"),
    "bold headers": PLAIN.replace("Question:", "**Question:**").replace("Answer:", "**Answer**:"),
    "all bold": PLAIN.replace("Question:", "**Question:**").replace(QUESTION, f"**{QUESTION}**"),
    "markdown headings": PLAIN.replace("Question:", "### Question 1:").replace("Answer:", "## Answer 1:"),
    "numbered": PLAIN.replace("Question:", "1. Question:").replace("Answer:", "1) Answer:"),
    "numbers after": PLAIN.replace("Question:", "Question 12:").replace("Answer:", "Answer #12 :"),
    "letters": PLAIN.replace("Question:\n", "Q: ").replace("Answer:\n", "A: "),
    "no separators": PLAIN.replace("===\n", ""),
    "long separators": PLAIN.replace("===", "  ========== "),
    "markdown lines": PLAIN.replace("===", "---"),
    "fenced": f"```\n{PLAIN}\n```",
    "fenced with a name": f"```text\n{PLAIN}\n```",
    "chatter": f"Sure! Here is a conversation about the photo:\n\n{PLAIN}",
    "thinking": f"<think>\nQuestion: what to ask?\n</think>\n\n{PLAIN}",
    "leading separator": f"===\n{PLAIN}",
    "other words": PLAIN.replace("Question:", "질문:").replace("Answer:", "답변："),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_conversation(form):
    assert parse("conversation", FORMS[form]) == WANTED


def test_paragraphs_and_lists_are_kept():
    answer = "There are two reasons.\n\n1. It is cold.\n2. It is late.\n\nNote: both may hold. A plan: wait."
    spaced = answer.replace("\n\n", "\n \n\n\n") + "\n---\nThe end."
    turns = parse("complex_reasoning", pair("Why does he wait?", spaced))
    assert turns[1]["value"] == answer + "\n\nThe end." and turns[0]["value"] == "Why does he wait?"


def test_descriptions():
    wanted = ({"from": "human", "value": "Describe it."}, {"from": "gpt", "value": LONG})
    for text in (LONG, f"\n {LONG}\n", f"Answer:\n{LONG}", f"**Description:** {LONG}", f"설명: {LONG}",
                 f"```\n{LONG}\n```", f"===\n{LONG}\n==="):
        assert parse("detail_description", text, question="Describe it.") == wanted
    turns = parse("detail_description", f"{LONG}\n\n{LONG}", question="Q?")
    assert turns[1]["value"] == f"{LONG}\n\n{LONG}"


@pytest.mark.parametrize("before", [
    "Sure! Here is a detailed description of the image:\n\n", "Certainly.\n\nHere's what the picture shows:\n",
    "I'd be glad to describe the scene in detail:\n\n", "네, 다음은 이미지에 대한 자세한 설명입니다:\n\n",
    "**Description:** ", ""])
@pytest.mark.parametrize("after", ["\n\nLet me know if you want more!", "\n\nI hope this helps.", ""])
def test_what_a_teacher_says_around_a_description_is_left_out(before, after):
    assert parse("detail_description", before + LONG + after, question=QUESTION)[1]["value"] == LONG


def test_what_a_teacher_says_after_a_conversation_is_left_out():
    assert parse("conversation", f"{PLAIN}\n\nLet me know if you want more!") == parse("conversation", PLAIN)


@pytest.mark.parametrize("text", [
    f"Here is a picture of calm: {LONG}", f"This is a busy scene.\n\n{LONG}", f"{LONG} I hope that it goes well.",
    f"{LONG}\n\nHe may hope that this goes well."])
def test_sentences_that_only_look_like_chatter_stay(text):
    assert parse("detail_description", text, question=QUESTION)[1]["value"] == text


@pytest.mark.parametrize(
    "kind, text, wanted",
    [
        ("conversation", "", "empty"),
        ("conversation", " \n\t", "empty"),
        ("conversation", "```\n\n```", "empty"),
        ("conversation", "Question:\n===\nAnswer:\nYes, he is on the beach.", "empty"),
        ("conversation", PLAIN.replace(ANSWER, " "), "empty"),
        ("conversation", LONG, "wrong_kind"),
        ("conversation", json.dumps([{"question": QUESTION, "answer": ANSWER}]), "wrong_kind"),
        ("complex_reasoning", PLAIN, "wrong_kind"),
        ("complex_reasoning", LONG, "wrong_kind"),
        ("detail_description", PLAIN, "wrong_kind"),
        ("detail_description", LONG + "\0", "wrong_kind"),
        ("detail_description", LONG + "\ud800", "wrong_kind"),
        ("conversation", f"Answer:\n{ANSWER}\n===\n{PLAIN}", "odd_turns"),
        ("conversation", f"{PLAIN}\n===\nQuestion:\nWhy?", "odd_turns"),
        ("conversation", f"{PLAIN}\n===\nAnswer:\nYes.", "odd_turns"),
        ("conversation", PLAIN.replace("===\n", "===", 1), "odd_turns"),
        ("conversation", PLAIN.replace("Answer:\n", "", 1), "odd_turns"),
        ("conversation", f"{PLAIN}\n===\nI hope that this helps!", "odd_turns"),
        ("conversation", f"{PLAIN}\n===\nQuestion:\n{QUESTION}\n===\nAnswer:\nHe rides.", "duplicate"),
        ("conversation", f"{PLAIN}\n===\nQuestion:\nwhat is the MAN doing\n===\nAnswer:\nHe rides.", "duplicate"),
        ("conversation", pair("Who?", "A man with a dog."), "too_short"),
        ("conversation", pair("Who is it?", "A man."), "too_short"),
        ("conversation", pair("Who is it, " + "and who " * 60 + "?", ANSWER), "too_long"),
        ("conversation", pair(QUESTION, ANSWER * 400), "too_long"),
        ("complex_reasoning", pair("Why is he there?", ANSWER), "too_short"),
        ("complex_reasoning", pair("Why is he there?", f"{ANSWER} " * 100), "too_long"),
        ("detail_description", ANSWER, "too_short"),
        ("detail_description", f"{LONG} " * 30, "too_long"),
        ("detail_description", LONG * 500, "too_long"),
        ("detail_description", LONG.removesuffix("sky is blue.") + "sky, the", "truncated"),
        ("detail_description", LONG.removesuffix(".") + ",", "truncated"),
    ],
)
def test_what_is_rejected(kind, text, wanted):
    assert reason(kind, text) == wanted


def test_the_other_side_of_the_lengths():
    limits = {**parse_module.ANSWER_WORDS}
    for kind, (least, most) in limits.items():
        for words, wanted in ((least - 1, "too_short"), (least, None), (most, None), (most + 1, "too_long")):
            answer = " ".join(["He", "is", "there"] * (words // 3 + 1)).split()[:words]
            text = " ".join(answer[:-1] + ["now."])
            assert reason(kind, text if kind == "detail_description" else pair(QUESTION, text)) == wanted, (kind, words)
    assert reason("conversation", pair("Where now?", ANSWER)) is None
    assert reason("detail_description", "一" * 39 + "。", language="zh") == "too_short"
    assert reason("detail_description", "一" * 40 + "。", language="zh") is None
    assert reason("detail_description", "다가마 " * 13 + ".", language="ko") == "too_short"
    assert reason("detail_description", "다가마 " * 14 + ".", language="ko") is None


def test_finish_reasons():
    assert reason("conversation", PLAIN, finish_reason="length") == "truncated"
    assert reason("conversation", PLAIN, finish_reason="content_filter") == "refusal"
    for other in ("stop", None, "eos"):
        assert reason("conversation", PLAIN, finish_reason=other) is None


REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but the photo is not there.",
    "As an AI language model, I cannot see images.",
    "I am only an AI assistant without eyes.",
    "I cannot view the image, so I can only guess.",
    "I am unable to see this picture.",
    "I can't help with identifying people.",
    "I don't have access to the image.",
    "언어 모델로서 답할 수 없습니다.",
    "죄송하지만 도와드릴 수 없습니다.",
]
NO_REFUSALS = [
    "I can see two dogs in the image.",
    "I cannot see any dog on the beach.",
    "He looks sorry, but his friend laughs.",
    "The robot on the poster is advertised as an AI toy.",
    "The woman cannot see the pictures on the wall behind her.",
    "A volunteer is there to help and assist the visitors.",
]


def test_refusals():
    assert [text for text in REFUSALS if not find_refusal(text)] == []
    assert [text for text in NO_REFUSALS if find_refusal(text)] == []
    for text in REFUSALS:
        assert reason("conversation", text) == "refusal"
        assert reason("conversation", pair(QUESTION, f"{text} He rides a bicycle on the beach.")) == "refusal"


SOURCES = [
    "The caption says that a man rides.",
    "According to the captions, there are two dogs.",
    "Based on the image captions it is a bus.",
    "As the first caption mentions, the cat sleeps.",
    "All captions agree on a red car.",
    "This is not mentioned in the provided caption.",
    "The bounding box of the dog is large.",
    "The bounding-boxes overlap.",
    "The coordinates suggest that it stands on the left.",
    "Its coordinates are near the centre.",
    "The x coordinate of the cup is small.",
    "The car with coordinates near the edge is blue.",
    "The dog is at [0.1, 0.25, 0.3, 1.0].",
    "The dog is at (0.1, .25, 0.3).",
    "Its place is 0.12, 0.34, 0.5, 0.6.",
    "The description does not say what he holds.",
    "Based on the description, it is a market.",
    "The accompanying descriptions tell of a market.",
    "The provided information shows a market.",
    "This can be told from the information provided.",
    "It is not specified in the text.",
    "The annotations indicate two people.",
    "There is a person (crowd) behind him.",
    "An object detector would find two.",
    "All detected objects are on the left.",
    "<image>\nThis is a dog.",
    "It is a dog.</s>",
    "It is a dog.<|im_end|>",
    "캡션에 따르면 개가 있습니다.",
    "경계 상자 안에 고양이가 있습니다.",
    "좌표를 보면 왼쪽에 있습니다.",
    "제공된 설명에는 나오지 않습니다.",
    "根据描述，这是一只狗。",
    "キャプションによると犬です。",
    "Laut der Bildunterschrift ist es ein Hund.",
    "Según las coordenadas está a la izquierda.",
    "D'après les légendes, c'est un chien.",
]
NO_SOURCES = [
    "A sign with a caption hangs over the door.",
    "The caption on the poster reads SALE.",
    "The captions under the pictures name the painters.",
    "The caption below the cartoon is funny.",
    "A framed image with caption hangs on the wall.",
    "The poster shows a whale, with accompanying text in small letters.",
    "Given the context, they are probably colleagues.",
    "A box of tomatoes stands on the floor.",
    "There is a text box on the screen.",
    "The box next to the bed is empty.",
    "He is bounding over a box.",
    "She coordinates the team with a whistle.",
    "Their outfits are well coordinated.",
    "The conductor coordinates the orchestra.",
    "The runners coordinate their steps.",
    "The display shows the coordinates of the ship.",
    "The coordinates on the map belong to a lighthouse.",
    "The plate reads [A 123].",
    "The score is (2, 1).",
    "It costs 0.99 or 1.25, depending on the size.",
    "The book has a description of the city.",
    "He gives a detailed description of the accident.",
    "The sign provides information to tourists.",
    "The information on the board tells the departure times.",
    "A police officer describes the way.",
    "The teacher has handwritten annotations in her notebook.",
    "The context makes it clear that it is a wedding.",
    "The text on the shirt says HELLO.",
    "A large crowd (perhaps hundreds) is watching.",
    "The food provided by the host stands on the table.",
    "He describes the scene to a friend on the phone.",
    "개가 상자 안에 있습니다.",
    "안내판에 설명이 적혀 있습니다.",
]


def test_mentions_of_the_source():
    assert [text for text in SOURCES if not find_source(text)] == []
    assert [(text, find_source(text)) for text in NO_SOURCES if find_source(text)] == []
    assert reason("conversation", pair(QUESTION, f"{ANSWER} {SOURCES[0]}")) == "mentions_source"
    assert reason("conversation", pair("What does the caption say?", ANSWER)) == "mentions_source"
    assert reason("detail_description", f"{LONG} {SOURCES[7]}") == "mentions_source"
    # The question of a description is the caller's, not the teacher's.
    assert reason("detail_description", LONG, question="What do the captions say?") is None


LEAKS = [
    ("What colour is the red bus?", "The bus is red."),
    ("What animal is the cat on the sofa?", "It is a cat."),
    ("Where is the man sitting on the bench?", "He is sitting on the bench."),
    ("The bus is red, isn't it?", "Yes, the bus is red."),
    ("There are two dogs, right?", "Yes, there are two."),
]
NO_LEAKS = [
    ("Is the bus red?", "Yes, the bus is red."),
    ("Is there a cat?", "No, there is no cat."),
    ("Is the cat on the left or right of the bed?", "The cat is on the left of the bed."),
    ("Which is larger, the cat or the dog?", "The dog is larger."),
    ("What colour is the bus?", "The bus is red."),
    ("What colour is the car next to the red bus?", "It is red too."),
    ("How many dogs are there?", "There are two dogs."),
    ("What is the man on the bench doing?", "The man on the bench is reading."),
    ("Who has the ball, and does he have the right of way?", "The boy has it."),
]


def test_questions_that_give_their_answer_away():
    for question, answer in LEAKS:
        assert find_leak("conversation", question, answer), question
        assert reason("conversation", f"{PLAIN}\n===\n{pair(question, answer)}") == "leaks_answer"
    assert [find_leak("conversation", *case) for case in NO_LEAKS] == [None] * len(NO_LEAKS)
    telling = "A man in a yellow jacket rides a bicycle through the snow. Why does he do it?"
    asking = "Imagine that you are the rider in this place. What would you pay attention to?"
    assert reason("complex_reasoning", pair(telling, LONG)) == "leaks_answer"
    assert reason("complex_reasoning", pair(asking, LONG)) is None
    assert reason("conversation", pair(telling, LONG)) is None


def test_languages():
    korean = pair("사진에는 무엇이 있나요?", "해변에서 빨간 자전거를 타는 남자가 있습니다.")
    assert reason("conversation", korean, language="ko") is None
    assert reason("conversation", korean) == "wrong_language"
    assert reason("conversation", PLAIN, language="ko") == "wrong_language"
    assert reason("conversation", f"{korean}\n===\n{pair(QUESTION, ANSWER)}", language="ko") == "wrong_language"
    french = pair("Que fait l'homme au bord de la mer ?", "Il roule à vélo le long de la plage et regarde les bateaux.")
    assert reason("conversation", french, language="fr") is None
    assert reason("conversation", f"{french}\n===\n{PLAIN}", language="fr") == "wrong_language"
    # The question of a description is drawn from the pool of its language.
    assert reason("detail_description", LONG, question="자세히 설명해 주세요.") is None


def test_seen():
    seen, other = Seen(), parse("conversation", pair("Who is there?", "A woman with a parrot on her arm."))
    seen.add("conversation", WANTED)
    seen.add("conversation", other)
    seen.add("detail_description", WANTED)
    asked_otherwise = tuple({**turn, "value": f"So, {turn['value']}" if turn["from"] == "human" else
                             turn["value"].upper()} for turn in WANTED)
    for turns in (WANTED, asked_otherwise):
        with pytest.raises(Reject, match="duplicate"):
            seen.add("conversation", turns)
    seen.add("conversation", (*other[:1], {"from": "gpt", "value": "A man with a parrot on his arm."}))


def test_a_reject_can_be_pickled():
    reject = pickle.loads(pickle.dumps(Reject("empty", "nothing")))
    assert (reject.reason, reject.detail, str(reject)) == ("empty", "nothing", "empty: nothing")


PIECES = ["Question:", "Answer:", "**Question 2:**", "Q:", "A:", "===", "\n===\n", "---", "\n", "\n", "\n\n", " ",
          "```", "#", "**", QUESTION, ANSWER, SECOND, LONG, "1.", ":", "：", "The caption says", "[0.1, 0.2",
          ", 11" * 3, "]", "<think>", "</think>", "<image>", "질문:", "사진", "?", ".", "\r\n", "\0", "\ud83d",
          "é", "x" * 50, "As an AI", "_", "*" * 9]


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_gives_turns_or_a_reject_with_a_listed_reason(kind):
    rng, found = random.Random(kind), {}
    for _ in range(6000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(24)))
        if rng.random() < 0.5:  # a good reply with a fault in it
            cut = rng.randrange(len(PLAIN))
            text = (PLAIN if kind == "conversation" else pair(QUESTION, LONG) if kind[0] == "c" else LONG)
            text = text[:cut] + rng.choice(["", *PIECES]) + text[cut + rng.randrange(3) :]
        language, finish = rng.choice(["en", "en", "ko"]), rng.choice(["stop", "stop", "stop", None, "length"])
        try:
            turns = parse(kind, text, finish, "Describe it." if kind == "detail_description" else None, language)
        except Reject as reject:
            assert reject.reason in REASONS and "\n" not in str(reject), text
            found[reject.reason] = found.get(reject.reason, 0) + 1
            continue
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and turns
        assert all(turn.keys() == {"from", "value"} and turn["value"] == turn["value"].strip() != "" for turn in turns)
        assert kind == "conversation" or len(turns) == 2
        found["turns"] = found.get("turns", 0) + 1
    assert found["turns"] > 200 and len(found) > 6, found


@pytest.mark.parametrize("unit", [
    "*", "#", "-", "= ", "Question:", "A:\n", "===\n", "[.1,", "[0.1, 11, ", "the the ", "\n", " ", "**1. ", "0.1, ",
    "_ ", "the given image ", "I am a ", "`", "<think>", "coordinates "])
def test_no_text_takes_long(unit):
    text = unit * (parse_module.MAX_CHARACTERS // len(unit))
    start = time.process_time()  # of this process alone, however busy the machine
    for kind in KINDS:
        for whole in (text, f"Question:\nWhat is it?\n===\nAnswer:\n{text}"):
            reason(kind, whole)
    assert time.process_time() - start < 10  # quadratic work would take minutes


def test_every_reason_is_raised_somewhere():
    source = "".join(open(parse_module.__file__).read().split("REASONS = ")[1:])
    raised = set(re.findall(r'Reject\("(\w+)"', source)) | {"too_short", "too_long"}
    assert raised == set(REASONS)
