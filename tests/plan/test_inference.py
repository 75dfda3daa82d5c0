"""Prefill and decode: bytes by closed form, and what follows from the compiler's cycles."""

import pytest

from llava_jax.errors import UserError
from llava_jax.models.llava import abstract_params
from llava_jax.plan import show
from llava_jax.plan.inference import plan_inference
from llava_jax.plan.models import planned_config
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


@pytest.mark.parametrize("name,context,expected", [
    ("v5e-16", 256, "4 hosts, and inference runs on one; v5e hosts have up to 8 chips"), ("v5e-1", 2, "--context 2"),
])
def test_what_inference_cannot_plan_is_one_line(tiny, name, context, expected):
    with pytest.raises(UserError, match=expected):
        plan_inference(planned_config(tiny.model)[0], parse(name), 1, context)
