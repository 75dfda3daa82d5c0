"""Several processes on this machine: what they agree on, and how all end when one of them does."""

import asyncio
import io
import json
import re
import signal
import socket
import threading
import types

import pytest
from member import ERRORS
from starting import finish, start

from llava_jax.parallel import coordinator
from llava_jax.parallel import processes as group
from llava_jax.parallel.cluster import ClusterInfo


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
    member = group.ProcessGroup(ClusterInfo("a:1", 0, 2), ours, io.StringIO())
    member.steps = 6
    member.receive({"kind": "where"})
    assert json.loads(theirs.recv(100)) == {"kind": "here", "step": 6}
    answers = []
    step = threading.Thread(target=lambda: answers.append(member.should_stop(0)))
    step.start()
    step.join(0.2)
    assert answers == []
    member.receive({"kind": "stop", "step": 8, "signal": 15})
    step.join()
    assert answers + [member.should_stop(0)] == [0, 15]


def test_a_death_goes_before_the_errors_that_it_causes(monkeypatch):
    """Process 0 reports that a connection broke; a moment later process 1 is found dead."""
    monkeypatch.setattr(coordinator, "ERROR_DELAY", 0.01)

    async def meet() -> str:
        told = coordinator.Coordinator(2, ["a", "b"], 60, 1)
        told.on_failed(0, "Gloo: connection reset by peer", coordinator.FAULT)
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


@pytest.mark.parametrize("error, code, line", [
    ("UserError", 2, "data.json row 7: the image is broken"),
    ("RuntimeError", 1, "RuntimeError: no room for it"),
    ("MemoryError", 1, "MemoryError:"),
    ("KeyError", 1, "KeyError: 'width'"),
    ("OSError", 1, "OSError: [Errno 5] Input/output error: '/mnt/data.json'"),
    ("JaxRuntimeError", 1, "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"),
    ("KeyboardInterrupt", 130, "was interrupted"),
    ("SystemExit", 75, "was stopped"),
])
def test_an_error_is_sent_in_one_line_with_the_exit_code(monkeypatch, error, code, line):
    sent = []
    monkeypatch.setattr(group, "_group", types.SimpleNamespace(code=0, abort=lambda *message: sent.append(message)))
    with pytest.raises(type(ERRORS[error])), group.abort_all_on_error():
        raise ERRORS[error]
    assert sent == [(line, code)]


@pytest.mark.parametrize("error, code", [("RuntimeError", 1), ("KeyboardInterrupt", 130)])
def test_an_error_of_one_process_ends_all_with_one_code(error, code):
    codes, _, errors = finish(start(f"{error}:1", 2))
    assert codes == [code] * 2, errors
    assert re.fullmatch(r"error: process 1 \(\S+\): (RuntimeError: no room for it|was interrupted)\n", errors[0])
    assert ("Traceback" in errors[1]) == (code == 1)


@pytest.mark.parametrize("error, code", [pytest.param("OSError", 1, marks=pytest.mark.slow), ("UserError", 2)])
def test_each_of_several_processes_that_fail_shows_its_error(error, code):
    codes, _, errors = finish(start(f"{error}:02", 3))
    assert codes == [code] * 3, errors
    for told in errors[::2]:
        assert ("Traceback" in told) == (code == 1) and (code == 1 or "error: data.json row 7" in told)
    assert len(errors[1].splitlines()) == 1 and re.match(r"error: process [02] \(", errors[1])


def test_a_silent_process_is_given_up():
    processes = start("stall:1", 2, silence=4)
    processes[0].wait(timeout=120)
    processes[1].kill()
    codes, _, (error, _) = finish(processes)
    assert codes == [75, -signal.SIGKILL]
    assert re.match(r"error: process 1 \(\S+\): has not been heard of for 4 s", error)


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
