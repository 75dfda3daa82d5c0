"""Which tasks there are, and that verdicts and outcomes follow from answers alone."""

import itertools
import json
import subprocess
import sys

import pytest
from synthesis_data import fill, good_answer, make_synthesis, reply, write_images

from llava_jax.annotations.context import AnnotationSource
from llava_jax.endpoint.log import AnswerLog
from llava_jax.errors import UserError
from llava_jax.synthesize.prompts import KINDS
from llava_jax.synthesize.synthesis import Synthesis, SynthesisSettings


def names(tasks):
    return [task.name for task in tasks]


def test_tasks_are_all_images_and_kinds_image_by_image(tmp_path):
    synthesis = make_synthesis(tmp_path)
    assert names(synthesis) == [(kind, f"{i:06d}") for i in range(10) for kind in KINDS]
    assert names(synthesis[i] for i in range(len(synthesis))) == names(synthesis)


def test_the_counts_are_drawn_by_seed(tmp_path):
    def drawn(seed):
        return names(make_synthesis(tmp_path, 40, conversation=25, detail=0, complex=7, seed=seed))

    one = drawn(1)
    assert one == drawn(1) != drawn(2)
    assert [sum(kind == wanted for kind, _ in one) for wanted in KINDS] == [25, 0, 7]
    assert len(set(one)) == 32 and sorted(one, key=lambda name: (name[1], KINDS.index(name[0]))) == one


def test_samples_come_by_turns_and_each_once(tmp_path):
    synthesis = make_synthesis(tmp_path, detail=2)
    shown = names(synthesis.drawn(3))
    assert sorted(shown) == sorted(names(synthesis)) and shown == names(synthesis.drawn(3)) != names(synthesis.drawn(4))
    assert [kind for kind, _ in shown[:6]] == list(KINDS) * 2
    assert names(synthesis.drawn(3, KINDS[:1])) == [name for name in shown if name[0] == KINDS[0]]


def test_more_images_than_there_are(tmp_path):
    with pytest.raises(UserError, match="--complex 11: there are only 10 images"):
        make_synthesis(tmp_path, complex=11)


def test_a_category_that_rules_cannot_name_is_told_before_any_work(tmp_path):
    path = write_images(tmp_path)
    path.write_text(path.read_text().replace("zebra", "wombat"))
    settings = {"source": AnnotationSource(data=str(path)), "out": str(tmp_path / "out"), "teacher": "rules"}
    assert len(Synthesis(SynthesisSettings(**settings, language="en"))) == 30
    with pytest.raises(UserError, match="no Korean name for the category 'wombat'"):
        Synthesis(SynthesisSettings(**settings, language="ko"))


def test_the_parameters_of_a_request_are_those_that_were_given():
    source = AnnotationSource(data="images.jsonl")
    assert SynthesisSettings(source).request_parameters == {"max_completion_tokens": 2048}
    given = SynthesisSettings(source, temperature=0.0, max_new_tokens=9, parameters='{"top_p": 0.5}')
    assert given.request_parameters == {"max_completion_tokens": 9, "temperature": 0.0, "top_p": 0.5}


@pytest.mark.parametrize(("name", "least"), [
    ("attempts", 1), ("max_new_tokens", 1), ("seed", 0), ("conversation", 0), ("detail", 0), ("complex", 0)])
def test_the_least_that_can_be_meant(name, least):
    given = {"source": AnnotationSource(data="images.jsonl"), "model": "teacher"}
    SynthesisSettings(**given, **{name: least}).check()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {least - 1}: it must be at least {least}"):
        SynthesisSettings(**given, **{name: least - 1}).check()


def test_the_same_settings_make_the_same_requests_in_another_process(tmp_path):
    synthesis = make_synthesis(tmp_path, temperature=0.5, parameters='{"top_k": 4}')
    keys = [task.key(attempt) for task in synthesis for attempt in range(2)]
    assert len(set(keys)) == 60
    code = ("import json, sys; from llava_jax.synthesize.synthesis import SynthesisSettings, Synthesis\n"
            "fields = json.load(open(sys.argv[1]))\n"
            "from llava_jax.annotations.context import AnnotationSource\n"
            "synthesis = Synthesis(SynthesisSettings(**{**fields, 'source': AnnotationSource(**fields['source'])}))\n"
            "print(json.dumps([task.key(attempt) for task in synthesis for attempt in range(2)]))")
    (tmp_path / "fields.json").write_text(json.dumps(synthesis.settings.as_json()))
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "fields.json")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == keys


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.1}, {"max_new_tokens": 7},
                                    {"parameters": '{"top_p": 0.5}'}, {"language": "ko"}])
def test_what_an_answer_depends_on_changes_its_key(tmp_path, change):
    assert make_synthesis(tmp_path)[0].key(0) != make_synthesis(tmp_path, **change)[0].key(0)


