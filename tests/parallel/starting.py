"""Starts the processes of `member.py` on this machine, and gathers what they leave."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("member.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(scenario: str, count: int, present: range | None = None, meeting: float = 60, silence: float = 60,
          folder: str = "", port: int = 0) -> list[subprocess.Popen]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": str(count),
                                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port or free_port()}"}
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
