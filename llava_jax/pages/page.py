"""Renders pages from Jinja2 templates that extend `pages/base.html`. A page is one file without external resources."""

import os
from pathlib import Path
from typing import Any

import jinja2

from llava_jax.errors import UserError, user_path
from llava_jax.files import write_file

DOCTYPE = b"<!doctype html>"


def count(number: int, noun: str, plural: str = "") -> str:
    """Writes a number with its noun: "1 image", "2 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parents[1]), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.globals["count"] = count


def render(template: str, **values: Any) -> str:
    """Renders a template by its path inside the package, such as "prepare/preview_page.html".

    Jinja2 escapes every value. A carriage return becomes a reference, because browsers read a bare one as a newline.
    Lone surrogates become `\\udXXX`, because UTF-8 has no bytes for them.
    """
    page = ENVIRONMENT.get_template(template).render(values)
    return page.replace("\r", "&#13;").encode(errors="backslashreplace").decode()


def check_page(path: str, option: str = "--out") -> None:
    """Raises UserError if a page at `path`, a value of `option`, would replace a file that is no page."""
    if not os.path.exists(path):
        return
    if os.path.isfile(path):
        with user_path(path), open(path, "rb") as file:
            if file.read(len(DOCTYPE)).lower() in (b"", DOCTYPE):
                return
    raise UserError(f"{path}: there is something else than a page; give {option} another name")


def write(path: str, page: str) -> None:
    """Writes a page completely or not at all."""
    write_file(path, page)
