"""Prefill and decode: bytes by closed form, and what follows from the compiler's cycles."""

import dataclasses

import jax
import pytest

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.models.llava import abstract_params
from llava_jax.plan import inference, show
from llava_jax.plan.inference import plan_inference
from llava_jax.plan.models import planned_config
from llava_jax.plan.step import Memory, Program
from llava_jax.plan.topologies import parse


@pytest.mark.slow
def test_bytes_and_rates_of_prefill_and_decode(needs_libtpu, tiny):
    model, _ = planned_config(tiny.model)
    where = parse("v5e-1")
    prefill, decode = plan_inference(model, where, batch=4, context=256)
    shapes, text = abstract_params(model)[1], model.text
    assert prefill.memory.frozen == decode.memory.frozen == 2 * sum(x.size for x in shapes.values())
    assert prefill.cache == decode.cache == 2 * 2 * text.num_layers * 4 * 256 * text.num_kv_heads * text.head_dim
    assert prefill.tokens == 4 * 256 and decode.tokens == 4
    # A token needs every weight of the decoder but the table of embeddings, and the whole cache.
    weights = sum(x.size for path, x in shapes.items() if path.startswith("decoder/") and path != "decoder/embedding")
    assert decode.needed == 2 * weights + decode.cache
    assert decode.tokens_per_second == 4 / decode.times.step
    assert decode.bandwidth == pytest.approx(decode.needed / 819e9 / decode.times.step)
    assert 0 < decode.bandwidth < 1
    # Every layer's products with the weights, once for each row.
    products = 2 * 4 * (weights - sum(x.size for path, x in shapes.items() if "norm" in path and "decoder" in path))
    assert products <= decode.profile.flops <= 1.5 * products
    assert prefill.profile.flops > 100 * decode.profile.flops / 4
    assert "tokens written per second" in show.phase_text(decode)
    assert show.phase_data(decode)["hbm_bandwidth_fraction"] == decode.bandwidth


@pytest.mark.slow
def test_prompts_have_the_tiles_and_weights_of_a_photo(needs_libtpu, tiny, monkeypatch):
    """Nothing is compiled: the arguments of prefill are looked at."""
    model = planned_config(tiny.model)[0].with_image_mode("anyres_max_9", "(1x1),...,(3x3)")
    lora = Lora(rank=4, targets=("decoder/layers/mlp/up_proj",))
    seen = []

    def compile_program(lowered, parts, where, mesh):
        seen.append([tuple(x.shape) for x in jax.tree.leaves(lowered.in_avals)])
        return Program("", Memory(temporaries=0, host=0, limit=1, **parts), (0,), 0.0)

    monkeypatch.setattr(inference, "compile_program", compile_program)
    plan_inference(dataclasses.replace(model, lora=lora), parse("v5e-1"), batch=2, context=64)
    tiles = model.processor.layout(640, 480).tiles
    assert tiles > 1 and (2, tiles, 28, 28, 3) in seen[0] and seen[0].count((2, 64, 4)) == 2
    assert len([shape for shape in seen[0] if 4 in shape[-2:] and 256 in shape]) == 0  # the adapters are merged


@pytest.mark.parametrize("name,context,expected", [
    ("v5e-16", 256, "4 hosts, and inference runs on one; v5e hosts have up to 8 chips"), ("v5e-1", 2, "--context 2"),
])
def test_what_inference_cannot_plan_is_one_line(tiny, name, context, expected):
    with pytest.raises(UserError, match=expected):
        plan_inference(planned_config(tiny.model)[0], parse(name), 1, context)
