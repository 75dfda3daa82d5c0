"""Run by test_group.py in several processes: one member of a group, in which something happens.

member.py SCENARIO [CONNECT_TIMEOUT HEARTBEAT_TIMEOUT], where SCENARIO is agree, late, missing,
or NAME:PROCESSES with NAME kill, stall, or one of ERRORS.
"""

import errno
import os
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_jax import cli, config
from llava_jax.errors import UserError
from llava_jax.parallel import processes as group
from llava_jax.parallel.processes import initialize
from llava_jax.train import output

STEPS = 500


def agree() -> None:
    """What all say to each other, and where they stop when one, the last, is asked to in its fifth step."""
    me, last = jax.process_index(), jax.process_count() - 1
    print("gathered", group.allgather_object("numbers", me * 10), group.allreduce_sum("numbers", [1, me]))
    data = config.Data(path="unused")
    stage = config.Stage(learning_rates=((".*", 1.0),), data=data)
    folder = os.path.join(sys.argv[4], str(me))
    for disagree in (lambda: group.assert_equal_across_processes("the recipe", {"rows": 8, "seed": me // last}),
                     lambda: output.check_shared(config.Recipe(config.Model(llava="unused"), {"a": stage}, folder))):
        try:
            disagree()
        except group.CollectiveError as error:
            print("differ", error)
    for step in range(1, STEPS + 1):
        multihost_utils.process_allgather(np.float64(step))
        if number := group.should_stop(signal.SIGTERM if me == last and step >= 5 else 0):
            print("stopped", step, number)
            return


def late() -> None:
    """Process 1 never comes."""
    if jax.process_index() == 1:
        signal.pause()
    group.allgather_object("checkpoint 5", None, seconds=1)


ERRORS = {
    "UserError": UserError("data.json row 7: the image is broken"),
    "RuntimeError": RuntimeError("no room\nfor it"),
    "MemoryError": MemoryError(),
    "KeyError": KeyError("width"),
    "OSError": OSError(errno.EIO, "Input/output error", "/mnt/data.json"),
    "JaxRuntimeError": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "SystemExit": SystemExit(75),
}


def steps(event: str, processes: str) -> None:
    """Steps on the devices of all; in the fifth something happens to these processes."""
    for step in range(STEPS):
        multihost_utils.process_allgather(np.float64(step))
        if step == 5 and str(jax.process_index()) in processes:
            if event in ERRORS:
                raise ERRORS[event]
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stall": signal.SIGSTOP}[event])


def main(args: list[str]) -> None:
    group.CONNECT_TIMEOUT, group.HEARTBEAT_TIMEOUT = float(args[1]), float(args[2])
    output.VISIBLE_TIMEOUT = 0.0
    scenario, _, processes = args[0].partition(":")
    initialize()
    with group.abort_all_on_error():
        steps(scenario, processes) if processes else {"agree": agree, "late": late}[scenario]()


if __name__ == "__main__":
    cli.run(main)
