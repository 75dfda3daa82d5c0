"""Makes llava_jax a model of lmms-eval: `python -m lmms_eval --model llava_jax --model_args pretrained=DIR ...`.

setup.cfg names `manifest` as an entry point `lmms_eval.models`, so lmms-eval finds it if both are installed. lmms-eval
installs torch and 150 other packages, so it needs an environment of its own.
"""

from typing import Any


def manifest() -> Any:
    """Returns the ModelManifest for lmms-eval. The classes are imported when they are used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "llava_jax.evaluate.runner.lmms_eval_models"
    return ModelManifest("llava_jax", f"{module}.LlavaJax", f"{module}.LlavaJaxChat")
