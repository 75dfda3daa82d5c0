"""One optimizer step: loss, gradients of the trainable subtree, update. Compiled once for each stage."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models.llama import Llama
from llava_jax.models.llava import Parameters, merge
from llava_jax.sharding import ROWS, constrain
from llava_jax.text.encode import IGNORE

Batch = dict[str, Array]
"""Packed rows: tokens, labels, positions, segment_ids [B, T], images [B, I, H, W, 3], image_segment_ids [B, I]."""

LOSS_CHUNK = 512
"""Positions whose scores over the vocabulary exist at one time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes: the number of steps done, the trainable subtree in float32, and the optimizer's state."""

    step: Int[Array, ""]
    trainable: Parameters
    optimizer: optax.OptState


def init_state(tx: optax.GradientTransformation, trainable: Parameters) -> TrainState:
    """Step 0. The optimizer's moments lie on the devices as their parameters do, from the start."""
    make = lambda trainable: TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))  # noqa: E731
    return jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make, trainable), trainable))(trainable)


def state_shardings(state: TrainState, trainable: Parameters) -> TrainState:
    """A sharding for every leaf of a state: that of the parameter whose path is part of its own, or replicated."""
    mesh = next(iter(trainable.values())).sharding.mesh
    def sharding(path, leaf):  # noqa: E306
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in trainable]
        return trainable[names[-1]].sharding if names and leaf.ndim else NamedSharding(mesh, P())
    return jax.tree_util.tree_map_with_path(sharding, state)


def cross_entropy(decoder: Llama, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Sum of the negative log likelihoods of `labels[:, t + 1]` given `hidden[:, t]`, float32; IGNORE counts nothing.

    Scores are made LOSS_CHUNK positions at a time and again in the backward pass, so [B, T, V] never exists.
    """
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    B, T, D = hidden.shape
    chunk = min(LOSS_CHUNK, T)
    rest = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, rest), (0, 0))).reshape(B, -1, chunk, D).swapaxes(0, 1)
    labels = jnp.pad(labels, ((0, 0), (0, rest)), constant_values=IGNORE).reshape(B, -1, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def add(total, chunk):
        hidden, labels = chunk
        scores = constrain(decoder.logits(hidden), ROWS)
        learned = labels != IGNORE
        right = jnp.take_along_axis(scores, jnp.where(learned, labels, 0)[..., None], axis=-1)[..., 0]
        return total + jnp.where(learned, jax.nn.logsumexp(scores, axis=-1) - right, 0.0).sum(), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (hidden, labels))[0]


def loss_sum(graph: nnx.GraphDef, trainable: Parameters, frozen: Parameters, batch: Batch) -> Float[Array, ""]:
    """Summed loss of a batch; dividing by `supervised(batch)` gives the mean over all learned tokens."""
    model = merge(graph, trainable | frozen)
    hidden = model.hidden(batch["tokens"], batch["images"], batch["positions"], batch["segment_ids"])
    return cross_entropy(model.decoder, hidden, batch["labels"])


def supervised(batch: Batch) -> Int[Array, ""]:
    """Learned tokens of a batch: those that a position before them predicts."""
    return (batch["labels"][..., 1:] != IGNORE).sum()


def make_train_step(graph: nnx.GraphDef, tx: optax.GradientTransformation, state: TrainState) -> Callable:
    """`(state, frozen, batch) -> (state, metrics)`, jitted; the state's memory is reused, laid out as `state` is.

    `batch` has the micro-batches on a leading axis [A, B, ...]. Their losses and gradients are summed, and divided
    once by the step's learned tokens, so the cut into micro-batches and devices does not change the result.
    Only `state.trainable` is differentiated, clipped and normed (`grad_norm`, before clipping).
    """

    def train_step(state: TrainState, frozen: Parameters, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        def add(sums, batch):
            sums_of_batch = jax.value_and_grad(loss_sum, argnums=1)(graph, state.trainable, frozen, batch)
            return jax.tree.map(jnp.add, sums, sums_of_batch), None

        count = supervised(batch)
        if batch["tokens"].shape[0] == 1:
            sums, _ = add((0.0, jax.tree.map(jnp.zeros_like, state.trainable)), jax.tree.map(lambda x: x[0], batch))
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trainable))
            sums, _ = jax.lax.scan(add, zeros, batch)
        loss, grads = jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums)
        updates, optimizer = tx.update(grads, state.optimizer, state.trainable)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "supervised_tokens": count}
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), optimizer), metrics

    # Without fixed shardings the first step's result may be laid out otherwise, and the second step compiled again.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def make_loss(graph: nnx.GraphDef) -> Callable:
    """`(trainable, frozen, batch) -> (summed loss, learned tokens)`, jitted, for validation."""
    return jax.jit(lambda trainable, frozen, batch: (loss_sum(graph, trainable, frozen, batch), supervised(batch)))
