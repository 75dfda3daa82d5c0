"""Every recipe in configs/: loaded, and its tables held against the parameters of its model. Nothing is compiled."""

import re
from pathlib import Path

import jax
import pytest

from llava_jax import config
from llava_jax.models.llava import abstract_params
from llava_jax.parallel import sharding
from llava_jax.plan.data import PUBLISHED, length
from llava_jax.plan.models import planned_config
from llava_jax.text import templates
from llava_jax.train.optimizer import trainable_paths
from llava_jax.train.setup import final_template, model_layout

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py"))
LATER = [name for name in NAMES if re.match("llava_(next|onevision)", name)]


@pytest.mark.parametrize("name", NAMES)
def test_tables_match_the_parameters_of_all_stages(name):
    recipe = config.load_recipe(name)
    if name.startswith("mini"):
        pytest.skip("its checkpoints are in the package, and other tests train it")
    model, _ = planned_config(recipe.model)
    model_layout(recipe, sharding.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1]), model)
    assert recipe.output == f"runs/{name}"
    assert templates.get(final_template(recipe, model.template)).name == (recipe.model.template or model.template)


@pytest.mark.parametrize("name", LATER)
def test_the_tower_has_its_own_rate_and_the_newline_that_of_the_decoder(name):
    recipe = config.load_recipe(name)
    model, _ = planned_config(recipe.model)
    paths = list(abstract_params(model)[1])
    (_, align), *tuned = recipe.stages.items()
    assert {path.split("/")[0] for path in trainable_paths(align, paths)} == {"projector"}
    for stage_name, stage in tuned:
        rates = trainable_paths(stage, paths)
        assert rates.keys() == set(paths)
        assert {path: rate for path, rate in rates.items() if rate != 1e-5} == {
            path: 2e-6 for path in paths if path.startswith("vision/")}
        assert rates["image_newline"] == rates["decoder/norm/scale"] == 1e-5
        processor = model.with_image_mode(stage.data.image_mode).processor
        largest = [processor.layout(*pinpoint) for pinpoint in processor.pinpoints]
        assert max(layout.tiles for layout in largest) <= stage.data.tiles_per_sequence
        assert max(len(layout.index) for layout in largest) <= stage.data.sequence_length
        assert any(stage.data.path.endswith(end) for end in PUBLISHED) and length(recipe, stage_name, model)
