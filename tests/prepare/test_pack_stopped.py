"""A pack that is killed, interrupted, out of space or not alone: nothing is lost, and it goes on to the same bytes."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from pack_data import KILLS, Stopped, contents, encoded, run, stop, with_tfds, write_data

from llava_jax import files
from llava_jax.data.workers import Pool
from llava_jax.errors import UserError
from llava_jax.prepare import pack, progress, shards
from llava_jax.prepare.pack import Pack


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


# Packs in children that kill themselves at their N-th event: a row read, or a file given its name (before and after
# that). Prints the signal that ended each child, and what opening its set says.
KILLED = KILLS + """
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError
for number in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        left, shards.Examples.load, os.replace = number, loads, replaces
        Pack(data=data, out=out, shards=4, workers=0).run()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    try:
        open_source(out)
        print("opened")
    except UserError as error:
        print(os.WTERMSIG(status), error)
"""


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(data, tmp_path):
    complete, out = contents(run(data, tmp_path / "complete" / "set")), tmp_path / "killed" / "set"
    # Each continues where the one before was killed: before and after the plan got its name; in the first shard; before
    # and after that and its note got theirs; in the third shard; before features.json got its name, and after; before
    # dataset_info.json got its.
    moments = ("0", "1", "4", "6", "7", "8", "9", "15", "20", "1", "2")
    killed = subprocess.run([sys.executable, "-c", KILLED, data, out, *moments], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    lines = killed.stdout.splitlines()
    assert len(lines) == len(moments)
    assert all(line.startswith("9 ") and "a pack into it has not finished" in line for line in lines), lines
    with pytest.raises(Exception, match="Could not read dataset info"):
        tfds.builder_from_directory(out)
    assert {"features.json", ".pack/00003.json", ".pack/lock"} < set(contents(out))
    run(data, out)
    assert contents(out) == complete


def test_finished_shards_are_kept(data, tmp_path, monkeypatch):
    whole = contents(run(data, tmp_path / "whole" / "set"))
    out, write, called = tmp_path / "set", pack.ShardWriter.__call__, []

    def write_two(self, shard):
        return write(self, shard) if shard < 2 else stop()

    def write_and_say(self, shard):
        called.append(shard)
        assert leftover.exists() == (shard < 3)
        return write(self, shard)

    monkeypatch.setattr(pack.ShardWriter, "__call__", write_two)
    with pytest.raises(Stopped):
        run(data, out)
    names = [f"set-train.array_record-0000{k}-of-00004" for k in range(4)]
    assert sorted(os.listdir(out)) == [".pack", *names[:2]]
    os.truncate(out / names[1], 100)  # is not what its note says
    leftover = out / ".pack" / f".00002.json.{files.HOST}.01234567.tmp"
    leftover.write_bytes(b"part of a shard")
    monkeypatch.setattr(pack.ShardWriter, "__call__", write_and_say)
    run(data, out)
    assert called == [1, 2, 3]
    assert contents(out) == whole


@pytest.fixture
def begun(data, tmp_path, monkeypatch) -> Path:
    """A folder with part of a pack."""
    with monkeypatch.context() as patch:
        patch.setattr(Pack, "_finish", stop)
        with pytest.raises(Stopped):
            run(data, tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 5}, "other shards: 4 before, 5 now"),
        ({"image_size": 56}, "other images: as in the files before, format jpeg mode pad quality 95 size 56 now"),
        ({"split": "val"}, "other name: set 1.0.0 train before, set 1.0.0 val now"),
        ({"image_root": "/"}, "other data or image root; give the same to continue, another folder, or --overwrite"),
    ],
)
def test_another_pack_is_not_mixed_with_the_one_that_was_begun(data, begun, options, message):
    with pytest.raises(UserError, match=message):
        run(data, begun, **options)
    changed = options if "image_root" not in options else {"bad_rows": "skip"}
    run(data, begun, overwrite=True, **changed)
    assert len(with_tfds(begun, options.get("split", "train"))) == 24
    count = options.get("shards", 4)
    assert sum(name.endswith(f"-of-{count:05}") for name in os.listdir(begun)) == count


def test_a_pack_that_overwrites_goes_on_too(data, begun, monkeypatch):
    """Its shards are all finished: none is written again."""
    monkeypatch.setattr(pack.ShardWriter, "__call__", stop)
    run(data, begun, overwrite=True)
    assert len(with_tfds(begun)) == 24


def test_data_that_has_changed_since_is_not_mixed_in(begun, tmp_path):
    path = write_data(tmp_path / "data")
    run(path, tmp_path / "other")
    with pytest.raises(UserError, match="other data"):
        run(path, begun)


def test_a_file_that_has_changed_is_refused_by_name(tmp_path, monkeypatch):
    path, out = write_data(tmp_path / "data"), tmp_path / "set"
    whole = contents(run(path, tmp_path / "whole" / "set"))
    with monkeypatch.context() as patch:
        patch.setattr(Pack, "_finish", stop)
        with pytest.raises(Stopped):
            run(path, out)
    text, times = Path(path).read_text(encoding="utf-8"), os.stat(path)
    Path(path).write_text(text.replace("plain", "Plain"), encoding="utf-8")
    with pytest.raises(UserError, match=f"contains part of a pack, and {re.escape(path)} has changed since; give"):
        run(path, out)
    Path(path).write_text(text, encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents(run(path, out)) == whole


def test_a_file_that_changes_while_it_is_packed(tmp_path, monkeypatch):
    path, load = write_data(tmp_path / "data"), shards.Examples.load

    def change(self, number):
        os.utime(path, ns=(0, number))
        return load(self, number)

    monkeypatch.setattr(shards.Examples, "load", change)
    with pytest.raises(UserError, match=f"{re.escape(path)} has changed meanwhile; delete this folder and start anew"):
        run(path, tmp_path / "set")


def test_a_finished_set_is_not_overwritten_unasked(data, tmp_path):
    out = run(data, tmp_path / "set")
    before = contents(out)
    for options in ({"shards": 5}, {"bad_rows": "skip"}, {"image_size": 32}, {"max_pixels": 5}, {"name": "other"}):
        with pytest.raises(UserError, match="contains a data set already; give another folder, or --overwrite"):
            run(data, out, **options)
    os.utime(data)  # perhaps with other rows
    with pytest.raises(UserError, match="contains a data set already"):
        run(data, out)
    assert contents(out) == before
    run(data, out, overwrite=True, shards=2)
    assert len(with_tfds(out)) == 24 and len(contents(out)) == 4


def test_the_command_of_a_finished_set_says_so(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: stop())  # killed when only the state is left to delete
        with pytest.raises(Stopped):
            run(data, tmp_path / "set")
    for _ in range(2):
        run(data, tmp_path / "set", workers=1)
        assert capsys.readouterr().out == (f"{tmp_path}/set: is finished; this command has nothing to do (--overwrite "
                                           "packs it anew, as after a change of images)\n")
        assert contents(tmp_path / "set") == contents(run(data, tmp_path / "other" / "set"))
        capsys.readouterr()


def test_the_command_of_a_finished_set_leaves_alone_one_that_overwrites_it(data, tmp_path, monkeypatch):
    out, bounds = run(data, tmp_path / "set"), pack._new_bounds
    before = contents(out)

    def meanwhile(*args):
        with pytest.raises(UserError, match="another pack is writing to this folder"):
            run(data, out)
        return bounds(*args)

    monkeypatch.setattr(pack, "_new_bounds", meanwhile)
    assert contents(run(data, out, overwrite=True)) == before


def test_a_folder_of_other_things_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="contains other files .thesis.tex.; give an empty folder or a new one"):
        run(data, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="thesis.tex: is a file; give a folder"):
        run(data, tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


# Says that it has begun, and goes on when it is told to.
HELD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have a test in the background ignore it
from llava_jax.prepare import shards
from llava_jax.prepare.pack import Pack
load = shards.Examples.load
def loads(*args):
    shards.Examples.load = load
    print("begun", flush=True)
    sys.stdin.readline()
    return load(*args)
shards.Examples.load = loads
Pack(data=sys.argv[1], out=sys.argv[2], shards=4, workers=0).run()
"""


