"""Torch files: honest ones against torch.load, malicious ones end in one line and touch nothing."""

import os
import pickle
import struct
import zipfile

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from llava_jax.errors import UserError
from llava_jax.weights import files, torch_files

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]


def honest() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 10)
    same = {f"as {dtype}": (9 * torch.randn(3, 4)).to(dtype) for dtype in DTYPES}
    return same | {
        "x": x, "tied": x, "turned": x.T, "rows": x[2:4], "block": x[1:3, 4:9], "every second": x[::2, 1::3],
        "parameter": torch.nn.Parameter(x[0]), "permuted": x.reshape(2, 3, 10).permute(2, 0, 1), "scalar": x[1, 2],
        "empty": x[:, :0], "one": x[:1, :1]}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def test_tensors_equal_those_of_torch(tmp_path):
    file = tmp_path / "x.bin"
    torch.save(honest(), file)
    found = files.tensors_in_file(file)
    expected = torch.load(file, weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = as_numpy(tensor)
        assert found[name].shape == wanted.shape, name
        if not tensor.is_floating_point() or tensor.element_size() == 8:
            with pytest.raises(UserError, match="cannot be read"):
                found[name].read()
            continue
        assert found[name].dtype.itemsize == tensor.element_size(), name
        np.testing.assert_array_equal(found[name].read().astype(wanted.dtype), wanted, name)
        if wanted.ndim and len(wanted):
            np.testing.assert_array_equal(found[name].read(slice(1, 3)).astype(wanted.dtype), wanted[1:3], name)
            np.testing.assert_array_equal(found[name].layer(0).read().astype(wanted.dtype), wanted[0], name)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"state_dict": d, "epoch": 3}, lambda d: {"module": d}])
def test_a_state_dict_may_be_wrapped(tmp_path, wrap):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(wrap(module.state_dict()), tmp_path / "pytorch_model.bin")
    found = files.list_tensors(tmp_path)
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].read(), tensor.numpy())


def test_several_files_and_an_index(tmp_path):
    parts = {"pytorch_model-00001-of-00002.bin": {"a": torch.ones(2, 3).bfloat16()},
             "pytorch_model-00002-of-00002.bin": {"b": torch.zeros(3).half()}}
    for name, tensors in parts.items():
        torch.save(tensors, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    files.write_json(index, {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}})
    assert {name: tensor.kind for name, tensor in files.list_tensors(tmp_path).items()} == {"a": "BF16", "b": "F16"}
    torch.save({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match=r"00001-of-00002.bin: tensors of type I64 cannot be read"):
        files.list_tensors(tmp_path)["a"].read()
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"00001-of-00002.bin is missing, which pytorch_model.bin.index.json names"):
        files.list_tensors(tmp_path)


@pytest.mark.parametrize("value, message", [
    ({"a": torch.ones(3).expand(4, 3)}, r"'a': strides \(0, 1\) of shape \(4, 3\) overlap"),
    ({"a": torch.ones(3, dtype=torch.complex64).conj()}, "names 'torch ComplexFloatStorage'"),
    ({"a": 3}, "'a': int where a tensor belongs"),
    ({"a": {"b": {"c": torch.ones(2)}}}, "'a': dict where a tensor belongs"),
    ({("a", "b"): torch.ones(2)}, "a key that is no name"),
    ([torch.ones(2)], "not a dict of tensors"),
    (torch.nn.Linear(2, 2), "names 'torch.nn.modules.linear Linear'"),
    ({"a": np.ones(2)}, "names 'numpy"),
])
def test_what_is_no_dict_of_tensors_is_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "x.bin")
    told(tmp_path / "x.bin", message)


