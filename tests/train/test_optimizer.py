"""The optimizer against torch's AdamW and transformers' schedule."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from llava_jax import config
from llava_jax.train.optimizer import make_optimizer, schedule, trainable_paths

SHAPES = {"projector/layers_0/kernel": (3, 4), "projector/layers_0/bias": (4,), "decoder/embedding": (5, 4)}


def make_stage(clip: float | None = None) -> config.Stage:
    return config.Stage(
        learning_rates=(("projector/.*", 1e-2), ("decoder/.*", 3e-3)), data=config.Data(path="unused"),
        optimizer=config.Optimizer(warmup_ratio=0.2, b1=0.8, b2=0.9, eps=1e-6, clip=clip,
                                   weight_decay=((".*/bias", 0.0), (".*/(kernel|embedding)", 0.1))))


@pytest.mark.parametrize("steps,ratio", [(10, 0.03), (100, 0.03), (7, 0.5), (5, 0.0), (1, 0.03), (3, 1.0)])
def test_schedule_is_transformers_cosine_with_warmup(steps, ratio):
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1.0)
    warmup = int(np.ceil(steps * ratio))
    scheduler = get_cosine_schedule_with_warmup(theirs, warmup, steps)
    ours = schedule(steps, ratio)
    for step in range(steps):
        assert float(ours(step)) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6), step
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_updates_are_torch_adamws(clip):
    rng = np.random.default_rng(0)
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    stage = make_stage(clip)
    tx = make_optimizer(stage, trainable_paths(stage, list(SHAPES)), total_steps=10)
    ours = {path: jnp.asarray(x) for path, x in start.items()}
    state = tx.init(ours)
    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    groups = [{"params": [x], "lr": 1e-2 if path.startswith("projector") else 3e-3,
               "weight_decay": 0.0 if path.endswith("bias") else 0.1} for path, x in theirs.items()]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    scheduler = get_cosine_schedule_with_warmup(adamw, 2, 10)
    for _ in range(6):
        grads = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
        updates, state = tx.update({path: jnp.asarray(g) for path, g in grads.items()}, state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, x in theirs.items():
            x.grad = torch.tensor(grads[path])
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.step()
        scheduler.step()
    for path in SHAPES:
        np.testing.assert_allclose(ours[path], theirs[path].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_every_parameter_needs_exactly_one_row():
    stage = config.Stage(learning_rates=(("projector/.*", 1e-2), (".*/bias", 1e-3), ("decoder/layers/.*", None)),
                         data=config.Data(path="unused"))
    with pytest.raises(ValueError) as error:
        trainable_paths(stage, list(SHAPES))
    message = str(error.value)
    assert "projector/layers_0/bias matches projector/.* and .*/bias" in message
    assert "decoder/embedding matches no row" in message
    assert "decoder/layers/.* matches no parameter" in message
