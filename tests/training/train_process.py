"""Run by test_processes.py: `llava_jax.train` as it is, but for what happens to one process as a step begins.

train_process.py EVENT PROCESS STEP RECIPE [options]; EVENT: none, or a signal that PROCESS then sends to itself.
"""

import os
import signal

from llava_jax import cli, train
from llava_jax.training import loop


def main(args: list[str]) -> int:
    event, process, step, *args = args
    original, count = loop.on_devices, [0]

    def on_devices(*arguments):
        count[0] += 1
        if event != "none" and os.environ.get("JAX_PROCESS_ID", "0") == process and count[0] == int(step):
            os.kill(os.getpid(), signal.Signals[event])
        return original(*arguments)

    loop.on_devices = on_devices
    return train.main(args)


if __name__ == "__main__":
    cli.run(main)
