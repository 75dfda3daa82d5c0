"""Several adapters in one batch: every row against PEFT, and against the model with its adapter alone."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import DECODER, IMAGE, adapted, torch_logits, with_adapters

import llava_jax
from llava_jax.errors import UserError
from llava_jax.models import lora
from llava_jax.models.llava import abstract_params, from_params
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.weights import save_peft

SETTINGS = {
    "some": dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
    "projector": dict(target_modules=DECODER, modules_to_save=["multi_modal_projector"], r=6, lora_alpha=5,
                      alpha_pattern={"v_proj": 7}, rank_pattern={"up_proj": 2}),
    "tower": dict(target_modules=["fc1", "linear_1", "o_proj"], r=3),
}


@pytest.fixture(scope="module")
def wrapped(hf_model, tmp_path_factory):
    """Models that PEFT wraps, by name, and the folders of their adapters."""
    base, folder = copy.deepcopy(hf_model), tmp_path_factory.mktemp("adapters")
    base.config.image_token_id = IMAGE
    models = {name: adapted(base, **settings) for name, settings in SETTINGS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {"base": base} | models, {name: folder / name for name in models}


def mixed_logits(llava, rows, tokens, tiles):
    """Logits of a batch whose rows have the adapters with the names `rows`. Images are encoded row by row."""
    graph = abstract_params(llava.config, attention=llava.attention)[0]
    ids = np.int32([0 if name == "base" else list(llava.adapters).index(name) + 1 for name in rows])

    @jax.jit
    def embed(parameters, number, tokens, tiles):
        model = from_params(graph, parameters)
        lora.select_adapters(model, number)
        return model.embed(tokens, tiles)

    @jax.jit
    def logits(parameters, ids, x):
        model = from_params(graph, parameters)
        lora.select_adapters(model.decoder, ids)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return model.decoder.logits(model.decoder(x, positions))

    embedded = [embed(llava.parameters | llava.adapters.get(name, {}), number, tokens[row, None], tiles[row, None])
                for row, (name, number) in enumerate(zip(rows, ids, strict=True))]
    assert embed._cache_size() == 1
    return np.asarray(logits(llava.parameters, ids, jnp.concatenate(embedded)))


def test_rows_have_the_logits_of_their_adapters_alone_and_of_peft(wrapped, hf_dir):
    models, folders = wrapped
    rows = ["projector", "base", "some", "tower", "base", "projector"]
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 1900, (len(rows), 24)).astype(np.int32)
    tokens[:, 5:9] = IMAGE_TOKEN_ID
    tiles = rng.normal(size=(len(rows), 1, 28, 28, 3)).astype(np.float32)
    several = llava_jax.load(hf_dir, adapters=folders, template="vicuna_v1")
    found = mixed_logits(several, rows, tokens, tiles)
    for name in models:
        chosen = np.array([row for row, other in enumerate(rows) if other == name])
        expected = torch_logits(models[name], tokens[chosen], tiles[chosen, 0])
        assert np.abs(found[chosen] - expected).max() <= 1e-4 * expected.std(), name
        if name in ("base", "projector"):
            adapter = None if name == "base" else folders[name]
            alone = llava_jax.load(hf_dir, adapter=adapter, template="vicuna_v1")
            expected = np.asarray(alone.model(tokens, tiles))[chosen]
            assert np.abs(found[chosen] - expected).max() <= 3e-6 * np.abs(expected).max(), name
        if name == "base":
            plain = mixed_logits(alone, ["base"] * len(rows), tokens, tiles)
            np.testing.assert_array_equal(found[chosen], plain[chosen])
            # What answers without a choice answers with the base.
            np.testing.assert_array_equal(several.model(tokens, tiles)[chosen], expected)


def test_what_several_adapters_cannot_share_is_refused(wrapped, hf_dir, tmp_path):
    base = wrapped[0]["base"]
    adapted(base, target_modules=DECODER, modules_to_save=["norm"]).save_pretrained(tmp_path / "norm")
    with pytest.raises(UserError, match=r"norm: decoder/layers/.* were trained in full.*--merge\) and serve it"):
        llava_jax.load(hf_dir, adapters=wrapped[1] | {"norm": tmp_path / "norm"}, template="vicuna_v1")
    config, parameters = with_adapters(hf_dir)
    path = "decoder/layers/mlp/down_proj/kernel"
    save_peft(tmp_path / "other", config, parameters | {path: parameters[path] * 2}, "the/base")
    with pytest.raises(UserError, match="other: trained on another model than .*the/base"):
        llava_jax.load(hf_dir, adapters={"other": tmp_path / "other"}, template="vicuna_v1")
