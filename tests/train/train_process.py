"""Run by test_processes.py: `llava_jax.train` as it is, but for what happens to one process as a step begins.

train_process.py EVENT PROCESSES STEP RECIPE [options]; EVENT: none; a signal that these processes then send to
themselves and their workers (SIGTERM+SIGTERM: one after the other); the name of an error that they raise; `rename` or
`folder`: from then on nothing can be renamed, no folder made (EIO); `loading`: they never load parameters; `early`:
SIGTERM as they load them.
"""

import builtins
import errno
import multiprocessing
import os
import signal

import jax

from llava_jax import cli
from llava_jax.train import __main__ as train
from llava_jax.train import batches, parameters
from llava_jax.weights import sharded


def broken(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def happen(event: str) -> None:
    if event == "rename":
        os.rename = os.replace = broken
    elif event == "folder":
        os.mkdir = os.makedirs = broken
    elif event == "OSError":
        broken()
    elif not event.startswith("SIG"):
        raise getattr(builtins, event, getattr(jax.errors, event, None))("RESOURCE_EXHAUSTED: out of memory")
    else:
        for name in event.split("+"):
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, signal.Signals[name])


def main(args: list[str]) -> int:
    event, processes, step, *args = args
    original, count = batches.shard_batch, [0]
    if os.environ.get("JAX_PROCESS_ID", "0") not in processes:
        event = "none"
    if event == "loading":
        parameters.load_parameters = lambda *_, **__: signal.pause()
    if event == "early":
        parameters.load_parameters = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    sharded.LOAD_TIMEOUT = 1.0 if step == "0" else sharded.LOAD_TIMEOUT

    def shard_batch(*arguments):
        count[0] += 1
        if event != "none" and count[0] == int(step):
            happen(event)
        return original(*arguments)

    batches.shard_batch = shard_batch
    return train.main(args)


if __name__ == "__main__":
    cli.run(main)
