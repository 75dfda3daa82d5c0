"""Checkpoints of LLaVA 1.6 and OneVision, both ways, against transformers with its own processors."""

import dataclasses
import re
import shutil
from pathlib import Path

import next_models
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from next_models import picture

import llava_jax
from llava_jax import config, convert
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text import agreement, templates
from llava_jax.text.encode import IMAGE_TOKEN_ID, encode_prompt
from llava_jax.train.loop import train
from llava_jax.weights import load_checkpoint, read_config, save_hf
from llava_jax.weights.checkpoint import check_export

IMAGE_ID, VIDEO_ID = next_models.IDS["<image>"], next_models.IDS["<video>"]
GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = {
    "1.6, LLaMA": ("llava_next", "llama", "clip", {}, "vicuna_v1"),
    "1.6, Mistral, SigLIP": ("llava_next", "mistral", "siglip", {
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, "mistral_instruct"),
    "OneVision, Qwen2, tied": ("llava_onevision", "qwen2", "siglip", {"tie_word_embeddings": True}, "qwen_1_5"),
    "OneVision, LLaMA, CLIP": ("llava_onevision", "llama", "clip", {
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}, "chatml_direct"),
}
"""Type, decoder, tower, fields, and the template that must be found."""
# Sizes (width, height): thin ones, exact pinpoints, ties between two canvases, and canvases that OneVision shrinks.
SIZES = [(1, 50), (50, 1), (25, 300), (30, 60), (60, 60), (90, 30), (20, 20), (41, 77), (200, 190), (101, 67)]


def conversations():
    """Questions about one image of each size, about several, and about none."""
    asked = [([{"role": "user", "content": "<image>\nWhat is it?"}], [picture(*size)]) for size in SIZES]
    asked.append(([{"role": "user", "content": "Compare: <image> and then <image> here"},
                   {"role": "assistant", "content": "The first."},
                   {"role": "user", "content": "And <image>"}], [picture(50, 20), picture(33, 61), picture(30, 30)]))
    asked.append(([{"role": "user", "content": "No image at all"}], []))
    return asked


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """A model of transformers, and the directory that transformers wrote."""
    kind, text, tower, fields, _ = KINDS[request.param]
    model = next_models.build(kind, text, tower, **fields)
    return model, next_models.save(model, tmp_path_factory.mktemp("their") / "model", GOLDEN)


@pytest.fixture(scope="module")
def llava(written):
    return llava_jax.load(written[1])


def compare(model, directory, llava, asked, texts):
    """Compares ids, pixels and logits of a batch."""
    processor = next_models.processor_of(directory)
    images = [pictures for _, pictures in asked]
    theirs = next_models.their_inputs(processor, texts, images)
    rows, batch = next_models.our_inputs(llava, asked)
    pixels = iter(theirs["pixel_values"].numpy())
    for i, row in enumerate(rows):
        mask = theirs["attention_mask"][i].bool()
        ids = np.where(row["tokens"][0] == IMAGE_TOKEN_ID, processor.image_token_id, row["tokens"][0])
        np.testing.assert_array_equal(theirs["input_ids"][i][mask], ids)
        found = [next(pixels) for _ in images[i]]
        first = 0
        for layout, tiles in zip(llava.processor.layouts(images[i]), found, strict=True):
            ours = llava.processor.normalise(row["tiles"][0][first : first + layout.tiles])
            np.testing.assert_array_equal(tiles[: layout.tiles].transpose(0, 2, 3, 1), ours)
            first += layout.tiles
    with torch.no_grad():
        expected = model(**theirs).logits.numpy()
    ours = np.asarray(llava.model(**batch))
    for i, row in enumerate(rows):
        size = row["tokens"].shape[1]
        error = np.abs(ours[i, :size] - expected[i, :size]).max() / expected[i, :size].std()
        assert error < 1e-4, (asked[i], error)


def test_transformers_writes_and_we_read(written, llava, request):
    model, directory = written
    asked = conversations()
    assert llava.template == KINDS[request.node.callspec.params["written"]][-1]
    texts = [templates.render(messages, llava.template, open_answer=True) for messages, _ in asked]
    compare(model, directory, llava, asked, texts)


@pytest.fixture(scope="module")
def exported(written, llava, tmp_path_factory):
    directory = tmp_path_factory.mktemp("our") / "model"
    save_hf(directory, llava.config, llava.parameters, written[1])
    return directory


def open_there(directory):
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_we_write_and_transformers_reads(written, llava, exported):
    model = open_there(exported)
    assert type(model) is type(written[0])
    asked = conversations()
    processor = next_models.processor_of(exported)
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages, _ in asked]
    compare(model, exported, llava, asked, texts)
    for name, weight in written[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("written", ["1.6, LLaMA", "OneVision, Qwen2, tied"], indirect=True)
def test_greedy_text_is_the_same(written, llava):
    model, directory = written
    processor, asked = next_models.processor_of(directory), conversations()[-2:]
    answers = llava.batch([{"messages": messages, "images": images, "max_new_tokens": 6} for messages, images in asked])
    for (messages, images), answer in zip(asked, answers, strict=True):
        text = templates.render(messages, llava.template, open_answer=True)
        inputs = next_models.their_inputs(processor, [text], [images]) if images else processor(
            text=[text], return_tensors="pt")
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=2000, eos_token_id=2)
        expected = found[0, inputs["input_ids"].shape[1] :].tolist()
        assert [token for token in expected if token != 2] == [token for token in answer.tokens if token != 2]


