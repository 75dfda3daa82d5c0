"""Tests the memory settings of processes that train."""

import subprocess
import sys

import pytest

PAGES_OF_BUFFERS = """
import resource, threading
from llava_jax.data.workers import keep_freed_memory

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size[0]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults, size = [], [2**27]  # more than the arena of a thread can keep
keep_freed_memory()
for _ in range(3):
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
print(faults[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_buffers_that_threads_free_are_used_again():
    run = subprocess.run([sys.executable, "-c", PAGES_OF_BUFFERS], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100
