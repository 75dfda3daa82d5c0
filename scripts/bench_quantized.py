"""Measures what 8 bits change in the logits of a decoder: kernels (`quantize="int8"`), cache (`--kv-cache int8`), both.

    python scripts/bench_quantized.py [--width 4096] [--layers 4] [--tokens 256]

The decoder has the proportions of LLaVA-1.5-7B, whose width is 4,096, and random weights, in float32. Every position's
logits are compared with those without quantisation. Random weights know no likely token: a trained model's choices
differ more seldom.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.models.llama import Llama, LlamaConfig
from llava_jax.models.llava import from_params, to_params
from llava_jax.models.quantized import is_quantizable, quantize
from llava_jax.models.slot_cache import SlotAttention, SlotCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="hidden_size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--tokens", type=int, default=256, help="number of positions, a multiple of 128")
    args = parser.parse_args()
    heads = args.width // 128
    config = dataclasses.replace(LlamaConfig(), num_layers=args.layers, hidden_size=args.width, num_heads=heads,
                                 num_kv_heads=heads, intermediate_size=args.width * 43 // 16)
    graph, shapes = to_params(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    parameters = random_weights(shapes)
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, config.vocab_size, (1, args.tokens)), jnp.int32)
    exact = logits(config, graph, parameters, tokens, "float32")
    kernels = {path: quantize(f"decoder/{path}", parameters.pop(path), "int8_matrices")
               for path in list(parameters) if is_quantizable(f"decoder/{path}")}
    print("| 8 bits | error of logits, RMS | largest | KL divergence | other most likely token |")
    print("|---|---|---|---|---|")
    # The cache alone is measured last, because the exact kernels are made again for it.
    both = {name: logits(config, graph, parameters | kernels, tokens, cache) for name, cache in (
        ("kernels", "float32"), ("kernels and cache", "int8"))}
    del kernels
    both["cache"] = logits(config, graph, random_weights(shapes), tokens, "int8")
    for name in ("kernels", "cache", "kernels and cache"):
        print(row(name, exact, both[name]), flush=True)


def random_weights(shapes: dict) -> dict:
    """Returns kernels that keep the variance of their inputs, embeddings of variance 0.09, and norms of 1."""
    found, rng = {}, np.random.default_rng(0)
    for path, x in sorted(shapes.items()):
        if path.endswith("scale"):
            found[path] = jnp.ones(x.shape)
            continue
        inputs = x.shape[1] * (x.shape[2] if "o_proj" in path else 1) if path.startswith("layers") else x.shape[0]
        std = 0.3 if path == "embedding" else inputs**-0.5
        found[path] = jnp.asarray(rng.standard_normal(x.shape, np.float32) * np.float32(std))
    return found


def logits(config: LlamaConfig, graph, parameters: dict, tokens: jax.Array, cache_dtype: str) -> np.ndarray:
    """Returns the logits of all positions, computed as a server's prompt, float32 [T, V]."""

    @jax.jit
    def run(parameters, tokens):
        model, positions = from_params(graph, parameters), jnp.arange(tokens.shape[1])[None]
        cache = SlotCache.zeros(config.num_layers, 1, config.num_kv_heads, tokens.shape[1], config.head_dim,
                                cache_dtype)
        x = model.embed(tokens, jnp.float32)
        return model.logits(model.extend(x, positions, cache, attend=SlotAttention(positions, cache))[0])[0]

    return np.asarray(run(parameters, tokens))


def row(name: str, exact: np.ndarray, found: np.ndarray) -> str:
    difference = found - exact
    expected, logs = (np.asarray(jax.nn.log_softmax(x.astype(np.float64))) for x in (exact, found))
    divergence = (np.exp(expected) * (expected - logs)).sum(-1).mean()
    changed = (found.argmax(-1) != exact.argmax(-1)).mean()
    return (f"| {name} | {100 * np.sqrt((difference**2).mean() / exact.var()):.2f} % of their deviation "
            f"| {np.abs(difference).max():.3f} | {divergence:.1e} | {100 * changed:.1f} % |")


if __name__ == "__main__":
    main()
