"""Run by test_group.py in several processes: one member of a group, in which something happens.

member.py SCENARIO [MEETING SILENCE]; SCENARIO: agree, late, missing, or NAME:PROCESS with NAME kill, stall or fail.
"""

import os
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_jax import config, sharding
from llava_jax.processes import group
from llava_jax.training import output

STEPS = 500


def agree() -> None:
    """What all say to each other, and where they stop when one, the last, is asked to in its fifth step."""
    me, last = jax.process_index(), jax.process_count() - 1
    print("gathered", group.gather("numbers", me * 10), group.total("numbers", [1, me]))
    data = config.Data(path="unused")
    stage = config.Stage(learning_rates=((".*", 1.0),), data=data)
    folder = os.path.join(sys.argv[4], str(me))
    for disagree in (lambda: group.agree("the recipe", {"rows": 8, "seed": me // last}),
                     lambda: output.check_shared(config.Recipe(config.Model(llava="unused"), {"a": stage}, folder))):
        try:
            disagree()
        except group.Everywhere as error:
            print("differ", error)
    for step in range(1, STEPS + 1):
        multihost_utils.process_allgather(np.float64(step))
        if number := group.stopping(signal.SIGTERM if me == last and step >= 5 else 0):
            print("stopped", step, number)
            return


def late() -> None:
    """Process 1 never comes."""
    if jax.process_index() == 1:
        signal.pause()
    group.gather("checkpoint 5", None, seconds=1)


def steps(event: str, process: int) -> None:
    """Steps on the devices of all; in the fifth something happens to one process."""
    for step in range(STEPS):
        multihost_utils.process_allgather(np.float64(step))
        if step == 5 and jax.process_index() == process:
            if event == "fail":
                raise KeyError("data.json row 7: the image is broken")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stall": signal.SIGSTOP}[event])


if __name__ == "__main__":
    group.MEETING, group.SILENCE = float(sys.argv[2]), float(sys.argv[3])
    output.SEEN_WITHIN = 0.0
    scenario, _, process = sys.argv[1].partition(":")
    sharding.connect()
    with group.shared_fate():
        steps(scenario, int(process)) if process else {"agree": agree, "late": late}[scenario]()
