"""Converts checkpoints between layouts, and joins a vision tower and a decoder to a new LLaVA."""

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.files import to_path
from llava_jax.images import ImageMode
from llava_jax.text import agreement, templates
from llava_jax.text.tokenizer import Tokenizer

PROG = "python -m llava_jax.convert"


@dataclass(frozen=True)
class Convert:
    """Converts a checkpoint, one tensor at a time: memory for the largest tensor is enough.

    python -m llava_jax.convert SRC DST --to LAYOUT

    python -m llava_jax.convert BASE DST --adapter DIR --merge --to LAYOUT

    python -m llava_jax.convert --vision CLIP --language LLAMA DST --to LAYOUT

    hf opens in transformers, with tokenizer, processor and chat template. native is this project's layout, with stacked
    layers. original opens in LLaVA's own code. peft and original-lora are adapters, of transformers' PEFT and of LLaVA.

    SRC, BASE, CLIP and LLAMA are directories with safetensors or torch files, whose layout is detected. SRC may also be
    a run of llava_jax.train, or RUN/checkpoints/STAGE/STEP of it; memory for what was trained is then needed too. The
    last form joins a CLIP or SigLIP and a LLaMA, Mistral or Qwen2 by a new, untrained projector. DST must be missing or
    empty; it appears when it is complete.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SRC] DST")]
    """Paths SRC and DST, or DST alone for a join."""
    to: Literal["hf", "native", "original", "peft", "original-lora"]
    """Layout of DST."""
    template: str | None = None
    """Conversation template. By default that of SRC; for a join the first of vicuna_v1, llava_llama_3, qwen_1_5 and
    gemma_instruct whose end of an answer is LLAMA's EOS, or else one of its tokens."""
    image_mode: ImageMode | None = None
    """Image mode: crop to the centre, pad or resize to a square. By default that of SRC; for a join pad with CLIP,
    resize with SigLIP."""
    dtype: Literal["bfloat16", "float16", "float32", "keep"] = "bfloat16"
    """Dtype of all tensors; keep leaves every bit as it is."""
    tower: Literal["in", "out"] = "in"
    """With --to original: whether the vision tower is among the tensors, or only named in config.json, which is right
    if it was never trained."""
    shard_size: str = "5GB"
    """Maximum size of a file of tensors, such as 500MB."""
    base: str | None = None
    """Directory of the decoder to which SRC, a delta of LLaVA v0 or v1-1, is added."""
    adapter: str | None = None
    """Directory of adapters of SRC, of PEFT or of the original LLaVA. They stay beside the kernels, in native, peft and
    original-lora, unless --merge is given."""
    merge: cli.Flag = False
    """Whether adapters are added to their kernels."""
    vision: str | None = None
    """Directory of the vision tower: of a join, or of an SRC in the original layout that only names it."""
    language: str | None = None
    """Join: directory of the decoder and its tokenizer."""
    projector: str | None = None
    """Join: linear, mlp2x_gelu (the default), or merge2x2_mlp2x_gelu, which only the native layout has."""
    projector_weights: str | None = None
    """Join: file of a projector that LLaVA's first stage trained (mm_projector.bin), or its folder, instead of a new
    one."""
    feature_layer: int | None = None
    """Join: hidden state of the vision tower that the projector reads; default: -2."""
    seed: int | None = None
    """Join: random seed of the new projector; default: 0."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs `python -m llava_jax.convert`. Raises UserError if the options or a checkpoint are invalid."""
    options = cli.parse(Convert, sys.argv[1:] if args is None else args, prog=PROG)
    _check(options)
    from llava_jax.weights import checkpoint, save_original, save_peft

    start = time.monotonic()
    target = Path(options.paths[-1])
    config, parameters, tokenizer_dir, trained = _join(options) if len(options.paths) == 1 else _open(options)
    config, parameters = _merged(options, config, parameters)
    if "image_newline" in parameters.shapes and not config.processor.has_newline:
        agreement.say(f"image_newline is left out: image mode {config.processor.mode_name} has none")
        kept = {path: shape for path, shape in parameters.shapes.items() if path != "image_newline"}
        parameters, trained = dataclasses.replace(parameters, shapes=kept), trained and trained - {"image_newline"}
    dtype = None if options.dtype == "keep" else options.dtype
    if options.to in ("peft", "original-lora"):
        save_peft(target, config, parameters, tokenizer_dir, layout=options.to, trained=trained, dtype=dtype)
    else:
        save = {"hf": checkpoint.save_hf, "native": checkpoint.save_native,
                "original": functools.partial(save_original, tower=options.tower)}[options.to]
        save(target, config, parameters, tokenizer_dir, dtype=dtype, shard_bytes=_bytes(options.shard_size))
    files = [*target.glob("*.safetensors"), *target.glob("*.bin")]
    size = sum(file.stat().st_size for file in files)
    amount = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"  # adapters are small
    print(f"{target}: {amount} in {len(files)} {'file' if len(files) == 1 else 'files'} of tensors, "
          f"{time.monotonic() - start:.0f} s")
    return 0


