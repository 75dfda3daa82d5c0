"""llava_jax as a model of lmms-eval: `python -m lmms_eval --model llava_jax --model_args pretrained=DIR --tasks ...`.

setup.cfg names `manifest` among the entry points `lmms_eval.models`: lmms-eval finds it where both are installed.
It brings torch and 150 other packages, and belongs in an environment of its own.
"""

from typing import Any


def manifest() -> Any:
    """The ModelManifest that lmms-eval asks for; the classes are imported when they are used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "llava_jax.evaluate.runner.lmms_eval_models"
    return ModelManifest("llava_jax", f"{module}.LlavaJax", f"{module}.LlavaJaxChat")