@pytest.mark.parametrize("written", [kind for kind in KINDS if "OneVision" in kind], indirect=True)
def test_the_frames_of_a_video(written, exported):
    llava = llava_jax.load(exported)
    frames, image = [picture(40, 25, seed) for seed in range(3)], picture(50, 20)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Then"}, {"type": "image"}]}]
    model, processor = open_there(exported), next_models.processor_of(exported)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], videos=[frames], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()

    layouts, tiles = llava.processor.layouts([frames, image]), llava.processor.tiles([frames, image])
    tokens = encode_prompt(messages, llava.template, llava.tokenizer, [len(layout.index) for layout in layouts])
    ids = np.repeat([IMAGE_ID, VIDEO_ID][::-1], [len(layout.index) for layout in layouts])
    expanded = tokens.copy()
    expanded[tokens == IMAGE_TOKEN_ID] = ids
    np.testing.assert_array_equal(inputs["input_ids"][0], expanded)
    visual = llava.processor.no_visual_tokens(tokens.shape)
    for name, values in llava.processor.visual_tokens(layouts, 0, len(tiles)).items():
        visual[name][tokens == IMAGE_TOKEN_ID] = values
    ours = llava.model(tokens[None], tiles[None], **{name: x[None] for name, x in visual.items()})
    assert np.abs(ours - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("written", ["1.6, LLaMA", "OneVision, Qwen2, tied"], indirect=True)
def test_names_of_every_version(written, llava, tmp_path):
    model, directory = written
    hub = safetensors.torch.load_file(directory / "model.safetensors")
    old = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): x for name, x in hub.items()}
    in_memory = {name: x.clone() for name, x in model.state_dict().items()}
    assert "image_newline" in old and "model.image_newline" in in_memory
    for number, tensors in enumerate((old, in_memory)):
        copy = shutil.copytree(directory, tmp_path / str(number))
        safetensors.torch.save_file(tensors, copy / "model.safetensors")
        parameters = load_checkpoint(copy)[1]
        assert parameters.keys() == llava.parameters.keys()
        for path, x in llava.parameters.items():
            np.testing.assert_array_equal(parameters[path], x, err_msg=path)


@pytest.mark.parametrize("written", ["1.6, LLaMA", "OneVision, Qwen2, tied"], indirect=True)
def test_there_and_back_again_is_the_same(exported, tmp_path):
    for source, target, layout in ((exported, "own", "native"), (tmp_path / "own", "back", "hf")):
        assert convert.main([str(source), str(tmp_path / target), "--to", layout, "--dtype", "keep"]) == 0
    files = {file.name: file.read_bytes() for file in exported.iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "back").iterdir()}
    assert read_config(tmp_path / "own") == read_config(exported)


