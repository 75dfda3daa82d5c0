"""Measures how several processes load a checkpoint together, and how long a run of them takes to its first step.

python scripts/bench_load.py [load | start-up] [--processes 1 8]

`load` reads a random LLaVA of about 1.1 GB in Hugging Face's layout, on one device a process, sharded over all of them
(fsdp). It prints the bytes that a process read, its seconds and its peak of memory above that before. `start-up` trains
the miniature's model and prints the seconds until each part of the start was done. All processes share this machine, so
their seconds are more than those of as many hosts.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "tokenizer.model"
TEXT = (32_000, 2048, 5504, 8, 16, 16, 128)
"""Sizes of the decoder, as arguments of LlamaConfig."""
PARTS = ("imports", "connected", "set up", "parameters", "data opened", "first step", "second step")
"""Parts of a start, each of which ends at the next one's beginning."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "start-up"), nargs="?", default="load")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return (load if options.what == "load" else start_up)(options.worker)
    with tempfile.TemporaryDirectory() as folder:
        write = write_checkpoint if options.what == "load" else write_data
        write(Path(folder))
        for count in options.processes:
            results = run(options.what, folder, count)
            print(f"{count} processes: " + "; ".join(
                f"{name} {min(column):.4g}" + (f" to {max(column):.4g}" if max(column) > min(column) else "")
                for name, column in ((name, [result[name] for result in results]) for name in results[0])), flush=True)


def run(what: str, folder: str, count: int) -> list[dict[str, float]]:
    """Starts the processes, and returns what each has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
        "BENCH_START": str(time.time())}
    command = [sys.executable, __file__, what, "--worker", folder]
    processes = [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, text=True,
                                  stdout=subprocess.PIPE) for i in range(count)]
    outputs = [process.communicate()[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def write_checkpoint(folder: Path) -> None:
    """Writes random weights in bfloat16."""
    import ml_dtypes

    from llava_jax.models.llama import LlamaConfig
    from llava_jax.models.llava import LlavaConfig
    from llava_jax.models.vit import VisionConfig
    from llava_jax.weights import configs, files, source, tables

    config = LlavaConfig(vision=VisionConfig(56, 14, 256, 512, 4, 4), text=LlamaConfig(*TEXT))
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    files.write(folder, [
        files.TensorSpec(name, dtype, mapping.hf_shape,
                         lambda mapping=mapping: [rng.standard_normal(mapping.hf_shape, np.float32).astype(dtype)])
        for name, mapping in tables.tensor_mappings(source.shapes(config)).items()])
    ids = {"image": 2000, "pad": 2001, "bos": 1, "eos": 2}
    files.write_json(folder / "config.json", configs.hf_config(config, ids, config.text.vocab_size, "bfloat16"))
    shutil.copy(TOKENIZER, folder)


def load(folder: str) -> None:
    """Loads the checkpoint in this process, and prints what it took."""
    from llava_jax.parallel import processes, sharding

    processes.initialize()
    import jax

    from llava_jax import config
    from llava_jax.weights import load_checkpoint, read_config, source

    mesh = sharding.make_mesh(config.Mesh(fsdp=-1))
    shardings = sharding.parameter_shardings(source.shapes(read_config(folder)), mesh)
    jax.block_until_ready(jax.jit(lambda: jax.numpy.ones(8))())
    processes.allgather_object("ready", None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    memory, read, start = status("VmRSS"), bytes_read(), time.perf_counter()
    parameters = load_checkpoint(folder, dtype="bfloat16", sharding=lambda path, shape: shardings[path])[1]
    jax.block_until_ready(parameters)
    seconds = time.perf_counter() - start
    shards = sum(shard.data.nbytes for x in parameters.values() for shard in x.addressable_shards)
    result = {"MB read": bytes_read() - read, "peak MB": status("VmHWM") - memory, "MB of shards": shards}
    print(json.dumps({name: round(value / 1e6) for name, value in result.items()} | {"seconds": round(seconds, 1)}))


def status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def bytes_read() -> int:
    """Returns the number of bytes that this process has read so far, from the disk or its cache."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def write_data(folder: Path) -> None:
    """Writes captions of plain pictures."""
    from PIL import Image

    rows = []
    for i in range(256):
        Image.new("RGB", (60, 60), (i, 255 - i, i * 7 % 256)).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"a colour, number {i}"}]})
    (folder / "data.json").write_text(json.dumps(rows))


def start_up(folder: str) -> None:
    """Trains in this process, and prints when each part of the start was done."""
    start, times = float(os.environ["BENCH_START"]), []
    note = lambda: times.append(time.time() - start)  # noqa: E731
    import jax

    from llava_jax import config
    from llava_jax.configs.mini import BACKBONES
    from llava_jax.parallel import processes
    from llava_jax.train import loop, stage
    from llava_jax.train.setup import setup

    note()
    processes.initialize()
    note()
    rows = config.Data(path=f"{folder}/data.json", template="plain", sequence_length=256, tiles_per_sequence=4)
    rates = (("projector/.*", 1e-3), ("(vision|decoder)/.*", None))
    recipe = config.Recipe(
        model=config.Model(vision=str(BACKBONES / "vision"), language=str(BACKBONES / "language"), image_mode="crop",
                           template="mistral_instruct"),
        stages={"align": config.Stage(learning_rates=rates, data=rows, batch_size=8, steps=2)},
        output=f"{folder}/run-{jax.process_count()}", mesh=config.Mesh(fsdp=-1))
    split, open_stage, step = stage.split_parameters, stage.StageTrainer.open, stage.StageTrainer.train_step

    def split_parameters(*arguments):
        note()
        result = split(*arguments)
        note()
        return result

    def open_and_note(self):
        open_stage(self)
        note()

    def train_step(self, *arguments):
        step(self, *arguments)
        jax.block_until_ready(self.state.step)
        note()

    stage.split_parameters = split_parameters
    stage.StageTrainer.open, stage.StageTrainer.train_step = open_and_note, train_step
    loop.train_stages(setup(recipe))
    print(json.dumps(dict(zip(PARTS, (round(seconds, 1) for seconds in times), strict=True))))


if __name__ == "__main__":
    main()
