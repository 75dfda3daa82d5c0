"""Reads the tensors of torch.save files (.bin, .pt) without torch, and without executing anything in them.

A file is a zip archive with uncompressed storages and a pickle that describes tensors in them. The pickle is never
unpickled: a small interpreter knows the opcodes of an honest file and a fixed table of names, none of which it imports.
Any other opcode or name is an error.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from llava_jax.errors import UserError, user_path
from llava_jax.files import check_fetched
from llava_jax.weights.ranges import file_size, read_range, read_ranges

MAX_PICKLE_BYTES = 2**26
MAX_OPCODES = 2**21
"""Number of opcodes of about 50,000 tensors."""
MAX_AXES = 8
MAX_NUMBER = 2**48
"""Bound of sizes, strides and offsets, so that no product of two overflows a file's size unseen."""
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""Start of files of torch before 1.6: a pickle of their magic number."""
SAVE_AGAIN = "open it with torch.load(..., weights_only=True) and torch.save it again with torch 1.6 or later"

DTYPES = {
    "Float": ("F32", np.float32), "Half": ("F16", np.float16), "BFloat16": ("BF16", ml_dtypes.bfloat16),
    "Double": ("F64", np.float64), "Long": ("I64", np.int64), "Int": ("I32", np.int32), "Short": ("I16", np.int16),
    "Char": ("I8", np.int8), "Byte": ("U8", np.uint8), "Bool": ("BOOL", np.bool_),
}
"""Type of a torch storage class (`HalfStorage`) -> its name in safetensors files, and NumPy's type."""
UNTYPED = "Untyped"
"""Type of a storage whose element type is an argument of `_rebuild_tensor_v3`."""


class StoredTensor(NamedTuple):
    """A tensor in a torch file: its type, shape, strides in elements, and the byte at which it starts."""

    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


class _Global(NamedTuple):
    """Stand-in for a name in a pickle. It is a mark, not the object of that name."""

    module: str
    name: str


class _Storage(NamedTuple):
    kind: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    """Arguments of a tensor, not yet checked because its name is not known yet."""

    arguments: tuple


class _Entry(NamedTuple):
    """Bytes of a file in the archive."""

    start: int
    size: int


STORAGES = {_Global("torch", f"{kind}Storage"): kind for kind in (*DTYPES, UNTYPED)} | {
    _Global("torch.storage", "UntypedStorage"): UNTYPED}
NAMED_DTYPES = {_Global("torch", np.dtype(dtype).name): kind for kind, (_, dtype) in DTYPES.items()}
DICT, SIZE, DEVICE = _Global("collections", "OrderedDict"), _Global("torch", "Size"), _Global("torch", "device")
PARAMETER = _Global("torch._utils", "_rebuild_parameter")
TENSORS = (_Global("torch._utils", "_rebuild_tensor_v2"), _Global("torch._utils", "_rebuild_tensor_v3"))
GLOBALS = {*STORAGES, *NAMED_DTYPES, DICT, SIZE, DEVICE, PARAMETER, *TENSORS}
"""Names that an honest file contains. They are only compared, never imported."""


