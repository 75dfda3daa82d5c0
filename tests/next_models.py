"""Small LLaVA 1.6 and OneVision models of transformers, and a batch of conversations through their processors."""

import json

import numpy as np
import torch
import transformers
from PIL import Image

from llava_jax.weights import tokenizer_files

SIDE, PATCH = 30, 10
NEXT_PINPOINTS = [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]  # (height, width), as in transformers
OV_PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 4) for columns in range(1, 4)]
IDS = {"<pad>": 2000, "<image>": 2001, "<video>": 2002}
# A chat template of a kind that transformers' conversion wrote: images, videos and then texts, without a system text.
CONVERTED = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}
{%- for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
{%- for part in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}
{%- for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}
{{- '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEXT = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config}


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), np.uint8))


def build(kind, text="llama", tower="clip", **fields):
    """A model with random weights, whose logits depend on every token."""
    sizes = dict(image_size=SIDE, patch_size=PATCH, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=4)
    vision = (transformers.CLIPVisionConfig(**sizes) if tower == "clip"
              else transformers.SiglipVisionConfig(**sizes, vision_use_head=False))
    decoder = TEXT[text](vocab_size=2064, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=fields.get("tie_word_embeddings", False),
                         **({"sliding_window": None} if text == "mistral" else {}))
    settings = dict(vision_config=vision, text_config=decoder, image_token_index=IDS["<image>"], **fields)
    torch.manual_seed(0)
    if kind == "llava_next":
        model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(
            image_grid_pinpoints=NEXT_PINPOINTS, **settings))
    else:
        model = transformers.LlavaOnevisionForConditionalGeneration(transformers.LlavaOnevisionConfig(
            image_grid_pinpoints=OV_PINPOINTS, video_token_index=IDS["<video>"], vision_aspect_ratio="anyres_max_2",
            **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


def save(model, directory, golden):
    """Writes the model, its tokenizer and its processors as transformers does."""
    kind, config = model.config.model_type, model.config
    model.save_pretrained(directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(tokenizer_files.tokenizer_json(golden / "tokenizer.model", legacy=True)))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>", "video_token": "<video>"})
    assert tokenizer.convert_tokens_to_ids(list(IDS)) == list(IDS.values())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    is_next, has_class = kind == "llava_next", config.vision_config.model_type == "clip_vision_model"
    images = (transformers.LlavaNextImageProcessorPil if is_next else transformers.LlavaOnevisionImageProcessorPil)(
        image_grid_pinpoints=config.image_grid_pinpoints,
        **(dict(size={"shortest_edge": SIDE}, crop_size=SIDE) if is_next else
           dict(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    strategy = config.vision_feature_select_strategy
    if is_next:
        transformers.LlavaNextProcessor(
            images, tokenizer, patch_size=PATCH, vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(has_class)).save_pretrained(directory)
    else:  # its processor cannot be made without torchvision
        tokenizer.save_pretrained(directory)
        images.save_pretrained(directory)
        (directory / "processor_config.json").write_text(json.dumps({
            "vision_feature_select_strategy": strategy, "vision_aspect_ratio": config.vision_aspect_ratio,
            "num_image_tokens": (SIDE // PATCH) ** 2 + has_class, "processor_class": "LlavaOnevisionProcessor"}))
        (directory / "chat_template.jinja").write_text(CONVERTED)
    return directory


class OnevisionProcessor(transformers.LlavaOnevisionProcessor):
    """transformers' processor with frames prepared here, because its video processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, **settings):
        def frames(videos, **_):
            size = image_processor.size["height"]
            clips = [[np.asarray(frame.resize((size, size), Image.Resampling.BICUBIC)) for frame in video]
                     for video in videos]
            x = (np.array(clips) * (1 / 255)).astype(np.float32)
            x = (x - np.float32(image_processor.image_mean)) / np.float32(image_processor.image_std)
            return transformers.BatchFeature({"pixel_values_videos": torch.from_numpy(x.transpose(0, 1, 4, 2, 3))})

        super().__init__(image_processor, tokenizer, frames, **settings)

    def check_argument_for_proper_class(self, *_):
        pass


def processor_of(directory):
    """The folder's processor, as AutoProcessor opens it."""
    if json.loads((directory / "config.json").read_text())["model_type"] == "llava_next":
        return transformers.AutoProcessor.from_pretrained(directory)
    settings = json.loads((directory / "processor_config.json").read_text())
    names = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio")
    template = directory / "chat_template.jinja"
    return OnevisionProcessor(
        transformers.AutoImageProcessor.from_pretrained(directory),
        transformers.AutoTokenizer.from_pretrained(directory), **{name: settings[name] for name in names},
        chat_template=template.read_text() if template.exists() else None)


def their_inputs(processor, texts, images):
    """A batch, padded on the right."""
    processor.tokenizer.padding_side = "right"
    pictures = images if isinstance(processor, OnevisionProcessor) else [image for row in images for image in row]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def our_inputs(llava, conversations):
    """A batch of `Llava.encode`, padded on the right with tokens and tiles that nothing reads."""
    rows = [llava.encode(messages, images) for messages, images in conversations]
    length = max(row["tokens"].shape[1] for row in rows)
    tiles = max(row["tiles"].shape[1] for row in rows if "tiles" in row)
    batch = {"tokens": np.zeros((len(rows), length), np.int32),
             "tiles": np.zeros((len(rows), tiles, SIDE, SIDE, 3), np.uint8)}
    extra = (4,) if llava.processor.is_weighted else ()
    batch["visual_index"] = np.full((len(rows), length, *extra), -1, np.int32)
    if extra:
        batch["visual_weight"] = np.zeros((len(rows), length, 4), np.float32)
    features = llava.processor.features_per_tile
    for i, row in enumerate(rows):
        size = row["tokens"].shape[1]
        batch["tokens"][i, :size] = row["tokens"][0]
        if "tiles" in row:
            count = row["tiles"].shape[1]
            batch["tiles"][i, :count] = row["tiles"][0]
            index = row["visual_index"][0]
            batch["visual_index"][i, :size] = np.where(index == count * features, tiles * features, index)
            if extra:
                batch["visual_weight"][i, :size] = row["visual_weight"][0]
    return rows, batch
