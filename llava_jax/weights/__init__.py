"""Reads and writes checkpoints in the native layout, Hugging Face's and the original one, in files and on devices."""

from llava_jax.weights.checkpoint import check_export, load_checkpoint, load_model, read_config, save_hf, save_native
from llava_jax.weights.original_export import save_original
from llava_jax.weights.peft_export import differing_paths, save_peft
from llava_jax.weights.source import fresh_paths

__all__ = ["check_export", "differing_paths", "fresh_paths", "load_checkpoint", "load_model", "read_config", "save_hf",
           "save_native", "save_original", "save_peft"]
