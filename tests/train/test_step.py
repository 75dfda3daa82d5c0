"""One train step: its loss against brute force, micro-batches against one batch, frozen parameters against memory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core
from sharded_steps import LENGTH, MODEL, ROWS, STAGE, make_batch, run

from llava_jax import config
from llava_jax.models import cpu, dot_product, layers
from llava_jax.models.llava import abstract_params, init_params
from llava_jax.parallel import sharding
from llava_jax.text.encode import IGNORE
from llava_jax.train.metrics import model_flops, trained_parts
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.step import init_state, loss_sum, make_train_step

ONE = config.Mesh(1, 1, 1)


def make_mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(ONE, jax.devices()[:1])


def test_micro_batches_weigh_by_learned_tokens():
    batch = make_batch()
    counts = (batch["labels"] != IGNORE).sum((1, 2))
    assert counts[0] != counts[1]
    together = {name: x.reshape(1, -1, *x.shape[2:]) for name, x in batch.items()}
    cut, whole = run(make_mesh(), batch), run(make_mesh(), together)
    for name, value in whole.items():
        np.testing.assert_allclose(cut[name], value, rtol=2e-5, atol=3e-5, err_msg=name)


def compile_step(stage: config.Stage, remat: str) -> tuple[jax.stages.Compiled, dict, dict]:
    graph, shapes = abstract_params(MODEL, remat=remat)
    mesh = make_mesh()
    shardings = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: init_params(MODEL), out_shardings=shardings)()
        rates = trainable_paths(stage, list(parameters))
        tx = make_optimizer(stage, rates, 10)
        trainable = {path: parameters[path] for path in rates}
        frozen = {path: x for path, x in parameters.items() if path not in rates}
        state = init_state(tx, trainable)
        compiled = make_train_step(graph, tx, state).lower(state, frozen, make_batch()).compile()
    return compiled, state, parameters


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_stage_one_has_no_gradient_or_optimizer_state_of_frozen_parameters():
    projector = config.Stage(learning_rates=(("projector/.*", 1e-2), ("(vision|decoder)/.*", None)), data=STAGE.data)
    small, state, parameters = compile_step(projector, "full")
    large, _, _ = compile_step(STAGE, "full")
    trained = nbytes({path: x for path, x in parameters.items() if path.startswith("projector/")})
    decoder = nbytes({path: x for path, x in parameters.items() if path.startswith("decoder/")})
    # The state is the projector, its two moments and two counters, and goes out where it came in.
    assert nbytes(state) <= 3 * trained + 16
    memory = small.memory_analysis()
    assert memory.output_size_in_bytes <= 3 * trained + 1024
    assert memory.argument_size_in_bytes <= nbytes(parameters) + 2 * trained + nbytes(make_batch()) + 1024
    # Training the decoder as well takes its gradients in addition; stage 1 has no room where they could be.
    assert large.memory_analysis().temp_size_in_bytes - memory.temp_size_in_bytes > 0.9 * decoder
    assert {path for path in state.trainable} == {path for path in parameters if path.startswith("projector/")}


@pytest.mark.bits
def test_moments_in_the_hosts_memory_change_nothing():
    here, offloaded = run(make_mesh(), make_batch()), run(make_mesh(), make_batch(), offload=True)
    for name, value in here.items():
        np.testing.assert_array_equal(offloaded[name], value, err_msg=name)


def dot_flops(jaxpr) -> float:
    """FLOPs of all matrix products in a jaxpr, those inside scans times their length."""
    count = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            count += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        count += sum(times * dot_flops(inner) for inner in jax_core.jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("trained", [{"projector"}, {"projector", "decoder"}, {"vision", "projector", "decoder"},
                                     {"projector", "decoder/adapter"}, {"vision/adapter", "projector/adapter"}])
def test_model_flops_count_the_products_of_a_traced_step(monkeypatch, trained):
    # With the backward passes that JAX derives: a CPU's own leave products to the compiler to drop, or repeat them.
    monkeypatch.setattr(layers, "matmul", jnp.matmul)
    monkeypatch.setattr(cpu, "chunked_causal_attention", dot_product.attention)
    adapted = tuple(f"{part.split('/')[0]}/.*(_proj|layers_[01])" for part in trained if part.endswith("/adapter"))
    model = dataclasses.replace(MODEL, lora=config.Lora(4, targets=adapted) if adapted else None)
    graph, shapes = abstract_params(model)
    batch = {name: x[0] for name, x in make_batch().items()}
    trainable = {path: x for path, x in shapes.items() if trained_parts([path]) <= trained}
    frozen = {path: x for path, x in shapes.items() if path not in trainable}
    traced = jax.make_jaxpr(jax.grad(lambda *parts: loss_sum(graph, *parts)))(trainable, frozen, batch)
    # The step computes all pairs of places, so the formula is told that every token sees a whole row; it makes the
    # head's gradient even where the compiler will drop it; and it turns queries and keys by products, both ways.
    places = np.full_like(batch["positions"], LENGTH - 1)
    formula = model_flops(model, trained, places, np.ones_like(places), tiles=2 * ROWS)
    text = MODEL.text
    formula += 2 * ROWS * LENGTH * text.hidden_size * text.vocab_size * ("decoder" not in trained)
    formula += 2 * 2 * ROWS * LENGTH * text.num_layers * (text.num_heads + text.num_kv_heads) * text.head_dim**2
    assert dot_flops(traced.jaxpr) == pytest.approx(formula, rel=1e-6)


def test_model_flops_of_attention_count_visible_pairs_only():
    def flops(lengths):
        places = np.concatenate([np.arange(n) for n in lengths])[None]
        return model_flops(MODEL, {"decoder"}, places, np.ones_like(places), tiles=0)

    per_pair = 3 * 4 * MODEL.text.num_layers * MODEL.text.num_heads * MODEL.text.head_dim
    assert flops([6]) - flops([2, 4]) == per_pair * (6 * 7 - 2 * 3 - 4 * 5) / 2
