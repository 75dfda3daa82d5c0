"""Compiles one optimizer step: loss, gradients of the trainable parameters, update. A stage compiles it once."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models import lora
from llava_jax.models.llava import Parameters, from_params
from llava_jax.parallel.compiler import compiler_options
from llava_jax.text.encode import IGNORE
from llava_jax.train.loss import cross_entropy

Batch = dict[str, Array]
"""Packed sequences: tokens, labels, positions, segment_ids [B, T], visual_index [B, T], tiles [B, I, H, W, 3]. For some
image processors visual_index and visual_weight [B, T, 4]."""

@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State that a step changes: step count, trainable parameters in float32, and optimizer state."""

    step: Array  # int32 []
    trainable: Parameters
    optimizer: optax.OptState


def init_state(tx: optax.GradientTransformation, trainable: Parameters, offload: bool = False) -> TrainState:
    """Returns the state before the first step. Moments are sharded as their parameters, also in host memory."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(tx, trainable, offload))
    init = lambda trainable: TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))  # noqa: E731
    return jax.jit(init, out_shardings=shardings)(trainable)


def abstract_state(tx: optax.GradientTransformation, trainable: Parameters, offload: bool = False) -> TrainState:
    """Returns `init_state` as ShapeDtypeStructs. A leaf is sharded as the parameter whose path is part of its own."""
    mesh = next(iter(trainable.values())).sharding.mesh

    def shard(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in trainable]
        sharding = trainable[names[-1]].sharding if names and leaf.ndim else NamedSharding(mesh, P())
        if offload and names and leaf.ndim and path[0].name == "optimizer":
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(lambda x: TrainState(jnp.zeros((), jnp.int32), x, tx.init(x)), trainable)
    return jax.tree_util.tree_map_with_path(shard, state)


def loss_sum(graph: nnx.GraphDef, trainable: Parameters, frozen: Parameters, batch: Batch,
             dropout_key: Array | None = None) -> Float[Array, ""]:
    """Returns the summed loss of a batch; `count_supervised(batch)` is the number of its terms.

    `dropout_key`: random key of the adapters' dropout; None for no dropout.
    """
    model = from_params(graph, trainable | frozen)
    if dropout_key is not None:
        lora.set_dropout(model, dropout_key)
    hidden = model.hidden(batch["tokens"], batch["tiles"], batch["positions"], batch["segment_ids"],
                          batch["visual_index"], batch.get("visual_weight"))
    with jax.named_scope("loss"):
        return cross_entropy(hidden, model.decoder.output_kernel(), batch["labels"])


def count_supervised(batch: Batch) -> Int[Array, ""]:
    """Returns the number of supervised tokens that a position before them predicts."""
    return (batch["labels"][..., 1:] != IGNORE).sum()


def make_train_step(graph: nnx.GraphDef, tx: optax.GradientTransformation, state: TrainState, seed: int = 0
                    ) -> Callable:
    """Returns a jitted `(state, frozen, batch) -> (state, metrics)`. It donates the state and keeps its shardings.

    `batch` has micro-batches on a leading axis [A, B, ...]. Their losses and gradients are summed and divided once by
    the number of supervised tokens, so that the result does not depend on the split into micro-batches and devices.
    Only `state.trainable` is differentiated, clipped and measured (`grad_norm`, before clipping). The adapters' dropout
    depends on `seed`, the step and the micro-batch, not on the devices.
    """

    def train_step(state: TrainState, frozen: Parameters, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro_batch(batch, number):
            return jax.value_and_grad(loss_sum, argnums=1)(
                graph, state.trainable, frozen, batch, jax.random.fold_in(key, number))

        count = count_supervised(batch)
        if batch["tokens"].shape[0] == 1:
            sums = micro_batch(jax.tree.map(lambda x: x[0], batch), 0)
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trainable))
            numbered = batch, jnp.arange(batch["tokens"].shape[0])
            sums, _ = jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, micro_batch(*one)), None),
                                   zeros, numbered)
        loss, grads = jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums)
        with jax.named_scope("optimizer"):
            moments = jax.tree.map(to_device, state.optimizer, shardings.optimizer)
            updates, optimizer = tx.update(grads, moments, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "supervised_tokens": count}
        return TrainState(state.step + 1, trainable, optimizer), metrics

    shardings = jax.tree.map(lambda x: x.sharding, state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    # Without out_shardings the first step may return other shardings, and the second step would compile again.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None),
                   compiler_options=compiler_options(mesh))


def to_device(x: Array, sharding: NamedSharding) -> Array:
    """Returns `x` in device memory, if `sharding` keeps it in host memory."""
    return jax.device_put(x, sharding.with_memory_kind("device")) if sharding.memory_kind == "pinned_host" else x


def make_loss(graph: nnx.GraphDef) -> Callable:
    """Returns a jitted `(trainable, frozen, batch) -> (summed loss, number of supervised tokens)`, for validation."""
    return jax.jit(lambda trainable, frozen, batch: (
        loss_sum(graph, trainable, frozen, batch), count_supervised(batch)))
