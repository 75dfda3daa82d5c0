"""The template that the finished model carries is the one it was trained on."""

import dataclasses
import json
import types
from pathlib import Path

import pytest

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.encode import encode_conversation, encode_prompt
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train import loop, samples
from llava_jax.train.setup import final_template
from llava_jax.weights import load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def make_recipe(parts, data, tmp_path):
    """make_recipe(template of the model, *templates of the stages)"""

    def make(template, *stages, **model):
        model = model or {"vision": str(parts[0]), "language": str(parts[1])}
        rates = (("projector/.*", 1e-2), ("(vision|decoder)/.*", None))
        made = {f"stage{i}": config.Stage(learning_rates=rates, batch_size=4, steps=1, data=config.Data(
                    path=str(data), template=name, sequence_length=192, tiles_per_sequence=4))
                for i, name in enumerate(stages)}
        return config.Recipe(model=config.Model(template=template, **model), stages=made, log_every=1,
                             mesh=config.Mesh(fsdp=1), output=str(tmp_path / "-".join([str(template), *stages])))

    return make


@pytest.mark.parametrize("template, stages, finished", [
    (None, [""], "vicuna_v1"),
    (None, ["llava_llama_2"], "llava_llama_2"),
    (None, ["plain", ""], "vicuna_v1"),
    (None, ["v1_mmtag", "plain"], "v1_mmtag"),
    (None, ["llama_2", "mpt", "plain"], "mpt"),
    (None, ["plain"], "plain"),
    ("mpt", ["plain", ""], "mpt"),
    ("v1", ["plain", "vicuna_v1"], "vicuna_v1"),
    ("mpt", ["llama_2", "mpt"], "mpt"),
    ("mpt", ["plain"], "mpt"),
])
def test_the_last_stage_of_conversations_names_the_template(make_recipe, template, stages, finished):
    assert final_template(make_recipe(template, *stages), template or "vicuna_v1") == finished


def test_another_template_than_trained_is_refused_by_name(make_recipe):
    words = r"stages.stage\d.data.template is llama_2, model.template mpt: .* in another form than trained"
    for stages in (["llama_2"], ["", "llama_2"], ["llama_2", "plain"], ["mpt", "llama_2"]):
        with pytest.raises(UserError, match=words):
            final_template(make_recipe("mpt", *stages), "mpt")
    with pytest.raises(UserError, match="stages.stage0.data.template is llava_llama_2, model.template vicuna_v1"):
        loop.train(make_recipe("vicuna_v1", "llava_llama_2"))


def test_the_exported_model_carries_it(make_recipe):
    model = loop.train(make_recipe(None, "llava_llama_2"))
    assert load_checkpoint(model)[0].template == "llava_llama_2"
    assert '"name": "llava_llama_2"' in (model / "chat_template.jinja").read_text()
    again = loop.train(make_recipe(None, "mistral_instruct", llava=str(model)))
    assert load_checkpoint(again)[0].template == "mistral_instruct"
    assert dataclasses.replace(load_checkpoint(again)[0], template="llava_llama_2") == load_checkpoint(model)[0]


def test_sample_questions_are_asked_with_their_system_text(make_recipe, tmp_path):
    rows = [{"system": "Be brief.", "conversations": [{"from": "human", "value": "Colour?"},
                                                      {"from": "gpt", "value": "red"}]},
            {"conversations": [{"from": "human", "value": "Shape?"}, {"from": "gpt", "value": "circle"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    stage = make_recipe(None, "mistral_instruct").stages["stage0"]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=str(tmp_path / "rows.json")))
    tokenizer = Tokenizer.load(GOLDEN)
    made = samples.Samples(types.SimpleNamespace(model=LlavaConfig(), tokenizer=tokenizer), stage)
    assert len(made.pairs) == 2
    for (request, _), row in zip(made.pairs, rows, strict=True):
        system = [{"from": "system", "value": row["system"]}] if "system" in row else []
        turns = system + row["conversations"]
        trained = encode_conversation(turns, "mistral_instruct", tokenizer).tokens.tolist()
        prompt = encode_prompt(request.messages, "mistral_instruct", tokenizer).tolist()
        assert trained[: len(prompt)] == prompt and request.messages[-1]["content"] == row["conversations"][0]["value"]
