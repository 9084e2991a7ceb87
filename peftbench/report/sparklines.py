"""The history of each case as small drawings, with a mark where the level changed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from peftbench.compare.history import History, Point, Series
from peftbench.compare.history_text import LEAST_HEIGHT, range_text
from peftbench.compare.text import number, signed

WIDTH, HEIGHT, EDGE = 150.0, 34.0, 6.0  # of a drawing, in CSS pixels
LATEST = 60  # sessions that a drawing shows
SHOWN = {
    "train_s": "training time",
    "peak_gpu_memory_bytes": "peak GPU memory",
    "torch_peak_reserved_bytes": "peak GPU memory (torch)",
    "host_peak_rss_delta_bytes": "peak memory (growth)",
    "energy_j": "energy",
    "perplexity": "perplexity",
    "preference_accuracy": "preference accuracy",
}
"""Columns, left out where no case has a value."""


@dataclass(frozen=True)
class Spark:
    svg: Markup
    last: str
    tip: str


@dataclass(frozen=True)
class HistoryRow:
    """One case on one machine."""

    case_id: str
    environment: str  # "" where all rows have the same
    sparks: tuple[Spark | None, ...]
    changed: bool


@dataclass(frozen=True)
class ChangeLine:
    case_id: str
    metric: str
    before: str
    after: str
    change: str
    sense: str  # worse, better or ""
    between: str


@dataclass(frozen=True)
class Sparklines:
    places: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[HistoryRow, ...]
    points: tuple[ChangeLine, ...]
    alone: int  # cases that one session alone has


def sparklines_of(found: History, keys: Container[tuple[str, str]]) -> Sparklines:
    """Those of the cases in `keys`, with a change first; every change is listed above them."""
    series = [s for s in found.series if (s.case_id, s.case_hash) in keys]
    several = [s for s in series if sum(v is not None for v in s.values) > 1]
    rows, columns = history_rows(several, found.places)
    alone = {(s.case_id, s.case_hash) for s in series} - {(s.case_id, s.case_hash) for s in several}
    return Sparklines(found.places, columns, tuple(rows), tuple(change_lines(several)), len(alone))


def history_rows(
    series: list[Series], places: tuple[str, ...]
) -> tuple[list[HistoryRow], tuple[str, ...]]:
    """The rows, and the titles of the columns that they have."""
    columns = [m for m in SHOWN if any(s.metric == m for s in series)]
    by_case: dict[tuple[str, str, str], dict[str, Series]] = {}
    for s in series:
        by_case.setdefault((s.case_id, s.case_hash, s.environment), {})[s.metric] = s
    several = len({key[2] for key in by_case}) > 1
    rows = [
        HistoryRow(
            key[0], key[2] if several else "",
            tuple(spark_of(own.get(m), places) for m in columns),
            any(s.points for s in own.values()),
        )
        for key, own in by_case.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: not row.changed)
    return rows, tuple(SHOWN[m] for m in columns)


def change_lines(series: list[Series]) -> list[ChangeLine]:
    """What became worse first, the largest change first."""
    points = [(s, p) for s in series for p in s.points]
    points.sort(key=lambda pair: (pair[1].is_worse is not True, -abs(pair[1].change),
                                  pair[0].case_id, pair[0].metric))  # fmt: skip
    return [
        ChangeLine(s.case_id, s.metric.removesuffix("_bytes"), number(p.base, s.unit),
                   number(p.new, s.unit), signed(p.change, s.is_difference), sense(p),
                   range_text(p))
        for s, p in points
    ]  # fmt: skip


def sense(point: Point) -> str:
    return {True: "worse", False: "better", None: ""}[point.is_worse]


def spark_of(series: Series | None, places: tuple[str, ...]) -> Spark | None:
    if series is None:
        return None
    known = [v for v in series.values if v is not None]
    start = max(len(series.values) - LATEST, 0)
    marked = {place_of(p, series.values, places): p for p in series.points}
    drawn = drawing(series.values[start:], {i - start: p for i, p in marked.items() if i >= start})
    low, high = (number(v, series.unit) for v in (min(known), max(known)))
    parts = [f"{len(known)} sessions, {low} to {high}"] + [
        f"{signed(p.change, series.is_difference)} {sense(p)} in {range_text(p)}"
        for p in series.points
    ]
    return Spark(drawn, number(known[-1], series.unit), "; ".join(parts))


def place_of(point: Point, values: tuple[float | None, ...], places: tuple[str, ...]) -> int:
    """The session that a point names as its last: a commit that was run again has several."""
    known = [i for i, v in enumerate(values) if v is not None]
    for last, i in pairwise(known):
        named = places[last] == point.after and places[i] == point.until
        if named and i - last - 1 == point.between:
            return i
    return places.index(point.until)


def drawing(values: tuple[float | None, ...], points: dict[int, Point]) -> Markup:
    """A line with a gap where a session has no value; changes are a bar and a triangle.

    The whole height is at least LEAST_HEIGHT of the value: noise must not look like mountains.
    """
    known = [v for v in values if v is not None] or [0.0]
    span = max(max(known) - min(known), LEAST_HEIGHT * abs(min(known)))
    low = (max(known) + min(known) - span) / 2
    step = (WIDTH - 2 * EDGE) / max(len(values) - 1, 1)

    def at(i: int, value: float) -> tuple[float, float]:
        share = (value - low) / span if span else 0.5
        return EDGE + i * step, HEIGHT - EDGE - share * (HEIGHT - 2 * EDGE)

    pieces: list[str] = [""]
    for i, value in enumerate(values):
        if value is None:
            pieces.append("")
        else:
            x, y = at(i, value)
            pieces[-1] += f"{'L' if pieces[-1] else 'M'}{x:.1f} {y:.1f}"
    parts = [f'<path class="line" d="{"".join(pieces)}"/>']
    parts += [change_mark(EDGE + i * step, point) for i, point in points.items()]
    if values and values[-1] is not None:
        x, y = at(len(values) - 1, values[-1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
    return Markup(
        f'<svg class="spark" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="{WIDTH:g}"'
        f' height="{HEIGHT:g}" aria-hidden="true">{"".join(parts)}</svg>'
    )


def change_mark(x: float, point: Point) -> str:
    """Worse points up and better points down: the shape says it without the colour."""
    y, tip = (1.0, 7.0) if point.is_worse else (7.0, 1.0)
    name = sense(point) or "neither"
    shape = f"M{x - 4:.1f} {tip:g}L{x + 4:.1f} {tip:g}L{x:.1f} {y:g}z"
    return f'<g class="{name}"><path class="bar" d="M{x:.1f} 7V{HEIGHT:g}"/><path d="{shape}"/></g>'
