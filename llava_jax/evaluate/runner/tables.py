"""Formats figures as Markdown tables."""

from collections.abc import Sequence

from llava_jax.cli import printable


def number(value: float | None) -> str:
    """Returns a figure with two decimals, a count as it is, and "" for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of a head and rows, with numbers to the right. It is safe to print."""
    rows = [[printable(" ".join(cell.replace("|", "\\|").split())) for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) if column else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |\n"

    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|\n"
    return line(rows[0]) + rule + "".join(map(line, rows[1:]))