def _merged(options: Convert, config: "LlavaConfig", parameters: "ParameterSource") -> tuple:
    """Merges the adapters if --merge is given. Raises UserError if they must be and are not, or if there are none."""
    from llava_jax.weights import peft

    if options.merge and config.lora is None:
        raise UserError(f"--merge: {options.paths[0]} has no adapters; name them with --adapter")
    if options.merge:
        return peft.merge(config, parameters, Path(options.adapter).name if options.adapter else "")
    if config.lora is not None and options.to in ("hf", "original"):
        raise UserError(f"--to {options.to} has no place for adapters; add --merge, or write them with --to peft or "
                        "--to original-lora")
    return config, parameters


def _check(options: Convert) -> None:
    joins = [name for name in ("language", "projector", "projector_weights", "feature_layer", "seed")
             if getattr(options, name) is not None]
    count = len(options.paths)
    if count > 2:
        raise UserError(f"{count} paths are given; SRC and DST are needed (see {PROG} --help)")
    if count == 2 and joins:
        raise UserError(f"--{joins[0].replace('_', '-')} belongs to a join, which takes DST but no SRC")
    if count < 2 and not (count and options.vision and options.language):
        raise UserError(f"give SRC and DST, or --vision, --language and DST (see {PROG} --help)")
    if count == 1 and options.base:
        raise UserError("--base belongs to a delta SRC, not to a join")
    if options.tower == "out" and options.to != "original":
        raise UserError("--tower belongs to --to original; the other layouts have the vision tower among their tensors")
    if count == 1 and (options.adapter or options.to in ("peft", "original-lora")):
        raise UserError("a join has no adapters: leave out --adapter, and write --to native, hf or original")
    if options.template:
        templates.get(options.template)


def _open(options: Convert) -> tuple:
    from llava_jax.models.llava import LlavaConfig
    from llava_jax.weights import checkpoint, peft_export

    path = to_path(options.paths[0])
    from llava_jax.train.restore import open_run

    if run := open_run(path):
        if options.adapter or options.base or options.vision or options.template:
            raise UserError(f"{path} is a run, which names its base itself; --adapter, --base, --vision and --template "
                            "belong to other checkpoints")
        config = run.config.with_image_mode(options.image_mode)
        return config, run.parameters, to_path(run.base), run.trained
    config, parameters = checkpoint.open_checkpoint(path, options.template, vision=options.vision, base=options.base,
                                                    adapter=options.adapter)
    if not isinstance(config, LlavaConfig):
        raise UserError(f"{path} is one part of a LLaVA; join it with --vision and --language")
    agreement.check(config.template, Tokenizer.load(path), config.text.vocab_size, str(path), trained=True,
                    visual_tokens=config.processor.features_per_tile, context=config.text.max_length)
    trained = None
    if options.adapter:
        trained = peft_export.usually_trained(parameters) | peft_export.in_full(options.adapter, parameters.shapes)
    return config.with_image_mode(options.image_mode), parameters, path, trained


def _join(options: Convert) -> tuple:
    from llava_jax.models.llama import LlamaConfig
    from llava_jax.models.llava import LlavaConfig, fresh_params
    from llava_jax.models.vit import VisionConfig
    from llava_jax.weights import checkpoint, files, processors, projector_files, source

    parts, projector_file = [], options.projector_weights
    projector_kind = options.projector or (projector_files.kind(projector_file) if projector_file else None)
    for option, path, kind in [("vision", options.vision, VisionConfig), ("language", options.language, LlamaConfig)]:
        parts.append(checkpoint.open_checkpoint(path))
        if not isinstance(parts[-1][0], kind):
            model_type = files.read_json(to_path(path) / "config.json")["model_type"]
            raise UserError(f"--{option} {path}: model_type {model_type} is not a {option} model")
    (vision, vision_parameters), (text, text_parameters) = parts
    tokenizer = Tokenizer.load(options.language)
    template = templates.get(options.template or agreement.template_for_decoder(tokenizer, options.language)).name
    chosen = {"projector": projector_kind, "feature_layer": options.feature_layer}
    config = LlavaConfig(vision=vision, text=text, template=template,
                         **{name: value for name, value in chosen.items() if value is not None})
    config = processors.with_colours(config, options.vision).with_image_mode(options.image_mode)
    agreement.check(template, tokenizer, text.vocab_size, options.language,
                    visual_tokens=config.processor.features_per_tile, context=text.max_length)
    fresh = {path for path in source.shapes(config) if path.startswith("projector/")}
    projector = source.from_memory(fresh_params(config, fresh, options.seed or 0))
    if projector_file:
        projector = projector_files.open_projector(projector_file, config)
        text_parameters = projector_files.with_marks(projector_file, text_parameters, config, tokenizer)
    return config, source.join(vision_parameters, projector, text_parameters), options.language, None


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])B", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"--shard-size {text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** ("KMG".index(match[2].upper()) + 1))


if __name__ == "__main__":
    cli.run(main)