@pytest.mark.parametrize("change", [{"seed": 9}, {"attempts": 9}, {"drop_contradictions": True},
                                    {"base_url": "http://h"}])
def test_other_settings_ask_nothing_anew(tmp_path, change):
    assert make_synthesis(tmp_path)[0].key(0) == make_synthesis(tmp_path, **change)[0].key(0)


def test_outcomes_against_plain_words(tmp_path):
    """Every sequence of up to three good and bad answers; the first good one counts, three bad ones end it."""
    synthesis = make_synthesis(tmp_path, 20, attempts=3)
    cases = [case for length in range(4) for case in itertools.product("gb", repeat=length)]
    with AnswerLog(str(tmp_path / "log")) as log:
        for task, case in zip(synthesis, cases, strict=False):
            fill(log, task, *(good_answer(task, i) if c == "g" else "" for i, c in enumerate(case)))
        for task, case in zip(synthesis, cases, strict=False):
            outcome = task.outcome(log)
            used = case[: case.index("g") + 1] if "g" in case else case
            assert len(outcome.answers) == len(used)
            assert outcome.done == ("g" in case or len(case) == 3)
            assert (outcome.verdict is None) == (not case)
            if case:
                assert outcome.verdict.accepted == ("g" in case)
                assert outcome.verdict.reason == ("" if "g" in case else "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_good_answers_are_accepted_and_truncated_ones_are_not(tmp_path, kind):
    task = next(task for task in make_synthesis(tmp_path) if task.kind == kind)
    verdict = task.verdict(reply(good_answer(task)))
    assert verdict.accepted and [turn["from"] for turn in verdict.turns] == ["human", "gpt"]
    assert task.verdict(reply(good_answer(task), "length")).reason == "truncated"


def test_contradictions_are_kept_or_dropped(tmp_path):
    for drop in (False, True):
        task = make_synthesis(tmp_path, drop_contradictions=drop)[1]
        wrong = good_answer(task).replace("left side", "right side").replace("To its right", "To its left")
        verdict = task.verdict(reply(wrong + " There are three dogs in the room."))
        assert verdict.evidence.findings and verdict.reason == ("contradiction" if drop else "")
        assert task.verdict(reply(good_answer(task))).accepted


def test_what_json_cannot_hold_does_not_get_into_a_record(tmp_path):
    task = make_synthesis(tmp_path)[1]
    for odd in ("half of a smile \ud83d", "a NUL \0", "an <image>"):
        assert not task.verdict(reply(f"{good_answer(task)} There is {odd} in it.")).accepted
    verdict = task.verdict(reply(good_answer(task) + " A whole smile \U0001f600 ends it."))
    assert verdict.accepted and "\U0001f600" in verdict.turns[1]["value"]


def test_the_place_of_the_image_is_random_by_seed(tmp_path):
    synthesis = make_synthesis(tmp_path, 100, detail=0, complex=0)
    turns = ({"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."})
    first = [task.to_record(turns)["conversations"][0]["value"] for task in synthesis]
    assert set(first) == {"<image>\nQ?", "Q?\n<image>"} and 30 < first.count("<image>\nQ?") < 70
    assert first == [task.to_record(turns)["conversations"][0]["value"] for task in synthesis]
    record = synthesis[3].to_record(turns)
    assert record["id"] == "000003" and record["image"] == "000003.jpg" and record["conversations"][1] == turns[1]


def test_settings_go_to_json_and_back(tmp_path):
    settings = make_synthesis(tmp_path, language="ko", conversation=3, temperature=0.5).settings
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings.as_json()))
    assert SynthesisSettings.load(str(tmp_path / "out")) == settings
    with pytest.raises(UserError, match="no synthesis has run there"):
        SynthesisSettings.load(str(tmp_path))
    (tmp_path / "out" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="settings.json: not what a synthesis writes"):
        SynthesisSettings.load(str(tmp_path / "out"))


@pytest.mark.parametrize(("options", "words"), [
    ({"model": ""}, "name the teacher with --model"),
    ({"conversation": 0, "detail": 0, "complex": 0}, "nothing to make"),
    ({"detail": -1}, "--detail is -1"),
    ({"attempts": 0}, "--attempts is 0"),
    ({"parameters": "[1]"}, "not a JSON object"),
    ({"parameters": "{1"}, "not a JSON object"),
    ({"parameters": '{"model": "x"}'}, "model cannot be set"),
    ({"teacher": "rules", "model": "x"}, "--model says nothing to --teacher rules"),
    ({"short": True}, "--short says nothing to a teacher that is a model"),
])
def test_settings_that_cannot_be_meant(tmp_path, options, words):
    settings = SynthesisSettings(AnnotationSource(data=str(tmp_path)), **{"model": "teacher", **options})
    with pytest.raises(UserError, match=words):
        settings.check()
