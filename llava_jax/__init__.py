"""LLaVA (Visual Instruction Tuning) in JAX: train, talk, score, convert. `load` opens a model."""

from importlib import import_module

_MODULES = {
    "IMAGE_TOKEN_ID": "llava_jax.text.encode",
    "Llava": "llava_jax.inference.llava",
    "load": "llava_jax.inference.llava",
}

__all__ = ["IMAGE_TOKEN_ID", "Llava", "__version__", "load"]


def __getattr__(name: str):
    # Imported on first use, because data workers import subpackages and must not wait for JAX.
    if name == "__version__":
        from importlib.metadata import version

        return version("llava_jax")
    if name not in _MODULES:
        raise AttributeError(f"module 'llava_jax' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
