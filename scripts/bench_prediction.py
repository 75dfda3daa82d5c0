"""Predicts programs whose speed on TPUs is published, and prints both.

    python scripts/bench_prediction.py --programs build
    python scripts/bench_prediction.py --hlo step.after_codegen.txt --topology v6e-32 --tokens 786432

The published runs are MaxText's. The first form compiles this project's own step of the same decoder, on the same
slice, with the nearest options: the vision tower is tiny, and every sequence is text. Texts of programs are kept in
--programs and read again. The second form predicts any program, such as one of MaxText dumped by xla_dump_to. No TPU is
used.
"""

import argparse
import sys
from pathlib import Path

from llava_jax import config
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.plan import topologies

LLAMA_3_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_kv_heads=8, max_length=8192)
LLAMA_2_70B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8)
LLAMA_3_70B = LlamaConfig(128256, 8192, 28672, 80, 64, 8, max_length=8192)
GPT_16B = LlamaConfig(hidden_size=4096, intermediate_size=28672, num_heads=64, num_kv_heads=64)
GPT_32B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_heads=64, num_kv_heads=64)

RUNS = (
    ("GPT-like 16B", GPT_16B, "v5e-256", 2048, 6, "full", 1, 1193),
    ("GPT-like 32B", GPT_32B, "v5p-128", 2048, 6, "save_dots", 2, 1684),
    ("Llama 3.1 8B", LLAMA_3_8B, "v6e-32", 8192, 3, "offload", 1, 7032),
    ("Llama 2 70B", LLAMA_2_70B, "v6e-256", 4096, 2, "offload", 1, 905),
    ("Llama 3.1 70B", LLAMA_3_70B, "tpu7x-128", 8192, 2, "offload", 1, 2687),
)
"""Name, decoder, slice, tokens of a sequence, sequences per device, remat, tensor parallelism, and the published
tokens/s and chip. The GPT-like runs publish 120 and 328 TFLOP/s, by 6 FLOPs a weight and 12 x length x width a
layer."""
TINY = VisionConfig(image_size=28, patch_size=14, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4)


def compiled(text: LlamaConfig, topology: str, length: int, sequences: int, remat: str, tensor: int):
    """Compiles the step of a decoder for a slice."""
    from llava_jax.parallel.sharding import make_mesh
    from llava_jax.plan.step import compile_step

    where = topologies.parse(topology)
    stage = config.Stage((("decoder/.*", 1e-5), ("(projector|vision)/.*", None)),
                         config.Data("text.json", sequence_length=length, tiles_per_sequence=1),
                         batch_size=sequences * where.devices, remat=remat)
    recipe = config.Recipe(config.Model(vision="tiny", language="text"), {"text": stage}, "nowhere",
                           config.Mesh(1, where.devices // tensor, tensor))
    model = LlavaConfig(vision=TINY, text=text)
    return compile_step(recipe, "text", where, make_mesh(recipe.mesh, where.jax_devices()), model)


def seconds(text: str, topology: str) -> float:
    """Predicts the seconds of a step from the text of its program."""
    from llava_jax.plan.replay import profile, times

    where = topologies.parse(topology)
    slices = [getattr(device, "slice_index", 0) for device in where.jax_devices()]
    return times(profile(text, slices), where).step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--programs", type=Path, default=Path("build"), help="folder for the texts of programs")
    options.add_argument("--only", default="", help="text that the name of a run must contain")
    options.add_argument("--hlo", type=Path, help="text of a program to predict")
    options.add_argument("--topology", help="slice of --hlo")
    options.add_argument("--tokens", type=int, help="tokens of a step of --hlo, over all chips")
    found = options.parse_args()
    topologies.quiet()
    if found.hlo:
        step, chips = seconds(found.hlo.read_text(), found.topology), topologies.parse(found.topology).chips
        rate = f", {found.tokens / step / chips:,.0f} tokens/s and chip" if found.tokens else ""
        print(f"{step:.3f} s{rate}")
        return
    found.programs.mkdir(parents=True, exist_ok=True)
    print("| decoder | slice | tokens x sequences | remat | predicted tokens/s/chip | published | difference |")
    print("|---|---|---|---|---|---|---|")
    for name, text, topology, length, sequences, remat, tensor, published in RUNS:
        if found.only not in name:
            continue
        file = found.programs / f"{name} {topology}.txt".replace(" ", "_")
        if not file.exists():
            program = compiled(text, topology, length, sequences, remat, tensor)
            if not program.hlo:
                print(f"{name} does not fit: {program.memory.peak / 2**30:.1f} GiB", file=sys.stderr)
                continue
            file.write_text(program.hlo)
        devices = topologies.parse(topology).chip.devices
        rate = length * sequences * devices / seconds(file.read_text(), topology)
        print(f"| {name} | {topology} | {length:,} x {sequences} | {remat} | {rate:,.0f} | {published:,} | "
              f"{rate / published - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
