"""Pages are Jinja2 templates that extend `pages/base.html`. A page is one file, which loads nothing from elsewhere."""

from pathlib import Path
from typing import Any

import jinja2

from llava_jax.files import replacing


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


def write(path: str, page: str) -> None:
    """Writes a page completely or not at all."""
    with replacing(path) as file:
        file.write(page.encode())
