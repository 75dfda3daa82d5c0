"""The exported tokenizer, processor and chat template, as transformers reads them."""

import json
import shutil
from pathlib import Path

import next_models
import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image
from sentencepiece import SentencePieceProcessor

from llava_jax.errors import UserError
from llava_jax.images import SIGLIP_MEAN, SIGLIP_STD, ImageProcessor
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text.encode import IMAGE_TOKEN_ID, encode_prompt
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.weights import tokenizer_files

MODEL = Path(__file__).parent.parent / "golden" / "tokenizer.model"
TEXTS = ["", "a", "What is this?", " two  blanks\n\n\tand a tab ", "naïve 汉字 한글 🙂 e\u0301", "<0x0A>▁", "x" * 60,
         "1234567890"]
MESSAGES = [
    {"role": "user", "content": "<image>\nWhat is  this?"},
    {"role": "assistant", "content": "A cat.\n Yes"},
    {"role": "user", "content": "And left of it"},
]
INTERLEAVED = [
    {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
    {"role": "user", "content": [{"type": "text", "text": "Before:"}, {"type": "image"},
                                 {"type": "text", "text": " After:\n"}, {"type": "image"},
                                 {"type": "text", "text": "What  changed?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
    {"role": "user", "content": [{"type": "text", "text": "And in"}, {"type": "image"}]},
]
INLINE = [{"role": "user", "content": "Compare <image> and  <image> of a dog."}]


def test_tokenizer_json_gives_sentencepieces_ids():
    ours = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files.tokenizer_json(MODEL, legacy=True)))
    sentencepiece = SentencePieceProcessor(model_file=str(MODEL))
    rng = np.random.default_rng(0)
    pieces = [sentencepiece.id_to_piece(i).replace("▁", " ") for i in range(300, 2000)]
    texts = TEXTS + ["".join(rng.choice(pieces, 40)) for _ in range(200)]
    for text in texts:
        assert ours.encode(text).ids == [1, *sentencepiece.encode(text)], text
        assert ours.decode(ours.encode(text).ids) == sentencepiece.decode(sentencepiece.encode(text))


def make_source(directory, legacy, only_json):
    directory.mkdir()
    if only_json:
        text = json.dumps(tokenizer_files.tokenizer_json(MODEL, legacy is not False))
        (directory / "tokenizer.json").write_text(text)
    else:
        shutil.copy(MODEL, directory)
    if legacy is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "model_max_length": 2048}))
    return directory


def export(source, target, mode=None, **fields):
    target.mkdir()
    config = LlavaConfig(vision=VisionConfig(image_size=28, patch_size=14), **fields).with_image_mode(mode)
    ids = tokenizer_files.export(source, target, config)
    (target / "config.json").write_text('{"model_type": "llava"}')
    return ids, transformers.AutoProcessor.from_pretrained(target)


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "v1_mmtag", "mpt", "qwen_1_5", "llava_v0"])
@pytest.mark.parametrize("legacy, only_json", [(None, False), (True, True), (False, False), (False, True)])
def test_the_processor_makes_the_models_prompts(tmp_path, legacy, only_json, template):
    source = make_source(tmp_path / "source", legacy, only_json)
    ids, processor = export(source, tmp_path / "target", template=template)
    assert ids == {"image": 2000, "pad": 2001, "bos": 1, "eos": 2}
    for messages, images in ((MESSAGES, 1), (INTERLEAVED, 3), (INLINE, 2)):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [Image.new("RGB", (9, 5))] * images
        found = processor(text=text, images=pictures, return_tensors="np")["input_ids"][0]
        expected = encode_prompt(messages, template, Tokenizer.load(source), visual_tokens=4)
        np.testing.assert_array_equal(np.where(found == 2000, IMAGE_TOKEN_ID, found), expected)
        # The export tokenizes as the source does here too.
        again = encode_prompt(messages, template, Tokenizer.load(tmp_path / "target"), visual_tokens=4)
        np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
@pytest.mark.parametrize("select, count", [("patch", 4), ("cls_patch", 5)])
def test_the_processor_makes_the_models_images(tmp_path, mode, select, count):
    source = make_source(tmp_path / "source", None, False)
    _, processor = export(source, tmp_path / "target", mode=mode, feature_select=select)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8))
    batch = processor(text=["<image>\na", "b <image> <image>"], images=[[image], [image, image]], padding=True,
                      return_tensors="np")
    ours = ImageProcessor(28, mode, patches=2)
    expected = ours.normalise(ours(image))
    for found in batch["pixel_values"]:
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected[0])
    np.testing.assert_array_equal((batch["input_ids"] == 2000).sum(1), [count, 2 * count])
    assert (batch["input_ids"] == 2001).any(), "rows of different lengths are padded with <pad>"


