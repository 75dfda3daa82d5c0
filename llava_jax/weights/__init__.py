"""Checkpoints in and out: our own layout and Hugging Face's, in files and on devices."""

from llava_jax.weights.checkpoint import check_export, load_checkpoint, read_config, save_hf, save_native

__all__ = ["check_export", "load_checkpoint", "read_config", "save_hf", "save_native"]
