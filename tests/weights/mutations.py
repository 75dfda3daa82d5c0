"""Opens, converts and re-reads damaged model folders; prints each error that is not one line naming the file.

    python mutations.py FOLDER FIRST COUNT FILE ...

FOLDER is a sound model; the mutations FIRST to FIRST + COUNT - 1 of each FILE are tried. A process of its own, whose
memory is limited: what a mutation makes too large, or lets a library crash on, is seen from outside.
"""

import contextlib
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

VALUES = [None, True, False, 0, -1, 1, 2**31, 2**31 - 1, 2**63, 10**9, 10**30, 1.5, -0.5, 1e308, float("nan"), "", "x",
          "../x", "<|x|>", "\ud800", [], {}, [1], ["x"], {"content": 7}, [[[[]]]], "9" * 400]


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:40]) if isinstance(value, list) else ()
    for key, child in list(items)[:60]:
        yield from places(child, (*path, key))


def mutate(content: bytes, number: int) -> bytes:
    rng = random.Random(number)
    kind = rng.randrange(10)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 2:
        return rng.choice([b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"1", b"\x00" * 50,
                           b'{"model_type": "llava"}', b"version https://git-lfs.github.com/spec/v1\noid sha256:4d"])
    try:
        value = json.loads(content)
    except ValueError:  # a binary file: bytes of another value
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    for _ in range(rng.choice([1, 1, 1, 2])):
        found = list(places(value))
        if not found:
            break
        *path, last = rng.choice(found)
        parent = value
        for key in path:
            parent = parent[key]
        if kind == 3 or kind == 4 and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = rng.choice(VALUES)
    return json.dumps(value).encode(errors="surrogatepass")


def main(folder: str, first: int, count: int, names: list[str]) -> None:
    from llava_jax import convert

    convert.main([folder, tempfile.mkdtemp() + "/warm", "--to", "hf"])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    wrong = 0
    for name in names:
        content = (Path(folder) / name).read_bytes()
        for number in range(first, first + count):
            with tempfile.TemporaryDirectory() as directory:
                model = Path(directory) / "model"
                shutil.copytree(folder, model)
                (model / name).write_bytes(mutate(content, number))
                wrong += sum(not is_told(action, f"{name}, mutation {number}", model) for action in actions(model))
    print(f"{count} mutations of {', '.join(names)}: {wrong} wrong", flush=True)


def actions(model: Path) -> list:
    from llava_jax import convert
    from llava_jax.prepare.settings import Settings
    from llava_jax.text.tokenizer import Tokenizer

    return [lambda: convert.main([str(model), f"{model}_hf", "--to", "hf"]),
            lambda: convert.main([str(model), f"{model}_own", "--to", "native"]),
            lambda: Settings.load(str(model)),
            lambda: Tokenizer.load(model).decode([0, 5, 10**6, -1])]


def is_told(action, what: str, model: Path) -> bool:
    """Whether an action succeeds, or ends in one line that names a file of the model."""
    from llava_jax.errors import UserError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            action()
    except UserError as error:
        if "\n" in str(error) or str(model) not in str(error) or len(str(error)) > 2000:
            print(f"{what}: {error!r:.600}", flush=True)
            return False
    except BaseException:
        print(f"{what}: {traceback.format_exc()[-1500:]}", flush=True)
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
