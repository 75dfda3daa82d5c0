"""Computes the cross-entropy of hidden states against labels, without the logits of all positions at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.parallel.sharding import AXES
from llava_jax.text.encode import IGNORE

LOSS_CHUNK_TOKENS = 1024
"""Number of positions per device whose logits exist at one time."""


def cross_entropy(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], labels: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the summed negative log likelihood of `labels[:, t + 1]` given `hidden[:, t]`, except IGNORE labels.

    Logits are computed for LOSS_CHUNK_TOKENS positions at a time, together with the gradients, so that [B, T, V] never
    exists and no matmul runs twice. Under a mesh (`jax.set_mesh`) each device computes positions of its own sequences.
    It gathers the kernel once and scatters its part of the kernel's gradient once.
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
    """Runs `function` on each device for its own positions, and sums loss and gradients over the devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        loss, *gradients = function(hidden, kernel, labels)
        return loss, *(x.astype(kernel.dtype) for x in gradients)
    # Devices along `tensor` have the same sequences and split their positions.
    rows, axes = P(("data", "fsdp"), "tensor"), ("fsdp", "tensor")
    T = hidden.shape[1]
    padding = -T % mesh.shape["tensor"]
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE)

    def local(hidden, kernel, labels):
        loss, *gradients = function(hidden, jax.lax.all_gather(kernel, axes, axis=0, tiled=True), labels)
        if gradients:
            grad_hidden, grad_kernel = gradients
            grad_kernel = jax.lax.psum_scatter(grad_kernel.astype(kernel.dtype), axes, scatter_dimension=0, tiled=True)
            # The barrier keeps the scatter here, because until then every device stores the complete gradient.
            gradients = jax.lax.optimization_barrier((grad_hidden, jax.lax.psum(grad_kernel, "data")))
        return jax.lax.psum(loss, AXES), *gradients

    layouts = (P(), rows, P(axes, None))[: 3 if function is _loss_and_gradients else 1]
    run = jax.shard_map(local, in_specs=(rows, P(axes, None), rows), out_specs=layouts, check_vma=False)
    loss, *gradients = run(hidden, kernel, labels)
    return (loss, gradients[0][:, :T], gradients[1]) if gradients else (loss,)


def _loss(hidden, kernel, labels):
    def add(total, chunk):
        _, logits, norm, is_label, supervised = _logits(*chunk, kernel)
        return total + _nll(logits, norm, is_label, supervised), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), _chunks(hidden, labels))[:1]


def _loss_and_gradients(hidden, kernel, labels):
    """Returns the loss and its gradients for `hidden` and, in float32, for `kernel`."""

    def add(sums, chunk):
        total, grad_kernel = sums
        x, logits, norm, is_label, supervised = _logits(*chunk, kernel)
        grad_logits = jnp.where(supervised[:, None], jnp.exp(logits - norm[:, None]) - is_label, 0).astype(x.dtype)
        grad_kernel += jnp.einsum("TD,TV->DV", x, grad_logits, preferred_element_type=jnp.float32)
        return (total + _nll(logits, norm, is_label, supervised), grad_kernel), grad_logits @ kernel.T

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
    (total, grad_kernel), grad_hidden = jax.lax.scan(add, zeros, _chunks(hidden, labels))
    return total, grad_hidden.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape), grad_kernel


def _chunks(hidden: Array, labels: Array) -> tuple[Float[Array, "C T D"], Int[Array, "C T"]]:
    """Flattens all positions and splits them into chunks of equal size. Padding of the last is not supervised."""
    size = min(LOSS_CHUNK_TOKENS, labels.size)
    padding = -labels.size % size
    hidden = jnp.pad(hidden.reshape(-1, hidden.shape[-1]), ((0, padding), (0, 0)))
    labels = jnp.pad(labels.reshape(-1), (0, padding), constant_values=IGNORE)
    return hidden.reshape(-1, size, hidden.shape[-1]), labels.reshape(-1, size)


def _logits(x: Float[Array, "T D"], labels: Int[Array, "T"], kernel: Float[Array, "D V"]) -> tuple[Array, ...]:
    """Returns `x`, the logits, their log-sum-exp, the labels as one-hot mask, and which positions are supervised."""
    logits = jnp.einsum("TD,DV->TV", x, kernel, preferred_element_type=jnp.float32)
    is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]
    return x, logits, jax.nn.logsumexp(logits, axis=-1), is_label, labels != IGNORE


def _nll(logits, norm, is_label, supervised) -> Float[Array, ""]:
    return jnp.where(supervised, norm - jnp.where(is_label, logits, 0).sum(-1), 0).sum()
