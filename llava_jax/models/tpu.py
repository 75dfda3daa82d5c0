"""Implements the end of the gated MLP in a form that XLA compiles well for TPUs.

llava_jax/plan/README.md has the time that it saves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

ROW_MAJOR = ("TPU v6", "TPU7")
"""Prefixes of the `device_kind` for which `row_major` pins layouts."""


def device_kind() -> str:
    """Returns the kind of the devices of the current mesh, or of the default device without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def row_major(x: Array) -> Array:
    """Pins the layout of `x` on a v6e and tpu7x.

    XLA computes the gradients of `gate` and `up` with tokens as the minor axis there, and copies both and what they are
    multiplied with (libtpu 0.0.52).
    """
    if not device_kind().startswith(ROW_MAJOR):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `silu(gate) * up`."""
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def gated_down(down_proj: Callable, gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
    """Returns `down_proj(gated(gate, up))`, where `down_proj` is a linear module.

    The backward pass recomputes `gated` together with the gradients of `gate` and `up`, all in one pass. It reads
    them where the forward pass saved them, because they do not go through the barrier of the forward pass again.
    """
    gate, up = optimization_barrier((gate, up))
    return down_proj(optimization_barrier(row_major(gated(gate, up))))


def _gated_down_backward(saved: tuple[Callable, Array, Array], g: Array) -> tuple[Callable, Array, Array]:
    down_proj, gate, up = saved
    [grad] = jax.vjp(down_proj, jnp.zeros_like(gate))[1](g)  # linear, so any input will do
    x, gated_vjp = jax.vjp(gated, gate, up)
    x, *grads = optimization_barrier(tuple(map(row_major, (x, *gated_vjp(optimization_barrier(grad))))))
    [grad_down] = jax.vjp(lambda down_proj: down_proj(x), down_proj)[1](g)
    return grad_down, *grads


gated_down.defvjp(lambda *args: (gated_down(*args), args), _gated_down_backward)
