"""A folder's history in a terminal: change points first, then a line a series."""

from __future__ import annotations

import textwrap

from peftbench.compare.history import History, Point, Series
from peftbench.compare.text import WIDTH, number, signed
from peftbench.progress import counted
from peftbench.summary import table

BARS = "▁▂▃▄▅▆▇█"
GAP = "·"
LEAST_HEIGHT = 0.1
LATEST = 40  # sessions that a spark line shows


def history_lines(found: History) -> list[str]:
    """Sessions, then every change point, then the series that have one or were asked for."""
    count = len(found.places)
    lines = [f"{counted(count, 'session')}, {places_text(found.places)}"]
    changed = [s for s in found.series if s.points]
    lines += ["", *point_lines(changed)]
    cases = {s.case_id for s in found.series}
    shown = found.series if len(cases) == 1 or len(found.series) <= 60 else changed
    if shown:
        lines += ["", *series_lines(list(shown))]
    hidden = len(found.series) - len(shown)
    if hidden:
        lines += [
            "",
            f"{hidden} series without a change are not listed; pick with --case, --metric",
        ]
    return ["".join(c if c.isprintable() else "?" for c in line).rstrip() for line in lines]


def places_text(places: tuple[str, ...]) -> str:
    return places[0] if len(places) == 1 else f"from {places[0]} to {places[-1]}"


def point_lines(changed: list[Series]) -> list[str]:
    """A line a point; what became worse first, the largest change first."""
    points = [(s, p) for s in changed for p in s.points]
    if not points:
        return ["no change point"]
    points.sort(key=lambda pair: (pair[1].is_worse is not True, -abs(pair[1].change),
                                  pair[0].case_id, pair[0].metric))  # fmt: skip
    rows = [
        [
            s.case_id, s.metric, number(p.base, s.unit), number(p.new, s.unit),
            signed(p.change, s.is_difference), better_text(p), range_text(p),
        ]
        for s, p in points
    ]  # fmt: skip
    header = ["case", "metric", "before", "after", "change", "", "between"]
    title = counted(len(points), "change point")
    return [title, *(f"  {line}" for line in table(header, rows, left=2))]


def better_text(found: Point) -> str:
    return {True: "worse", False: "better", None: ""}[found.is_worse]


def range_text(found: Point) -> str:
    gaps = f" ({found.between} without a value)" if found.between else ""
    return f"{found.after}..{found.until}{gaps}"


def series_lines(series: list[Series]) -> list[str]:
    """First and last value and a spark line of each series, under its case."""
    rows = []
    hashes = {(s.case_id, s.case_hash) for s in series}
    several = {case for case, _ in hashes if sum(c == case for c, _ in hashes) > 1}
    for s in series:
        known = [v for v in s.values if v is not None]
        name = f"{s.case_id} {s.case_hash[:6]}" if s.case_id in several else s.case_id
        rows.append([
            name, s.metric, number(known[0], s.unit), number(known[-1], s.unit),
            str(len(known)), spark(s.values[-LATEST:]),
        ])  # fmt: skip
    lines = table(["case", "metric", "first", "last", "n", "newest last"], rows, left=2)
    machines = sorted({s.environment for s in series})
    if len(machines) > 1:
        lines += textwrap.wrap(f"on {len(machines)} machines: {'; '.join(machines)}", WIDTH)
    return lines


def spark(values: tuple[float | None, ...]) -> str:
    """One character a session, lowest to highest; a gap is a dot.

    The whole height is at least a tenth of the value: noise must not look like mountains.
    """
    known = [v for v in values if v is not None]
    if not known:
        return GAP * len(values)
    low, high = min(known), max(known)
    step = max(high - low, LEAST_HEIGHT * abs(low)) / (len(BARS) - 1) or 1.0
    return "".join(GAP if v is None else BARS[round((v - low) / step)] for v in values)
