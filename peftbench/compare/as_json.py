"""A comparison as JSON. Schema history: 1 (first). docs/comparison.md explains every key."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from peftbench import __version__
from peftbench.compare.load import VERDICT_SCHEMA
from peftbench.compare.verdicts import Comparison, Row, SuiteLine
from peftbench.record import dumps

SCHEMA_VERSION = 1


def json_text(found: Comparison) -> str:
    """Strict JSON, the same bytes for the same comparison."""
    return dumps(plain(found)) + "\n"


def plain(found: Comparison) -> dict[str, Any]:
    return {
        "schema": VERDICT_SCHEMA,  # first: it is how a verdict file among results is told
        "version": SCHEMA_VERSION,
        "peftbench": __version__,
        "exit_code": found.exit_code,
        "strict": found.strict,
        "subject": found.subject,
        "base": asdict(found.base),
        "new": asdict(found.new),
        "history_sessions": found.sessions,
        "libraries": [asdict(change) for change in found.libraries],
        "notes": list(found.notes),
        "counts": found.counts,
        "suite": [suite_plain(line) for line in found.suite],
        "rows": [row_plain(row) for row in found.rows],
    }


def suite_plain(line: SuiteLine) -> dict[str, Any]:
    shares = [asdict(share) for share in line.shares]
    return asdict(line) | {
        "change": held(line.change), "cases": list(line.cases), "shares": shares
    }  # fmt: skip


def row_plain(row: Row) -> dict[str, Any]:
    """One row; a number that JSON cannot hold is null."""
    return {
        "case_id": row.case_id,
        "case_hash": row.case_hash,
        "metric": row.metric,
        "class": row.metric_class,
        "unit": row.unit,
        "verdict": row.verdict,
        "code": row.code,
        "reason": row.reason,
        "base": held(row.base),
        "new": held(row.new),
        "change": held(row.change),
        "interval_90": None if row.low is None else [held(row.low), held(row.high)],
        "minimum_detectable": held(row.minimum_detectable),
        "change_is": "difference" if row.is_difference else "ratio",
        "sessions": row.sessions,
        "acknowledged": row.acknowledged,
    }


def held(value: float | str | None) -> float | str | None:
    """Ten significant digits: the last bits of a quantile differ between builds of scipy."""
    if isinstance(value, float):
        rounded = float(f"{value + 0.0:.10g}")  # of the largest float: infinite
        return rounded if math.isfinite(rounded) else None
    return value
