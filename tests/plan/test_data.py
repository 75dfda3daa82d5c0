"""How long stages are: the recipe's steps, the data file's rows, estimates for published sets."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from llava_jax import config
from llava_jax.data.packing import pack
from llava_jax.data.pipeline import Batches
from llava_jax.plan.data import PUBLISHED, length
from llava_jax.plan.models import planned_config
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.batches import data_spec


def recipe(model: config.Model, path: str, **stage) -> config.Recipe:
    data = config.Data(path=path, sequence_length=96, tiles_per_sequence=2)
    return config.Recipe(model=model, output="nowhere", stages={
        "instruct": config.Stage((("projector/.*", 1e-3), ("(vision|decoder)/.*", None)), data, batch_size=2, **stage)})


def test_a_data_file_that_is_there_is_counted(parts, data):
    described = recipe(config.Model(vision=str(parts[0]), language=str(parts[1])), str(data), epochs=3)
    model, _ = planned_config(described.model)
    spec = data_spec(described.stages["instruct"].data, model, Tokenizer.load(parts[1]), str(data))
    rows = list(Batches(spec, 1, epochs=1))
    steps, source = length(described, "instruct", model)
    assert steps == 3 * len(rows) // 2 and "counted" in source
    assert length(described, "instruct", model, rows=100)[0] == 150


def test_steps_of_the_recipe_come_first_and_unknown_data_has_no_length(tiny):
    model, _ = planned_config(tiny.model)
    assert length(recipe(tiny.model, "x.json", steps=7), "instruct", model) == (7, "the recipe's steps")
    assert length(recipe(tiny.model, "x.json"), "instruct", model) is None


def test_the_published_mix_is_estimated_from_its_counts():
    records = {end: sum(part[0] for part in parts) for end, (_, *parts) in PUBLISHED.items()}
    assert records == {"llava_v1_5_mix665k.json": 665_298, "llava_instruct_150k.json": 156_564,
                       "blip_laion_cc_sbu_558k.json": 558_128, "cc3m_595k/chat.json": 595_375,
                       "scienceqa/llava_train_QCM-LEA.json": 12_726, "LLaVA-NeXT-Data": 779_000,
                       "onevision/mid_stage.json": 4_000_000, "onevision/single_image.json": 3_200_000,
                       "onevision/onevision.json": 1_600_000}
    described = config.load_recipe("llava_1_5_7b")
    model, _ = planned_config(described.model)
    steps, source = length(described, "instruct", model)
    align, instruct = described.stages.values()
    # No row can hold more images than its slots, nor more tokens than its length.
    assert steps > (665_298 - 40_688) / instruct.data.tiles_per_sequence / instruct.batch_size and "estimate" in source
    captions = length(described, "align", model)[0] * align.batch_size
    assert captions == pytest.approx(558_128 / align.data.tiles_per_sequence, rel=0.01)


def test_an_estimate_is_near_packed_records_of_the_same_lengths():
    """LLaVA-1.5's mix as bench_packing.py draws it."""
    draw = runpy.run_path(Path(__file__).parents[2] / "scripts" / "bench_packing.py")["made_up"]
    tokens, _, images = draw(np.random.default_rng(0), 0.01)
    described = config.load_recipe("llava_1_5_7b")
    stage = described.stages["instruct"]
    rows = pack(tokens, images, stage.data.sequence_length, stage.data.tiles_per_sequence)
    steps, _ = length(described, "instruct", planned_config(described.model)[0])
    assert steps * stage.batch_size == pytest.approx(100 * len(rows), rel=0.03)


def test_rows_of_images_of_any_size_are_those_of_their_layouts(tiny, monkeypatch):
    """Records of one photo: 2,340 tokens in 5 tiles (reference: the token counts of LLaVA-1.6), 37 of their text."""
    monkeypatch.setitem(PUBLISHED, "photos.json", (1, (6000, 37, [[(640, 480)]])))
    described = config.load_recipe("llava_next_vicuna_7b")
    model, _ = planned_config(described.model)
    for tokens, tiles, expected in ((4 * 2377, 20, 4), (2 * 2377, 20, 2), (4 * 2377, 10, 2)):
        data = dataclasses.replace(described.stages["instruct"].data, path="photos.json", sequence_length=tokens,
                                   tiles_per_sequence=tiles)
        stages = {"instruct": dataclasses.replace(described.stages["instruct"], data=data, batch_size=1)}
        steps, _ = length(dataclasses.replace(described, stages=stages), "instruct", model)
        assert steps == pytest.approx(6000 / expected, abs=2)


def test_a_published_set_under_another_name_is_not_taken_for_it(tiny):
    model, _ = planned_config(tiny.model)
    assert length(recipe(tiny.model, "data/chat.json"), "instruct", model) is None
