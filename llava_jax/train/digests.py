"""Computes digests of the bits of arrays on their devices, and whether all values are finite."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llava_jax.errors import UserError


def digests(tree: Any) -> dict[str, tuple[str, bool]]:
    """Returns the digest of every array of a tree by its path, and whether the array is finite.

    A digest depends on bits, shape and dtype, not on the sharding or the number of processes. A change of one
    element always changes it. It reads the memory once. Arrays in host memory move to the devices one by one.
    """
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    on_host = {path for path, leaf in leaves.items() if leaf.sharding.memory_kind == "pinned_host"}
    sums = dict(_sums({path: leaf for path, leaf in leaves.items() if path not in on_host}))
    for path in sorted(on_host):
        leaf = jax.device_put(leaves[path], leaves[path].sharding.with_memory_kind("device"))
        sums[path] = jax.block_until_ready(_sums({path: leaf})[path])
    result = {}
    for path, (total, finite) in jax.device_get(sums).items():
        leaf = leaves[path]
        result[path] = f"{int(total):08x} {leaf.dtype}{list(leaf.shape)}", bool(finite)
    return result


def fingerprint(digests_by_path: Mapping[str, tuple[str, bool]]) -> str:
    """Returns one hash over the `digests` of a tree."""
    lines = "".join(f"{path} {digest}\n" for path, (digest, _) in sorted(digests_by_path.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16] if lines else "none"


def check_finite(digests_by_path: Mapping[str, tuple[str, bool]], what: str, advice: str) -> None:
    """Raises UserError that starts with `what` and ends with `advice` if an array is not finite."""
    if wrong := [path for path, (_, finite) in digests_by_path.items() if not finite]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what}: {', '.join(wrong[:3])}{more} {'is' if len(wrong) == 1 else 'are'} not finite "
                        f"(NaN or infinite); {advice}")


@jax.jit
def _sums(leaves: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    return {path: (_sum_of_bits(x), jnp.issubdtype(x.dtype, jnp.integer) or jnp.isfinite(x).all())
            for path, x in leaves.items()}


def _sum_of_bits(x: Array) -> Array:
    """Returns the sum, modulo 2^32, of a hashed word for every element's bits and position."""
    if x.dtype == jnp.uint4:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    word = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    for axis in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) * 0x9E3779B1 % 2**32)
        word = word + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    # Every line is a bijection, so a changed element changes its word. A sum does not depend on order or sharding.
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)