@pytest.mark.parametrize("written, mode", [("1.6, LLaMA", "anyres"), ("OneVision, LLaMA, CLIP", "anyres_max_2")],
                         indirect=["written"])
def test_a_model_of_the_original_rule(written, tmp_path, mode):
    """Pinpoints are (width, height) in the order of LLaVA's code; of two that fit equally, the first one counts."""
    model, parameters = load_checkpoint(written[1])
    pinpoints = "(30x60),(60x30),(60x60),(90x30),(30x90)"
    model = dataclasses.replace(model, processor=dataclasses.replace(
        ImageProcessor(30, patches=3).with_mode(mode, pinpoints), video_newline="grid"))
    directory = tmp_path / "model"
    save_hf(directory, model, parameters, GOLDEN)
    assert read_config(directory) == model
    llava = llava_jax.load(directory)
    assert llava.processor.canvas(20, 20) == (30, 60)
    asked = conversations()
    processor = next_models.processor_of(directory)
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages, _ in asked]
    compare(open_there(directory), directory, llava, asked, texts)


@pytest.mark.parametrize("fields, lines", [
    ({"rule": "transformers"}, []),
    ({}, ["rounds an image's size without padding, the original truncates it"]),
    ({"rule": "transformers", "several": "pad"}, ["llava_next gives each its own tiles"]),
    ({"max_tiles": 4, "video_newline": "grid"}, ["rounds an image's size", "pads each to one tile", "this model has "
                                                 "bilinear and grid"]),
])
def test_what_transformers_does_otherwise_is_told(capsys, fields, lines):
    agreement.say.cache_clear()
    processor = ImageProcessor(28, "anyres", 2, pinpoints=((28, 56),))
    check_export(LlavaConfig(vision=VisionConfig(28, 14), processor=dataclasses.replace(processor, **fields)), GOLDEN)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("export: ")]
    assert len(said) == len(lines) and all(line in found for line, found in zip(lines, said, strict=True))


@pytest.mark.parametrize("fields, message", [
    ({"merge": "flat"}, "image mode anyres with merge flat has no form in Hugging Face's layout"),
    ({"merge": "spatial"}, "image mode anyres with merge spatial has no form"),
    ({"mode": "pad", "pinpoints": (), "merge": "spatial_unpad"}, "image mode pad with merge spatial_unpad has no form"),
])
def test_what_transformers_cannot_compute(tmp_path, fields, message):
    processor = ImageProcessor(28, "anyres", 2, pinpoints=((28, 56),))
    model = LlavaConfig(vision=VisionConfig(28, 14), processor=dataclasses.replace(processor, **fields))
    with pytest.raises(UserError, match=message):
        check_export(model, GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("written", ["OneVision, Qwen2, tied"], indirect=True)
def test_a_model_of_transformers_trains(written, llava, data, tmp_path):
    rows = config.Data(path=str(data), sequence_length=512, tiles_per_sequence=40)
    stage = config.Stage(learning_rates=((".*", 1e-3),), data=rows, batch_size=1, steps=2)
    recipe = config.Recipe(model=config.Model(llava=str(written[1])), stages={"tune": stage}, output=str(tmp_path),
                           mesh=config.Mesh(fsdp=1), log_every=1)
    train(recipe)
    trained, parameters = load_checkpoint(tmp_path / "model")
    assert trained == llava.config
    assert not np.array_equal(parameters["image_newline"], llava.parameters["image_newline"])
    save_hf(tmp_path / "hf", trained, parameters, tmp_path / "model")
    directory, asked = tmp_path / "hf", conversations()[-3:]
    texts = [templates.render(messages, llava.template, open_answer=True) for messages, _ in asked]
    compare(open_there(directory), directory, llava_jax.load(directory), asked, texts)
