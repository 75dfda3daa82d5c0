"""The Pallas kernels, interpreted on this machine, against plain attention; and the choice between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.errors import UserError
from llava_jax.inference.decode import prefill
from llava_jax.inference.sampling import Sampling
from llava_jax.models import attention, cpu, llava, pallas, splash
from llava_jax.models.dot_product import attention as plain_attention
from llava_jax.models.llama import LlamaConfig, rope_tables
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig


def inputs(length: int, heads: int, num_kv_heads: int, width: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width), (2, length, num_kv_heads, width), (2, length, num_kv_heads, width)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_same_with_gradients(function, expected, arrays):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    got = jax.value_and_grad(lambda arrays: (function(*arrays) * weights).sum(), has_aux=False)(arrays)
    want = jax.value_and_grad(lambda arrays: (expected(*arrays) * weights).sum())(arrays)
    np.testing.assert_allclose(function(*arrays), expected(*arrays), atol=2e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "heads", "num_kv_heads", "width"),
                         [(300, 2, 1, 128), (256, 2, 2, 64)])
def test_splash_sees_what_a_causal_mask_of_segments_shows(monkeypatch, length, heads, num_kv_heads, width):
    monkeypatch.setattr(pallas, "SPLASH_BLOCKS", (256, 128))  # several blocks in a row
    monkeypatch.setattr(splash, "TWO_BUFFERS", 300)
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], -(-length // 4), axis=1)[:, :length]
    positions = jnp.asarray(np.random.default_rng(2).integers(0, 4096, (2, length)))
    for ids, rope in ((jnp.asarray(segments, jnp.int32), rope_tables(LlamaConfig(head_dim=width), positions)),
                      (None, None)):
        starts = None if ids is None else pallas.segment_starts(ids)
        assert_same_with_gradients(
            lambda *arrays, starts=starts, rope=rope: pallas.splash_attention(*arrays, starts, rope, interpret=True),
            attention.causal("xla", length, ids, rope), inputs(length, heads, num_kv_heads, width))


@pytest.mark.parametrize(("length", "heads", "num_kv_heads", "width"), [(37, 4, 2, 16), (3, 2, 2, 8), (64, 4, 1, 8)])
def test_parts_of_a_row_are_the_row(length, heads, num_kv_heads, width):
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], -(-length // 4), axis=1)[:, :length], jnp.int32)
    mask = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    assert_same_with_gradients(attention.causal("xla", length, segments),
                               lambda *arrays: plain_attention(*arrays, mask),
                               inputs(length, heads, num_kv_heads, width))
    # What a backward pass uses of the forward pass is the same too.
    out, _ = jax.vjp(attention.causal("xla", length, segments), *inputs(length, heads, num_kv_heads, width))
    np.testing.assert_allclose(out, plain_attention(*inputs(length, heads, num_kv_heads, width), mask), atol=2e-6)


@pytest.mark.parametrize(("queries", "heads", "num_kv_heads"), [(1, 4, 2), (3, 4, 4), (2, 6, 1)])
def test_a_cache_with_heads_first_is_seen_as_any_other(queries, heads, num_kv_heads):
    _, key, value = inputs(20, heads, num_kv_heads, 8)
    query = inputs(queries, heads, num_kv_heads, 8)[0]
    mask = jnp.arange(20) <= jnp.asarray([[3], [15]])[..., None] + jnp.arange(queries)[:, None]
    got = cpu.attention_heads_first(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask)
    np.testing.assert_allclose(got, plain_attention(query, key, value, mask), atol=2e-6)


@pytest.mark.parametrize(("length", "heads", "width"), [(37, 4, 64), (50, 3, 72), (16, 1, 128)])
def test_the_towers_kernel_sees_everything(length, heads, width):
    def joined(*arrays):
        side_by_side = jnp.concatenate([x.reshape(2, length, heads * width) for x in arrays], axis=-1)
        return pallas.bidirectional_attention(side_by_side, heads, True)

    assert_same_with_gradients(joined, plain_attention, inputs(length, heads, heads, width))


def test_the_towers_kernel_fits_on_v4(monkeypatch):
    """Heads in groups, which v4's VMEM has room for, give the same."""
    monkeypatch.setattr(pallas.tpu, "device_kind", lambda: "TPU v4")
    assert [pallas._head_groups(577, 1024, 16, 2), pallas._head_groups(729, 1152, 16, 2)] == [4, 8]
    monkeypatch.setattr(pallas, "V4_VMEM_BYTES", pallas._tower_bytes(37, 2 * 72, 4))
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(3, 37, 3 * 6 * 72)), jnp.float32)
    found = pallas.bidirectional_attention(qkv, 6, True)
    np.testing.assert_allclose(found, plain_attention(*pallas.split_qkv(qkv, 6)), atol=2e-6)


