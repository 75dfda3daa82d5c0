"""Cross-entropy of hidden states against labels, without the scores of all positions at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.parallel.sharding import AXES
from llava_jax.text.encode import IGNORE

LOSS_CHUNK_TOKENS = 1024
"""Positions of a device whose scores over the vocabulary exist at one time."""


def cross_entropy(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], labels: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Sum of the negative log likelihoods of `labels[:, t + 1]` given `hidden[:, t]`, float32; IGNORE counts nothing.

    Scores are made LOSS_CHUNK_TOKENS positions at a time, and the gradients at once with them, so that [B, T, V]
    never exists and no product is made twice. Under a mesh (`jax.set_mesh`) each device takes positions of its rows,
    gathers the kernel once and gives its part of the kernel's gradient away once.
    """
    labels = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORE)], axis=1)
    return _sum(hidden, kernel.astype(hidden.dtype), labels)


@jax.custom_vjp
def _sum(hidden, kernel, labels):
    return _on_devices(_loss, hidden, kernel, labels)[0]


def _sum_forward(hidden, kernel, labels):
    loss, *gradients = _on_devices(_loss_and_gradients, hidden, kernel, labels)
    return loss, gradients


def _sum_backward(gradients, g):
    return *((x * g).astype(x.dtype) for x in gradients), None


_sum.defvjp(_sum_forward, _sum_backward)


def _on_devices(function: Callable, hidden: Array, kernel: Array, labels: Array) -> tuple[Array, ...]:
    """A loss and gradients that each device computes of its own positions, summed over the devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        loss, *gradients = function(hidden, kernel, labels)
        return loss, *(x.astype(kernel.dtype) for x in gradients)
    # Devices that share a row share its positions out.
    rows, parts = P(("data", "fsdp"), "tensor"), ("fsdp", "tensor")
    T = hidden.shape[1]
    rest = -T % mesh.shape["tensor"]
    hidden = jnp.pad(hidden, ((0, 0), (0, rest), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, rest)), constant_values=IGNORE)

    def local(hidden, kernel, labels):
        loss, *gradients = function(hidden, jax.lax.all_gather(kernel, parts, axis=0, tiled=True), labels)
        if gradients:
            by_hidden, by_kernel = gradients
            by_kernel = jax.lax.psum_scatter(by_kernel.astype(kernel.dtype), parts, scatter_dimension=0, tiled=True)
            # Not later: until it is given away, the whole kernel's gradient lies on every device.
            gradients = jax.lax.optimization_barrier((by_hidden, jax.lax.psum(by_kernel, "data")))
        return jax.lax.psum(loss, AXES), *gradients

    layouts = (P(), rows, P(parts, None))[: 3 if function is _loss_and_gradients else 1]
    run = jax.shard_map(local, in_specs=(rows, P(parts, None), rows), out_specs=layouts, check_vma=False)
    loss, *gradients = run(hidden, kernel, labels)
    return (loss, gradients[0][:, :T], gradients[1]) if gradients else (loss,)


def _loss(hidden, kernel, labels):
    def add(total, chunk):
        _, scores, norm, right, learned = _scores(*chunk, kernel)
        return total + _log_likelihoods(scores, norm, right, learned), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), _chunks(hidden, labels))[:1]


def _loss_and_gradients(hidden, kernel, labels):
    """The loss, its gradient by `hidden`, and by `kernel` in float32."""

    def add(sums, chunk):
        total, by_kernel = sums
        x, scores, norm, right, learned = _scores(*chunk, kernel)
        by_scores = jnp.where(learned[:, None], jnp.exp(scores - norm[:, None]) - right, 0).astype(x.dtype)
        by_kernel += jnp.einsum("TD,TV->DV", x, by_scores, preferred_element_type=jnp.float32)
        return (total + _log_likelihoods(scores, norm, right, learned), by_kernel), by_scores @ kernel.T

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
    (total, by_kernel), by_hidden = jax.lax.scan(add, zeros, _chunks(hidden, labels))
    return total, by_hidden.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape), by_kernel


def _chunks(hidden: Array, labels: Array) -> tuple[Float[Array, "C T D"], Int[Array, "C T"]]:
    """All positions in a line, cut into pieces of equal length; what fills up the last learns nothing."""
    size = min(LOSS_CHUNK_TOKENS, labels.size)
    rest = -labels.size % size
    hidden = jnp.pad(hidden.reshape(-1, hidden.shape[-1]), ((0, rest), (0, 0)))
    labels = jnp.pad(labels.reshape(-1), (0, rest), constant_values=IGNORE)
    return hidden.reshape(-1, size, hidden.shape[-1]), labels.reshape(-1, size)


def _scores(x: Float[Array, "T D"], labels: Int[Array, "T"], kernel: Float[Array, "D V"]) -> tuple[Array, ...]:
    scores = jnp.einsum("TD,DV->TV", x, kernel, preferred_element_type=jnp.float32)
    right = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == labels[:, None]
    return x, scores, jax.nn.logsumexp(scores, axis=-1), right, labels != IGNORE


def _log_likelihoods(scores, norm, right, learned) -> Float[Array, ""]:
    return jnp.where(learned, norm - jnp.where(right, scores, 0).sum(-1), 0).sum()