def list_tensors(file: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a torch file: a dict of them, also within `state_dict` or `module` of a dict.

    Raises UserError, one line with the file, the tensor and the cause, if the file is damaged, has another format, or
    contains anything but tensors.
    """
    storages, pickle = _read_archive(file)
    try:
        value = _interpret(pickle)
    except (ValueError, struct.error) as error:  # those of pickletools are of both types
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not read, its pickle is not one of tensors: {cause}") from None
    if isinstance(value, dict):
        value = next((value[name] for name in ("state_dict", "module") if isinstance(value.get(name), dict)), value)
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a dict of tensors, so it is no file of a model")
    return {name: _check_tensor(f"{file}: {name!r:.200}", tensor, storages) for name, tensor in value.items()}


def _read_archive(file: Path) -> tuple[Mapping[str, _Entry], bytes]:
    """Returns the storages by key and the pickle of an archive. Raises UserError if it is not one of torch.save."""

    def fail(cause: str) -> NoReturn:
        raise UserError(f"{file}: {cause}")

    size = file_size(file)
    start = read_ranges(file, [(0, 512)])[0]
    check_fetched(file, start)
    if start.startswith(LEGACY_START):
        fail(f"the format of torch before 1.6 is not read; {SAVE_AGAIN}")
    if start[257:262] == b"ustar":
        fail(f"a tar archive, the oldest format of torch, is not read; {SAVE_AGAIN}")
    try:
        with user_path(file), file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, struct.error, EOFError):
        fail(f"truncated, damaged or not a torch file ({size:,} bytes); download it again")
    names = [info.filename for info in listed]
    if len({name.split("/")[0] for name in names}) != 1 or len(set(names)) != len(names):
        fail("an archive with several root folders or two entries of one name; torch writes none")
    root = names[0].split("/")[0]
    entries = {}
    headers = read_ranges(file, [(max(0, min(info.header_offset, size - 30)), 30) for info in listed])
    for info, header in zip(listed, headers, strict=True):
        name = info.filename[len(root) + 1 :]
        if name == "constants.pkl" or name.startswith("code/"):
            fail("a TorchScript program is not read; save its state_dict")
        if name in ("data.pkl", "byteorder") or name.startswith("data/"):
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                fail(f"entry {name!r:.100} is compressed or encrypted; torch writes none")
            if info.header_offset < 0 or len(header) < 30 or not header.startswith(b"PK\x03\x04"):
                fail(f"entry {name!r:.100} has no header; download the file again")
            # The lengths of this header: its extra field differs from that in the directory.
            first = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            if first + info.file_size > size:
                fail(f"entry {name!r:.100} ends beyond the file; download it again")
            entries[name] = _Entry(first, info.file_size)

    def content(name: str, limit: int) -> bytes:
        if name not in entries or entries[name].size > limit:
            fail(f"its entry {name} is missing or larger than {limit:,} bytes, so it is no file of torch.save")
        return read_range(file, *entries[name]).tobytes()

    if "byteorder" in entries and content("byteorder", 100) != b"little":
        fail(f"written in the byte order of another machine; {SAVE_AGAIN} on a little-endian one")
    storages = {name.removeprefix("data/"): entry for name, entry in entries.items() if name.startswith("data/")}
    return storages, content("data.pkl", MAX_PICKLE_BYTES)


def _interpret(pickle: bytes) -> Any:
    """Interprets the opcodes of a pickle. Raises ValueError for anything that torch.save does not write.

    The result consists of None, numbers, text, tuples, lists, dicts, and this module's records.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack below each mark
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if count == MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES:,} opcodes")
        if name in CONSTANTS:
            stack.append(CONSTANTS[name](argument))
        elif name in OPERATIONS:
            items, (operands, function) = [], OPERATIONS[name]
            if name in MARKED:
                items, stack = stack, below.pop() if below else _fail("no mark")
            at = len(stack) - operands
            items[:0] = stack[at:] if at >= 0 else _fail("an operand too few")
            stack[at:] = [function(*items)]
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else _fail("an operand too few")
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument] if argument in memo else _fail("a reference to nothing"))
        elif name == "STOP":
            return stack[0] if len(stack) == 1 and not below else _fail("an operand too many")
        elif name != "PROTO":
            _fail(f"the opcode {name}, which no file of tensors has")
    raise ValueError("it has no end")


def _fail(cause: str) -> NoReturn:
    raise ValueError(cause)


def _find(name: str) -> _Global:
    found = _Global(*name.split(" ")) if name.count(" ") == 1 else None
    return found if found in GLOBALS else _fail(f"it names {name!r:.100}, which is no kind of tensor that is read here "
                                                "and could run code")


def _append(target: Any, *items: Any) -> list[Any]:
    if type(target) is not list:
        _fail("an item of what is no list")
    target.extend(items)
    return target


def _set_items(target: Any, *items: Any) -> dict[Any, Any]:
    if type(target) is not dict or len(items) % 2 or any(type(key) not in (str, int) for key in items[::2]):
        _fail("an item of what is no dict, or a key that is no name")
    target.update(zip(items[::2], items[1::2], strict=True))
    return target


def _call(function: Any, arguments: Any) -> Any:
    """Stands in for a call: it makes an empty dict, a shape, or a record of a tensor."""
    if type(function) is not _Global or type(arguments) is not tuple:
        _fail("a call of what is no function")
    if function == DICT and not arguments:
        return {}
    if function in TENSORS:
        return _Tensor((function.name, *arguments))
    if function == PARAMETER and arguments and type(arguments[0]) is _Tensor:
        return arguments[0]
    if function == SIZE and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    return None if function == DEVICE else _fail(f"a call of {'.'.join(function)} with other arguments")