def test_old_formats_are_refused_by_name(tmp_path):
    import tarfile

    file = tmp_path / "x.bin"
    torch.save(honest(), file, _use_new_zipfile_serialization=False)
    told(file, "before 1.6 is not read; open it with torch.load")
    with tarfile.open(file, "w") as archive:
        archive.add(__file__, "storages")
    told(file, "tar archive, the oldest format of torch, is not read; open it with torch.load")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    told(file, "TorchScript program")
    file.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    told(file, "truncated, damaged or not a torch file")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    told(file, "Git LFS pointer")


def told(file, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        torch_files.list_tensors(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value) and len(str(error.value)) < 600


# Malicious files.

def archive(file, data_pkl: bytes, entries=(("data/0", bytes(16)),), compress=zipfile.ZIP_STORED, root="x") -> None:
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(f"{root}/data.pkl", data_pkl)
        for name, content in entries:
            opened.writestr(f"{root}/{name}", content, compress)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def long(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def storage(key="0", elements=4, kind="torch\nFloatStorage", mark="storage") -> bytes:
    return b"(" + text(mark) + b"c" + kind.encode() + b"\n" + text(key) + text("cpu") + long(elements) + b"tQ"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(long, values)) + b"t"


ZERO, SHAPE, STRIDES = long(0), numbers(2, 2), numbers(2, 1)


def tensor(storage: bytes, offset=ZERO, shape=SHAPE, strides=STRIDES, rest=b"\x89N") -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + rest + b"tR"


def model(value: bytes, name="w") -> bytes:
    return b"\x80\x02}" + text(name) + value + b"s."


MALICIOUS = {
    # opcodes that call
    "REDUCE of os.system": (model(b"cposix\nsystem\n(" + text("{command}") + b"tR"), "names 'posix system'"),
    "REDUCE of eval": (model(b"c__builtin__\neval\n(" + text("1") + b"tR"), "names '__builtin__ eval'"),
    "getattr": (
        model(b"c__builtin__\ngetattr\n(ctorch\nSize\n" + text("__class__") + b"tR"), "names '__builtin__ getatt"),
    "a dotted name": (
        model(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"), "names 'torch._utils _rebuild_tensor_v2"),
    "a module of torch": (model(b"ctorch.hub\nload\n(" + text("{command}") + b"tR"), "names 'torch.hub load'"),
    "a name with blanks": (model(b"ctorch Size\nx\n"), "names 'torch Size x'"),
    "STACK_GLOBAL": (
        model(text("posix") + text("system") + b"\x93(" + text("{command}") + b"tR"), "opcode STACK_GLOBAL"),
    "INST": (model(b"(" + text("{command}") + b"iposix\nsystem\n"), "opcode INST"),
    "OBJ": (model(b"(cposix\nsystem\n" + text("{command}") + b"o"), "names 'posix system'"),
    "OBJ of a stand-in": (model(b"(ctorch\nSize\n" + b"o"), "opcode OBJ"),
    "NEWOBJ": (model(b"ctorch\nSize\n)\x81"), "opcode NEWOBJ"),
    "NEWOBJ_EX": (model(b"ctorch\nSize\n)}\x92"), "opcode NEWOBJ_EX"),
    "EXT1": (model(b"\x82\x01"), "opcode EXT1"), "EXT4": (model(b"\x84\x01\x00\x00\x00"), "opcode EXT4"),
    "PERSID": (model(b"Pstorage\n"), "opcode PERSID"),
    "NEXT_BUFFER": (model(b"\x97"), "opcode NEXT_BUFFER"),
    "BUILD of a stand-in": (
        model(b"ctorch\nSize\n}" + text("__call__") + b"cposix\nsystem\nsb"), "names 'posix system'"),
    "BUILD of a class": (model(b"ctorch\nSize\n}" + text("__call__") + b"Nsb"), "attributes of what is no dict"),
    "BUILD of a tuple of states": (model(b"}N}\x86b"), "attributes of what is no dict"),
    "REDUCE of a stand-in": (model(b"ctorch\nHalfStorage\n(K\x01tR"), "a call of torch.HalfStorage"),
    "REDUCE of a text": (model(text("os.system") + b")R"), "a call of what is no function"),
    "REDUCE of a list": (model(b"ctorch\nSize\n]R"), "a call of what is no function"),
    "REDUCE of a pair that looks like a name": (
        model(text("torch") + text("Size") + b"\x86))\x85R"), "call of what is no"),
    "Size of a number": (model(b"ctorch\nSize\n(K\x05tR"), "a call of torch.Size with other arguments"),
    "OrderedDict of a tensor": (
        model(b"ccollections\nOrderedDict\n(" + tensor(storage()) + b"tR"), "a call of collections"),
    # sizes and references
    "huge LONG4": (model(b"\x8b\xff\xff\xff\x7f1"), "not one of tensors"),
    "negative LONG4": (model(b"\x8b\xff\xff\xff\xff1"), "not one of tensors"),
    "huge BINUNICODE8": (model(b"\x8d" + b"\xff" * 7 + b"\x7f"), "not one of tensors"),
    "huge BINBYTES8": (model(b"\x8e" + b"\xff" * 7 + b"\x7f"), "not one of tensors"),
    "huge BYTEARRAY8": (model(b"\x96" + b"\xff" * 7 + b"\x7f"), "not one of tensors"),
    "huge FRAME": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", "opcode FRAME"),
    "huge LONG text": (model(b"L" + b"9" * 5000 + b"L\n"), "not one of tensors"),
    "huge memo index": (b"\x80\x02}r\xff\xff\xff\xff.", None),
    "a memo that is nothing": (model(b"h\x07"), "a reference to nothing"),
    "a list in itself": (model(b"]q\x00h\x00a"), "'w': list where a tensor belongs"),
    "a dict in itself": (
        b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s.", "'state_dict': dict where a tensor belongs"),
    "doubled tuples": (model(b")" + b"q\x00h\x00\x86" * 200), "'w': tuple where a tensor belongs"),
    "a deep list": (model(b"]" * 50_000 + b"a" * 49_999), "'w': list where a tensor belongs"),
    "a deep tuple as key": (b"\x80\x02}" + b")" + b"\x85" * 50_000 + b"Ns.", "a key that is no name"),
    "a deep tuple as shape": (model(tensor(storage(), shape=b")" + b"\x85" * 50_000)), "axes and|shape"),
    "no end": (b"\x80\x02}", "not one of tensors"), "nothing": (b"", "not one of tensors"),
    "an empty stack": (b"\x80\x02.", "an operand too many"), "too few operands": (b"\x80\x02}s.", "an operand too few"),
    "no mark": (b"\x80\x02}u.", "no mark"), "half a pair": (b"\x80\x02}(" + text("w") + b"u.", "of what is no dict"),
    "append to a dict": (b"\x80\x02}Na.", "of what is no list"),
    "set in a list": (b"\x80\x02]" + text("w") + b"Ns.", "no dict"),
    "an unknown opcode": (model(b"\xff"), "not one of tensors"),
    "a boolean key": (b"\x80\x02}\x88Ns.", "a key that is no name"),
    # tensors
    "negative size": (
        model(tensor(storage(), shape=numbers(-2, 2))), "'w': offset, shape or strides that are no whole"),
    "negative stride": (model(tensor(storage(), strides=numbers(-2, 1))), "'w': offset, shape or strides that are no"),
    "negative offset": (model(tensor(storage(), long(-1))), "'w': offset, shape or strides that are no whole"),
    "a boolean size": (model(tensor(storage(), shape=b"\x88\x88\x86")), "'w': offset, shape or strides that are no"),
    "size of a float": (
        model(tensor(storage(), shape=b"G" + bytes(8) + b"K\x01\x86")), "'w': offset, shape or strides"),
    "huge size": (model(tensor(storage(), shape=numbers(2**62, 2**62))), "'w': offset, shape or strides that are no"),
    "sizes whose product overflows": (
        model(tensor(storage(), shape=numbers(2**40, 2**40), strides=numbers(2**40, 1))), "'w': a shape of too many"),
    "huge empty": (model(tensor(storage(), shape=numbers(0, 2**40, 2**40), strides=numbers(1, 1, 1))), "of too many"),
    "overlapping strides": (model(tensor(storage(), strides=numbers(1, 1))), r"'w': strides \(1, 1\) .* overlap"),
    "stride 0": (model(tensor(storage(), shape=numbers(2**40,), strides=numbers(0,))), "'w': strides .* overlap"),
    "beyond the storage": (model(tensor(storage(), long(1))), "'w': it ends beyond its storage of 16 bytes"),
    "too many axes": (model(tensor(storage(), shape=numbers(*[1] * 9), strides=numbers(*[1] * 9))), "'w': 9 axes"),
    "more strides than axes": (model(tensor(storage(), strides=numbers(1))), "'w': 2 axes and 1 strides"),
    "wrong numel": (model(tensor(storage(elements=5))), "'w': its storage has 16 bytes, not 5 elements of F32"),
    "huge numel": (model(tensor(storage(elements=2**60))), "a persistent id that is no storage"),
    "negative numel": (model(tensor(storage(elements=-4))), "a persistent id that is no storage"),
    "storage ../x": (model(tensor(storage("../x"))), "'w': its storage '../x' is not in the file"),
    "storage /etc/passwd": (model(tensor(storage("/etc/passwd"))), "'w': its storage '/etc/passwd' is not in"),
    "storage of another mark": (model(tensor(storage(mark="module"))), "a persistent id that is no storage"),
    "storage of a wrong class": (model(tensor(storage(kind="torch\nSize"))), "a persistent id that is no storage"),
    "a text as storage": (model(tensor(text("0"))), "'w': a tensor without storage"),
    "a list as shape": (model(tensor(storage(), shape=b"]")), "'w': a tensor without storage, shape"),
    "metadata": (
        model(tensor(storage(), rest=b"\x89N}" + text("conj") + b"\x88s")), "'w': a tensor with arguments or meta"),
    "no arguments": (model(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "'w': a tensor with arguments"),
    "v3 without a type": (model(tensor(storage()).replace(b"tensor_v2", b"tensor_v3")), "'w': a tensor with arguments"),
    "v3 of a wrong type": (
        model(tensor(storage(), rest=b"\x89N" + text("float32")).replace(b"tensor_v2", b"tensor_v3")),
        "'w': elements of a type that is not read"),
    "a parameter of a text": (
        model(b"ctorch._utils\n_rebuild_parameter\n(" + text("w") + b"\x88NtR"), "a call of torch._"),
    "a name with control characters": (model(b"N", "\x1b[31m\nw"), "NoneType where a tensor belongs"),
}


@pytest.fixture
def canary(tmp_path):
    canary = tmp_path / "canary"
    canary.touch()
    return canary


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_pickles_are_told_and_touch_nothing(tmp_path, canary, name):
    data_pkl, message = MALICIOUS[name]
    command = f"rm {canary}"
    data_pkl = data_pkl.replace(text("{command}"), text(command))
    archive(tmp_path / "x.bin", data_pkl)
    if message:
        told(tmp_path / "x.bin", message)
    else:
        assert torch_files.list_tensors(tmp_path / "x.bin") == {}
    assert canary.exists() and len(list(tmp_path.iterdir())) == 2


def test_the_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_OPCODES", 1000)
    archive(tmp_path / "x.bin", b"\x80\x02" + b"(" * 2000)
    told(tmp_path / "x.bin", "more than 1,000 opcodes")


def test_the_payload_would_work(tmp_path, canary):
    """Python's own unpickler runs it: the canary tells."""
    data_pkl = MALICIOUS["REDUCE of os.system"][0].replace(text("{command}"), text(f"rm {canary}"))
    pickle.loads(data_pkl)
    assert not canary.exists()


def test_the_honest_form_of_the_malicious_files_is_read(tmp_path):
    archive(tmp_path / "x.bin", model(tensor(storage())), [("data/0", np.arange(4, dtype=np.float32).tobytes())])
    np.testing.assert_array_equal(files.tensors_in_file(tmp_path / "x.bin")["w"].read(), [[0, 1], [2, 3]])


def rewrite(file, change) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


def encrypt(content: bytearray) -> None:
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.rindex(mark) + flags] |= 1


@pytest.mark.parametrize("spoil, message", [
    (lambda file: rewrite(file, lambda c: c.__delitem__(slice(-30, None))), "truncated, damaged or not a torch file"),
    (lambda file: rewrite(file, lambda c: c.__delitem__(slice(40, 60))), "entry 'data.pkl' has no header"),
    (lambda file: archive(file, model(tensor(storage())), compress=zipfile.ZIP_DEFLATED), "'data/0' is compressed"),
    (lambda file: archive(file, model(tensor(storage())), compress=zipfile.ZIP_BZIP2), "'data/0' is compressed"),
    (lambda file: rewrite(file, encrypt), "compressed or encrypted"),
    (lambda file: archive(file, model(tensor(storage())), [("data/0", bytes(16))] * 2), "two entries of one name"),
    (lambda file: archive(file, model(tensor(storage())), [("../y/data/0", bytes(16))]),
     "'w': its storage '0' is not in"),
    (lambda file: archive(file, model(tensor(storage())), [("byteorder", b"big")]), "byte order of another machine"),
    (lambda file: archive(file, model(tensor(storage())), [("data/0/x", bytes(16))]), "'w': its storage '0' is not in"),
    (lambda file: archive(file, model(tensor(storage())), root="x/y"), "its entry data.pkl is missing"),
    (lambda file: archive(file, bytes(2**26 + 1)), "its entry data.pkl is missing or larger than 67,108,864 bytes"),
    (lambda file: zipfile.ZipFile(file, "a").writestr("other/data/1", b""), "several root folders"),
    (lambda file: file.write_bytes(b"PK\5\6" + bytes(18)), "several root folders or two|truncated"),
])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_malicious_archives_are_told(tmp_path, spoil, message):
    file = tmp_path / "x.bin"
    archive(file, model(tensor(storage())))
    spoil(file)
    told(file, message)


def test_zip64_sizes_beyond_the_file_are_told(tmp_path):
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("x/data.pkl", model(tensor(storage(elements=2**42))))
        opened.writestr("x/data/0", bytes(16))
        opened.getinfo("x/data/0").file_size = opened.getinfo("x/data/0").compress_size = 2**44
    told(file, "entry 'data/0' ends beyond the file")


@hypothesis.settings(max_examples=int(os.environ.get("TORCH_FILE_EXAMPLES", 100)))
@hypothesis.given(data=st.data())
def test_mutated_files_are_read_or_told(data, tmp_path_factory):
    """Every mutation of an honest file gives arrays of the file's bytes, or one line."""
    file = tmp_path_factory.getbasetemp() / "mutated.bin"
    torch.save({name: tensor for name, tensor in honest().items() if not name.startswith("as ")}, file)
    content = bytearray(file.read_bytes())
    pickled = content.index(b"\x80\x02")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(pickled, pickled + 1500) | st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "flip", "cut", "insert"]))
        if kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        elif at < len(content):
            content[at] = data.draw(st.integers(0, 255)) if kind == "set" else content[at] ^ 1 << data.draw(
                st.integers(0, 7))
    file.write_bytes(content)
    try:
        found = files.tensors_in_file(file)
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        return
    for tensor in found.values():
        if tensor.kind in files.DTYPES:
            assert tensor.read().nbytes <= len(content)
