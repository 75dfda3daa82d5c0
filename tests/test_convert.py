"""The verb: both directions, joins, mistakes, and how much memory it takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from original_models import config_json, write

from llava_jax import convert
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, init_params
from llava_jax.models.vit import VisionConfig
from llava_jax.text import agreement
from llava_jax.weights import configs, files, load_checkpoint, original, read_config, save_native, tables
from llava_jax.weights.source import shapes

ROOT = Path(__file__).parents[1]


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors")
            for name, tensor in safetensors.torch.load_file(file).items()}


def assert_identical(found, expected):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def joined(parts, tmp_path_factory):
    target = tmp_path_factory.mktemp("joined") / "hf"
    convert.main(["--vision", str(parts[0]), "--language", str(parts[1]), str(target), "--to", "hf", "--dtype", "keep"])
    return target


def test_a_join_is_its_parts_and_a_new_projector(parts, joined, tmp_path):
    config, parameters = load_checkpoint(joined)
    assert (config.projector, config.feature_layer, config.template, config.processor.mode) == (
        "mlp2x_gelu", -2, "vicuna_v1", "pad")
    for part in parts:
        for path, x in load_checkpoint(part)[1].items():
            found = np.asarray(parameters[path])
            if path == "decoder/embedding":
                found = found[: len(x)]
            elif path == "decoder/lm_head/kernel":
                found = found[:, : x.shape[1]]
            np.testing.assert_array_equal(found, x, err_msg=path)
    kernel, bias = np.asarray(parameters["projector/layers_0/kernel"]), parameters["projector/layers_0/bias"]
    bound = 1 / kernel.shape[0] ** 0.5  # torch.nn.Linear's default, from which LLaVA starts
    assert 0.95 * bound < np.abs(kernel).max() < bound and np.abs(bias).max() < bound

    arguments = ["--vision", str(parts[0]), "--language", str(parts[1]), "--to", "native", "--dtype", "keep"]
    for seed, same in [("0", True), ("1", False)]:
        convert.main([*arguments, str(tmp_path / seed), "--seed", seed])
        again = load_checkpoint(tmp_path / seed)[1]["projector/layers_0/kernel"]
        assert np.array_equal(kernel, again) is same
    convert.main([*arguments, str(tmp_path / "linear"), "--projector", "linear", "--feature-layer", "-1",
                  "--template", "llava_v1", "--image-mode", "crop"])
    config = read_config(tmp_path / "linear")
    assert (config.projector, config.feature_layer, config.template, config.processor.mode) == (
        "linear", -1, "llava_v1", "crop")


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_an_image_mode_of_one_tile_leaves_the_newline_out(parts, tmp_path, capsys, layout):
    config = LlavaConfig(vision=read_config(parts[0]), text=read_config(parts[1])).with_image_mode("anyres", "(28x56)")
    save_native(tmp_path / "tiles", config, init_params(config, seed=0), parts[1])
    agreement.say.cache_clear()
    convert.main([str(tmp_path / "tiles"), str(tmp_path / "one"), "--to", layout, "--image-mode", "pad"])
    assert "image_newline is left out: image mode pad has none" in capsys.readouterr().err
    found, parameters = load_checkpoint(tmp_path / "one")
    assert found.processor.mode == "pad" and "image_newline" not in parameters


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_again_is_the_same(parts, tmp_path, dtype, projector):
    convert.main(["--vision", str(parts[0]), "--language", str(parts[1]), str(tmp_path / "a"), "--to", "hf",
                  "--dtype", dtype, "--projector", projector, "--template", "llava_llama_2", "--image-mode", "crop"])
    convert.main([str(tmp_path / "a"), str(tmp_path / "own"), "--to", "native", "--shard-size", "20KB",
                  "--dtype", "keep"])
    convert.main([str(tmp_path / "own"), str(tmp_path / "b"), "--to", "hf", "--shard-size", "100KB",
                  "--dtype", "keep"])
    assert {str(tensor.dtype) for tensor in tensors(tmp_path / "a").values()} == {f"torch.{dtype}"}
    assert_identical(tmp_path / "b", tmp_path / "a")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == dtype
    for file in (tmp_path / "a").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_parts_of_different_dtypes_stay_as_they_are(parts, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(parts[1], half)
    safetensors.torch.save_file({name: tensor.half() for name, tensor in tensors(half).items()},
                                half / "model.safetensors")
    convert.main(["--vision", str(parts[0]), "--language", str(half), str(tmp_path / "own"), "--to", "native",
                  "--dtype", "keep"])
    convert.main([str(tmp_path / "own"), str(tmp_path / "hf"), "--to", "hf", "--dtype", "keep"])
    for name, tensor in tensors(tmp_path / "hf").items():
        assert tensor.dtype == (torch.float16 if name.startswith("language_model") else torch.float32), name


def test_a_checkpoint_keeps_or_changes_its_template(joined, tmp_path):
    convert.main([str(joined), str(tmp_path / "kept"), "--to", "hf"])
    assert read_config(tmp_path / "kept") == read_config(joined)
    convert.main([str(joined), str(tmp_path / "new"), "--to", "hf", "--template", "mpt", "--image-mode", "crop"])
    config = read_config(tmp_path / "new")
    assert (config.template, config.processor.mode) == ("mpt", "crop")
    assert not json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())["do_pad"]


@pytest.mark.parametrize("arguments, message", [
    ("{joined} {new}", "Missing from .*: --to"),
    ("{joined} {new} --to torch", "invalid choice 'torch'"),
    ("{joined} {new} {new} --to hf", "3 paths are given"),
    ("{new} --to hf", "give SRC and DST, or --vision, --language and DST"),
    ("{new} --to hf --vision {vision}", "give SRC and DST, or --vision, --language and DST"),
    ("{joined} {new} --to hf --seed 1", "--seed belongs to a join"),
    ("{new} --to hf --vision {vision} --language {language} --base {language}", "--base belongs to a delta SRC"),
    ("{joined} {new} --to hf --vision {vision}", "is no LLaVA in the original layout, so it takes no vision tower"),
    ("{joined} {new} --to hf --base {language}", "is no LLaVA in the original layout, so it is no delta"),
    ("{joined} {new} --to hf --colour red", "Unrecognized options: --colour"),
    ("{joined} {new} --to hf --shard-size big", "--shard-size 'big' is not a size such as 5GB"),
    ("{joined} {new} --to hf --template vicuna_v2", "unknown template 'vicuna_v2'; did you mean 'vicuna_v1'"),
    ("{new}/nowhere {new} --to hf", "nowhere: no such directory"),
    ("{joined} {joined} --to hf", "exists already"),
    ("{vision} {new} --to hf", "is one part of a LLaVA; join it with --vision and --language"),
    ("{new} --to hf --vision {language} --language {vision}", "model_type llama is not a vision model"),
    ("{new} --to hf --vision {vision} --language {language} --projector mlp3x_gelu", "'mlp3x_gelu' has no form"),
    ("{new} --to hf --vision {vision} --language {language} --projector merge2x2_linear", "has no form in H"),
    ("{new} --to original --vision {vision} --language {language} --projector merge2x2_linear", "form in the original"),
    ("{new} --to hf --vision {vision} --language {language} --projector mlp", "projector 'mlp' is not one of"),
    ("{new} --to hf --vision {vision} --language {language} --feature-layer -9", "feature_layer -9"),
])
def test_mistakes(parts, joined, tmp_path, arguments, message):
    arguments = arguments.format(joined=joined, new=tmp_path / "new", vision=parts[0], language=parts[1]).split()
    with pytest.raises((ValueError, OSError), match=message) as error:
        convert.main(arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_source_leaves_nothing_behind(joined, tmp_path):
    """As a command: one line, exit code 2."""
    broken = tmp_path / "broken"
    shutil.copytree(joined, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = run("broken", "new", "--to", "hf", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "model.safetensors: truncated" in done.stderr
    assert list(tmp_path.iterdir()) == [broken]


def run(*arguments, check=True, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "llava_jax.convert", *arguments], env=environment, check=check,
                          capture_output=True, text=True, **options)


def make_hub_directory(directory, config, tokenizer):
    """A checkpoint of zeros in the hub's layout and float16."""
    directory.mkdir()
    shutil.copy(tokenizer, directory)
    dtype = np.dtype(np.float16)
    entries = [
        files.TensorSpec(name, dtype, place.hf_shape, lambda place=place: [np.zeros(place.hf_shape, dtype)])
        for name, place in tables.tensor_mappings(shapes(config)).items()
    ]
    files.write(directory, entries, 140 * 10**6)
    ids = {"image": 2000, "pad": 2001, "bos": 1, "eos": 2}
    files.write_json(directory / "config.json", configs.hf_config(config, ids, config.text.vocab_size, "float16"))


