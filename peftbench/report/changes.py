"""The comparison as the page shows it: what gates first, the rest folded or counted."""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.compare.text import (
    LISTED,
    MEANING,
    cells,
    exit_text,
    headcount,
    side_text,
    suite_text,
    verdict_text,
    without_whole,
)
from peftbench.compare.verdicts import STATUS, VERDICTS, Comparison, Row

OPEN = ("regressed", "changed", "failed", "missing")  # unfolded, however many
FEW = 8  # rows of another verdict that gates are unfolded too
MOST_ROWS = 500  # of one verdict


@dataclass(frozen=True)
class Line:
    case_id: str
    metric: str
    base: str
    new: str
    change: str
    interval: str
    detects: str
    reason: str


@dataclass(frozen=True)
class Section:
    """The rows of one verdict; `left_out` of them are not on the page."""

    verdict: str
    meaning: str
    count: int
    is_open: bool
    is_whole: bool  # all rows are about whole cases: there are no numbers
    lines: tuple[Line, ...]
    left_out: int


@dataclass(frozen=True)
class Changes:
    """Everything that the section says; `counted` are (verdict, rows, meaning) without a table."""

    passed: bool
    verdict: str
    exit_code: int
    exit_text: str
    base: str
    new: str
    sessions: int | None
    libraries: tuple[str, ...]
    notes: tuple[str, ...]
    suite: tuple[str, ...]
    sections: tuple[Section, ...]
    counted: tuple[tuple[str, int, str], ...]


def changes_of(found: Comparison) -> Changes:
    by_verdict = {v: [r for r in found.rows if r.verdict == v] for v in VERDICTS}
    counted = {v: sum(r.metric != STATUS for r in rows) for v, rows in by_verdict.items()}
    return Changes(
        passed=found.exit_code == 0,
        verdict=verdict_text(found),
        exit_code=found.exit_code,
        exit_text=exit_text(found),
        base=side_text(found.base),
        new=side_text(found.new),
        sessions=found.sessions,
        libraries=tuple(f"{c.name} {c.base} → {c.new}" for c in found.libraries),
        notes=found.notes,
        suite=tuple(suite_text(line) for line in found.suite),
        sections=tuple(section(v, by_verdict[v]) for v in LISTED if by_verdict[v]),
        counted=tuple((v, counted[v], MEANING[v]) for v in VERDICTS[len(LISTED) :] if counted[v]),
    )


def section(verdict: str, rows: list[Row]) -> Section:
    shown = without_whole(rows)
    return Section(
        verdict, MEANING[verdict], headcount(rows), is_open(verdict, len(shown)),
        all(row.metric == STATUS for row in shown),
        tuple(line(row) for row in shown[:MOST_ROWS]), max(len(shown) - MOST_ROWS, 0),
    )  # fmt: skip


def is_open(verdict: str, rows: int) -> bool:
    gates = VERDICTS.index(verdict) < VERDICTS.index("suspect")
    return verdict in OPEN or (gates and rows <= FEW)


def line(row: Row) -> Line:
    metric = "whole case" if row.metric == STATUS else row.metric.removesuffix("_bytes")
    return Line(row.case_id, metric, *cells(row))
