"""Files that are written without torch, opened by torch and by the reader."""

import ml_dtypes
import numpy as np
import torch

from llava_jax.weights import files, torch_writer


def test_torch_opens_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.normal(size=(3, 5)), "vector": rng.normal(size=7),
              "name of ünicode": rng.normal(size=(2, 3, 4))}
    for kind, expected in ((np.float32, torch.float32), (np.float16, torch.float16),
                           (ml_dtypes.bfloat16, torch.bfloat16)):
        cast = {name: x.astype(kind) for name, x in arrays.items()}
        specs = [files.TensorSpec(name, np.dtype(kind), x.shape, lambda x=x: iter([x[:1], x[1:]]))
                 for name, x in cast.items()]
        file = tmp_path / f"{expected}.bin"
        assert not torch_writer.write(file, specs).message()
        opened, ours = torch.load(file, weights_only=True, mmap=True), files.tensors_in_file(file)
        assert list(opened) == list(ours) == list(arrays)
        for name, x in cast.items():
            assert opened[name].dtype == expected and ours[name].dtype == kind
            np.testing.assert_array_equal(opened[name].float().numpy(), x.astype(np.float32))
            np.testing.assert_array_equal(ours[name].read(), x)


def test_an_empty_dict_and_values_that_are_not_finite(tmp_path):
    torch_writer.write(tmp_path / "empty.bin", [])
    assert torch.load(tmp_path / "empty.bin", weights_only=True) == {}
    spec = files.TensorSpec("x", np.dtype(np.float16), (1,), lambda: [np.float32([1e6])])
    assert torch_writer.write(tmp_path / "x.bin", [spec]).overflowed == ["x"]
