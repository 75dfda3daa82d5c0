"""Makes the miniature's pre-trained parts from scratch: a BPE tokenizer, a tiny CLIP and a tiny LLaMA.

LLaVA starts from a CLIP and a LLaMA that others trained; the miniature's are made here, with the model code of
the library:

    JAX_PLATFORMS=cpu python scripts/train_mini_backbones.py [--out DIR] [--part tokenizer vision ...]

- `tokenizer`: as LLaMA's (BPE over a text with a leading space, bytes for unseen characters), 1,280 pieces. Its text is
  the rules teacher's, in English and Korean.
- `vision`: contrastive, as CLIP. Regions of pictures (patches of the layer that LLaVA reads, averaged) against
  captions that name some of an object's size, colour, shape and position ("a red object at the top"); every
  matching caption is right. Whole pictures (class token) against whole captions. A part of the pictures has mixed
  colours, which no caption names. The held-back colour-shape pairs appear in no picture.
- `language`: next-word prediction on text of the domain: descriptions, captions, restatements, questions with short
  answers, and the teacher's long answers; a part in Korean. A language model has read of every colour and shape, so
  its text names the held-back pairs too. In most descriptions one position stands for one object (or one patch of a
  picture) and holds the sum of the embeddings of its words. So the decoder learns to read several words at one
  position, as a projector will give them, without ever seeing a picture.

The decoder first learns to look up. It reads lists of up to nine objects, which are repeated in another order: there
guessing among the objects pays little, and looking up ("red circle" -> "top-left") forms in a few hundred steps, which
it does not on the pictures' one to four objects alone. At first an object is one sum of words, then two, then plain
words, then sentences: the last ones alone are not learned. Words that belong together have to be gathered from
neighbouring positions, for which attention has biases. At the start they let three heads look one, two and three
positions back; heads that have to find this themselves do so with some seeds only. In the later part of the text,
questions that are learned last (counting, existence) and long answers come more often. There the words that say a fact
weigh more than the others, and lists are restated in reading order, as a description goes through a picture. A tuning
follows, as Vicuna is tuned from LLaMA: three long answers a page, conclusions above all, in the chat template of stage
2 to the token, and short questions about the teacher's sentences. A second tuning asks for conclusions that compare
what was read (`comparing`): whether the covered half is the one that an object is in, what two objects share. With all
conclusions equally often, these stay guesses. The decoder's kernels are updated by Muon, with which looking up forms in
fewer steps than with AdamW.

Each part starts from the files of the parts before it. Running the parts in processes of their own gives the same
weights as running them in one. A decoder that is tuned already is tuned on, which suits new phrases of the teacher.
Everything is seeded.
`scores.json` records seconds, seed, sha256 and the results of probes and questions.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

from mini_backbones import pages
from mini_backbones.common import (
    COMPARING_STEPS,
    LANGUAGE_STEPS,
    TUNING_STEPS,
    VISION_STEPS,
    Encoder,
    write_json,
)
from mini_backbones.language import make_language, tune_language
from mini_backbones.tokenizer import make_tokenizer
from mini_backbones.vision import make_vision

from llava_jax.data.workers import keep_freed_memory

PARTS = ("tokenizer", "vision", "language", "tuning", "comparing")
OUT = Path(__file__).parents[1] / "llava_jax" / "data" / "mini"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS)
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS)
    parser.add_argument("--tuning-steps", type=int, default=TUNING_STEPS)
    parser.add_argument("--comparing-steps", type=int, default=COMPARING_STEPS)
    args = parser.parse_args()
    keep_freed_memory()  # before XLA starts threads; a step faulted its buffers in anew, a third of its time
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "scores.json"
    encode = lambda: Encoder(args.out / "language")  # noqa: E731
    makers = {
        "vision": lambda: make_vision(args.out, args.seed, args.vision_steps),
        "language": lambda: make_language(args.out, encode(), args.seed, args.language_steps),
        "tuning": lambda: tune_language(args.out, encode(), args.seed, args.tuning_steps, pages.TUNING),
        "comparing": lambda: tune_language(args.out, encode(), args.seed, args.comparing_steps, pages.COMPARING),
    }
    if "tokenizer" in args.part:
        make_tokenizer(args.out / "language", args.seed)
    for part in PARTS[1:]:
        if part in args.part:
            start = time.perf_counter()
            scores = makers[part]()
            seconds = round(time.perf_counter() - start)
            file = args.out / ("vision" if part == "vision" else "language") / "model.safetensors"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            known = json.loads(record.read_text()) if record.exists() else {}
            write_json(record, known | {part: {"seed": args.seed, "seconds": seconds, "sha256": digest,
                                               "scores": scores}})  # fmt: skip


if __name__ == "__main__":
    main()
