"""Computes the cross-entropy of hidden states against labels, without the logits of all positions at once."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.parallel import sharding
from llava_jax.text.encode import IGNORE

LOSS_CHUNK_TOKENS = 1024
"""Number of positions per device whose logits exist at one time, if the vocabulary is small."""

LOSS_CHUNK_LOGITS = 2**26
"""Maximum number of logits per device that exist at one time, if the vocabulary is large."""

MAX_COLUMNS = 16_384
"""Maximum number of columns of the kernel that a device gathers at one time, if the vocabulary is large."""

NUM_LANES = 128
"""Divisor of the number of columns of a chunk: a TPU pads other numbers."""

SHARDS = ("fsdp", "tensor")
"""Mesh axes that split the rows of the kernel."""


def cross_entropy(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], labels: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the summed negative log likelihood of `labels[:, t + 1]` given `hidden[:, t]`, except IGNORE labels.

    [B, T, V] never exists. Under a mesh (`jax.set_mesh`) each device computes positions of its own sequences.

    For up to sharding.LARGE_VOCABULARY columns, logits are computed for LOSS_CHUNK_TOKENS positions at a time, together
    with the gradients, so that no matmul runs twice. A device gathers the kernel once and scatters its gradient once.

    For more columns, no device stores the complete kernel or its gradient. Logits of all positions are computed for
    some columns at a time: once for their log-sum-exp, and again for the gradients. A chunk of the kernel's gradient is
    one matmul, and is scattered at once. The fourth matmul costs as much as it saves (llava_jax/plan/README.md).
    """
    labels = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORE)], axis=1)
    return _sum(hidden, kernel.astype(hidden.dtype), labels)


@jax.custom_vjp
def _sum(hidden, kernel, labels):
    return _on_devices(False, hidden, kernel, labels)[0]


def _sum_forward(hidden, kernel, labels):
    loss, *gradients = _on_devices(True, hidden, kernel, labels)
    return loss, gradients


def _sum_backward(gradients, g):
    return *((x * g).astype(x.dtype) for x in gradients), None


_sum.defvjp(_sum_forward, _sum_backward)


def _on_devices(differentiate: bool, hidden: Array, kernel: Array, labels: Array) -> tuple[Array, ...]:
    """Computes the loss, and its gradients if asked, on each device for its own positions. Sums over the devices."""
    large = kernel.shape[1] > sharding.LARGE_VOCABULARY
    function = functools.partial(_chunked_by_columns if large else _chunked_by_positions, differentiate)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(hidden, kernel, labels, ())
    # Devices along `tensor` have the same sequences and split their positions.
    rows = P(("data", "fsdp"), "tensor")
    T = hidden.shape[1]
    padding = -T % mesh.shape["tensor"]
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE)

    def local(hidden, kernel, labels):
        loss, *gradients = function(hidden, kernel, labels, SHARDS)
        if gradients:
            grad_hidden, grad_kernel = gradients
            # The barrier keeps the scatter here, because until then a device may store the complete gradient.
            gradients = jax.lax.optimization_barrier((grad_hidden, jax.lax.psum(grad_kernel, "data")))
        return jax.lax.psum(loss, sharding.AXES), *gradients

    layouts = (P(), rows, P(SHARDS, None))[: 3 if differentiate else 1]
    run = jax.shard_map(local, in_specs=(rows, P(SHARDS, None), rows), out_specs=layouts, check_vma=False)
    loss, *gradients = run(hidden, kernel, labels)
    return (loss, gradients[0][:, :T], gradients[1]) if gradients else (loss,)


def _gather(shard: Float[Array, "d V"], axes: tuple[str, ...]) -> Float[Array, "D V"]:
    return jax.lax.all_gather(shard, axes, axis=0, tiled=True) if axes else shard


def _scatter(gradient: Float[Array, "D V"], axes: tuple[str, ...]) -> Float[Array, "d V"]:
    return jax.lax.psum_scatter(gradient, axes, scatter_dimension=0, tiled=True) if axes else gradient


