"""A server's programs: bytes by closed form, what follows from the compiler's cycles, and how many slots fit."""

import dataclasses

import jax
import pytest

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.models import slot_kernel
from llava_jax.models.llava import abstract_params
from llava_jax.models.quantized import is_quantizable
from llava_jax.plan import serve, show
from llava_jax.plan.models import planned_config
from llava_jax.plan.serve import plan_serving
from llava_jax.plan.step import Memory, Program
from llava_jax.plan.topologies import GIB, parse


@pytest.fixture
def compiled(monkeypatch):
    """Shapes of the arguments of programs, none of which is compiled: each takes 1 GiB of temporaries."""
    seen = []

    def compile_program(lowered, parts, where, mesh):
        seen.append([(tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(lowered.in_avals)])
        return Program("", Memory(temporaries=GIB, host=0, limit=where.chip.memory, **parts), (0,), 0.0)

    monkeypatch.setattr(serve, "compile_program", compile_program)
    return seen


@pytest.mark.slow
def test_bytes_and_rates_of_a_server(needs_libtpu, tiny, monkeypatch):
    monkeypatch.setattr(slot_kernel, "MAX_BLOCK_BYTES", 0)  # blocks of 128 positions
    model, _ = planned_config(tiny.model)
    plan = plan_serving(model, parse("v5e-1"), slots=4, context=256)
    shapes, text = abstract_params(model)[1], model.text
    *prompt, _, full, half = plan["phases"]
    assert full["memory"]["frozen"] == 2 * sum(x.size for x in shapes.values())
    assert plan["slot_bytes"] == 2 * 2 * text.num_layers * 256 * text.num_kv_heads * text.head_dim
    # A token needs every weight of the decoder but the table of embeddings, and the whole cache.
    weights = sum(x.size for path, x in shapes.items() if path.startswith("decoder/") and path != "decoder/embedding")
    assert plan["tokens_per_second_per_chip"] == 4 / full["step_seconds"]
    for suffix, phase, filled in (("", full, 4), ("_half_full", half, 2)):
        bound = (2 * weights + filled * plan["slot_bytes"]) / 819e9
        assert plan["hbm_bandwidth_fraction" + suffix] == pytest.approx(bound / phase["step_seconds"])
    assert 0 < plan["hbm_bandwidth_fraction"] < 1
    # A full context has two blocks of keys, half of it one.
    assert half["seconds"]["kernels"] < full["seconds"]["kernels"] <= 2 * half["seconds"]["kernels"]
    assert half["seconds"]["cycles"] == full["seconds"]["cycles"]
    # 4 tokens of the image and 64 of text are one chunk of 128.
    assert [phase["phase"] for phase in prompt] == ["vision tower", "chunk of 128 tokens"]
    assert plan["first_token_seconds"] == sum(phase["step_seconds"] for phase in prompt)
    assert plan["fits"] and plan["possible_slots"] > 1000
    assert "tokens/s per chip, contexts full" in show.serving_text(plan)


@pytest.mark.slow
@pytest.mark.parametrize("quantize, kv_cache", [(None, None), ("int8", "int8")])
def test_as_many_slots_as_fit(needs_libtpu, tiny, compiled, quantize, kv_cache):
    model, where = planned_config(tiny.model)[0], parse("v5e-1")
    lora = Lora(rank=4, targets=("decoder/layers/mlp/up_proj",))
    plan = plan_serving(dataclasses.replace(model, lora=lora), where, 24, 4096, quantize, kv_cache)
    frozen = plan["phases"][-1]["memory"]["frozen"]
    text = model.text
    values = 2 * text.num_layers * 4096 * text.num_kv_heads
    assert plan["slot_bytes"] == values * (text.head_dim + 4 if kv_cache else 2 * text.head_dim)
    free = where.chip.memory - frozen - GIB
    assert plan["fits"] and free - 2 * plan["slot_bytes"] < plan["possible_slots"] * plan["slot_bytes"] <= free
    shapes = abstract_params(model)[1]
    kernels = sum(x.size for path, x in shapes.items() if is_quantizable(path))
    full = 2 * sum(x.size for x in shapes.values())
    assert (frozen == full) if quantize is None else (
        full - kernels < frozen < full - 0.98 * kernels)  # one byte less, and the scales
    assert not any(shape[-1] == 4 or shape[-2:-1] == (4,) for shape, _ in compiled[-1] if len(shape) == 3)  # merged
    cache = text.num_layers, 24, text.num_kv_heads, 4096, text.head_dim
    assert compiled[-1].count((cache, kv_cache or "bfloat16")) == 2


@pytest.mark.slow
def test_the_prompt_has_the_tiles_of_a_photo(needs_libtpu, tiny, compiled):
    model = planned_config(tiny.model)[0].with_image_mode("anyres_max_9", "(1x1),...,(3x3)")
    plan = plan_serving(model, parse("v5e-1"), 8, 4096)
    image = model.processor.layout(*serve.PHOTO)
    assert image.tiles > 1 and ((1, image.tiles, 28, 28, 3), "uint8") in compiled[0]
    assert plan["prompt_tokens"] == len(image.index) + 64


@pytest.mark.parametrize("name, context, expected", [
    ("v5e-16", 256, "4 hosts, and a server runs on one; v5e hosts have up to 8 chips"),
    ("v5e-1", 60, "--context 60: one image takes 4 tokens, and its prompt 68"),
])
def test_what_cannot_be_planned_is_one_line(tiny, name, context, expected):
    with pytest.raises(UserError, match=expected):
        plan_serving(planned_config(tiny.model)[0], parse(name), 1, context)
