"""Id 0 is a token as any other: Qwen's is "!", which LLaVA-NeXT's collator masked as padding."""

import numpy as np
import pytest
import tokenizers
from pipeline_data import packed_rows, settings, write_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from llava_jax.data.records import BadRow
from llava_jax.text.encode import IGNORE
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
ROW = {"id": "loud", "conversations": [{"from": "human", "value": "Stop! Really!"}, {"from": "gpt", "value": "Yes!!"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["x"], trainer)
    made.add_special_tokens(SPECIALS)
    folder = tmp_path_factory.mktemp("qwen")
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "name", ["qwen_1_5", "qwen_1_5_original", "chatml_direct", "llava_llama_3", "mistral_instruct"])
def test_token_zero_is_read_and_learned(name, tokenizer, tmp_path):
    assert tokenizer.encode("!") == [0]
    options = settings(write_file(tmp_path, [ROW]), template=TEMPLATES[name], tokenizer=tokenizer, sequence_length=600,
                       epochs=1)
    [packed] = packed_rows(**options)
    zeros = (packed["tokens"] == 0) & (packed["segment_ids"] == 1)
    assert zeros.sum() == 4 and (packed["labels"][zeros] == 0).sum() == 2
    assert (packed["labels"][packed["segment_ids"] == 0] == IGNORE).all()
    np.testing.assert_array_equal(np.flatnonzero(packed["segment_ids"]), np.arange((packed["segment_ids"] == 1).sum()))

    length = int((packed["segment_ids"] == 1).sum())
    for says, sequence_length, context in (("the model's context", 600, length - 1),
                                           ("data.sequence_length", length - 1, None)):
        spec = settings(write_file(tmp_path, [ROW]), template=TEMPLATES[name], tokenizer=tokenizer,
                        sequence_length=sequence_length, context=context)["spec"]
        with pytest.raises(BadRow, match=f"row 1.*id loud: {length} tokens, 1 more than .*{says}"):
            spec.text(0)
