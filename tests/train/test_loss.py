"""The chunked loss and its gradients against torch."""

import jax
import numpy as np
import pytest
import torch

from llava_jax.parallel import sharding
from llava_jax.text.encode import IGNORE
from llava_jax.train import loss


@pytest.mark.parametrize("large", [100, 101])
@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_loss_and_gradients_are_those_of_torch(monkeypatch, chunk, large):
    """101 columns are a large vocabulary if `large` is less: chunks of 48, 80 or 101 columns, the last one padded."""
    monkeypatch.setattr(loss, "LOSS_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(loss, "LOSS_CHUNK_LOGITS", 48 * {4: 48, 7: 80, 64: 101}[chunk])
    monkeypatch.setattr(loss, "NUM_LANES", 16)
    monkeypatch.setattr(sharding, "LARGE_VOCABULARY", large)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 24, 48)).astype(np.float32)
    kernel = rng.normal(size=(48, 101)).astype(np.float32) / 7
    labels = np.where(rng.random((2, 24)) < 0.5, rng.integers(0, 101, (2, 24)), IGNORE)
    x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (hidden, kernel))
    expected = torch.nn.functional.cross_entropy(
        (x @ w)[:, :-1].reshape(-1, 101), torch.tensor(labels[:, 1:]).reshape(-1), ignore_index=IGNORE, reduction="sum")
    (3 * expected).backward()

    def scaled(hidden, kernel):
        return 3 * loss.cross_entropy(hidden, kernel, labels)

    assert float(loss.cross_entropy(hidden, kernel, labels)) == pytest.approx(expected.item(), rel=1e-5)
    value, gradients = jax.value_and_grad(scaled, argnums=(0, 1))(hidden, kernel)
    assert float(value) == pytest.approx(3 * expected.item(), rel=1e-5)
    for gradient, tensor in zip(gradients, (x, w), strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=2e-5)
