"""Checkpoints in and out: Hugging Face's layouts, our own, and a vision tower joined with a language model."""

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.images import ImageMode
from llava_jax.text import agreement, templates
from llava_jax.text.tokenizer import Tokenizer

USAGE = """%(prog)s SRC DST --to {hf,native}
       %(prog)s --vision CLIP --language LLAMA DST --to {hf,native}"""
HELP = """Converts a checkpoint, one tensor at a time: memory for the largest one is enough.

hf         opens in transformers' LlavaForConditionalGeneration, with tokenizer, processor and chat template
native  this project's layout, with stacked layers

SRC, CLIP and LLAMA are directories with safetensors, whose layout is told from their files. The second form joins a
CLIP and a LLaMA (or Mistral, or Qwen2) by a new, untrained projector. DST must not exist or be empty; it appears when
it is complete."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m llava_jax.convert", USAGE, HELP, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="SRC DST", help="DST alone for a join")
    parser.add_argument("--to", required=True, choices=["hf", "native"], help="layout of DST")
    parser.add_argument("--template", help="conversation template (default: SRC's; for a join vicuna_v1, llava_llama_3 "
                        "or qwen_1_5: one whose end of an answer is a token of LLAMA's tokenizer)")
    parser.add_argument("--image-mode", choices=get_args(ImageMode),
                        help="crop images to the centre, pad them, or resize them to a square (default: SRC's; pad "
                        "for a join)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of all tensors (default: as they are)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE",
                        help="largest file of tensors, such as 500MB (default: 5GB)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    join = parser.add_argument_group("join")
    join.add_argument("--vision", metavar="CLIP", help="directory of the vision tower")
    join.add_argument("--language", metavar="LLAMA", help="directory of the decoder and its tokenizer")
    join.add_argument("--projector", help="linear, or mlp2x_gelu (the default)")
    join.add_argument("--feature-layer", type=int, metavar="N",
                      help="hidden state of the vision tower that the projector reads (default: -2)")
    join.add_argument("--seed", type=int, metavar="N", help="of the new projector (default: 0)")
    options = parser.parse_args(args)

    joins = [name for name in ("vision", "language", "projector", "feature_layer", "seed")
             if getattr(options, name) is not None]
    if len(options.paths) > 2:
        parser.error(f"{len(options.paths)} paths are given; SRC and DST are needed")
    if len(options.paths) == 2 and joins:
        parser.error(f"--{joins[0].replace('_', '-')} belongs to a join, which takes no SRC but DST alone")
    if len(options.paths) == 1 and not (options.vision and options.language):
        parser.error("give SRC and DST, or --vision, --language and DST")
    if options.template:
        options.template = templates.get(options.template).name
    return options


def main(args: Sequence[str] | None = None) -> int:
    """`python -m llava_jax.convert`; see HELP. A mistake raises UserError, KeyError or OSError with one line."""
    options = parse(args)
    from llava_jax.weights import checkpoint

    start = time.monotonic()
    target = Path(options.paths[-1])
    if options.vision:
        config, parameters, tokenizer_dir = _join(options)
    else:
        config, parameters, tokenizer_dir = _open(options)
    save = checkpoint.save_hf if options.to == "hf" else checkpoint.save_native
    save(target, config, parameters, tokenizer_dir, dtype=options.dtype, shard_bytes=_bytes(options.shard_size))
    files = list(target.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{target}: {size / 1e9:.2f} GB in {len(files)} {'file' if len(files) == 1 else 'files'} of tensors, "
          f"{time.monotonic() - start:.0f} s")
    return 0


def _open(options: argparse.Namespace) -> tuple:
    from llava_jax.models.llava import LlavaConfig
    from llava_jax.weights import checkpoint

    path = Path(options.paths[0])
    config, parameters = checkpoint.open_checkpoint(path, options.template)
    if not isinstance(config, LlavaConfig):
        raise UserError(f"{path} is one part of a LLaVA; join it with --vision and --language")
    agreement.check(config.template, Tokenizer.load(path), config.text.vocab_size, str(path), trained=True,
                    visual_tokens=config.processor.features_per_tile, context=config.text.max_length)
    return config.with_image_mode(options.image_mode), parameters, path


def _join(options: argparse.Namespace) -> tuple:
    from llava_jax.models.llama import LlamaConfig
    from llava_jax.models.llava import LlavaConfig, fresh_params
    from llava_jax.models.vit import VisionConfig
    from llava_jax.weights import checkpoint, source

    parts = []
    for option, path, kind in [("vision", options.vision, VisionConfig), ("language", options.language, LlamaConfig)]:
        parts.append(checkpoint.open_checkpoint(Path(path)))
        if not isinstance(parts[-1][0], kind):
            raise UserError(f"--{option} {path}: model_type {_model_type(path)} is not a {option} model")
    (vision, vision_parameters), (text, text_parameters) = parts
    tokenizer = Tokenizer.load(options.language)
    template = options.template or agreement.template_for_decoder(tokenizer, options.language)
    config = LlavaConfig(vision=vision, text=text, template=template, **_chosen(options, "projector", "feature_layer"))
    config = config.with_image_mode(options.image_mode)
    agreement.check(template, tokenizer, text.vocab_size, options.language,
                    visual_tokens=config.processor.features_per_tile, context=text.max_length)
    fresh = {path for path in source.shapes(config) if path.startswith("projector/")}
    projector = source.from_memory(fresh_params(config, fresh, options.seed or 0))
    return config, source.join(vision_parameters, projector, text_parameters), Path(options.language)


def _chosen(options: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _model_type(path: str) -> str:
    from llava_jax.weights import files
    return files.read_json(Path(path) / "config.json")["model_type"]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])B", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"--shard-size {text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** ("KMG".index(match[2].upper()) + 1))


if __name__ == "__main__":
    cli.run(main)
