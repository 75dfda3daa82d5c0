"""Writes the page of `prepare filter`: frequencies of noun phrases before and after the filter."""

from collections.abc import Mapping, Sequence

import numpy as np

from llava_jax.pages import page
from llava_jax.pages.curves import Curve, draw_curves

PHRASES_PER_TABLE = 20
CURVE_POINTS = 300


def write_report(path: str, name: str, counts: Mapping[str, str], phrases: Sequence[str], before: np.ndarray,
                 after: np.ndarray, min_frequency: int, max_per_phrase: int) -> None:
    """Writes the page.

    Args:
      name: Name of the data.
      counts: Names and values of the first table.
      before, after: int [phrases], number of captions with each phrase before and after the filter.
    """
    frequent = np.argsort(-before, kind="stable")[: 50 * PHRASES_PER_TABLE]
    frequent = sorted(frequent, key=lambda i: (-before[i], phrases[i]))[:PHRASES_PER_TABLE]
    rare = np.flatnonzero(before >= min_frequency)
    rare = rare[before[rare] == before[rare].min()] if len(rare) else rare
    rare = sorted(rare[:: max(1, len(rare) // PHRASES_PER_TABLE)][:PHRASES_PER_TABLE], key=lambda i: phrases[i])
    curves = [Curve("before", _frequencies_by_rank(before), "dashed"), Curve("after", _frequencies_by_rank(after))]
    svg = draw_curves(
        "Frequency of noun phrases by rank, before and after the filter, both axes logarithmic", curves,
        "rank of the phrase", "captions with the phrase", log=True,
        limit=(max_per_phrase, f"{max_per_phrase:,} captions"))
    tables = {"Most frequent phrases": frequent, "Some of the rarest phrases that are kept": rare}
    page.write(path, page.render(
        "prepare/filter_report.html", title=f"Noun phrases of {name}, before and after the filter", counts=counts,
        svg=svg, tables={title: [(phrases[i], f"{before[i]:,}", f"{after[i]:,}") for i in chosen]
                         for title, chosen in tables.items()}))


def _frequencies_by_rank(frequencies: np.ndarray) -> list[tuple[int, int]]:
    """Returns points (rank, frequency), evenly spaced over the logarithm of the rank."""
    ordered = np.sort(frequencies[frequencies > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), CURVE_POINTS).round().astype(int)) if len(ordered) else []
    return [(int(rank), int(ordered[rank - 1])) for rank in ranks]
