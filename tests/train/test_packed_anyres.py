"""Packed sequences of anyres_max_N, whose tokens have weights: the same logits and loss as conversations alone."""

import jax
import numpy as np
import pytest
from PIL import Image
from pipeline_data import SIZE, TOKENIZER, packed_rows, settings, write_file

import llava_jax
from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, abstract_params, init_params
from llava_jax.models.vit import VisionConfig
from llava_jax.parallel import sharding
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.batches import shard_batch
from llava_jax.train.setup import model_layout
from llava_jax.train.step import loss_sum
from llava_jax.weights import fresh_paths

PROCESSOR = ImageProcessor(SIZE, patches=2).with_mode("anyres_max_1", "(1x1),...,(4x4)")
MODEL = LlavaConfig(
    VisionConfig(SIZE, 7, 16, 16, 1, 2),
    LlamaConfig(2000, 32, 48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, max_length=512),
    feature_layer=-1, processor=PROCESSOR)
SIZES = [[(56, 42)], [(14, 14)], [(30, 50), (20, 20)], [], [(23, 40)]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed sequence of all conversations, those of each one alone, and the folder of the images."""
    folder, rows, rng = tmp_path_factory.mktemp("rows"), [], np.random.default_rng(0)
    for number, sizes in enumerate(SIZES):
        names = [f"{number}-{k}.png" for k in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        turns = [{"from": "human", "value": "<image>\n" * len(names) + "What is here?"},
                 {"from": "gpt", "value": f"Number {number}."}]
        rows.append({"id": str(number), "image": names, "conversations": turns})
    files = [write_file(folder, rows)] + [write_file(folder, [row], f"{row['id']}.json") for row in rows]
    options = dict(processor=PROCESSOR, sequence_length=480, tiles_per_sequence=48, shuffle=False, epochs=1)
    [together], *alone = [list(packed_rows(**settings(file, **options))) for file in files]
    return together, [row for [row] in alone], folder


@pytest.fixture(scope="module")
def model():
    parameters = jax.jit(lambda: init_params(MODEL, 3))()
    parameters = {path: x if path.endswith("norm/scale") else 5 * x for path, x in parameters.items()}
    return llava_jax.Llava(MODEL, parameters, Tokenizer.load(TOKENIZER))


def logits_of(model, row) -> np.ndarray:
    names = ("tokens", "tiles", "positions", "segment_ids", "visual_index", "visual_weight")
    return np.asarray(model.model(*(row[name][None] for name in names)))[0]


def test_logits_of_a_packed_sequence_are_those_of_each_conversation(packed, model):
    row, alone, folder = packed
    assert row["visual_index"].shape == row["visual_weight"].shape == (480, 4) and row["images"] == 5
    assert set((row["visual_weight"][row["tokens"] == IMAGE_TOKEN_ID] == 1).any(axis=1)) == {True, False}
    found, order = logits_of(model, row), []
    for segment in range(1, 6):
        span = row["segment_ids"] == segment
        length = span.sum()
        [number] = [i for i in range(5) if (alone[i]["tokens"][:length] == row["tokens"][span]).all()
                    and alone[i]["segment_ids"].sum() == length]
        order.append(number)
        np.testing.assert_allclose(found[span], logits_of(model, alone[number])[:length], rtol=1e-4, atol=2e-4)
        # Asking builds the same arrays.
        images = [str(folder / f"{number}-{k}.png") for k in range(len(SIZES[number]))]
        inputs = {name: x[0] for name, x in model.encode("What is here?", images).items()}
        prompt = len(inputs["tokens"])
        assert inputs["tokens"].tolist() == row["tokens"][span][:prompt].tolist()
        if images:
            np.testing.assert_array_equal(inputs["visual_weight"], row["visual_weight"][span][:prompt])
            np.testing.assert_array_equal(inputs["tiles"], row["tiles"][row["tile_segment_ids"] == segment])
    assert sorted(order) == list(range(5))


def test_empty_slots_never_reach_the_decoder(packed, model):
    row, *_ = packed
    empty = row["tile_segment_ids"] == 0
    assert empty.any()
    filled = dict(row, tiles=row["tiles"].copy())
    filled["tiles"][empty] = 255
    np.testing.assert_array_equal(logits_of(model, filled), logits_of(model, row))
    filled["tiles"][~empty] ^= 255
    assert not np.allclose(logits_of(model, filled), logits_of(model, row), atol=1e-2)


def test_the_loss_of_training_has_the_weights(packed, model):
    row, *_ = packed
    mesh = sharding.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])
    batch = jax.tree.map(lambda x: x[0], shard_batch(mesh, {name: x[None] for name, x in row.items()}, 1))
    assert batch["visual_weight"].shape == (1, 480, 4)
    loss = jax.jit(lambda parameters: loss_sum(abstract_params(MODEL)[0], parameters, {}, batch))(model.parameters)
    scores, labels = jax.nn.log_softmax(logits_of(model, row)[:-1]), row["labels"][1:]
    supervised = np.flatnonzero(labels != IGNORE)
    expected = -np.asarray(scores)[supervised, labels[supervised]].sum()
    assert len(supervised) > 20 and float(loss) == pytest.approx(expected, rel=1e-4)


def test_a_stage_with_more_than_the_model_has_is_told():
    data = config.Data("data.json", image_mode="anyres")
    stage = config.Stage((("(projector|decoder|vision)/.*", 1e-3),), data)
    recipe = config.Recipe(config.Model(llava="model"), {"tune": stage}, "out", config.Mesh(1, 1, 1))
    mesh = sharding.make_mesh(recipe.mesh, jax.devices()[:1])
    with pytest.raises(UserError, match="stages.tune.data.image_mode is anyres, and the model's is crop: set model.im"):
        model_layout(recipe, mesh, MODEL.with_image_mode("crop"))


def test_joined_models_with_newlines_start_with_one():
    model = config.Model(vision="a", language="b", image_mode="anyres", pinpoints="(1x1),...,(2x2)")
    fresh = fresh_paths(model, abstract_params(MODEL)[1])
    assert "image_newline" in fresh and all(path.startswith("projector/") for path in fresh - {"image_newline"})
    assert not any("newline" in path for path in abstract_params(MODEL.with_image_mode("crop"))[1])
