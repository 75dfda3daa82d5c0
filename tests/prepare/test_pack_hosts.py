"""Hosts that pack together, and Beam's local runner: the same bytes as one process."""

import contextlib
import errno
import os
import re
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from pack_data import KILLS, contents, run, with_tfds, write_data

from llava_jax import cli
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError
from llava_jax.prepare import pack, shards
from llava_jax.prepare.pack import Pack


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, str]:
    return contents(run(data, tmp_path_factory.mktemp("whole") / "set", shards=7))


# Packs on three hosts at the same time: forked children, which kill themselves at their N-th row or renaming. One round
# for every argument, N,N,N; then says how the children ended.
HOSTS = KILLS + """
for moments in sys.argv[3:]:
    children = []
    for host, number in enumerate(map(int, moments.split(","))):
        children.append(os.fork())
        if not children[-1]:
            left, shards.Examples.load, os.replace = number, loads, replaces
            os._exit(Pack(data=data, out=out, shards=7, workers=0, hosts=3, host=host).run())
    print("ended", [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.parametrize(
    "rounds", [["999,999,999"], ["0,1,2", "6,3,4", "9,999,3", "14,7,0"]])
def test_hosts_at_the_same_time_killed_or_not(data, whole, tmp_path, rounds):
    out = tmp_path / "set"
    command = [sys.executable, "-W", "ignore", "-c", HOSTS, data, out, *rounds]
    ended = subprocess.run(command, capture_output=True, text=True)
    killed = [any(int(moment) < 999 for moment in moments.split(",")) for moments in rounds]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("ended")]
    assert len(lines) == len(rounds) and not ended.stderr, ended.stderr
    assert [("-9" in line) for line in lines] == killed, lines
    if any(killed):
        with pytest.raises(UserError, match="a pack into it has not finished"):
            open_source(out)
        for host in range(2):  # two go on where three were
            run(data, out, shards=7, hosts=2, host=host)
    assert contents(out) == whole


def test_the_last_host_completes_the_set(data, whole, tmp_path, capsys):
    out = tmp_path / "set"
    for host, missing in ((2, 5), (0, 2)):
        run(data, out, shards=7, hosts=3, host=host)
        assert capsys.readouterr().out.endswith(
            f"this host is done; {missing} of 7 shards are missing; the last host completes the data set\n")
        with pytest.raises(Exception, match="Could not read dataset info"):
            tfds.builder_from_directory(out)
    run(data, out, shards=7, hosts=3, host=1)
    assert "24 rows with" in capsys.readouterr().out
    for options in ({"hosts": 3, "host": 0}, {"hosts": 3, "host": 1}, {"hosts": 4, "host": 3}, {"runner": "Flink"}):
        run(data, out, shards=7, **options)  # started, or started again, when there is nothing to do
        assert "is finished; this command has nothing to do" in capsys.readouterr().out
    assert contents(out) == whole


def test_two_hosts_make_the_plan_at_the_same_time(data, whole, tmp_path, monkeypatch):
    new_bounds, out = pack._new_bounds, tmp_path / "set"

    def other_first(*args):
        monkeypatch.setattr(pack, "_new_bounds", new_bounds)
        run(data, out, shards=7, hosts=2, host=0)
        return new_bounds(*args)

    monkeypatch.setattr(pack, "_new_bounds", other_first)
    run(data, out, shards=7, hosts=2, host=1)
    assert contents(out) == whole


def test_a_host_that_starts_while_the_last_one_completes_it(data, whole, tmp_path, monkeypatch, capsys):
    lock, out = pack._lock, tmp_path / "set"

    @contextlib.contextmanager
    def others_first(*args):
        monkeypatch.setattr(pack, "_lock", lock)
        for host in range(2):
            run(data, out, shards=7, hosts=2, host=host)
        with lock(*args):
            yield

    monkeypatch.setattr(pack, "_lock", others_first)
    run(data, out, shards=7, hosts=2, host=1)
    assert capsys.readouterr().out.count("is finished; this command has nothing to do") == 1
    assert contents(out) == whole


def test_two_hosts_complete_it_at_the_same_time(data, whole, tmp_path, monkeypatch, capsys):
    finish, write = Pack._finish, pack.write_json

    def other_first(self, *args):
        def writes(*arguments):
            monkeypatch.setattr(pack, "write_json", write)
            finish(self, *args)  # the other host completes the set and deletes the state
            write(*arguments)

        monkeypatch.setattr(pack, "write_json", writes)
        finish(self, *args)

    monkeypatch.setattr(Pack, "_finish", other_first)
    run(data, tmp_path / "set", shards=7, hosts=2, host=0)
    run(data, tmp_path / "set", shards=7, hosts=2, host=1)
    assert contents(tmp_path / "set") == whole


def test_bad_rows_of_all_hosts_are_reported_together(tmp_path, capsys):
    path = write_data(tmp_path / "data")
    names = sorted(name for name in os.listdir(tmp_path / "data") if name.endswith((".jpeg", ".png")))[::4]
    for name in names:
        os.unlink(tmp_path / "data" / name)
    messages = []
    for options in ({}, {"hosts": 2, "host": 0}, {"hosts": 2, "host": 1}):
        with pytest.raises(UserError) as error:
            run(path, tmp_path / f"set {len(options)}", shards=6, **options)
        messages.append(str(error.value))
    assert messages[2] == messages[0] != messages[1]
    run(path, tmp_path / "set 2", shards=6, hosts=2, host=0, bad_rows="skip")  # both have their shards: it completes
    skipped = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"left out: \d+ rows \(missing_image \d+\)", skipped)
    run(path, tmp_path / "set 0", shards=6, bad_rows="skip", overwrite=True)
    assert with_tfds(tmp_path / "set 0") == with_tfds(tmp_path / "set 2")


def test_position_of_a_process_of_a_cluster(data, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    for process in ("0", "1"):
        monkeypatch.setenv("JAX_PROCESS_ID", process)
        options = [data, str(tmp_path / "set"), "--shards", "7", "--workers", "0", "--hosts", "cluster"]
        assert cli.parse(Pack, options, prog="pack").run() == 0
        assert len(list(tmp_path.glob("set/*.array_record*"))) == (4, 7)[int(process)]
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": 2, "host": 2}, "--host is 2: with --hosts 2 it must be less"),
        ({"host": 1}, "--host is 1: with --hosts 1 it must be less"),
        ({"host": -1}, "--host is -1: it must be at least 0"),
        ({"hosts": 2, "overwrite": True}, "--overwrite is for one host; delete the folder, then start all hosts"),
        ({"hosts": 2, "runner": "DirectRunner"}, "--runner has workers of its own; leave out --hosts"),
    ],
)
def test_positions_that_cannot_be(data, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(data, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


class TestBeam:
    @pytest.fixture(autouse=True)
    def beam(self):
        return pytest.importorskip("apache_beam", reason="apache-beam is not installed")

    def test_the_local_runner_writes_the_same_bytes(self, data, whole, tmp_path):
        out = run(data, tmp_path / "set", shards=7, runner="DirectRunner")
        assert contents(out) == whole

    def test_it_continues_what_workers_have_left_and_the_other_way_round(self, data, whole, tmp_path):
        out = tmp_path / "set"
        run(data, out, shards=7, hosts=2, host=0)
        held = [os.stat(file).st_mtime_ns for file in sorted(out.glob("*.array_record*"))]
        run(data, out, shards=7, runner="DirectRunner")
        assert contents(out) == whole
        assert [os.stat(file).st_mtime_ns for file in sorted(out.glob("*.array_record*"))[::2]] == held

    def test_bad_rows_and_errors(self, tmp_path, monkeypatch):
        path = write_data(tmp_path / "data")
        names = [name for name in os.listdir(tmp_path / "data") if name.endswith(".png")]
        for name in names:
            os.unlink(tmp_path / "data" / name)
        with pytest.raises(UserError, match=r"rows cannot be used \(missing_image"):
            run(path, tmp_path / "set", runner="DirectRunner")
        with pytest.raises(UserError, match="--runner Nonsense.*: Unexpected pipeline runner: Nonsense. Valid values"):
            run(path, tmp_path / "other", runner="Nonsense")
        with pytest.raises(UserError, match="direct_num_workers=many: invalid value of an option"):
            run(path, tmp_path / "other", runner="DirectRunner", runner_options=("direct_num_workers=many",))

        def no_space(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shards.Examples, "load", no_space)
        with pytest.raises(UserError, match="other: No space left on device; make room; 0 shards are finished"):
            run(path, tmp_path / "other", runner="DirectRunner", runner_options=())


def test_beam_that_is_not_there(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--runner needs Apache Beam: pip install 'llava_jax\[beam\]'"):
        run(data, tmp_path / "set", runner="DirectRunner")
