"""The command line of prepare, and that what it packs trains as what it was made of."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import run_command

from llava_jax.data.examples import DataSpec
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.prepare import __main__ as prepare
from llava_jax.prepare.settings import Settings


@pytest.mark.parametrize("name", prepare.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main([name, "--help"])
    assert ended.value.code == 0 and f"llava_jax.prepare {name}" in capsys.readouterr().out


def test_an_unknown_command_names_those_there_are():
    with pytest.raises(UserError, match="no command 'chek'; there are check, preview"):
        prepare.main(["chek", "data.json"])


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    for arguments in (["check", str(tmp_path / "none.json")], ["check", "--bad"], ["sample", "a"], []):
        ended = run_command("prepare", *arguments)
        assert ended.code == 2 and len(ended.err.splitlines()) == bool(arguments), ended.err


def test_the_command_in_a_process_of_its_own(data):
    command = [sys.executable, "-m", "llava_jax.prepare", "check", str(data), "--json", "--workers", "0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and json.loads(ended.stdout)["ok"]


def test_a_packed_data_set_gives_the_same_batches(data, parts, tmp_path):
    assert prepare.main(["check", str(data), "--model", str(parts[1]), "--visual-tokens", "4"]) == 0
    assert prepare.main(["pack", str(data), str(tmp_path / "packed"), "--workers", "0", "--shards", "3"]) == 0
    options = vars(Settings.load(str(parts[1]))) | {"processor": ImageProcessor(28, patches=2)}
    here, there = (Batches(DataSpec(mixture=open_mixture(path), **options, sequence_length=256, tiles_per_sequence=4),
                           2, epochs=2) for path in (data, tmp_path / "packed"))
    count = 0
    for one, other in zip(here, there, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
        count += 1
    assert count > 4
