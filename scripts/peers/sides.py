"""Running a side in a process of its own, and goals to hold against what it took."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_side(python: Path, script: str, work: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a side. Raises: SystemExit with what it wrote last, if it failed."""
    with tempfile.TemporaryDirectory(prefix="peftbench-peers-") as folder:
        given, outcome = Path(folder) / "work.json", Path(folder) / "outcome.json"
        given.write_text(json.dumps(work))
        done = subprocess.run(
            [python, ROOT / "scripts" / "peers" / script, given, outcome],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if done.returncode or not outcome.exists():
            sys.exit(f"{script} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(outcome.read_text())
    return found


def steady(values: list[float]) -> float:
    """Median without the first, in which kernels are chosen and memory is taken."""
    return statistics.median(values[1:])


@dataclass(frozen=True)
class Goal:
    """A ratio and its limit."""

    name: str
    value: float
    limit: float
    at_most: bool = False  # else at least

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def line(self) -> str:
        side = "at most" if self.at_most else "at least"
        verdict = "met   " if self.met else "MISSED"
        return f"{verdict} {self.value:6.2f}  {self.name} ({side} {self.limit:g})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "value": self.value, "limit": self.limit,
            "at_most": self.at_most, "met": self.met,
        }  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they must be; the first left-aligned, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