def test_auto_depends_on_the_platform_and_other_names_stand_for_themselves():
    assert [attention.resolve("auto", name) for name in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "xla"]
    assert attention.resolve("xla", "tpu") == "xla"
    with pytest.raises(UserError, match="'flash' is not one of xla, splash, cudnn"):
        attention.causal("flash", 4)


def test_what_cannot_run_raises():
    q, k, v = inputs(16, 2, 2, 64)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        jax.block_until_ready(attention.causal("cudnn", 16)(q, k, v))
    with pytest.raises(ValueError):
        jax.block_until_ready(attention.causal("splash", 16)(q, k, v))


BASE = LlavaConfig()
NARROW = dataclasses.replace(BASE, vision=VisionConfig(hidden_size=84, num_heads=7))
SO400M = LlavaConfig(vision=VisionConfig(
    384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", class_token=False, patch_bias=True, pre_norm=False))
ODD = dataclasses.replace(BASE, text=LlamaConfig(head_dim=100))


@pytest.mark.parametrize("name, platform, config, dtype, expected", [
    ("auto", "cpu", BASE, "float32", ("xla", "xla")), ("auto", "tpu", BASE, "bfloat16", ("splash", "splash")),
    ("auto", "tpu", NARROW, "bfloat16", ("splash", "xla")), ("splash", "tpu", NARROW, "bfloat16", ("splash", "splash")),
    ("auto", "tpu", SO400M, "bfloat16", ("splash", "splash")), ("auto", "gpu", SO400M, "bfloat16", ("cudnn", "cudnn")),
    ("auto", "gpu", BASE, "bfloat16", ("cudnn", "cudnn")), ("auto", "gpu", BASE, "float32", ("xla", "xla")),
    ("auto", "gpu", ODD, "bfloat16", ("xla", "cudnn")), ("cudnn", "gpu", ODD, "float32", ("cudnn", "cudnn")),
    ("xla", "tpu", BASE, "bfloat16", ("xla", "xla")),
])
def test_each_part_of_a_model_gets_what_it_can_run(name, platform, config, dtype, expected):
    assert llava.choose_attention(name, platform, config, dtype) == expected


def test_a_tower_never_changes_its_attention_quietly():
    with pytest.raises(UserError, match="splash: a vision tower of hidden_size 84 with 7 heads has no kernel"):
        attention.bidirectional_attention("splash", 7)(jnp.zeros((1, 4, 3 * 84)))
    with pytest.raises(UserError, match="'flash' is not one of xla, splash, cudnn"):
        attention.bidirectional_attention("flash", 3)
    assert str(llava.AttentionChoice("splash", "xla")) == "splash (vision tower xla)"


@pytest.mark.parametrize("name, kernels", [("auto", {"bidirectional_attention", "splash"}), ("xla", set())])
def test_prefill_on_a_tpu_has_the_kernels(name, kernels):
    """The program of inference, traced for a TPU that is not there."""
    config = LlavaConfig(vision=VisionConfig(28, 14, 128, 128, 2, 2), text=LlamaConfig(64, 128, 128, 1, 1, 1, 128),
                         feature_layer=-1)
    chosen = llava.choose_attention(name, "tpu", config, "bfloat16")
    graph, shapes = llava.abstract_params(config, "bfloat16", chosen)
    array = jax.ShapeDtypeStruct
    sampling = Sampling(array((2, 2), "uint32"), array((2,), "float32"), array((2,), "float32"))
    inputs = (array((2, 128), "int32"), array((2,), "int32"), array((2, 1, 28, 28, 3), "uint8"),
              array((2, 128), "int32"), None, array((2,), "int32"))
    read = jax.jit(lambda parameters, *inputs: prefill(llava.from_params(graph, parameters), *inputs, (2,), 192))
    text = str(read.trace(shapes, *inputs, sampling).jaxpr)
    assert {kernel for kernel in ("bidirectional_attention", "splash") if kernel in text} == kernels
    assert ("pallas_call" in text) == bool(kernels)
