"""Reads the rows of a TFDS data set in ArrayRecord by random access, without TensorFlow.

A data set is a folder with features.json (the types), dataset_info.json (splits and lengths of shards) and the shards.
A row is stored as a tf.train.Example: a flat map from a feature's path, such as "conversations/value", to a list of
bytes, floats or integers. TFDS's own data source is not used: it imports the classes that features.json names, and
decodes every image of a sequence of images to give a row's texts (tensorflow-datasets 4.9.10).
"""

import bisect
import dataclasses
import errno
import itertools
import os
import re
from typing import Any, Literal

from llava_jax import files
from llava_jax.data.records import BadRow
from llava_jax.errors import UserError

RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
"""Options of a reader without read-ahead, which would read megabytes for every row."""
MACHINE_ERRORS = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENODEV)
"""Errors of the machine, not of the file."""
BUFFER_BYTES = 1 << 15
"""Size of a reader's buffer, as in Grain."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A feature that is one value.

    Text becomes str, and so does a string that is UTF-8. An image stays encoded. A label's number becomes its name. A
    box is a tuple of y1, x1, y2, x2 in fractions of the image.
    """

    kind: Literal["text", "string", "image", "bool", "number", "label", "box"]
    names: tuple[str, ...] = ()


Feature = Leaf | list["Feature"] | dict[str, "Feature"]  # a list has one feature: that of its elements


class TfdsRows:
    """Reads the rows of one split of a TFDS data set; `rows[i]` is a dict of plain Python values.

    `path` is a version folder (.../1.0.0) or the folder of a single version, local or on gs://. `FOLDER:SPLIT` chooses
    a split; without it the only split or "train" is read. Texts are str, images their encoded bytes, sequences lists,
    sequences of several features lists of dicts. Features of other types (arrays, boxes in another format than TFDS's
    own) are skipped, and named in `skipped`.

    Raises UserError, one line, if this is no such data set, has videos or audio, or a shard is missing. `rows[i]`
    raises BadRow ("malformed") for a damaged row, UserError for a damaged shard, and OSError if reading fails. Small
    when pickled: shards are opened where they are read.
    """

    def __init__(self, path: str):
        self.path = path
        folder, wanted = _split_off(path)
        self._folder = _version_folder(folder)
        missing = "no such file; without it the folder is no TFDS data set"
        info, features = (files.read_json(files.to_path(_join(self._folder, name)), dict, missing)
                          for name in ("dataset_info.json", "features.json"))
        try:
            self.skipped: list[str] = []
            self._features = _parse_features(features, self._folder, self.skipped)
            stored = info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", ())
            splits = {split["name"]: split for split in info.get("splits", ())}
            lengths = {name: [int(n) for n in split.get("shardLengths", ())] for name, split in splits.items()}
            shards = {name: _shard_names(info["name"], split, len(lengths[name]), self._folder)
                      for name, split in splits.items()}
            sizes = [count for counts in lengths.values() for count in counts]
            if not all(isinstance(name, str) for name in lengths) or min(sizes, default=0) < 0 or sum(sizes) >= 2**48:
                raise ValueError("the splits' names or shard lengths")
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self._folder}: its metadata are not what TFDS writes ({error!r:.200})") from None
        if not isinstance(self._features, dict):
            raise UserError(f"{path}: features.json names no text, image or number")
        if "array_record" not in stored:
            raise UserError(
                f"{path}: the data set is stored as {stored[0]}; write it anew as ArrayRecord, with tfds.builder(NAME, "
                'file_format="array_record").download_and_prepare() or tfds convert_format'
            )
        self.split = _choose_split(list(splits), wanted, path)
        self._starts = list(itertools.accumulate(lengths[self.split], initial=0))
        if not len(self):
            raise UserError(f"{path}: split {self.split} has no rows")
        self.files = [_join(self._folder, shard) for shard in shards[self.split]]
        for file in self.files:
            if "://" not in file and not os.path.isfile(file):
                raise UserError(f"{file}: this shard of split {self.split} is missing")
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: row {index} of {len(self)}")
        content = self._read(index)
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            columns = tf_example_pb2.Example.FromString(content).features.feature
            return {name: _value(feature, name, 0, columns) for name, feature in self._features.items()}
        except (DecodeError, LookupError, ValueError) as error:
            raise BadRow("malformed", f"{self.where(index)}: not what features.json says ({_line(error)})") from None

    def where(self, index: int) -> str:
        """Returns folder, split and number of a row, for messages."""
        return f"{self._folder}, split {self.split}, row {index + 1}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}}

    def _read(self, index: int) -> bytes:
        shard = bisect.bisect_right(self._starts, index) - 1
        reader = self._reader(shard)
        try:
            (content,) = reader.read([index - self._starts[shard]])
        except RuntimeError as error:  # ArrayRecord's only one
            message = f"{self.where(index)}: cannot be read ({_line(error)})"
            # A row that is damaged may be skipped; one that the network or the disk withholds may not.
            raise (BadRow("malformed", message) if "orrupt" in str(error) else OSError(message)) from None
        return content

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            name, expected = self.files[shard], self._starts[shard + 1] - self._starts[shard]
            try:
                reader = ArrayRecordReader(name, RANDOM_ACCESS, file_reader_buffer_size=BUFFER_BYTES)
                actual = reader.num_records()
            except RuntimeError as error:  # ArrayRecord's only one, without a code
                if code := next((code for code in MACHINE_ERRORS if os.strerror(code) in str(error)), None):
                    raise OSError(code, os.strerror(code), name) from error
                raise UserError(f"{name}: not a readable ArrayRecord file ({_line(error)})") from None
            if actual != expected:  # also what a truncated or missing file shows: it reads as empty
                message = f"has {actual} rows, but dataset_info.json says {expected}; it is truncated, copy it again"
                raise UserError(f"{name}: {message}")
            self._readers[shard] = reader
        return self._readers[shard]


