"""`evaluate`, killed from within after so many answers: `evaluate_process.py COUNT ARGUMENT ...`; 0 is never."""

import os
import signal
import sys

from llava_jax import cli
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.json_lines import JsonLinesFile

left, add = int(sys.argv[1]), JsonLinesFile.append


def add_and_die(self, line):
    global left
    add(self, line)
    left -= 1
    if left == 0:
        os.write(self._file, b'{"question_id": 3, "prompt": "Is th')
        os.kill(os.getpid(), signal.SIGKILL)


JsonLinesFile.append = add_and_die
sys.argv[1:2] = []
cli.run(evaluate.main)
