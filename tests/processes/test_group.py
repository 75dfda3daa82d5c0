"""Several processes on this machine: what they agree on, and how all end when one of them does."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava_jax.processes import coordinator, group

SCRIPT = Path(__file__).with_name("member.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(scenario: str, count: int, present: range | None = None, meeting: float = 60, silence: float = 60,
          folder: str = "") -> list[subprocess.Popen]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": str(count),
                                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, str(SCRIPT), scenario, str(meeting), str(silence), str(folder)]
    return [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in present or range(count)]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[list[str]], list[str]]:
    """Exit codes, the lines of output that are ours, and everything on stderr."""
    try:
        both = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [[line for line in out.splitlines() if "[Gloo]" not in line and "is connected to" not in line]
               for out, _ in both]
    return [process.returncode for process in processes], outputs, [err for _, err in both]


def test_all_hear_all_and_stop_after_the_same_step(tmp_path):
    codes, outputs, errors = finish(start("agree", 3, folder=tmp_path))
    assert codes == [0, 0, 0], errors
    for i in range(3):  # each had a folder of its own
        outputs[i][2] = outputs[i][2].removeprefix(f"differ {tmp_path}/{i}: ")
    assert outputs[0] == outputs[1] == outputs[2]
    numbers, recipe, folder, stopped = outputs[0]
    assert numbers == "gathered [0, 10, 20] [3, 3]"
    assert re.fullmatch(r"differ the recipe: process 2 \(\S+\) differs from process 0 in seed \(1, not 0\)", recipe)
    assert folder.startswith("what process 0 writes there is not seen by process 1, 2; give an --output that all hosts")
    _, step, number = stopped.split()  # the last process was asked in step 5, and word takes its time
    assert 5 <= int(step) < 500 and int(number) == signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_no_step_begins_while_the_last_one_is_agreed_on():
    ours, theirs = socket.socketpair()
    member = group.Group.__new__(group.Group)
    member.socket, member.sending, member.changed = ours, threading.Lock(), threading.Condition()
    member.calls, member.asked, member.paused, member.stop_at = 6, False, False, None
    member._on_where()
    assert json.loads(theirs.recv(100)) == {"kind": "here", "step": 6}
    answers = []
    step = threading.Thread(target=lambda: answers.append(member.stopping(0)))
    step.start()
    step.join(0.2)
    assert answers == []
    with member.changed:
        member._on_stop(step=8, number=15)
        member.changed.notify_all()
    step.join()
    assert answers + [member.stopping(0)] == [0, 15]


def test_a_death_goes_before_the_errors_that_it_causes(monkeypatch):
    """Process 0 reports that a connection broke; a moment later process 1 is found dead."""
    monkeypatch.setattr(coordinator, "ECHO", 0.01)

    async def meet() -> str:
        told = coordinator.Coordinator(2, ["a", "b"], 60, 1, close=lambda: None)
        told.on_failed(0, "Gloo: connection reset by peer")
        told.lose(1, "has ended")
        await asyncio.sleep(0.02)
        return told.verdict

    process, line = asyncio.run(meet())
    assert process == 1 and line.startswith("process 1 (b): has ended")


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_process_is_named_by_the_others(process):
    codes, _, errors = finish(start(f"kill:{process}", 2))
    assert codes[process] == -signal.SIGKILL
    assert codes[1 - process] == 75
    line, = errors[1 - process].splitlines()
    assert re.match(rf"error: process {process} \(\S+\): has ended without a word", line)


def test_an_error_of_one_process_is_told_by_all():
    codes, _, errors = finish(start("fail:1", 3))
    assert codes == [2, 2, 2]
    for error in errors[::2]:
        assert re.fullmatch(r"error: process 1 \(\S+\): data.json row 7: the image is broken\n", error)
    assert errors[1].splitlines()[-1] == "KeyError: 'data.json row 7: the image is broken'"


def test_a_silent_process_is_given_up():
    processes = start("stall:1", 2, silence=5)
    processes[0].wait(timeout=120)
    processes[1].kill()
    codes, _, (error, _) = finish(processes)
    assert codes == [75, -signal.SIGKILL]
    assert re.match(r"error: process 1 \(\S+\): has not been heard of for 5 s", error)


def test_a_barrier_names_who_is_late():
    codes, _, errors = finish(start("late", 2))
    assert codes == [75, 75]
    for error in errors:
        assert re.fullmatch(r"error: checkpoint 5: waited 1 s for process 1 \(\S+\)\n", error)


def test_a_process_that_was_not_started_is_named():
    (code,), _, (error,) = finish(start("agree", 2, present=range(1), meeting=1))
    assert code == 75
    assert error == "error: start: waited 1 s for process 1\n"


def test_a_process_0_that_was_not_started_is_named():
    (code,), _, (error,) = finish(start("agree", 2, present=range(1, 2), meeting=0.1))
    assert code == 75
    assert re.match(r"error: process 0 at 127.0.0.1:\d+ has not answered for 0 s", error)