def _chunked_by_positions(differentiate, hidden, shard, labels, axes):
    """Returns the loss and, if asked, its gradients for `hidden` and for the kernel's `shard`, in their dtypes."""
    kernel = _gather(shard, axes)

    def add_loss(total, chunk):
        _, logits, norm, is_label, supervised = _logits(*chunk, kernel)
        return total + _nll(logits, norm, is_label, supervised), None

    def add(sums, chunk):
        total, grad_kernel = sums
        x, logits, norm, is_label, supervised = _logits(*chunk, kernel)
        grad_logits = jnp.where(supervised[:, None], jnp.exp(logits - norm[:, None]) - is_label, 0).astype(x.dtype)
        grad_kernel += jnp.einsum("TD,TV->DV", x, grad_logits, preferred_element_type=jnp.float32)
        return (total + _nll(logits, norm, is_label, supervised), grad_kernel), grad_logits @ kernel.T

    zero = jnp.zeros((), jnp.float32)
    if not differentiate:
        return jax.lax.scan(add_loss, zero, _chunks(hidden, labels))[:1]
    zeros = zero, jnp.zeros(kernel.shape, jnp.float32)
    (total, grad_kernel), grad_hidden = jax.lax.scan(add, zeros, _chunks(hidden, labels))
    grad_hidden = grad_hidden.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
    return total, grad_hidden, _scatter(grad_kernel.astype(shard.dtype), axes)


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


def _chunked_by_columns(differentiate, hidden, shard, labels, axes):
    """Returns what `_chunked_by_positions` does, for a vocabulary whose kernel no device stores."""
    x, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    vocabulary, supervised = shard.shape[1], labels != IGNORE
    chunks = _split_columns(shard, LOSS_CHUNK_LOGITS // max(x.shape))

    def logits(start, chunk):
        kernel = _gather(chunk, axes)
        y = jnp.einsum("TD,DV->TV", x, kernel, preferred_element_type=jnp.float32)
        column = start + jax.lax.broadcasted_iota(jnp.int32, y.shape, 1)
        return kernel, jnp.where(column < vocabulary, y, -jnp.inf), column == labels[:, None]

    def add_stats(stats, chunk):
        largest, total, label = stats
        _, y, is_label = logits(*chunk)
        new = jnp.maximum(largest, y.max(-1))
        total = total * jnp.exp(largest - new) + jnp.exp(y - new[:, None]).sum(-1)
        return (new, total, label + jnp.where(is_label, y, 0).sum(-1)), None

    def add_gradient(grad_hidden, chunk):
        kernel, y, is_label = logits(*chunk)
        grad_logits = jnp.where(supervised[:, None], jnp.exp(y - norm[:, None]) - is_label, 0).astype(x.dtype)
        grad_hidden += jnp.einsum("TV,DV->TD", grad_logits, kernel, preferred_element_type=jnp.float32)
        grad_kernel = jnp.einsum("TD,TV->DV", x, grad_logits, preferred_element_type=jnp.float32)
        return grad_hidden, _scatter(grad_kernel.astype(shard.dtype), axes)

    zeros = jnp.zeros(labels.shape, jnp.float32)
    (largest, total, label), _ = jax.lax.scan(add_stats, (zeros - jnp.inf, zeros, zeros), chunks)
    norm = largest + jnp.log(total)
    loss = jnp.where(supervised, norm - label, 0).sum()
    if not differentiate:
        return (loss,)
    grad_hidden, grad_kernel = jax.lax.scan(add_gradient, jnp.zeros(x.shape, jnp.float32), chunks)
    grad_kernel = grad_kernel.swapaxes(0, 1).reshape(shard.shape[0], -1)[:, :vocabulary]
    return loss, grad_hidden.astype(hidden.dtype).reshape(hidden.shape), grad_kernel


def _split_columns(shard: Float[Array, "d V"], max_columns: int) -> tuple[Int[Array, "C"], Float[Array, "C d W"]]:
    """Returns the first column of each chunk, and the chunks. The last one is padded with zeros."""
    vocabulary = shard.shape[1]
    count = -(-vocabulary // max(NUM_LANES, min(max_columns, MAX_COLUMNS)))
    columns = -(-vocabulary // (count * NUM_LANES)) * NUM_LANES
    count = -(-vocabulary // columns)
    padded = jnp.pad(shard, ((0, 0), (0, count * columns - vocabulary)))
    return jnp.arange(count) * columns, padded.reshape(len(shard), count, columns).swapaxes(0, 1)
