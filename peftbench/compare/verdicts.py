"""What is said of a case and a metric, and what that makes the exit code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from peftbench.compare.load import CaseRow
from peftbench.compare.rules import Rule

VERDICTS = (
    "regressed", "changed", "failed", "missing", "incomparable", "redefined", "invalid", "suspect",
    "no-history", "improved", "new", "inconclusive", "unchanged",
)  # fmt: skip
"""In the order of a report: what gates first."""

USAGE_ERROR = 2
CODES = {"regressed": 1, "changed": 1, "failed": 1, "missing": 3, "incomparable": 3,
         "redefined": 3, "invalid": 3, "suspect": 4, "no-history": 4}  # fmt: skip
STATUS = "status"  # the metric of a row that says how a case ended


@dataclass(frozen=True)
class Row:
    """One case, one metric (or STATUS), one verdict.

    `change`, `low` and `high` (a 90 % interval) and `minimum_detectable` (80 % power) are ratios to
    the base, or differences where `is_difference`; None where they mean nothing. `sessions` of
    history stand behind the base; 0: one session alone.
    """

    case_id: str
    case_hash: str
    axes: dict[str, str]
    metric: str
    unit: str
    metric_class: str
    verdict: str
    reason: str
    base: float | str | None = None
    new: float | str | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    minimum_detectable: float | None = None
    is_difference: bool = False
    sessions: int = 0
    was_ok: bool = True  # of a failed case: it had worked before
    acknowledged: str | None = None

    @property
    def code(self) -> int:
        """The exit code that this row asks for; 4 counts with --strict only."""
        if self.acknowledged is not None or (self.verdict == "failed" and not self.was_ok):
            return 0
        return CODES.get(self.verdict, 0)


@dataclass(frozen=True)
class Share:
    """How many of the cases of one adapter, method or model became worse."""

    axis: str
    name: str
    worse: int
    of: int


def shares_of(cases: list[CaseRow], worse: list[bool]) -> tuple[Share, ...]:
    """By adapter, method and model, where one of them tells cases apart: a slower peft moves every
    adapter but `full`."""
    found = []
    for axis in ("adapter", "method", "model"):
        names = list(dict.fromkeys(case.axes[axis] for case in cases))
        for name in names if len(names) > 1 else []:
            own = [w for case, w in zip(cases, worse, strict=True) if case.axes[axis] == name]
            found.append(Share(axis, name, sum(own), len(own)))
    return tuple(found)


@dataclass(frozen=True)
class SuiteLine:
    """A metric that became worse in most cases, which the machine does not explain."""

    metric: str
    change: float
    cases: tuple[str, ...]
    of: int
    reason: str
    shares: tuple[Share, ...]
    acknowledged: str | None = None


@dataclass(frozen=True)
class Side:
    """Where one side's numbers come from."""

    name: str
    commit: str | None
    dirty: bool
    cases: int


@dataclass(frozen=True)
class LibraryChange:
    name: str
    base: str
    new: str


@dataclass(frozen=True)
class Comparison:
    """Everything a report says."""

    base: Side
    new: Side
    sessions: int | None  # of the history; None: two files
    libraries: tuple[LibraryChange, ...]
    suite: tuple[SuiteLine, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    strict: bool = False
    subject: str | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """By priority: 1, 3, 4 (strict), 0."""
        codes = {row.code for row in self.rows}
        if 1 in codes or any(line.acknowledged is None for line in self.suite):
            return 1
        if 3 in codes:
            return 3
        return 4 if self.strict and 4 in codes else 0


def counts_of(rows: tuple[Row, ...]) -> dict[str, int]:
    """Rows by verdict, in the report's order."""
    return {v: n for v in VERDICTS if (n := sum(row.verdict == v for row in rows))}


def plain_row(
    case: CaseRow, rule: Rule, verdict: str, reason: str, base: float | None = None,
    new: float | None = None,
) -> Row:  # fmt: skip
    """A row without statistics; the change where there are two numbers."""
    change = None
    if base is not None and new is not None:
        change = new - base if rule.is_difference else ratio_change(base, new)
    return Row(
        case.case_id, case.case_hash, case.axes, rule.metric, rule.unit, rule.metric_class,
        verdict, reason, base, new, change, is_difference=rule.is_difference,
    )  # fmt: skip


def ratio_change(base: float, new: float) -> float | None:
    """new / base - 1; None for a base of 0 unless nothing changed."""
    if base == new:
        return 0.0
    return None if base == 0 else (new - base) / abs(base)


def status_row(case: CaseRow, verdict: str, reason: str, base: str | None, new: str | None) -> Row:
    return Row(
        case.case_id, case.case_hash, case.axes, STATUS, "", STATUS, verdict, reason, base, new,
        was_ok=base in (None, "ok"),
    )  # fmt: skip


def whole_case(
    case: CaseRow, rules: list[Rule], verdict: str, reason: str, base: str | None, new: str | None,
    status_verdict: str | None = None,
) -> list[Row]:  # fmt: skip
    """One verdict for a case and all of its metrics."""
    status = status_row(case, status_verdict or verdict, reason, base, new)
    metrics = [
        replace(plain_row(case, rule, verdict, reason), was_ok=status.was_ok) for rule in rules
    ]
    return [status, *metrics]
