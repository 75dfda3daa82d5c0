"""Videos in asking: the prompt and the tiles are those of training, and an answer is that of the full forward pass."""

import dataclasses
import json
import shutil

import clips
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

import llava_jax
from llava_jax import generate
from llava_jax.data.examples import DataSpec
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, init_params
from llava_jax.models.vit import VisionConfig
from llava_jax.text.encode import PromptTooLong
from llava_jax.text.templates import get
from llava_jax.video import Video, VideoSampling
from llava_jax.weights.checkpoint import save_native


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random model with OneVision's layouts: pooled frames with weights, and a newline."""
    config = LlavaConfig(
        VisionConfig(28, 7, 16, 16, 1, 1),
        LlamaConfig(2000, 64, 64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_length=512),
        feature_layer=-1, video=VideoSampling(fps=2, frames=6),
        processor=ImageProcessor(28, "anyres", 4, pinpoints=((28, 28), (56, 28)), max_tiles=9, several="pad"))
    parameters = {path: value if path.endswith("norm/scale") else 15 * value
                  for path, value in init_params(config, seed=1).items()}
    return llava_jax.Llava(config, parameters, tokenizer)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clip") / "clip.mp4", 40, 10)


def test_a_video_is_asked_about_as_it_is_trained_on(model, clip, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
    (tmp_path / "data.json").write_text(json.dumps([{"video": clip, "conversations": turns}]))
    for video in (model.config.video, VideoSampling(frames=3, uniform=True, time_text=True)):
        asked = llava_jax.Llava(dataclasses.replace(model.config, video=video), model.parameters, model.tokenizer)
        spec = DataSpec(mixture=open_mixture(tmp_path / "data.json", "/"), tokenizer=model.tokenizer, video=video,
                        template=get(model.template), processor=model.processor, sequence_length=512,
                        tiles_per_sequence=8)
        inputs = asked.encode("What?", [clip])
        trained = spec.text(0).tokens
        np.testing.assert_array_equal(inputs["tokens"][0], trained[: inputs["tokens"].shape[1]])
        np.testing.assert_array_equal(inputs["tiles"][0], spec.tiles(0))
    text = model.tokenizer.decode([token for token in asked.encode("What?", [clip])["tokens"][0] if token >= 0])
    assert "The video lasts for 4.00 seconds, and 3 frames" in text


def test_answers_about_videos(model, clip):
    picture = Image.new("RGB", (60, 30), "red")
    parts = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    requests = [("What?", clip), (parts, [Video(clip)]), ("<image>\nThen <image>\nSo?", [picture, clip])]
    answers = model.batch([{"messages": messages, "images": images, "max_new_tokens": 5}
                           for messages, images in requests])
    assert answers[0] == answers[1] != answers[2]
    for (messages, images), answer in zip(requests, answers, strict=True):
        assert model.generate(messages, images, 5) == answer
        inputs = model.encode(messages, images)
        assert inputs["tokens"][0].tolist() == answer.prompt_tokens
        inputs["tokens"] = np.append(inputs["tokens"], [answer.tokens], axis=1)
        for name, value in (("visual_index", -1), ("visual_weight", 0)):
            more = np.full((1, len(answer.tokens), 4), value, inputs[name].dtype)
            inputs[name] = np.append(inputs[name], more, axis=1)
        logits = np.asarray(model.model(**inputs))
        assert logits[0, len(answer.prompt_tokens) - 1 : -1].argmax(-1).tolist() == answer.tokens


def test_videos_that_cannot_be_asked_about(model, clip, tmp_path):
    with pytest.raises(UserError, match="none.mp4: no such video file"):
        model.generate("What?", [str(tmp_path / "none.mp4")])
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 99)
    with pytest.raises(UserError, match="broken.mp4: the video cannot be read"):
        model.generate("What?", [str(tmp_path / "broken.mp4")])
    with pytest.raises(PromptTooLong):
        model.generate("What?", [clip] * 20)


def test_the_command_line_asks_about_a_video(model, clip, tmp_path, capsys):
    """The sampling is stored with the model."""
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    save_native(tmp_path / "model", model.config, model.parameters, tmp_path)
    loaded = llava_jax.load(tmp_path / "model", dtype="float32")
    assert loaded.config.video == model.config.video
    args = ["--model", str(tmp_path / "model"), "--image", clip, "--prompt", "What?", "--max-new-tokens", "5"]
    assert generate.main(args) == 0
    assert capsys.readouterr().out.strip() == model.generate("What?", clip, 5).text.strip()
    assert generate.main([*args, "--json", "--video-frames", "2"]) == 0
    fewer = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert fewer == model.encode("What?", clip)["tokens"].size - 4 * 4
