"""A folder of play for scripts/*.sh: fake programs on the PATH, a copy of the repository that may be changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"TPU_PROJECT": "lab", "TPU_ZONE": "us-west4-a", "TPU_NAME": "llava", "TPU_TYPE": "v5litepod-16"}


class Play:
    """What the fakes (fakes.py) do, and what was asked of them."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self.repository = folder, repository
        fake = folder / "fake"
        fake.write_text(f"#!{sys.executable} -IS\n{(Path(__file__).parent / 'fakes.py').read_text()}")
        fake.chmod(0o755)
        for place, names in {
            "bin": ["gcloud", "kubectl", "sleep"],
            "worker_bin": ["gcloud", "systemctl", "sudo", "hostname", "curl"],
            "venv_bin": ["python"],
            ".": ["uv"],
        }.items():
            (folder / place).mkdir(exist_ok=True)
            for name in names:
                (folder / place / name).symlink_to(fake)
    def run(self, script: str, *args: str, answer: str = "", **settings: str | None) -> subprocess.CompletedProcess:
        """Runs a script with these settings besides SETTINGS; None takes one away."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "GKE_"))}
        own = inherited | {"FAKES": str(self.folder), "PATH": f"{self.folder}/bin:/usr/bin:/bin"} | SETTINGS | settings
        return subprocess.run(
            [self.repository / "scripts" / script, *args], input=answer, text=True, capture_output=True, timeout=60,
            env={key: value for key, value in own.items() if value is not None},
        )

    def set(self, name: str, number: int) -> None:
        """`workers_per_node` (1), or `polls`: how many looks find the command running before it has ended (0)."""
        (self.folder / name).write_text(str(number))

    def plan(self, *steps: dict) -> None:
        (self.folder / "plan.json").write_text(json.dumps(steps))

    def exits(self, **codes: list[int]) -> None:
        """Exit codes of the training's starts, for `all` workers or one (`llava_0`)."""
        named = {name.replace("_", "-"): values for name, values in codes.items()}
        (self.folder / "exits.json").write_text(json.dumps(named))

    def tpu(self, *states: str) -> None:
        """There is a TPU, in these states, one after the other as somebody looks."""
        (self.folder / "tpu.json").write_text(json.dumps(states))

    @property
    def left(self) -> bool:
        return (self.folder / "tpu.json").exists()

    def lines(self, name: str) -> list:
        path = self.folder / name
        return [json.loads(line) if line[0] in "[{" else line for line in path.read_text().splitlines()] \
            if path.exists() else []

    def calls(self, program: str = "gcloud") -> list[list[str]]:
        """The arguments of every call, in order."""
        return [call[1:] for call in self.lines("calls") if call[0] == program]

    def verbs(self) -> list[str]:
        """The gcloud calls in short: describe, create, delete, ssh, scp; what ran on workers where it tells."""
        short = []
        for call in self.calls():
            verb = call[3] if call[0] == "compute" else call[1]
            for word in ("install", "start", "report", "stop"):
                if f"tpu_worker.sh {word} " in call[-1]:
                    verb = word
            short.append(verb)
        return short

    def home(self, worker: str) -> Path:
        return self.folder / "workers" / worker


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A small repository with the launch scripts in it."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "scripts").mkdir()
    for path in [*(REPOSITORY / "scripts").glob("*.sh"), *(REPOSITORY / "scripts").glob("*.yaml")]:
        shutil.copy(path, folder / "scripts")
    (folder / "llava_jax").mkdir()
    (folder / "llava_jax" / "train.py").write_text("first\n")
    (folder / "old.py").write_text("old\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def play(tmp_path, repository) -> Play:
    return Play(tmp_path, repository)