def _parse_features(spec: dict[str, Any], folder: str, skipped: list[str], path: tuple[str, ...] = ()
                    ) -> Feature | None:
    """Returns the content of features.json as a Feature; None for a type that is skipped, whose path it adds.

    Raises UserError for a video or audio.
    """
    if "featuresDict" in spec:
        inner = spec["featuresDict"]["features"].items()
        named = {name: _parse_features(feature, folder, skipped, (*path, name)) for name, feature in inner}
        return {name: feature for name, feature in named.items() if feature is not None} or None
    for kind in ("video", "audio"):
        if kind in spec or str(spec.get("pythonClassName")).lower().endswith(f".{kind}"):
            raise UserError(f"{folder}: feature {'/'.join(path)} is {kind}; only texts and images can be trained on")
    if "sequence" in spec:
        element = _parse_features(spec["sequence"]["feature"], folder, skipped, path)
        return None if element is None else [element]
    leaf = _parse_leaf(spec, folder, path)
    if leaf is None:
        skipped.append("/".join(path))
    return leaf


def _parse_leaf(spec: dict[str, Any], folder: str, path: tuple[str, ...]) -> Leaf | None:
    if "text" in spec:
        return Leaf("text")
    if "image" in spec:
        return Leaf("image")
    if "classLabel" in spec:
        name = "-".join(path) + ".labels.txt"
        names = files.to_path(_join(folder, _inside(name, folder)))
        return Leaf("label", tuple(names.read_text().split("\n"))) if names.exists() else Leaf("number")
    if "boundingBox" in spec:
        return Leaf("box") if spec["boundingBox"].get("bboxFormat", "REL_YXYX") == "REL_YXYX" else None
    tensor = spec.get("tensor")
    if tensor is None or tensor.get("shape", {}).get("dimensions") or tensor.get("encoding", "none") != "none":
        return None
    kinds = {"string": "string", "object": "string", "bool": "bool"}
    return Leaf(kinds.get(tensor["dtype"], "number"))


def _value(feature: Feature, name: str, depth: int, columns: Any) -> Any:
    """Returns a feature's value inside `depth` sequences, as lists of that depth."""
    if isinstance(feature, list):
        return _value(feature[0], name, depth + 1, columns)
    if isinstance(feature, dict):
        return _rows({key: _value(inner, f"{name}/{key}", depth, columns) for key, inner in feature.items()}, depth)
    # TFDS stores the values of sequences in a sequence as one list, and the lengths of the inner ones as others.
    stored = f"{name}/ragged_flat_values" if depth > 1 else name
    values = _plain(columns[stored], feature) if stored in columns else []
    for level in reversed(range(depth - 1)):
        following = iter(values)
        lengths = columns[f"{name}/ragged_row_lengths_{level}"].int64_list.value
        values = [list(itertools.islice(following, length)) for length in lengths]
    if depth:
        return values
    # TFDS has no missing values; a missing image is stored as no bytes.
    return values[0] if values and (values[0] or feature.kind != "image") else None


