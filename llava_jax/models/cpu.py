"""Implements matmul and attention in forms that XLA compiles well for CPUs, with custom VJPs and cache layouts.

scripts/bench_train.py and scripts/bench_decode.py measure the time that they save.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llava_jax.models.dot_product import attention

NUM_CHUNKS = 4
"""Number of chunks of a sequence in `chunked_causal_attention`."""


def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """Returns `x @ kernel`. On a CPU it has a custom VJP (`_matmul_backward`)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_cpu = (device.platform if device else jax.default_backend()) == "cpu"
    return _matmul_on_cpu(x, kernel) if on_cpu else x @ kernel


@jax.custom_vjp
def _matmul_on_cpu(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # JAX's default VJP computes the transposed kernel gradient. XLA for CPUs then recomputes `g` once per column.
    x, kernel = saved
    batch_axes = list(range(x.ndim - 1))
    return g @ kernel.T, jnp.tensordot(x, g, (batch_axes, batch_axes))


_matmul_on_cpu.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def attention_heads_first(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Computes `attention` of few queries over a cache with heads first, which XLA for CPUs reads without a copy."""
    B, T, N, H = query.shape
    K = key.shape[1]
    query = query.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    scores = jnp.einsum("BKSH,BKQH->BKSQ", key, query, preferred_element_type=jnp.float32).swapaxes(2, 3) * H**-0.5
    mask = jnp.repeat(mask, N // K, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(value.dtype)
    weighted = jnp.einsum("BKQS,BKSH->BKQH", weights, value)
    return weighted.reshape(B, K, T, -1, H).swapaxes(1, 2).reshape(B, T, N, H)


@jax.custom_vjp
def chunked_causal_attention(
    query: Array, key: Array, value: Array, mask: Bool[Array, "#B T T"]
) -> Float[Array, "B T N H"]:
    """Computes `attention` under a causal mask. Its VJP works in NUM_CHUNKS chunks, which skip most masked scores.

    The attention weights are not saved but recomputed from each query's log-sum-exp (FlashAttention, section 3.1). On a
    CPU the memory traffic of saved weights costs more than the recomputation.
    """
    return attention(query, key, value, mask)


def _attention_forward(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    q, k, v = _heads(query, key) * query.shape[-1] ** -0.5, key.swapaxes(1, 2), value.swapaxes(1, 2)
    outputs, log_sums = [], []
    for chunk in _chunks(query.shape[1]):
        visible = slice(chunk.stop)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q[..., chunk, :], k[:, :, visible], preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None, chunk, visible], scores, jnp.finfo(jnp.float32).min)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        weighted = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(value.dtype), v[:, :, visible])
        outputs.append((weighted / total).astype(value.dtype))
        log_sums.append((largest + jnp.log(total))[..., 0])
    output, log_sum = _tokens(jnp.concatenate(outputs, axis=3)), jnp.concatenate(log_sums, axis=3)
    return output, (query, key, value, mask, output, log_sum)


def _attention_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    query, key, value, mask, output, log_sum = saved
    scale = query.shape[-1] ** -0.5
    q, g, output = _heads(query, key) * scale, _heads(g, key), _heads(output, key)
    k, v = key.swapaxes(1, 2), value.swapaxes(1, 2)
    delta = (output * g).sum(-1, dtype=jnp.float32)
    grad_query, grad_key, grad_value = jnp.zeros(q.shape, jnp.float32), [], []
    for chunk in _chunks(query.shape[1]):
        later = slice(chunk.start, None)
        q_, g_ = q[..., later, :], g[..., later, :]
        scores = jnp.einsum("BKSH,BKGTH->BKGST", k[:, :, chunk], q_, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - log_sum[..., None, later])
        weights = jnp.where(mask[:, None, None, later, chunk].swapaxes(-1, -2), weights, 0)
        grad_weights = jnp.einsum("BKSH,BKGTH->BKGST", v[:, :, chunk], g_, preferred_element_type=jnp.float32)
        grad_scores = (weights * (grad_weights - delta[..., None, later])).astype(q.dtype)
        grad_value.append(jnp.einsum("BKGST,BKGTH->BKSH", weights.astype(g.dtype), g_))
        grad_key.append(jnp.einsum("BKGST,BKGTH->BKSH", grad_scores, q_))
        grad_query = grad_query.at[..., later, :].add(jnp.einsum("BKGST,BKSH->BKGTH", grad_scores, k[:, :, chunk]))
    grad_key, grad_value = (jnp.concatenate(chunks, axis=2).swapaxes(1, 2) for chunks in (grad_key, grad_value))
    return _tokens((grad_query * scale).astype(query.dtype)), grad_key, grad_value, None


chunked_causal_attention.defvjp(_attention_forward, _attention_backward)


def _chunks(length: int) -> list[slice]:
    size = -(-length // NUM_CHUNKS)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _heads(x: Float[Array, "B T N H"], key: Float[Array, "B S K H"]) -> Float[Array, "B K G T H"]:
    B, T, N, H = x.shape
    return x.reshape(B, T, key.shape[2], -1, H).transpose(0, 2, 3, 1, 4)


def _tokens(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
