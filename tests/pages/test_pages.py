"""Pages read back with a parser that knows nothing of their templates, and drawings read back from their SVG."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.pages import page
from llava_jax.pages.curves import Curve, draw_curves
from llava_jax.pages.thumbnails import load_thumbnail, make_thumbnail

ENVIRONMENT = page.ENVIRONMENT.overlay(loader=jinja2.ChoiceLoader([
    jinja2.DictLoader({"one.html": '{% extends "pages/base.html" %}{% from "pages/macros.html" import table %}'
                                   '{% block content %}<p title="{{ text }}">{{ text }}</p>{{ table([], [[text]]) }}'
                                   "{% endblock %}"}), page.ENVIRONMENT.loader]))


class Reader(HTMLParser):
    """Attributes and text of a page by tag."""

    def __init__(self, text):
        super().__init__()
        self.tag, self.texts, self.attributes = "", {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        self.attributes.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts[self.tag] = self.texts.get(self.tag, "") + text


@given(st.text(min_size=1) | st.sampled_from(["</p><script>alert(1)</script>", "'\"&amp;\r\n", "</style>", "{{ 1 }}"]))
def test_text_comes_back_and_is_no_markup(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "ENVIRONMENT", ENVIRONMENT)
        reader = Reader(page.render("one.html", title=text, about={text: text}, text=text))
    if "\0" not in text:
        assert reader.texts["title"].strip("\n") == text.strip("\n")
        [shown] = [attributes["title"] for tag, attributes in reader.attributes if tag == "p"]
        assert shown == text and reader.texts["b"].startswith(text)
    tags = {tag for tag, _ in reader.attributes}
    assert tags == set("html head meta title style body h1 div span b p table tr th".split())


def test_a_page_loads_nothing_and_has_bytes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "ENVIRONMENT", ENVIRONMENT)
        text = page.render("one.html", title="a\ud800", text="")
    assert "<title>a\\ud800</title>" in text and text.encode().startswith(b"<!doctype html>")
    [policy] = [values["content"] for tag, values in Reader(text).attributes if "http-equiv" in values]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"https?:|url\(|@import", text)


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="summary"):
        page.render("train/report.html", title="", tables={}, curves={}, cards=[])


def points_of(svg, name):
    """The points of a curve, read from the SVG by the positions of the ticks' numbers: (x, y)."""
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"([^>]*)>([^<]*)</text>', svg)
    x_ticks = [(float(x), float(text)) for x, _, rest, text in texts if "middle" in rest and text[0].isdigit()]
    y_ticks = [(float(y), float(text)) for _, y, rest, text in texts if "dy=" in rest]
    group = next(group for group in svg.split("<g ")[1:] if f">{name}</text>" in group)
    if 'points="' in group:
        points = [pair.split(",") for pair in re.search(r'points="([^"]*)"', group)[1].split()]
    else:
        points = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', group)[:-1]  # the last is the legend's

    def value(position, ticks):
        (a, low), (b, high) = ticks[0], ticks[-1]
        return low + (position - a) / (b - a) * (high - low)

    return [(value(float(x), x_ticks), value(float(y), y_ticks)) for x, y in points]


@given(st.lists(st.tuples(st.integers(1, 10**5), st.floats(0, 50)), min_size=1, max_size=20), st.floats(0.01, 50))
def test_points_are_where_the_ticks_say(points, top):
    points = [*points, (100, top)]
    svg = str(draw_curves("Title", [Curve("loss", points), Curve("checked", points, "dots")], "step", "loss"))
    ticks = [float(y) for y in re.findall(r'dy="\.35em" text-anchor="end">([\d.e+-]+)<', svg)]
    assert 2 <= len(ticks) <= 6 and ticks == sorted(set(ticks)) and ticks[0] == 0
    if "k<" in svg:  # thousands are shortened
        return
    highest = max(y for _, y in points)
    for name in ("loss", "checked"):
        found = points_of(svg, name)
        np.testing.assert_allclose([y for _, y in found], [y for _, y in points], atol=highest / 100)
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in points], atol=max(x for x, _ in points) / 100)


def test_logarithmic_axes():
    curves = [Curve("a", [(1, 1000), (10, 100), (100, 1)])]
    svg = str(draw_curves("Title", curves, "x", "y", log=True, limit=(10, "limit")))
    [points] = re.findall(r'points="([^"]*)"', svg)
    (x1, y1), (x2, y2), (x3, y3) = [map(float, pair.split(",")) for pair in points.split()]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and (y2 - y1) * 2 == pytest.approx(y3 - y2, abs=0.2)
    assert ">1k</text>" in svg and ">limit</text>" in svg


@pytest.mark.parametrize("points", [[], [(0, 0)], [(1, 0.0)], [(1, math.nan), (2, math.inf)], [(1, 1e-9)], [(1, 1e9)]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_curves_are_drawn(points, log):
    points = [point for point in points if not log or all(value > 0 for value in point)]
    svg = draw_curves("<T>", [Curve("<a>", points), Curve("b", points, "dots")], "<x>", "y", log)
    assert "nan" not in svg and "inf" not in svg and "<x>" not in svg and "<a>" not in svg and "<T>" not in svg


def decode(thumbnail):
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", thumbnail.url).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind and image.size == (thumbnail.width, thumbnail.height)
    return image


def test_thumbnails_keep_small_images_exactly_and_scale_large_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    small = make_thumbnail(Image.fromarray(pixels), 100, min_side=200)
    assert np.array_equal(np.asarray(decode(small)), pixels) and small.scale == 3
    large = make_thumbnail(Image.new("RGB", (2000, 1000), (9, 99, 199)), 640)
    image = decode(large)
    assert image.size == (640, 320) and image.format == "JPEG" and large.scale == 1
    assert image.getpixel((300, 100)) == pytest.approx((9, 99, 199), abs=4)


def test_a_missing_or_damaged_image_is_told_in_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in ("a.png", "none.png", "\0"):
        found = load_thumbnail(str(tmp_path / name), str(tmp_path), 100)
        assert found.url == "" and found.problem and "\n" not in found.problem


def test_images_outside_of_the_root_are_not_shown(tmp_path):
    """By an absolute name, by .. and by a link. A link inside the root, and a root that is a link, are fine."""
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    (root / "folder").mkdir(parents=True)
    for path in (secret, root / "own.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    (root / "link.png").symlink_to(secret)
    (root / "inner.png").symlink_to(root / "own.png")
    (tmp_path / "moved").symlink_to(root)
    shown = [bool(load_thumbnail(str(place / name), str(folder), 8).url)
             for place, name, folder in ((root, "own.png", root), (root, "inner.png", root),
                                         (root, "folder/../own.png", root), (root, "own.png", tmp_path / "moved"),
                                         (root, "link.png", root), (root, "../secret.png", root), (root, secret, root),
                                         (root, "", root))]
    assert shown == [True] * 4 + [False] * 4


def test_a_page_takes_only_a_pages_place(tmp_path):
    path = tmp_path / "page.html"
    page.check_page(str(path))
    for content in ("", "<!DOCTYPE html><title>old</title>"):
        path.write_text(content)
        page.check_page(str(path))
    path.write_text('[{"id": 1}]')
    for taken in (path, tmp_path):
        with pytest.raises(UserError, match="something else than a page"):
            page.check_page(str(taken))
