"""The replay of a schedule: answers by hand, and random schedules against a simulation that repeats every round."""

import random

import pytest

from llava_jax.plan import costs
from llava_jax.plan.hlo import Instruction
from llava_jax.plan.replay import Loop, Op, Profile, times
from llava_jax.plan.topologies import parse

WHERE = parse("v5e-4")
MS = round(WHERE.chip.clock / 1e3)
"""Cycles of a millisecond."""
SENT = 93e6
"""Bytes that a ring of two sends in a millisecond, if the complete array has twice as many."""


def work(milliseconds: float, *, start: str = "", end: str = "", sync: str = "", sent: float = 0, kind="all-gather",
         runs: int = 1) -> Op:
    """Returns an instruction that computes, starts or runs a collective, or waits for its end."""
    name = "async-collective-start" if start else "async-collective-done" if end else "fusion"
    cycles = f'backend_config={{"estimated_cycles":"{round(milliseconds * MS)}"}}'
    found = (costs.Collective(kind, 2 * SENT * sent, 2, 1, start or sync),) if start or sync else ()
    return Op(Instruction(name, "fusion", (), (), cycles), runs, found, ((1, end),) if end else ())


def step(*schedule: Op | Loop) -> tuple[float, float]:
    """Returns the milliseconds of a step, and those of waiting."""
    found = times(Profile(schedule), WHERE)
    return pytest.approx(1e3 * found.step, rel=1e-5), pytest.approx(1e3 * found.waits, abs=1e-4)


def test_what_computation_hides_costs_nothing_and_the_remainder_is_waited_for():
    assert step(work(0, start="a", sent=2), work(3), work(0, end="a")) == (3, 0)
    assert step(work(0, start="a", sent=5), work(3), work(0, end="a"), work(1)) == (6, 2)
    assert step(work(1), work(0, sync="a", sent=2), work(1)) == (4, 2)
    assert step(work(3, sync="a", sent=2)) == (3, 0)  # inside a fusion that computes
    assert step(work(1, sync="a", sent=2)) == (2, 1)


def test_collectives_share_the_links_and_all_reduces_use_both_axes():
    assert step(work(0, start="a", sent=2), work(0, start="b", sent=2), work(1), work(0, end="b")) == (4, 3)
    assert step(work(0, start="a", sent=2), work(0, sync="b", sent=1), work(0, end="a")) == (3, 3)
    assert step(work(0, sync="a", sent=2, kind="all-reduce")) == (2, 2)


def test_a_collective_may_end_in_a_later_round():
    body = (work(0, end="a", runs=100), work(2, runs=100), work(0, start="a", sent=3, runs=100))
    assert step(Loop(100, body), work(0, end="a")) == (500, 300)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_take_as_long_as_when_every_round_is_simulated(seed):
    rng, names = random.Random(seed), iter(range(1000))

    def random_schedule(depth: int, runs: int) -> list[Op | Loop]:
        schedule = []
        for _ in range(rng.randint(2, 6)):
            if depth and rng.random() < 0.3:
                rounds = rng.randint(0, 40)
                schedule.append(Loop(rounds, tuple(random_schedule(depth - 1, runs * rounds))))
                continue
            name = str(next(names))
            schedule.append(work(0, start=name, sent=rng.random() * 4, runs=runs))
            schedule += [work(rng.random() * 3, runs=runs) for _ in range(rng.randint(0, 2))]
            if rng.random() < 0.3:
                schedule.append(work(0, sync=str(next(names)), sent=rng.random(), runs=runs))
            schedule.append(work(0, end=name, runs=runs))
        return schedule

    schedule = random_schedule(2, 1)
    now = free = 0.0
    ends = {}

    def simulate(schedule: list[Op | Loop]) -> None:
        nonlocal now, free
        for each in schedule:
            if isinstance(each, Loop):
                for _ in range(each.rounds):
                    simulate(each.body)
                continue
            for collective in each.collectives:
                free = max(now, free) + collective.bytes / 2 / 93e9
                ends[collective.channel] = free
            now += each.instruction.cycles / WHERE.chip.clock
            if each.instruction.name == "fusion" and each.collectives:
                now = max(now, free)
            now = max([now, *(ends[channel] for _, channel in each.awaits if channel in ends)])

    simulate(schedule)
    assert times(Profile(tuple(schedule)), WHERE).step == pytest.approx(now, rel=1e-9)
