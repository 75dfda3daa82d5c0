import jax
import numpy as np
import pytest


def _randomise(model, seed=0):
    """Weights of a size that makes every part of a model count: random norms and biases, sharp attention."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * (0.5 if "embed" in name else 1.5 / weight[0].numel() ** 0.5))
            else:
                weight.copy_(noise * 0.3 + ("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="session")
def randomise():
    return _randomise


def _assert_close(found, expected, relative):
    """The largest difference is at most `relative` times the expected values' standard deviation."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    difference = np.abs(found - expected).max() / expected.std()
    assert difference <= relative, f"differs by {difference:.1e} standard deviations"
    return difference


@pytest.fixture(scope="session")
def assert_close():
    return _assert_close


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """A torch model by way of its files: configuration, and a function of (parameters, ...) that is the module here."""
    from flax import nnx

    from llava_jax.models import llava
    from llava_jax.models.llama import Llama
    from llava_jax.models.llava import LlavaConfig
    from llava_jax.models.vit import VisionConfig, Vit
    from llava_jax.weights.checkpoint import load_checkpoint

    def load(torch_model, remat="none"):
        directory = tmp_path_factory.mktemp("checkpoint")
        torch_model.save_pretrained(directory)
        config, parameters = load_checkpoint(directory)
        if isinstance(config, LlavaConfig):
            return llava.abstract_params(config, remat=remat)[0], parameters
        module = Vit if isinstance(config, VisionConfig) else Llama
        graph = nnx.split(nnx.eval_shape(lambda: module(config, remat=remat, rngs=nnx.Rngs(0))))[0]
        return graph, {path.split("/", 1)[1]: parameter for path, parameter in parameters.items()}

    return load


@pytest.fixture(scope="session")
def call():
    """`call(graph, parameters, f, *args)` is f(module, *args), compiled."""
    from llava_jax.models import llava

    def call(graph, parameters, f, *args):
        return jax.jit(lambda parameters, *args: f(llava.from_params(graph, parameters), *args))(parameters, *args)

    return call
