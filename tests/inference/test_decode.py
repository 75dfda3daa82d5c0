"""What the device does with rows that end: the host would not see a token too many, but would wait for it."""

from functools import partial

import jax
import numpy as np
import pytest

from llava_jax.inference import decode as module
from llava_jax.inference.decode import MAX_DECODE_STEPS, NO_TOKEN, decode, prefill
from llava_jax.inference.sampling import Sampling
from llava_jax.models.llava import abstract_params, from_params

ROWS = 4
LIMITS = np.array([50, 3, 0, 50], np.int32)


@pytest.fixture(scope="module")
def chain(tokenizer, reciting):
    """The tokens that the model writes, the end token last."""
    return reciting.generate("Say it.", max_new_tokens=50).tokens


@pytest.fixture(scope="module")
def started(reciting, chain):
    """The state after the prompts, their first tokens, and a jitted `decode`. Row 3 starts within the text.

    Row 2 only fills the batch; its position is made to count the steps that the device takes.
    """
    graph, _ = abstract_params(reciting.config)
    tokens = np.zeros((ROWS, 8), np.int32)
    tokens[:, 4] = reciting.tokenizer.encode("ASSISTANT:")[-1]
    tokens[3, 4] = chain[-5]
    sampling = Sampling(np.zeros((ROWS, 2), np.uint32), np.zeros(ROWS, np.float32), np.ones(ROWS, np.float32))
    eos_ids = (reciting.tokenizer.eos_id,)
    write = module.write

    def counting(*args):
        state, token = write(*args)
        return state._replace(position=state.position.at[2].add(1)), token

    @jax.jit
    def read(parameters):
        lengths = np.full(ROWS, 5, np.int32)
        model = from_params(graph, parameters)
        return prefill(model, tokens, lengths, None, None, None, LIMITS, sampling, eos_ids, length=64)

    @jax.jit
    def go_on(parameters, state, going, steps):
        return decode(from_params(graph, parameters), state, going, steps, eos_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write", counting)
        yield *read(reciting.parameters), partial(go_on, reciting.parameters)


def test_rows_end_at_their_limit_and_at_the_end_token(started, chain):
    state, first, go_on = started
    assert first[:, 0].tolist() == [chain[0], chain[0], NO_TOKEN, chain[-4]]
    assert state.remaining.tolist() == [49, 2, 0, 49]
    state, written = go_on(state, np.ones(ROWS, bool), MAX_DECODE_STEPS)
    nothing = [NO_TOKEN] * MAX_DECODE_STEPS
    assert written.tolist() == [chain[1:17], chain[1:3] + nothing[2:], nothing, chain[-3:] + nothing[3:]]
    assert state.remaining.tolist() == [33, 0, 0, 0]
    assert state.position.tolist() == [5 + 16, 5 + 2, 4 + 1 + 16, 5 + 3]


def test_the_loop_stops_when_told_and_when_all_rows_ended(started, chain):
    state, _, go_on = started
    start = int(state.position[2])
    state, written = go_on(state, np.array([False, True, True, True]), 2)
    assert written[:, :3].tolist() == [[NO_TOKEN] * 3, [*chain[1:3], NO_TOKEN], [NO_TOKEN] * 3,
                                       [*chain[-3:-1], NO_TOKEN]]
    state, written = go_on(state, np.array([False, True, True, True]), MAX_DECODE_STEPS)
    assert (np.array(written) != NO_TOKEN).sum() == 1 and written[3, 0] == chain[-1]
    assert not state.remaining.any()
    assert state.position[2] == start + 2 + 1