MEASURE = """
import re, sys
from llava_jax import convert
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
small, large, *rest = sys.argv[1:]
convert.main([small, small + " new", *rest])  # imports and compiles
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
convert.main([large, large + " new", *rest])
print(status("VmHWM") - before)
"""


def peak_memory(*arguments):
    """Bytes by which converting the second directory exceeds what the process held after converting the first."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], env=environment, check=True,
                          capture_output=True, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells a process's peak memory")
def test_memory_stays_near_the_largest_file(tmp_path):
    tokenizer = Path(__file__).parent / "golden" / "tokenizer.model"
    small = LlavaConfig(vision=VisionConfig(28, 14, 32, 48, 2, 4), text=LlamaConfig(2048, 48, 64, 2, 4, 2, 12))
    large = LlavaConfig(text=LlamaConfig(32000, 2048, 5504, 9, 16, 16, 128))
    make_hub_directory(tmp_path / "small", small, tokenizer)
    make_hub_directory(tmp_path / "large", large, tokenizer)
    total = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    source = ""
    for to in ["native", "hf"]:
        # The largest tensor, the embedding, fills a file.
        peak = peak_memory(tmp_path / f"small{source}", tmp_path / f"large{source}", "--to", to, "--dtype", "keep",
                           "--shard-size", "140MB")
        source += " new"
        largest = max(file.stat().st_size for file in (tmp_path / f"large{source}").glob("*.safetensors"))
        print(f"to {to}: model {total / 1e9:.2f} GB, largest file {largest / 1e6:.0f} MB, "
              f"peak {peak / 1e6:.0f} MB, {peak / largest:.2f} of it")
        assert 0.1 * largest < peak < 2.5 * largest


# The same, and first the peak without pages of mapped files, which a thread samples.
MEASURE_ARRAYS = MEASURE.replace("before =", """peak = start = status("RssAnon")
def watch():
    global peak
    while True:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
