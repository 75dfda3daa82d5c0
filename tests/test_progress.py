"""Progress without a terminal: lines on stderr, a minute apart."""

import pytest

from llava_jax import progress as module
from llava_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


def test_a_line_has_count_rate_time_left_and_note(clock):
    notes = [""]
    progress = Progress(5013, done=2, unit="answers", name="gqa", note=lambda: notes[0])
    assert progress.line() == "gqa 2 of 5,013 answers, 0 a minute"
    for fresh in (True, True, True, False):  # the last was found in a log
        clock[0] += 10
        progress.update(fresh)
    notes[0] = "33 % right"
    assert progress.line() == "gqa 6 of 5,013 answers, 4.5 a minute, 18:32:40 left, 33 % right"
    assert Progress().line() == "0 jobs, 0 a minute"


def test_lines_come_a_minute_apart_and_on_demand(clock, capsys):
    progress = Progress(unit="steps")
    for _ in range(13):
        clock[0] += 10
        progress.update()
    progress.print("a \x1b[31mline")
    progress.show()
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "7 steps, 6 a minute", "a \N{REPLACEMENT CHARACTER}[31mline", "13 steps, 6 a minute"]


def test_a_disabled_one_prints_nothing(clock, capsys):
    progress = Progress(enabled=False)
    clock[0] += 1000
    progress.update()
    progress.show()
    progress.print("text")
    assert capsys.readouterr() == ("", "")
