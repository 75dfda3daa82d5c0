"""Draws curves over two axes as SVG."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from llava_jax.pages.page import ENVIRONMENT

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 60, 16, 12, 46
"""Size of a drawing and its margins, in SVG units."""


class Curve(NamedTuple):
    """Points of a curve, which are (x, y), and how it is drawn."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Literal["line", "dashed", "dots"] = "line"


class Axis:
    """Positions and ticks of one axis: from 0, or from 1 in powers of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool):
        self.start, self.end, self.log = start, end, log
        top = max(values, default=0)
        if log:
            self.top = max(1, math.ceil(math.log10(max(top, 2))))
            self.ticks = [10**power for power in range(self.top + 1)]
        else:
            top = top if top > 0 else 1
            step = next(step for step in _round_numbers(top) if top / step <= 5)
            self.top = top
            self.ticks = [i * step for i in range(int(top / step * (1 + 1e-9)) + 1)]

    def position(self, value: float) -> float:
        share = (math.log10(value) if self.log else value) / self.top
        return round(self.start + share * (self.end - self.start), 1)


def draw_curves(title: str, curves: Sequence[Curve], x_name: str, y_name: str, log: bool = False,
                limit: tuple[float, str] | None = None) -> Markup:
    """Draws curves from (0, 0) on, or over logarithmic axes from (1, 1) on.

    Points that are not finite are left out. `limit` is a value of y with its name, drawn as a dotted line.
    """
    curves = [curve._replace(points=[point for point in curve.points if all(map(math.isfinite, point))])
              for curve in curves]
    x = Axis([point[0] for curve in curves for point in curve.points], LEFT, WIDTH - RIGHT, log)
    y = Axis([point[1] for curve in curves for point in curve.points], HEIGHT - BOTTOM, TOP, log)
    return Markup(ENVIRONMENT.get_template("pages/curves.html").render(
        title=title, curves=curves, x=x, y=y, x_name=x_name, y_name=y_name, number=_number, width=WIDTH, height=HEIGHT,
        limit=limit if limit and y.position(limit[0]) >= TOP else None))


def _round_numbers(top: float) -> Iterator[float]:
    """Yields 1, 2, 5, 10, ... times a power of ten well below `top`."""
    power = 10.0 ** (math.floor(math.log10(top)) - 1)
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _number(value: float) -> str:
    for size, unit in ((10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