def test_two_packs_into_one_folder(data, tmp_path):
    out = tmp_path / "one" / "set"
    command = [sys.executable, "-c", HELD, data, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "begun\n"
        for options in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match="another pack is writing to this folder; wait for it"):
                run(data, out, **options)
        first.communicate("go on\n")
    assert first.returncode == 0
    assert contents(out) == contents(run(data, tmp_path / "two" / "set"))


def test_a_file_system_without_locks(data, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(with_tfds(run(data, tmp_path / "set"))) == 24


def test_ctrl_c_stops_at_once(data, tmp_path):
    command = [sys.executable, "-c", HELD, data, str(tmp_path / "set")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as held:
        assert held.stdout.readline() == b"begun\n"
        held.send_signal(signal.SIGINT)
        assert held.wait(20) == 130  # though its row is still held
        assert held.stderr.read().strip() == b"stopped; the same command continues from here"
    assert len(with_tfds(run(data, tmp_path / "set"))) == 24


def test_a_set_is_not_packed_onto_itself(data, tmp_path):
    out = run(data, tmp_path / "set")
    before = contents(out)
    with pytest.raises(UserError, match="is in this folder; give another one"):
        run(out, out, overwrite=True)
    assert contents(out) == before


class TestDisk:
    @pytest.fixture
    def disk(self, tmp_path):
        """A file system of its own, of 1 MB."""
        folder = tmp_path / "disk"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)

    @pytest.fixture
    def large(self, tmp_path) -> str:
        (tmp_path / "large").mkdir()
        for i in range(16):
            (tmp_path / "large" / f"{i}.png").write_bytes(encoded(i, 300, 250, "PNG"))
        rows = [{"image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>"}]} for i in range(16)]
        (tmp_path / "large" / "data.json").write_text(json.dumps(rows))
        return str(tmp_path / "large" / "data.json")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_full_disk(self, disk, large, tmp_path, workers):
        out = disk / "set"
        with pytest.raises(UserError, match="set: No space left .*; make room; . shards are finished, and") as error:
            run(large, out, workers=workers)
        done = int(re.search(r"(\d+) shards", str(error.value))[1])
        assert 0 < done < 4 and "\n" not in str(error.value)
        assert sum(name.startswith("set-train") for name in os.listdir(out)) == done
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        run(large, out, workers=workers)
        assert contents(out) == contents(run(large, tmp_path / "whole" / "set"))

    def test_a_disk_that_is_full_from_the_start(self, disk, large):
        (disk / "other").write_bytes(bytes(1 << 20)[: 252 * 4096])
        with pytest.raises(UserError, match="No space left .*; make room; 0 shards are finished"):
            run(large, disk / "set")
        os.unlink(disk / "other")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert len(with_tfds(run(large, disk / "set"))) == 16

    def test_files_that_may_not_grow(self, large, tmp_path):
        code = (
            "import resource, sys; from llava_jax import cli; from llava_jax.prepare.pack import Pack; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "cli.run(lambda args: Pack(data=args[0], out=args[1], workers=0).run())"
        )
        command = [sys.executable, "-c", code, large, str(tmp_path / "set")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1
        assert "0 shards are finished, and the same command continues from there" in done.stderr

    def test_a_worker_that_dies(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(progress, "Pool", lambda write, workers, writes: Pool(Dies(), 1, writes))
        with pytest.raises(RuntimeError, match="a worker process died .*; 0 shards are finished, and the same command"):
            run(data, tmp_path / "set")


class Dies:
    """What a worker does that the system kills. (Found by the worker under the name of this file.)"""

    def __reduce__(self):
        return os._exit, (1,)
