"""config.json: what is read from it, and what is refused with the name of file and field."""

import dataclasses
import json

import pytest
import transformers

from llava_jax.errors import UserError
from llava_jax.images import CLIP_MEAN, CLIP_STD, ImageProcessor
from llava_jax.models.llama import LlamaConfig, RopeScaling
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text import templates
from llava_jax.video import VideoSampling
from llava_jax.weights import configs, processors
from llava_jax.weights.configs import read_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
# Word for word the fields of the published llava-1.5-7b, as transformers 4.36 wrote them: defaults are left out.
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                    "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
                    "torch_dtype": "float16", "vocab_size": 32064},
    "torch_dtype": "float16",
    "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                      "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
                      "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}

# Fields of the published llava-v1.6-mistral-7b and llava-onevision-qwen2-0.5b-ov of llava-hf, shortened in the latter.
LLAVA_NEXT = LLAVA_7B | {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], "image_seq_length": 576,
    "use_image_newline_parameter": True,
    "text_config": {"_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "model_type": "mistral",
                    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
                    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32064}}
ONEVISION = {
    "model_type": "llava_onevision", "image_token_index": 151646, "video_token_index": 151647,
    "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]], "projector_hidden_act": "gelu",
    "tie_word_embeddings": False, "use_image_newline_parameter": True, "vision_aspect_ratio": "anyres_max_9",
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "text_config": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
                    "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
                    "tie_word_embeddings": True, "vocab_size": 152000, "max_window_layers": 24},
    "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                      "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 26,
                      "patch_size": 14, "vision_use_head": False}}
PROCESSOR = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 384, "width": 384},
             "image_grid_pinpoints": ONEVISION["image_grid_pinpoints"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
             "do_pad": True}


@pytest.fixture
def read(tmp_path):
    def read(config, **other_files):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, content in other_files.items():
            name = name.replace("_json", ".json").replace("_jinja", ".jinja")
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return read_config(tmp_path)
    return read


def test_the_published_7b(read):
    assert read(LLAVA_7B) == LlavaConfig(text=LlamaConfig(vocab_size=32064)).with_image_mode("crop")


def test_published_1_6_and_onevision(read):
    config = read(LLAVA_NEXT, preprocessor_config_json={"size": {"shortest_edge": 336}, "crop_size": {"height": 336}})
    # The same numbers are (width, height) in LLaVA's code: there, the first canvas is the tall one.
    assert config.processor == ImageProcessor(
        mode="anyres", rule="transformers", pinpoints=((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)))
    assert (config.template, config.feature_layer, config.text.max_length) == ("mistral_instruct", -2, 32768)
    config = read(ONEVISION, preprocessor_config_json=PROCESSOR)
    assert config.processor == ImageProcessor(
        384, "anyres", 27, mean=(0.5,) * 3, std=(0.5,) * 3, rule="transformers", max_tiles=9, several="pad",
        pinpoints=((384, 384), (768, 384), (384, 768)))
    assert config.text.tie_word_embeddings and config.vision.num_layers == 26 and config.feature_layer == -1
    # A class's default, where a file leaves it out: transformers' OneVision has CLIP's statistics.
    short = {name: value for name, value in PROCESSOR.items() if not name.startswith("image_mean")}
    assert read(ONEVISION, preprocessor_config_json=short).processor.mean == CLIP_MEAN


@pytest.mark.parametrize("changed, processor, message", [
    ({"image_grid_pinpoints": [[384, 384, 1]]}, {}, r"config.json: image_grid_pinpoints is \[\[384, 384, 1\]\]; "),
    ({"image_grid_pinpoints": [[384, "x"]]}, {}, "config.json: image_grid_pinpoints is .* pairs of sizes"),
    ({"image_grid_pinpoints": [[10**9, 384]]}, {}, "config.json: image_grid_pinpoints is .* pairs of sizes"),
    ({"image_grid_pinpoints": []}, {"image_grid_pinpoints": None}, "config.json: .*anyres_max_9 needs pinpoints"),
    ({"image_grid_pinpoints": [[384, 500]]}, {"image_grid_pinpoints": None}, "pinpoint 500 x 384 is no multiple"),
    ({"vision_aspect_ratio": "anyres"}, {}, 'config.json: vision_aspect_ratio is "anyres"; supported: anyres_max_N'),
    ({"use_image_newline_parameter": False}, {}, "config.json: use_image_newline_parameter is False; supported: True"),
    ({"vision_feature_layer": [-2, -5]}, {}, r"config.json: vision_feature_layer is \[-2, -5\]"),
    ({"llava_jax": {"rule": "theirs"}}, {}, "config.json: rule is 'theirs'; supported: original, transformers"),
    ({}, {"size": {"height": 336}}, r'preprocessor_config.json: size is {"height": 336}, but .*image_size .* is 384'),
    ({}, {"image_grid_pinpoints": [[384, 384]]}, "preprocessor_config.json: image_grid_pinpoints differ"),
    ({}, {"resample": 2}, "preprocessor_config.json: resample is 2"),
])
def test_onevision_settings_are_checked(read, changed, processor, message):
    with pytest.raises(UserError, match=message) as error:
        read(ONEVISION | changed, preprocessor_config_json=PROCESSOR | processor)
    assert "\n" not in str(error.value)


