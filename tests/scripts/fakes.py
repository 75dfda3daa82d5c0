"""Stands in, under their names, for the programs that the launch scripts call, here and on a worker.

FAKES is the folder of the play: `calls` lists every call of gcloud, kubectl, sleep and uv; `plan.json` says which calls
fail or change the TPU's state; `tpu.json` is the TPU; `workers/NODE-W` are the workers' home folders.
"""

import fcntl
import json
import os
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKES"])
NAME, ARGS = Path(sys.argv[0]).name, sys.argv[1:]
NOT_FOUND = "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'x' was not found"


def read(path: Path, default):
    return json.loads(path.read_text()) if path.exists() else default


def planned() -> dict:
    """Records this call; the step of the plan that is about it: the `nth` (from 1) whose arguments hold `when`."""
    line = " ".join([NAME, *ARGS])
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(ROOT / "calls", "a") as calls:
            calls.write(json.dumps([NAME, *ARGS]) + "\n")
        plan, hit = read(ROOT / "plan.json", []), {}
        for step in plan:
            if step["when"] in line:
                step["seen"] = step.get("seen", 0) + 1
                if step["seen"] == step.get("nth", step["seen"]):
                    hit |= step
        (ROOT / "plan.json").write_text(json.dumps(plan))
        if "states" in hit:
            (ROOT / "tpu.json").write_text(json.dumps(hit["states"]))
    if "signal" in hit:
        os.kill(os.getppid(), hit["signal"])
    sys.stderr.write(hit.get("stderr", ""))
    sys.stdout.write(hit.get("stdout", ""))
    return hit


def gcloud() -> int:
    step = planned()
    if "exit" in step:
        return step["exit"]
    tpu = ROOT / "tpu.json"  # the states that describe gives, one after the other; the last one stays
    match ARGS[:4]:
        case ["compute", "tpus", "queued-resources", "describe"]:
            if not tpu.exists():
                print(NOT_FOUND, file=sys.stderr)
                return 1
            states = read(tpu, [])
            print(states[0])
            tpu.write_text(json.dumps(states[1:] or states))
        case ["compute", "tpus", "queued-resources", "create"]:
            if "states" not in step:
                tpu.write_text('["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]')
        case ["compute", "tpus", "queued-resources", "delete"]:
            import shutil  # imported where they are needed: a play starts hundreds of these programs

            tpu.unlink()
            shutil.rmtree(ROOT / "workers", ignore_errors=True)
        case ["compute", "tpus", "tpu-vm", "ssh"]:
            command = next(arg for arg in ARGS if arg.startswith("--command=")).removeprefix("--command=")
            codes = [on_worker(home, command) for home in homes(ARGS[4])]
            return max(codes)
        case ["compute", "tpus", "tpu-vm", "scp"]:
            for home in homes(ARGS[5].removesuffix(":")):
                (home / Path(ARGS[4]).name).write_bytes(Path(ARGS[4]).read_bytes())
    return 0


def homes(node: str) -> list[Path]:
    """The workers of a node."""
    paths = [ROOT / "workers" / f"{node}-{worker}" for worker in range(read(ROOT / "workers_per_node", 1))]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    return paths


def on_worker(home: Path, command: str) -> int:
    import subprocess

    env = {"HOME": str(home), "FAKES": str(ROOT), "PATH": f"{ROOT}/worker_bin:/usr/local/bin:/usr/bin:/bin"}
    # sshd gives the words to the login shell.
    return subprocess.run(["bash", "-c", command], cwd=home, env=env, stdin=subprocess.DEVNULL).returncode


def systemctl() -> int:
    home = Path.home()
    service = home / "service.json"
    state = read(service, {"SubState": "dead", "ExecMainCode": 0, "ExecMainStatus": 0, "polls": 0})
    if ARGS[0] == "show":
        key = ARGS[2].removeprefix("--property=")
        if state["polls"] > 0:  # not ended yet for as many looks
            state["polls"] -= key == "SubState"
            service.write_text(json.dumps(state))
            print({"SubState": "running"}.get(key, 0))
        else:
            print(state[key])
    elif ARGS[0] == "stop":
        with open(ROOT / "stopped", "a") as file:
            file.write(home.name + "\n")
    elif ARGS[0] == "restart":
        import subprocess

        unit = dict(line.split("=", 1) for line in (home / ARGS[1]).read_text().split("\n") if "=" in line)
        with open(unit["StandardOutput"].removeprefix("append:"), "a") as log:
            process = subprocess.Popen(unit["ExecStart"].split(" "), cwd=unit["WorkingDirectory"], stdout=log,
                                       stderr=log, env=os.environ | {"LOGNAME": unit["User"]})
            code = process.wait()
        (home / "main_pid").write_text(str(process.pid))
        polls = read(ROOT / "polls", 0)
        service.write_text(json.dumps({
            "SubState": "failed" if code else "exited", "ExecMainCode": 1 if code >= 0 else 2,
            "ExecMainStatus": abs(code), "polls": polls,
        }))
    return 0


def sudo() -> int:
    if ARGS[0] == "tee":
        target = Path.home() / Path(ARGS[1]).name
        target.write_text(sys.stdin.read())
        return 0
    os.execvp(ARGS[0], ARGS)


def python() -> int:
    """The training: leaves its arguments in `trained`; every start takes the next exit code of `exits.json`."""
    home = Path.home()
    told = {"args": ARGS, "folder": os.getcwd(), "pid": os.getpid(), "worker": home.name,
            "secret": os.environ.get("LLAVA_JAX_SECRET")}
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(ROOT / "trained", "a") as file:
            file.write(json.dumps(told) + "\n")
        exits = read(ROOT / "exits.json", {})
        mine = exits.get(home.name) or exits.get("all") or [0]
        exits[home.name] = mine[1:] or mine
        (ROOT / "exits.json").write_text(json.dumps(exits))
    return mine[0]


def uv() -> int:
    step = planned()
    with open(ROOT / "installed", "a") as file:
        file.write(" ".join([Path.home().name, *ARGS]) + "\n")
    if ARGS[0] == "venv":
        activate = Path(ARGS[-1]) / "bin" / "activate"
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.write_text(f"PATH={ROOT}/venv_bin:$PATH\n")
    return step.get("exit", 0)


def kubectl() -> int:
    step = planned()
    if ARGS[0] == "create":
        (ROOT / "created.yaml").write_text(sys.stdin.read())
    return step.get("exit", 0)


def main() -> int:
    match NAME:
        case "sleep":
            planned()
        case "hostname":
            print(Path.home().name)
        case "curl":
            print(f"mkdir -p ~/.local/bin && ln -s {ROOT}/uv ~/.local/bin/uv")
        case _:
            return globals()[NAME]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
