"""What the concept-balanced filter did to the phrases, as one self-contained HTML page."""

import html
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from llava_jax.files import replacing

STYLE = """
:root { color-scheme: light dark; --line: #8885; --before: #b3552f; --after: #2f6fb3; }
@media (prefers-color-scheme: dark) { :root { --before: #f09a70; --after: #79b4f2; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.tables { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
td { font-variant-numeric: tabular-nums; text-align: right; } th { font-weight: 400; } thead th { font-weight: 600; }
th.number { text-align: right; } p, figure { margin: .6rem 0; }
svg { width: 100%; height: auto; max-width: 44rem; }
svg text { fill: currentColor; font-size: 12px; } @media (max-width: 40rem) { svg text { font-size: 15px; } }
svg .name { font-weight: 600; }
.before { stroke: var(--before); stroke-dasharray: 7 4; } .after { stroke: var(--after); }
svg text.before { fill: var(--before); stroke: none; } svg text.after { fill: var(--after); stroke: none; }
"""
SHOWN = 20  # phrases of each table


def write_report(
    path: str,
    name: str,
    counts: Mapping[str, str],
    texts: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    min_frequency: int,
    max_per_phrase: int,
) -> None:
    """Writes the page, all or nothing.

    `name`: of the data; `counts`: what to tell of it, in order; `texts`: the phrases; `before` and `after`,
    int [phrases]: how many captions have each, before and after the filter.
    """
    most = sorted(np.argsort(-before, kind="stable")[: 50 * SHOWN], key=lambda i: (-before[i], texts[i]))[:SHOWN]
    left = np.flatnonzero(before >= min_frequency)
    fewest = left[np.argsort(before[left], kind="stable")]
    fewest = fewest[before[fewest] == before[fewest[0]]] if len(fewest) else fewest
    some = sorted((texts[i], i) for i in fewest[:: max(1, len(fewest) // SHOWN)][:SHOWN])
    title = f"Noun phrases of {name}, before and after the filter"
    rows = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>" for key, text in counts.items())
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<table>{rows}</table><h2>Captions per phrase</h2>"
        "<p>Phrases in order of their frequency, the most frequent first; each curve in its own order.</p>"
        f"<figure>{_plot(before, after, max_per_phrase)}</figure><div class='tables'>"
        f"<div><h2>The most frequent phrases</h2>{_table(most, texts, before, after)}</div>"
        f"<div><h2>Some of the rarest that are kept</h2>{_table([i for _, i in some], texts, before, after)}</div>"
        "</div></body></html>\n"
    )
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())


def _table(chosen: Sequence[int], texts: Sequence[str], before: np.ndarray, after: np.ndarray) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(texts[i])}</th><td>{before[i]:,}</td><td>{after[i]:,}</td></tr>" for i in chosen
    )
    head = "<tr><th>phrase</th><th class='number'>before</th><th class='number'>after</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _plot(before: np.ndarray, after: np.ndarray, max_per_phrase: int) -> str:
    """Frequency over rank, both in powers of ten."""
    width, height, left, right, top, bottom = 480, 330, 60, 16, 12, 50
    decades_x = max(1, math.ceil(math.log10(max(len(before), 2))))
    decades_y = max(1, math.ceil(math.log10(max(before.max(), 2))))

    def place(rank: float, frequency: float) -> tuple[float, float]:
        x = left + math.log10(rank) / decades_x * (width - left - right)
        return x, height - bottom - math.log10(frequency) / decades_y * (height - top - bottom)

    parts = []
    for power in range(decades_x + 1):
        x, y = place(10**power, 1)
        parts.append(f"<path d='M{x:.1f} {y}V{top}' stroke='var(--line)'/>")
        parts.append(f"<text x='{x:.1f}' y='{y + 18}' text-anchor='middle'>{_short(10**power)}</text>")
    for power in range(decades_y + 1):
        x, y = place(1, 10**power)
        parts.append(f"<path d='M{x} {y:.1f}H{width - right}' stroke='var(--line)'/>")
        parts.append(f"<text x='{x - 8}' y='{y:.1f}' dy='.35em' text-anchor='end'>{_short(10**power)}</text>")
    if max_per_phrase <= 10**decades_y:
        _, y = place(1, max_per_phrase)
        parts.append(f"<path d='M{left} {y:.1f}H{width - right}' stroke='currentColor' stroke-dasharray='2 4'/>")
        note = f"{max_per_phrase:,} captions"
        parts.append(f"<text x='{width - right - 4}' y='{y - 5:.1f}' text-anchor='end'>{note}</text>")
    for kind, frequencies in (("before", before), ("after", after)):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _curve(frequencies)))
        parts.append(f"<polyline class='{kind}' points='{points}' fill='none' stroke-width='2.5'/>")
    for kind, y, note in (("before", top + 18, "before (broken line)"), ("after", top + 38, "after")):
        x = width - right - 200
        parts.append(f"<path class='{kind}' d='M{x} {y - 5}h36' stroke-width='2.5'/>")
        parts.append(f"<text class='{kind} name' x='{x + 44}' y='{y}'>{note}</text>")
    middle = (height - bottom + top) / 2
    parts.append(f"<text x='{(width + left) / 2}' y='{height - 8}' text-anchor='middle'>rank of the phrase</text>")
    parts.append(
        f"<text transform='translate(14 {middle}) rotate(-90)' text-anchor='middle'>captions that have it</text>"
    )
    label = "Frequency of noun phrases over their rank, before and after the filter, both axes logarithmic"
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{label}'>{''.join(parts)}</svg>"


def _curve(frequencies: np.ndarray) -> list[tuple[int, int]]:
    """(rank, frequency), at most some 300 of them, evenly over the logarithm of the rank."""
    ordered = np.sort(frequencies[frequencies > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 300).round().astype(int)) if len(ordered) else []
    return [(int(rank), int(ordered[rank - 1])) for rank in ranks]


def _short(number: int) -> str:
    return f"{number // 10**6}M" if number >= 10**6 else f"{number // 1000}k" if number >= 1000 else str(number)
