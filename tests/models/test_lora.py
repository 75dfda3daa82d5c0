"""Adapters: against PEFT on a torch LLaMA, merged kernels, dropout, and targets that cannot be adapted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.models import llava, lora
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.weights import peft, source
from llava_jax.weights.checkpoint import load_checkpoint, load_source

CONFIG = LlavaConfig(vision=VisionConfig(28, 14, 32, 48, 3, 2), text=LlamaConfig(101, 64, 96, 2, 4, 2, 16),
                     feature_layer=-2, lora=Lora(rank=4, alpha=6.0, dropout=0.25))
TOWER = Lora(rank=3, targets=(r"vision/layers/(attention/(q|o)_proj|mlp/.*)", r"projector/layers_1"))
PLAIN = dataclasses.replace(CONFIG, lora=None)
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 12)).astype(np.int32)


def randomised(config: LlavaConfig) -> llava.Parameters:
    rng = np.random.default_rng(1)
    return {path: jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32) if path.endswith("lora_b") else x
            for path, x in llava.init_params(config).items()}


def logits(config: LlavaConfig, parameters: llava.Parameters, remat: str = "none", key: jax.Array | None = None,
           tokens: np.ndarray = TOKENS, images: np.ndarray | None = None) -> np.ndarray:
    graph = llava.abstract_params(config, remat=remat)[0]

    def run(parameters):
        model = llava.from_params(graph, parameters)
        if key is not None:
            lora.set_dropout(model, key)
        return model(tokens, images)

    return np.asarray(jax.jit(run)(parameters))


def test_logits_and_gradients_are_those_of_peft(tmp_path, randomise, assert_close):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    torch_model = randomise(LlamaForCausalLM(TorchConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)))
    torch_model.save_pretrained(tmp_path)
    text, base = load_checkpoint(tmp_path)
    config = dataclasses.replace(CONFIG, text=text, lora=dataclasses.replace(CONFIG.lora, rslora=True))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(torch_model, LoraConfig(
        r=4, lora_alpha=6.0, target_modules=names, use_rslora=True))
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
            layer, block, linear, factor = name.split(".")[4:8]
            block = {"self_attn": "attention", "mlp": "mlp"}[block]
            path = f"decoder/layers/{block}/{linear}/adapter/{factor.lower()}"
            factors.setdefault(path, {})[int(layer)] = weight
    mine = {path: jnp.stack([jnp.asarray(x[i].detach().numpy().T) for i in range(2)]) for path, x in factors.items()}
    assert mine.keys() == {path for path in llava.abstract_params(config)[1] if lora.is_adapter(path)}
    parameters = llava.init_params(config) | base | mine

    ids = torch.tensor(TOKENS, dtype=torch.long)
    result = adapted(input_ids=ids, labels=ids)
    result.loss.backward()
    graph = llava.abstract_params(config)[0]

    def loss(factors):
        found = llava.from_params(graph, parameters | factors)(TOKENS, None)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(found[:, :-1]), TOKENS[:, 1:, None], axis=-1)
        return nll.mean(), found

    (value, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(mine)
    assert_close(found, result.logits.detach().numpy(), 1e-4)
    np.testing.assert_allclose(value, result.loss.item(), rtol=1e-5)
    for path, weights in factors.items():
        assert_close(gradients[path], np.stack([weights[i].grad.numpy().T for i in range(2)]), 1e-3)


@pytest.mark.bits
@pytest.mark.parametrize("adapters", [CONFIG.lora, TOWER])
def test_new_adapters_change_no_bit_and_merged_ones_are_the_same_function(adapters, assert_close):
    config = dataclasses.replace(CONFIG, lora=adapters)
    tokens = TOKENS.copy()
    tokens[:, 3:7] = IMAGE_TOKEN_ID
    inputs = {"tokens": tokens, "images": np.random.default_rng(2).normal(size=(2, 1, 28, 28, 3)).astype(np.float32)}
    base = logits(PLAIN, llava.init_params(PLAIN), **inputs)
    np.testing.assert_array_equal(logits(config, llava.init_params(config), **inputs), base)
    parameters = randomised(config)
    adapted = logits(config, parameters, **inputs)
    assert np.abs(adapted - base).max() > 0.1 * base.std()
    plain, merged = peft.merge(config, source.from_memory(parameters))
    merged = load_source("merged", merged)
    assert plain == dataclasses.replace(PLAIN, merged=plain.merged) and plain.merged
    assert merged.keys() == llava.init_params(PLAIN).keys()
    assert_close(logits(plain, merged, **inputs), adapted, 1e-4)


def test_initial_values_have_the_bound_of_torch():
    parameters = llava.init_params(CONFIG)
    for path, x in parameters.items():
        if path.endswith("lora_a"):
            bound = x.shape[1] ** -0.5
            assert 0.9 * bound < jnp.abs(x).max() <= bound and not (x[0] == x[1]).any()
        elif path.endswith("lora_b"):
            assert not x.any()
    paths = [path for path in parameters if lora.is_adapter(path)]
    one, other = (llava.fresh_params(CONFIG, paths, seed) for seed in (0, 1))
    a = "decoder/layers/mlp/up_proj/adapter/lora_a"
    assert (one[a] != other[a]).all()
    assert not np.array_equal(one[a], one[a.replace("up", "gate")])


def test_rematerialised_layers_have_the_same_dropout():
    def loss(remat, parameters):
        model = llava.from_params(llava.abstract_params(CONFIG, remat=remat)[0], parameters)
        lora.set_dropout(model, jax.random.key(3))
        return jnp.square(model(TOKENS, None)).mean()

    parameters = randomised(CONFIG)
    expected, again = (jax.jit(jax.grad(functools.partial(loss, remat)))(parameters) for remat in ("none", "full"))
    for path, x in again.items():
        np.testing.assert_allclose(x, expected[path], atol=1e-5 * np.abs(expected[path]).max(), err_msg=path)


def test_dropout_differs_by_layer_path_and_key_and_keeps_the_mean():
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.5))
    graph, parameters = llava.abstract_params(config)[0], randomised(config)
    model = llava.from_params(graph, parameters)
    lora.set_dropout(model, jax.random.key(0))
    keys = {name: jax.random.key_data(getattr(model.decoder.layers.mlp, name).adapter.dropout_key)
            for name in ("gate_proj", "up_proj")}
    assert len({tuple(np.asarray(key)) for both in keys.values() for key in both}) == 4
    adapter = jax.tree.map(lambda x: x[0], model.decoder.layers.mlp.up_proj.adapter)
    a, b = adapter.lora_a[...], adapter.lora_b[...]
    x = jnp.ones((1, 64))
    runs = jax.vmap(lambda key: _with_key(adapter, key)(x))(jax.random.split(jax.random.key(1), 2000))
    exact = x @ a @ b * config.lora.scale
    np.testing.assert_allclose(runs.mean(0), exact, atol=5 * float(runs.std(0).max()) / 2000**0.5)
    # The first layer's variance: p / (1 - p) times the sum of squares.
    np.testing.assert_allclose(runs.var(0)[0], jnp.square(a @ b * config.lora.scale).sum(0), rtol=0.25)
    words = [np.asarray(lora._random_words(jax.random.key(seed), (64, 512))) for seed in (0, 1)]
    bits = np.unpackbits(np.stack(words).view(np.uint8)).reshape(2, -1) * 2.0 - 1
    assert np.abs([bits.mean(1), [bits[0] @ bits[1] / bits.shape[1]] * 2]).max() < 5 / bits.shape[1] ** 0.5
    one, same, other = (logits(config, parameters, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1 and np.abs(one - logits(config, parameters)).max() > 0.1


def _with_key(adapter, key):
    adapter = jax.tree.map(lambda x: x, adapter)
    adapter.dropout_key = key
    return adapter


@pytest.mark.parametrize("target, problem", [
    ("decoder/.*", "'decoder/.*' matches decoder/embedding, which takes no adapter"),
    ("decoder/lm_head", "'decoder/lm_head' matches decoder/lm_head, which takes no adapter"),
    ("vision/patch", "'vision/patch' matches vision/patch, which takes no adapter"),
    (".*_norm/scale", "'.*_norm/scale' matches .*norm/scale, which takes no adapter"),
    ("q_proj", "'q_proj' matches no linear map; there are decoder/layers/attention/k_proj, .*projector/layers_1, .*"),
    ("decoder/layers/mlp/up_proj/kernel", "'decoder/layers/mlp/up_proj/kernel' matches no linear map")])
def test_targets_that_cannot_be_adapted_are_refused(target, problem):
    with pytest.raises(UserError, match=f"^model.lora.targets: {problem}"):
        llava.abstract_params(dataclasses.replace(CONFIG, lora=Lora(targets=(target,))))


def test_fields_are_checked():
    assert (Lora(16, 32.0).scale, Lora(16, 32.0, rslora=True).scale) == (2, 8)
    for fields, problem in [({"rank": 0}, "lora.rank is 0"), ({"dropout": 1.0}, "lora.dropout is 1.0"),
                            ({"alpha": 0.0}, "lora.alpha is 0.0"), ({"targets": ()}, "lora.targets is empty"),
                            ({"targets": ("(",)}, r"lora.targets: '\(' is no regular expression")]:
        with pytest.raises(UserError, match=problem):
            Lora(**fields)


def test_the_decoder_alone_is_adapted_unless_the_tower_is_asked_for():
    shapes = {path: x.shape for path, x in llava.abstract_params(LlavaConfig(lora=Lora()))[1].items()}
    assert {path.split("/")[0] for path in shapes if lora.is_adapter(path)} == {"decoder"}
    # The published adapters of the 7B model have this many parameters.
    assert lora.describe(Lora(), shapes).startswith(
        "LoRA of rank 128, scale 2, dropout 0.05: 224 matrices, 319,815,680 parameters, in decoder/layers/attention/k_")
