"""A decoder joined with a vision tower: its tokenizer's family chooses the template, and transformers stops there."""

import json
import shutil

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llava_jax import convert
from llava_jax.errors import UserError
from llava_jax.prepare.settings import Settings
from llava_jax.text import agreement
from llava_jax.text.encode import IGNORE, encode_conversation
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.setup import model_config
from llava_jax.weights import read_config

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "two"}]
FAMILIES = {  # special tokens, EOS of the tokenizer, template, its end
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "qwen_1_5", "<|im_end|>"),
    "llama": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
              "<|end_of_text|>", "llava_llama_3", "<|eot_id|>"),
}


@pytest.fixture(scope="module")
def decoders_dirs(tmp_path_factory):
    """A Qwen2 and a Llama 3, tiny and untrained, as their base models are: EOS is not the end of a chat's turn."""
    made = {}
    for kind, (special, eos, _, _) in FAMILIES.items():
        directory = tmp_path_factory.mktemp(kind)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tokenizer.add_special_tokens(special)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 512, "vocab_size": 320,
                "eos_token_id": tokenizer.token_to_id(eos)}
        kinds = {"qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
                 "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
        config, model = kinds[kind]
        model(config(**size)).save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "pad_token": special[0]}))
        made[kind] = directory
    return made


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_family_chooses_the_template(parts, decoders_dirs, tmp_path, capsys, kind):
    _, eos, template, end = FAMILIES[kind]
    agreement.say.cache_clear()
    source = decoders_dirs[kind]
    convert.main(["--vision", str(parts[0]), "--language", str(source), str(tmp_path / "hf"), "--to", "hf"])
    assert f"template {template}: its end {end} is a token of {source}" in capsys.readouterr().err
    assert read_config(tmp_path / "hf").template == template
    assert Settings.load(str(source)).template.name == template

    tokenizer = Tokenizer.load(tmp_path / "hf")
    example = encode_conversation(TURNS, template, tokenizer)
    learned = example.labels[example.labels != IGNORE]
    assert tokenizer.special_id(end) in learned
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert set(ends) == {tokenizer.special_id(eos), tokenizer.special_id(end)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_template_is_refused(parts, decoders_dirs, tmp_path, kind):
    source = str(decoders_dirs[kind])
    line = f"template vicuna_v1 ends answers with </s>, .* no token .*; template {FAMILIES[kind][2]} ends with one"
    with pytest.raises(UserError, match=f"{source}: {line}"):
        convert.main(["--vision", str(parts[0]), "--language", source, str(tmp_path / "hf"), "--to", "hf",
                      "--template", "vicuna_v1"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=f"{source}: {line}"):
        Settings.load(source, "vicuna_v1")


def test_training_takes_it_too(parts, decoders_dirs):
    from llava_jax import config
    from llava_jax.train.setup import resolve_template

    source = str(decoders_dirs["qwen2"])
    tokenizer = Tokenizer.load(source)

    def agreed(template=None, data_template=""):
        stages = {name: config.Stage(learning_rates=((".*", 1e-3),), steps=1,
                                     data=config.Data(path="d.json", template=chosen))
                  for name, chosen in (("first", data_template), ("last", ""))}
        recipe = config.Recipe(model=config.Model(vision=str(parts[0]), language=source, template=template),
                               stages=stages, output="out")
        return resolve_template(recipe, model_config(recipe.model), tokenizer).template

    assert agreed() == "qwen_1_5" and agreed("qwen_2_5", "plain") == "qwen_2_5"
    with pytest.raises(UserError, match="template vicuna_v1 ends answers with </s>"):
        agreed("vicuna_v1")
    with pytest.raises(UserError, match="stages.first.data.template: template vicuna_v1 ends answers with </s>"):
        agreed(data_template="vicuna_v1")


def test_the_colours_are_those_of_the_tower(parts, tmp_path):
    """The mean and std of the tower's own processor count in a join and in training, and are exported."""
    from llava_jax import config

    tower = tmp_path / "tower"
    shutil.copytree(parts[0], tower)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, image_mean=[0.1, 0.2, 0.3],
                                       image_std=[0.4, 0.5, 0.6]).save_pretrained(tower)
    convert.main(["--vision", str(tower), "--language", str(parts[1]), str(tmp_path / "hf"), "--to", "hf"])
    recipe = config.Model(vision=str(tower), language=str(parts[1]), image_mode="crop")
    for processor, mode in ((read_config(tmp_path / "hf").processor, "pad"), (model_config(recipe).processor, "crop")):
        assert (processor.mean, processor.std, processor.mode) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), mode)


def test_an_unsuitable_model_is_refused_everywhere(parts, tmp_path):
    from llava_jax import load

    convert.main(["--vision", str(parts[0]), "--language", str(parts[1]), str(tmp_path / "hf"), "--to", "hf"])
    file = tmp_path / "hf" / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["added_tokens"] += [spec["added_tokens"][-1] | {"id": i, "content": f"<seg{i}>"} for i in range(2002, 2050)]
    file.write_text(json.dumps(spec))
    (tmp_path / "hf" / "tokenizer.model").unlink()
    line = "hf: the tokenizer has ids up to 2049, the embedding has 2048 rows; .*: '<seg2048>' = 2048, '<seg2049>'"
    for action in (lambda: load(tmp_path / "hf"), lambda: Settings.load(str(tmp_path / "hf")),
                   lambda: convert.main([str(tmp_path / "hf"), str(tmp_path / "b"), "--to", "hf"])):
        with pytest.raises(UserError, match=line):
            action()