before =""").replace("import re, sys", "import re, sys, threading, time").replace("print(", "print(peak - start, ")


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells a process's peak memory")
def test_memory_of_torch_files_stays_below_one_tensor(tmp_path, parts):
    """One pytorch_model.bin of 1.1 GB: one tensor at a time is in memory."""
    decoders = {"large": LlamaConfig(32000, 2048, 5504, 8, 16, 16, 128),
                "small": LlamaConfig(2000, 32, 64, 1, 2, 2, 16)}
    for name, text in decoders.items():
        model = LlavaConfig(vision=VisionConfig(28, 14, 32, 64, 3, 4), text=text)
        tensors = {original.speller(model)(tensor): torch.zeros(mapping.hf_shape, dtype=torch.float16)
                   for tensor, mapping in tables.tensor_mappings(shapes(model)).items()
                   if not tensor.startswith(tables.VISION)}
        write(tmp_path / name, tensors, config_json(
            **configs.hf_text(text, text.vocab_size) | {"model_type": "llava"}, mm_vision_tower=str(parts[0])))
    total, largest = (tmp_path / "large" / "pytorch_model.bin").stat().st_size, 32000 * 2048 * 2
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for to in ("native", "hf"):
        done = subprocess.run([sys.executable, "-c", MEASURE_ARRAYS, tmp_path / "small", tmp_path / "large", "--to", to,
                               "--dtype", "keep"], env=environment, check=True, capture_output=True, text=True)
        arrays, peak = map(int, done.stdout.split()[-2:])
        print(f"to {to}: file {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, arrays {arrays / 1e6:.0f} "
              f"MB, peak {peak / 1e6:.0f} MB")
        assert arrays < 1.3 * largest
        for name in decoders:
            shutil.rmtree(tmp_path / f"{name} new")