def test_special_tokens_are_listed_everywhere(tmp_path):
    source = make_source(tmp_path / "source", None, False)
    _, processor = export(source, tmp_path / "target")
    read = {file.name: json.loads(file.read_text()) for file in (tmp_path / "target").glob("*.json")}
    assert read["added_tokens.json"] == {"<image>": 2000, "<pad>": 2001}
    assert [(t["id"], t["content"], t["special"]) for t in read["tokenizer.json"]["added_tokens"]] == [
        (0, "<unk>", True), (1, "<s>", True), (2, "</s>", True), (2000, "<image>", True), (2001, "<pad>", True)]
    assert read["tokenizer_config.json"]["added_tokens_decoder"]["2000"]["content"] == "<image>"
    assert read["special_tokens_map.json"] == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
                                               "image_token": "<image>"}
    assert read["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2001}
    tokenizer = processor.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2001)
    assert tokenizer.decode([1, 2000, 2001, 300], skip_special_tokens=True) == tokenizer.decode([300])


def test_what_is_there_already_stays(tmp_path):
    source = make_source(tmp_path / "source", False, False)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.9}')
    first, _ = export(source, tmp_path / "first")
    assert first["eos"] == [2, 7]
    second, _ = export(tmp_path / "first", tmp_path / "second")
    assert second == first
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_padding_token_of_its_own_is_kept(tmp_path):
    source = make_source(tmp_path / "source", None, False)
    (source / "added_tokens.json").write_text('{"[PAD]": 2000}')
    (source / "special_tokens_map.json").write_text('{"pad_token": {"content": "[PAD]", "lstrip": false}}')
    ids, processor = export(source, tmp_path / "target")
    assert (ids["pad"], ids["image"]) == (2000, 2001)
    assert processor.tokenizer.pad_token_id == 2000


def test_no_tokenizer(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="source: no tokenizer"):
        export(tmp_path / "source", tmp_path / "target")


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")


def qwen2_source(directory):
    """A small tokenizer with the pipeline and the special tokens of Qwen2, after the vocabulary as in the original."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["What is this? A cat. And left of it"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "add_bos_token": False, "model_max_length": 32768}))
    return directory


def test_onevisions_tokens_and_prompts(tmp_path):
    source = qwen2_source(tmp_path / "source")
    size = Tokenizer.load(source).vocab_size
    processor = ImageProcessor(30, "anyres", 3, mean=SIGLIP_MEAN, std=SIGLIP_STD, pinpoints=((30, 60), (60, 30)),
                               max_tiles=4, several="pad", rule="transformers")
    vision = VisionConfig(30, 10, class_token=False, patch_bias=True, pre_norm=False)
    config = LlavaConfig(vision=vision, processor=processor, template="qwen_1_5")
    target = tmp_path / "target"
    target.mkdir()
    ids = tokenizer_files.export(source, target, config)
    # `<image>` and `<video>` are the tokenizer's next ids: 151646 and 151647 of the published OneVision.
    assert ids == {"image": size, "video": size + 1, "pad": size - 3, "bos": None, "eos": size - 1}
    (target / "config.json").write_text('{"model_type": "llava_onevision"}')
    theirs, tokenizer, frame = next_models.processor_of(target), Tokenizer.load(target), Image.new("RGB", (9, 5))
    video = [{"role": "user", "content": [{"type": "text", "text": " What is this "}, {"type": "video"}]}]
    mixed = [*video, {"role": "assistant", "content": "A cat."},
             {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "left of"}, {"type": "image"}]}]
    for messages, order in ((MESSAGES, "i"), (INTERLEAVED, "iii"), (video, "v"), (mixed, "vvi")):
        text = theirs.apply_chat_template(messages, add_generation_prompt=True)
        found = theirs(text=[text], images=[[frame] * order.count("i")] if "i" in order else None,
                       videos=[[frame] * 2] * order.count("v") or None, return_tensors="np")["input_ids"][0]
        counts = [len(layout.index) for layout in processor.layouts([2 if c == "v" else (9, 5) for c in order])]
        expected = encode_prompt(messages, "qwen_1_5", tokenizer, visual_tokens=counts)
        marks = np.repeat([ids["video" if c == "v" else "image"] for c in order], counts)
        np.put(expected, np.flatnonzero(expected == IMAGE_TOKEN_ID), marks)
        np.testing.assert_array_equal(found, expected)
        assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n") or order == "iii"