def _plain(column: Any, leaf: Leaf) -> list[Any]:
    stored = column.WhichOneof("kind")
    values = getattr(column, stored).value if stored else ()
    if (stored == "bytes_list") != (leaf.kind in ("text", "string", "image")) and stored:
        raise UserError(f"a {leaf.kind} is stored as {stored}")
    match leaf.kind:
        case "text":
            return [value.decode() for value in values]
        case "string":
            return [_text_or_bytes(value) for value in values]
        case "bool":
            return [bool(value) for value in values]
        case "label":
            return [leaf.names[value] if value >= 0 else None for value in values]  # -1 is TFDS's "unknown"
        case "box":
            return list(zip(*[iter(values)] * 4, strict=True))
        case _:
            return list(values)


def _text_or_bytes(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:  # an encoded image, for one
        return value


def _rows(columns: dict[str, Any], depth: int) -> Any:
    """Converts {"a": [1, 2], "b": [3, 4]} to [{"a": 1, "b": 3}, {"a": 2, "b": 4}], inside `depth` lists."""
    if not depth:
        return columns
    return [_rows(dict(zip(columns, values, strict=True)), depth - 1) for values in zip(*columns.values(), strict=True)]


def _split_off(path: str) -> tuple[str, str]:
    """Returns FOLDER and SPLIT of FOLDER:SPLIT. A folder's own name may contain a colon."""
    match = re.fullmatch(r"(.+):([^/:]+)", path)
    return (match[1], match[2]) if match and not os.path.isdir(path) else (path, "")


def _version_folder(path: str) -> str:
    folder = files.to_path(path)
    if (folder / "dataset_info.json").exists():
        return path
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder")
    names = sorted(inner.name for inner in folder.iterdir() if (inner / "dataset_info.json").exists())
    if len(names) == 1:
        return _join(path, names[0])
    if names:
        raise UserError(f"{path}: has several data sets or versions, choose one: {', '.join(names)}")
    partly = "; a pack into it has not finished: run it again" if (folder / ".pack").exists() else ""
    raise UserError(f"{path}: no TFDS data set, there is no dataset_info.json in it{partly}")


def _choose_split(splits: list[str], wanted: str, path: str) -> str:
    names = ", ".join(splits) or "none"
    if wanted and wanted not in splits:
        raise UserError(f"{path}: no split {wanted}; there are: {names}")
    if not wanted and len(splits) != 1 and "train" not in splits:
        raise UserError(f"{path}: choose a split as FOLDER:SPLIT; there are: {names}")
    return wanted or ("train" if "train" in splits else splits[0])


# Not str.format, because the data contain the template, and a width in it could allocate gigabytes.
_FIELD = re.compile(r"\{(DATASET|SPLIT|FILEFORMAT|NUM_SHARDS|SHARD_INDEX|SHARD_X_OF_Y)\}")


def _shard_names(name: str, split: dict[str, Any], count: int, folder: str) -> list[str]:
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    digits = max(5, len(str(count)))
    parts = {"DATASET": name, "SPLIT": split["name"], "FILEFORMAT": "array_record", "NUM_SHARDS": f"{count:0{digits}}"}
    numbers = [f"{shard:0{digits}}" for shard in range(count)]
    fields = [parts | {"SHARD_INDEX": number, "SHARD_X_OF_Y": f"{number}-of-{count:0{digits}}"} for number in numbers]
    return [_inside(_FIELD.sub(lambda match, values=values: values[match[1]], template), folder) for values in fields]


def _inside(name: str, folder: str) -> str:
    """Returns the name of a file of the data set. Raises UserError if it would be outside of the folder."""
    if {"", ".", ".."} & {*name.split("/")} or "\0" in name or "\\" in name:
        raise UserError(f"{folder}: its metadata name a file outside of the folder, {name!r:.200}; nothing was read")
    return name


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