def test_parts_alone(read):
    assert read({"model_type": "clip_vision_model", "image_size": 224, "hidden_act": "gelu"}) == VisionConfig(
        224, 32, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, activation="gelu")
    assert read({"model_type": "clip", "vision_config": {"image_size": 336, "patch_size": 14}}).patches == 576
    llama = read({"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 5e5, "rope_scaling": LLAMA3,
                  "max_position_embeddings": 131072, "attention_bias": True, "tie_word_embeddings": True})
    assert llama == LlamaConfig(num_kv_heads=8, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
                                norm_eps=1e-6, max_length=131072, qkv_bias=True, out_bias=True,
                                tie_word_embeddings=True)
    old = read({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old.rope_scaling == RopeScaling("linear", 2.0) and old.rope_theta == 10000
    new = read({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "head_dim": 64})
    assert (new.rope_theta, new.rope_scaling, new.head_dim) == (2e4, None, 64)
    qwen2 = read({"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False})
    assert qwen2.qkv_bias and not qwen2.out_bias
    mistral = read({"model_type": "mistral", "sliding_window": None})
    assert mistral.num_kv_heads == 8 and mistral.intermediate_size == 14336
    # A window as long as the model's context hides nothing.
    assert read({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}) is not None


def with_text(**fields):
    return LLAVA_7B | {"text_config": LLAVA_7B["text_config"] | fields}


def with_vision(**fields):
    return LLAVA_7B | {"vision_config": LLAVA_7B["vision_config"] | fields}


@pytest.mark.parametrize("config, message", [
    ({"model_type": "llava_next_video"}, "model_type 'llava_next_video' is not supported; llava, llava_next, "),
    ({}, "model_type None is not supported"),
    (LLAVA_7B | {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
    (LLAVA_7B | {"vision_feature_layer": -26}, "feature_layer -26"),
    (LLAVA_7B | {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
    (LLAVA_7B | {"multimodal_projector_bias": False}, "multimodal_projector_bias is False; supported: True"),
    (LLAVA_7B | {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; supported: gelu and linear"),
    (LLAVA_7B | {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAVA_7B | {"llava_jax": {"template": "vicuna_v2"}}, "unknown template 'vicuna_v2'; did you mean 'vicuna_v1'"),
    (with_vision(model_type="siglip_vision_model"), "vision_feature_select_strategy is 'default', .* no class token"),
    (with_vision(model_type="dinov2"), "vision_config.model_type is 'dinov2'"),
    (with_vision(hidden_act="relu"), "hidden_act is 'relu'; supported: quick_gelu and gelu and gelu_pytorch_tanh"),
    (with_vision(num_channels=1), "vision_config.num_channels is 1"),
    (with_vision(image_size=[336, 224]), r"vision_config.image_size is"),
    (with_text(model_type="gemma"), "text_config.model_type is 'gemma'; supported: llama and mistral and qwen2"),
    (with_text(hidden_act="gelu"), "text_config.hidden_act is 'gelu'; supported: silu"),
    (with_text(rope_scaling={"type": "yarn", "factor": 4.0}), "text_config.rope_scaling .*yarn.* is not supported"),
    (with_text(rope_scaling={"type": "dynamic", "factor": 4.0}), "dynamic.* is not supported; rope_type linear"),
    (with_text(partial_rotary_factor=0.5), "partial_rotary_factor.* is not supported"),
    (with_text(num_attention_heads=32, num_key_value_heads=5), "32 is not a multiple of num_kv_heads 5"),
    (with_text(hidden_size="wide"), "hidden_size"),
    ({"model_type": "mistral"}, "sliding_window is 4096, shorter than max_position_embeddings 131072"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
     "sliding_window is 512"),
    ({"model_type": "llava_jax", "version": 3}, "version 3 of the llava_jax layout is not known here; 2 is"),
    ({"model_type": "llava_jax", "version": 2}, "not a configuration of the llava_jax layout"),
    ({"model_type": "llava_jax", "version": 1}, "version 1 .* convert the model again from its hf layout"),
])
def test_what_does_not_fit_is_named(read, config, message):
    with pytest.raises(UserError, match=f"config.json: .*{message}") as error:
        read(config)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path, read):
    with pytest.raises(UserError, match="nowhere: no such directory.*hf download"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.json: no such file"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="config.json: not JSON"):
        (tmp_path / "config.json").write_text("{,}")
        read_config(tmp_path)


@pytest.mark.parametrize("processor, mode", [
    ({"preprocessor_config_json": {"image_processor_type": "CLIPImageProcessor"}}, "crop"),
    ({"preprocessor_config_json": {"image_processor_type": "SiglipImageProcessor"}}, "resize"),
    ({"preprocessor_config_json": {"do_pad": True}}, "pad"),
    ({"processor_config_json": {"image_processor": {"do_pad": True}, "patch_size": 14}}, "pad"),
    ({"processor_config_json": {"patch_size": 14}, "preprocessor_config_json": {"do_pad": True}}, "pad"),
    ({}, "crop"),
])
def test_image_mode(read, processor, mode):
    assert read(LLAVA_7B, **processor).processor.mode == mode


@pytest.mark.parametrize("config, chat, template", [
    (LLAVA_7B, {}, "vicuna_v1"),
    (LLAVA_7B, {"chat_template_jinja": templates.chat_template("llava_v1")}, "llava_v1"),
    (LLAVA_7B, {"chat_template_json": {"chat_template": templates.chat_template("mpt")}}, "mpt"),
    (LLAVA_7B, {"tokenizer_config_json": {"chat_template": [
        {"name": "tool_use", "template": "[INST]"},
        {"name": "default", "template": templates.chat_template("qwen_1_5")}]}}, "qwen_1_5"),
    (LLAVA_7B, {"processor_config_json": {"chat_template": templates.chat_template("llama_2")}}, "llama_2"),
    (with_text(model_type="mistral", sliding_window=None), {}, "mistral_instruct"),
    (with_text(model_type="mistral", sliding_window=None),
     {"chat_template_jinja": templates.chat_template("vicuna_v1")}, "vicuna_v1"),
    (with_text(model_type="qwen2"), {}, "qwen_1_5"),
    (LLAVA_7B | {"llava_jax": {"template": "plain", "image_mode": "pad"}}, {"chat_template_jinja": "[INST]"}, "plain"),
])
def test_template(read, config, chat, template):
    assert read(config, **chat).template == template


def test_a_template_that_is_named_replaces_the_files(tmp_path, read):
    with pytest.raises(UserError, match="chat_template.jinja: this chat template is none .* --template"):
        read(LLAVA_7B, chat_template_jinja="{{ messages }}")
    assert read_config(tmp_path, "v1").template == "vicuna_v1"
    with pytest.raises(UserError, match="unknown template 'v7'"):
        read_config(tmp_path, "v7")
    own = LlavaConfig(template="mpt")
    (tmp_path / "config.json").write_text(json.dumps(configs.native_config(own)))
    assert read_config(tmp_path) == own and read_config(tmp_path, "llava_v1").template == "llava_v1"


FULL = LlavaConfig(
    vision=VisionConfig(70, 7, 32, 48, 4, 2, "gelu", 1e-6),
    text=LlamaConfig(256, 64, 96, 3, 8, 2, 16, 1e-4, 5e5, RopeScaling("llama3", 4.0, 2.0, 8.0, 64), True, True, True,
                     True, 512),
    projector="linear", feature_layer=-3, feature_select="cls_patch", template="mpt", exif=True,
    processor=ImageProcessor(70, "resize", 10, True),
)
TOKENS = {"image": 7, "video": 9, "pad": 8, "bos": 1, "eos": [2, 3]}


SIGLIP = LlavaConfig(vision=VisionConfig(
    70, 7, 144, 96, 3, 2, "gelu_pytorch_tanh", 1e-6, class_token=False, patch_bias=True, pre_norm=False))


def changed(config, **fields):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


@pytest.mark.parametrize("config", [
    LlavaConfig(), FULL, changed(FULL, rope_scaling=RopeScaling("linear", 2.0), tie_word_embeddings=False),
    changed(FULL, out_bias=False, mlp_bias=False), SIGLIP, SIGLIP.with_image_mode("pad"),
    LlavaConfig(processor=ImageProcessor(mode="anyres", pinpoints=((336, 672), (672, 336)), several="pad")),
    dataclasses.replace(
        SIGLIP.with_image_mode("anyres_max_4", "(1x1),...,(2x3)"), video=VideoSampling(2.0, 16, True, True), merged="A",
        processor=dataclasses.replace(SIGLIP.with_image_mode("anyres_max_4", "(1x1),...,(2x3)").processor,
                                      rule="transformers", several="same", video_pool="average", video_newline="grid")),
])
def test_both_layouts_keep_every_field(read, config):
    assert read(configs.native_config(config)) == config
    hub = configs.hf_config(config, TOKENS, config.text.vocab_size, "float32")
    assert read(hub) == config
    # Nothing is left to the reader's defaults, which change from version to version.
    parsed = transformers.AutoConfig.for_model(**hub)
    length = config.processor.features_per_tile
    assert getattr(parsed, "image_seq_length", length) == length and parsed.eos_token_id == [2, 3]
    assert parsed.text_config.pad_token_id == 8 and parsed.text_config.model_type in ("llama", "qwen2")


MERGING = dataclasses.replace(SIGLIP, projector="merge2x2_mlp2x_gelu", processor=None)


def test_the_native_layout_keeps_a_projector_that_merges_patches(read):
    assert (MERGING.vision.grid, MERGING.processor.patches, MERGING.processor.features_per_tile) == (10, 5, 25)
    assert read(configs.native_config(MERGING)) == MERGING
    with pytest.raises(UserError, match="processor.patches is 10, but 5 suits vision, projector"):
        read(configs.native_config(MERGING) | {"processor": configs.native_config(SIGLIP)["processor"]})


@pytest.mark.parametrize("config, message", [
    (dataclasses.replace(FULL, projector="mlp3x_gelu"), "'mlp3x_gelu' has no form in Hugging Face's layout"),
    (dataclasses.replace(FULL, projector="identity"), "'identity' has no form"),
    (MERGING, "'merge2x2_mlp2x_gelu' has no form in Hugging Face's layout"),
    (changed(FULL, qkv_bias=False), "no decoder with these biases: qkv_bias False, out_bias True"),
    (changed(FULL, out_bias=False), "no decoder with these biases"),
    (dataclasses.replace(FULL, vision=dataclasses.replace(FULL.vision, pre_norm=False)), "no vision tower with these"),
])
def test_what_hugging_face_cannot_compute(config, message):
    with pytest.raises(UserError, match=message):
        configs.hf_config(config, TOKENS, 256, "float32")


def test_an_unknown_field_of_our_own_layout(read):
    raw = configs.native_config(FULL)
    with pytest.raises(UserError, match="config.json: not a configuration.*colour"):
        read(raw | {"colour": 1})
    del raw["text"]["num_heads"], raw["text"]["rope_scaling"]
    with pytest.raises(UserError, match="config.json: not a configuration.*rope_scaling"):
        read(raw)


def test_older_files_of_the_native_layout(read):
    raw = configs.native_config(SIGLIP)
    del raw["video"], raw["lora"], raw["merged"]
    for name in ("max_tiles", "rule", "merge", "several", "video_pool", "video_newline"):
        del raw["processor"][name]
    assert read(raw) == SIGLIP


NATIVE = configs.native_config(FULL)


@pytest.mark.parametrize("config, field", [
    (with_text(num_hidden_layers=10**9), "text_config.num_hidden_layers is 1000000000; it must be a whole number"),
    (with_vision(num_hidden_layers=10**9), "vision_config.num_hidden_layers is 1000000000"),
    (with_text(vocab_size=2**40), "text_config.vocab_size is 1099511627776"),
    (with_text(vocab_size=-1), "text_config.vocab_size is -1"),
    (with_text(hidden_size=0), "text_config.hidden_size is 0"),
    (with_text(num_attention_heads=True), "text_config.num_attention_heads is true"),
    (with_text(head_dim=1.5), "text_config.head_dim is 1.5"),
    (with_text(rms_norm_eps="small"), "rms_norm_eps is .small."),
    (with_text(rms_norm_eps=float("nan")), "text_config.rms_norm_eps is NaN; it must be a number from"),
    (with_text(max_position_embeddings=[4096]), r"text_config.max_position_embeddings is \[4096\]"),
    (with_text(rope_scaling="linear"), "text_config.rope_scaling is .linear.; it must be an object"),
    (with_text(rope_scaling={"type": "linear", "factor": "2"}), "text_config.rope_scaling.factor is .2."),
    (with_text(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "low_freq_factor"),
    (with_text(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor"),
    (with_text(tie_word_embeddings="no"), "text_config.tie_word_embeddings is .no.; it must be true or false"),
    (with_vision(image_size=10**6), "vision_config.image_size is 1000000"),
    (with_vision(hidden_size=None), "vision_config.hidden_size is null"),
    (LLAVA_7B | {"text_config": []}, r"text_config is \[\]; it must be an object"),
    (LLAVA_7B | {"llava_jax": 3}, "llava_jax is 3"),
    (LLAVA_7B | {"llava_jax": {"template": 3}}, "llava_jax.template is 3"),
    (with_text(quantization_config={"bits": 4}), "text_config.quantization_config: quantised models are not read"),
    (NATIVE | {"text": NATIVE["text"] | {"num_layers": 10**9}}, "text.num_layers is 1000000000"),
    (NATIVE | {"vision": NATIVE["vision"] | {"num_heads": "2"}}, "vision.num_heads is .2."),
    (NATIVE | {"projector": "mlp1000000x_gelu"}, "projector 'mlp1000000x_gelu' is not one of"),
    (NATIVE | {"projector": 1}, "projector is 1; it must be a text"), (NATIVE | {"template": "v9"}, "template 'v9'"),
    (NATIVE | {"feature_layer": None}, "feature_layer is null"), (NATIVE | {"exif": 1}, "exif is 1"),
    (LLAVA_7B | {"llava_jax": {"exif": "yes"}}, "llava_jax.exif is"),
    ({"model_type": "clip", "vision_config": 7}, "vision_config is 7"),
    ({"model_type": ["llava"]}, "model_type .* is not supported"),
])
def test_types_and_sizes_are_checked_before_anything_is_built(read, config, field):
    with pytest.raises(UserError, match=f"config.json: .*{field}") as error:
        read(config)
    assert "\n" not in str(error.value)


def test_what_is_not_a_size_is_never_built(read):
    """transformers makes a name of each of 10**9 labels, and a type of each of 10**9 layers."""
    assert read(LLAVA_7B | {"num_labels": 10**9}) == read(LLAVA_7B)
    assert read(with_text(num_labels=10**9, layer_types=["full_attention"] * 3)) == read(LLAVA_7B)


CLIP_PREPARATION = {
    "do_resize": True, "size": {"shortest_edge": 336}, "resample": 3, "do_center_crop": True, "do_rescale": True,
    "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "do_convert_rgb": None}


@pytest.mark.parametrize("name, value", [
    ("image_mean", 0.5), ("image_mean", [0.48] * 4), ("image_std", [0, 1, 1]), ("image_mean", [None, "x", {}]),
    ("rescale_factor", 1 / 256), ("rescale_factor", 10**400), ("resample", 2),
    ("do_normalize", False), ("do_rescale", False), ("do_resize", False)])
@pytest.mark.parametrize("nested", [False, True])
def test_images_prepared_otherwise_are_refused(tmp_path, name, value, nested):
    def write(settings):
        file = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
        file.write_text(json.dumps({"image_processor": settings} if nested else settings))

    write(CLIP_PREPARATION | {"do_pad": True})
    assert processors.settings_of(tmp_path) == {"mode": "pad", "mean": CLIP_MEAN, "std": CLIP_STD}
    write(CLIP_PREPARATION | {name: value})
    with pytest.raises(UserError, match=f"processor_config.json: ({name} is .*; images are prepared |.*mean .*std|"
                                        f"{name} is .*list of numbers)"):
        processors.settings_of(tmp_path)
