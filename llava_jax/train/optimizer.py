"""Builds AdamW with a learning rate and a weight decay for every parameter path."""

import math
from collections.abc import Sequence

import optax

from llava_jax import config


def schedule(total_steps: int, warmup_ratio: float) -> optax.Schedule:
    """Returns the factor of the peak rate: linear warm-up from 0 in ceil(ratio * total) steps, then cosine decay to 0.

    The first update has factor 0, as with transformers' `get_cosine_schedule_with_warmup`.
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, max(total_steps, warmup + 1))


def trainable_paths(stage: config.Stage, paths: Sequence[str]) -> dict[str, float]:
    """Returns the peak learning rate of every parameter that the stage trains."""
    rates = config.match_rules(stage.learning_rates, list(paths), "learning_rates")
    return {path: rate for path, rate in rates.items() if rate is not None}


def make_optimizer(stage: config.Stage, rates: dict[str, float], total_steps: int) -> optax.GradientTransformation:
    """Returns the transformation of the gradients of the trainable parameters, which are the paths of `rates`."""
    settings = stage.optimizer
    decays = config.match_rules(settings.weight_decay, list(rates), "optimizer.weight_decay", allow_unused=True)
    factor = schedule(total_steps, settings.warmup_ratio)
    groups = sorted({(rates[path], decays[path] or 0.0) for path in rates})

    def adamw(rate: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(lambda step: rate * factor(step), settings.b1, settings.b2, settings.eps, weight_decay=decay)

    transforms = {str(group): adamw(*group) for group in groups}
    labels = {path: str((rates[path], decays[path] or 0.0)) for path in rates}
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    return optax.chain(clip, optax.partition(transforms, labels))