def _build(target: Any, state: Any) -> dict[Any, Any]:
    """Drops the attributes of a dict (`_metadata` of a state_dict)."""
    return target if type(target) is dict and type(state) is dict else _fail("attributes of what is no dict")


def _storage(record: Any) -> _Storage:
    if type(record) is not tuple or [type(part) for part in record] != [str, _Global, str, str, int]:
        _fail("a persistent id that is no storage")
    mark, kind, key, _, elements = record
    if mark != "storage" or kind not in STORAGES or not 0 <= elements < MAX_NUMBER:
        _fail("a persistent id that is no storage")
    return _Storage(STORAGES[kind], key, elements)


CONSTANTS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), lambda argument: argument),
    "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False, "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [], "EMPTY_DICT": lambda _: {}, "GLOBAL": _find,
}
"""Opcode -> function of its argument, whose result is put on the stack."""
OPERATIONS = {
    "TUPLE1": (1, lambda *items: items), "TUPLE2": (2, lambda *items: items), "TUPLE3": (3, lambda *items: items),
    "TUPLE": (0, lambda *items: items), "APPEND": (2, _append), "APPENDS": (1, _append), "SETITEM": (3, _set_items),
    "SETITEMS": (1, _set_items), "REDUCE": (2, _call), "BUILD": (2, _build), "BINPERSID": (1, _storage),
}
"""Opcode -> number of operands on the stack, and the function of them whose result replaces them."""
MARKED = ("TUPLE", "APPENDS", "SETITEMS")
"""Opcodes whose further operands are everything above the last mark."""


def _check_tensor(where: str, tensor: Any, storages: Mapping[str, _Entry]) -> StoredTensor:
    """Returns a tensor whose bytes are all in the file. Raises UserError that starts with `where` otherwise."""

    def fail(cause: str) -> NoReturn:
        raise UserError(f"{where}: {cause}")

    if type(tensor) is not _Tensor:
        fail(f"{type(tensor).__name__} where a tensor belongs; only files of tensors are read")
    version, *arguments = tensor.arguments
    last = 6 if version == TENSORS[0].name else 7  # the metadata, which newer versions of torch write
    if len(arguments) not in (last, last + 1) or arguments[last:] not in ([], [None], [{}]):
        fail("a tensor with arguments or metadata that are not read (a conjugated view, for example)")
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        fail("a tensor without storage, shape or strides")
    kind, dtype = storage.kind, arguments[6] if last == 7 else None
    if last == 7:
        kind = NAMED_DTYPES.get(dtype) if type(dtype) is _Global else None
    if kind not in DTYPES or storage.kind not in (kind, UNTYPED):
        fail("elements of a type that is not read")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < MAX_NUMBER for number in numbers):
        fail("offset, shape or strides that are no whole numbers from 0")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        fail(f"{len(shape)} axes and {len(strides)} strides; there must be as many, at most {MAX_AXES}")
    name, numpy_type = DTYPES[kind]
    itemsize = np.dtype(numpy_type).itemsize
    entry = storages.get(storage.key)
    if entry is None:
        fail(f"its storage {storage.key!r:.100} is not in the file")
    if entry.size != storage.elements * (1 if storage.kind == UNTYPED else itemsize):
        fail(f"its storage has {entry.size:,} bytes, not {storage.elements:,} elements of {name}")
    if math.prod(max(axis, 1) for axis in shape) >= MAX_NUMBER:
        fail(f"a shape of too many elements, {shape}")
    last_element = 0
    for stride, axis in sorted(zip(strides, shape, strict=True)) if 0 not in shape else ():
        if axis > 1 and stride <= last_element:
            fail(f"strides {strides} of shape {shape} overlap; save a contiguous copy")
        last_element += (axis - 1) * stride
    if 0 not in shape and (offset + last_element + 1) * itemsize > entry.size:
        fail(f"it ends beyond its storage of {entry.size:,} bytes")
    return StoredTensor(name, shape, strides, entry.start + offset * itemsize)
