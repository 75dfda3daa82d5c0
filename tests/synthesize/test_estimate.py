"""Estimates against sums over all requests, and against what answers turned out to be."""

import statistics
from pathlib import Path

import pytest
from synthesis_data import good_answer, make_synthesis, reply

from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.synthesize import estimate as module
from llava_jax.synthesize.estimate import BYTES_PER_TOKEN, cost, describe, estimate
from llava_jax.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer.model"


def test_without_answers_it_is_the_sum_of_all_requests(tmp_path):
    synthesis = make_synthesis(tmp_path, 20, detail=5)
    kinds = {kind.kind: kind for kind in estimate(synthesis, {})}
    for name, kind in kinds.items():
        tasks = [task for task in synthesis if task.kind == name]
        total = sum(task.request(0).bytes for task in tasks) / BYTES_PER_TOKEN
        assert kind.requests == kind.tasks == len(tasks) == (5 if name == "detail_description" else 20)
        assert kind.requests * kind.prompt == pytest.approx(total)
        assert kind.completion == pytest.approx(len(tasks[0].request(0).messages[2]["content"]) / BYTES_PER_TOKEN)
        assert kind.answered == kind.measured == kind.rejected == 0


def test_a_tokenizer_counts(tmp_path):
    synthesis, tokenizer = make_synthesis(tmp_path, 5, conversation=0, complex=0), Tokenizer.load(TOKENIZER)
    (kind,) = estimate(synthesis, {}, tokenizer)
    texts = [[message["content"] for message in task.request(0).messages] for task in synthesis]
    exact = statistics.fmean(sum(len(tokenizer.encode(text)) + 4 for text in one) for one in texts)
    assert kind.prompt == pytest.approx(exact)


def test_answers_of_the_log_say_how_long_others_are(tmp_path):
    """Half of the tasks are answered, a quarter of these answers rejected; then the rest is asked and compared."""
    synthesis = make_synthesis(tmp_path, 40, detail=0, complex=0, attempts=2)
    with AnswerLog(str(tmp_path / "log")) as log:
        for number, task in enumerate(list(synthesis)[:20]):
            text = "" if number % 4 == 0 else good_answer(task)
            tokens = {"prompt_tokens": task.request(0).bytes // 3, "completion_tokens": 100 + number}
            log.append(task.key(0), reply(text, **tokens))
        (kind,) = estimate(synthesis, log)
    assert (kind.tasks, kind.answered, kind.measured, kind.rejected) == (40, 20, 20, 0.25)
    assert kind.requests == 25  # 20, and a quarter of them again
    assert kind.completion == pytest.approx(109.5)
    mean = statistics.fmean(task.request(0).bytes for task in synthesis)
    assert kind.prompt == pytest.approx(mean / 3, rel=0.02)


def test_few_answers_among_many_tasks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_TASKS", 5)
    synthesis = make_synthesis(tmp_path, 200, detail=0, complex=0)
    with AnswerLog(str(tmp_path / "log")) as log:
        log.append(synthesis[150].key(0), reply(good_answer(synthesis[150]), completion_tokens=77))
        (kind,) = estimate(synthesis, log)
    assert (kind.answered, kind.measured, kind.completion, kind.requests) == (1, 1, 77, 199)


def test_servers_that_count_no_tokens(tmp_path):
    synthesis = make_synthesis(tmp_path, 4)
    with AnswerLog(str(tmp_path / "log")) as log:
        for task in synthesis:
            log.append(task.key(0), reply(good_answer(task), prompt_tokens=0, completion_tokens=0))
        assert all(kind.prompt > 0 and kind.completion > 0 and not kind.requests for kind in estimate(synthesis, log))


def test_cost_by_hand(tmp_path):
    (kind,) = estimate(make_synthesis(tmp_path, 10, detail=0, complex=0), {})
    price = Price(prompt=2.0, completion=8.0, cached=0.5, batch=0.5)
    found = cost([kind], price)
    assert found.full == pytest.approx(10 * (kind.prompt * 2 + kind.completion * 8) / 1e6)
    assert found.cached == pytest.approx(10 * (kind.own * 2 + kind.shared * 0.5 + kind.completion * 8) / 1e6)
    assert found.batch == pytest.approx(found.full / 2)
    assert f"{found.full:,.2f} USD" in describe([kind], price, 3) and "USD" not in describe([kind], None, 3)
