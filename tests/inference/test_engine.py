"""Requests that come and go in the slots of one decode state, against each of them alone."""

import numpy as np
import pytest

from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.engine import Engine, Prompt
from llava_jax.inference.llava import Request
from llava_jax.models.llava import abstract_params

SLOTS, LENGTH, STEPS = 4, 192, 3


@pytest.fixture(scope="module")
def engine(llava):
    graph, _ = abstract_params(llava.config)
    return Engine(graph, llava.parameters, eos_ids=(2,))


@pytest.fixture(scope="module")
def prompts(llava, pictures):
    """Twelve: 0 to 2 images, greedy and drawn, prompts and answers of different lengths."""
    prompts = []
    for i in range(12):
        images = pictures[i % 4 : i % 4 + i % 3]
        text = "<image>\n" * len(images) + f"What is thing number {i}?" + " Why?" * i
        request = Request(text, images, max_new_tokens=1 + 5 * (i % 5), temperature=0.7 * (i % 4 == 3), top_p=0.9,
                          seed=i)
        prompts.append(llava._prompt(request, *llava._encode(request), llava._tiles(images)))
    return prompts


def answer_alone(engine, prompt):
    """The tokens of an answer that is decoded where it was prefilled, without an insertion."""
    state, tokens = engine.prefill([prompt], length=LENGTH)
    answer = np.asarray(tokens)[0].tolist()
    while int(state.remaining[0]):
        state, tokens = engine.decode(state, [True])
        answer += [token for token in np.asarray(tokens)[0].tolist() if token != NO_TOKEN]
    return answer


def serve(engine, prompts, arrivals):
    """The tokens of each answer. A prompt is inserted once its time has come and a slot is free."""
    state = engine.empty_state(SLOTS, LENGTH)
    owners, waiting, answers = [None] * SLOTS, list(zip(arrivals, range(len(prompts)), strict=True)), {}
    full = 0
    for time in range(1000):
        while waiting and waiting[0][0] <= time and None in owners:
            slot, number = owners.index(None), waiting.pop(0)[1]
            prefix, first = engine.prefill([prompts[number]])
            answers[number] = np.asarray(first)[0].tolist()
            if len(answers[number]) < prompts[number].max_new_tokens and answers[number][-1] != 2:
                state = engine.insert(state, prefix, [slot])
                owners[slot] = number
        if not waiting and owners == [None] * SLOTS:
            return [answers[number] for number in range(len(prompts))], full
        full += None not in owners
        state, tokens = engine.decode(state, [owner is not None for owner in owners], STEPS)
        for slot, row in enumerate(np.asarray(tokens)):
            row = row[row != NO_TOKEN].tolist()
            number = owners[slot]
            if number is None:
                assert not row  # a free slot writes nothing
                continue
            answers[number] += row
            if len(answers[number]) == prompts[number].max_new_tokens or answers[number][-1] == 2:
                owners[slot] = None
    raise AssertionError("some request was never answered")


@pytest.mark.bits
def test_requests_inserted_at_different_times_are_answered_as_alone(engine, prompts):
    alone = [answer_alone(engine, prompt) for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) == len(prompts) and max(map(len, alone)) == 21
    for arrivals in ([0] * 12, list(range(12)), [0, 0, 1, 2, 2, 2, 5, 5, 6, 9, 9, 9]):
        answers, full = serve(engine, prompts, arrivals)
        assert answers == alone
        assert full >= 2  # prompts waited for a slot


@pytest.mark.bits
def test_a_batch_is_a_state_of_its_own(engine, prompts):
    """Rows of one prefill go to slots in any order, and padding rows go nowhere."""
    state, wanted = engine.prefill(prompts[4:7], length=LENGTH)
    prefix, first = engine.prefill(prompts[4:7])
    np.testing.assert_array_equal(first, wanted)
    assert np.asarray(first)[3].tolist() == [NO_TOKEN]
    other, token = engine.prefill(prompts[8:9])
    moved = engine.insert(engine.empty_state(SLOTS, LENGTH), other, [1])
    moved = engine.insert(moved, prefix, [3, 2, 0])
    _, wanted = engine.decode(state, [True] * 3 + [False])
    moved, tokens = engine.decode(moved, [True] * SLOTS)
    np.testing.assert_array_equal(np.asarray(tokens)[[3, 2, 0]], np.asarray(wanted)[:3])
    _, own = engine.decode(engine.prefill(prompts[8:9], length=LENGTH)[0], [True])
    assert np.asarray(tokens)[1].tolist() == np.asarray(own)[0].tolist()


def test_a_prompt_longer_than_the_state_is_refused(engine, prompts):
    long = Prompt(np.full(200, 5, np.int32), np.zeros((0, 28, 28, 3), np.uint8), (), 5, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="longer than the cache"):
        engine.insert(engine.empty_state(1, 64), engine.prefill([long])[0], [0])
