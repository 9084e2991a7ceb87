"""`pytest bench --report-to`: each finished round becomes a run in each tracker, at the very end.

Nothing of it happens before the last round, the machine's last timing and the comparison are done:
no tracker's process or thread stands beside a measured one, and accelerate may bring torch into
this process, which has no child any more. The rounds are read from the run's
folder, so those that an interrupted session had finished are among them, and `reported.txt` there
keeps a resumed one from telling any of them twice.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from peftbench import trackers
from peftbench.errors import UserError
from peftbench.progress import counted
from peftbench.resume import round_of

REPORTED = "reported.txt"  # a line for each tracker and round that it has


def report_rounds(folder: Path, run_id: str, names: tuple[str, ...]) -> list[str]:
    """Tell each tracker of the finished rounds that it does not have; a line on each tracker."""
    found = {file.stem: round_of(file, run_id) for file in sorted(folder.glob("*.json"))}
    rounds = {stem: record for stem, record in found.items() if record is not None}
    return [report_to(name, folder, rounds) for name in names]


def report_to(name: str, folder: Path, rounds: dict[str, dict[str, Any]]) -> str:
    """One tracker's runs, and the line that says how many; a failure ends it and is that line."""
    kept = folder / REPORTED
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    todo = {stem: r for stem, r in rounds.items() if f"{name} {stem}" not in lines}
    told = 0
    try:
        for stem, record in todo.items():
            with contextlib.redirect_stdout(io.StringIO()):  # a line of its own for each round
                report_round(name, folder, record)
            with kept.open("a", encoding="utf-8") as file:
                file.write(f"{name} {stem}\n")
            told += 1
    except UserError as error:
        return f"{error}; {told} of {len(todo)} rounds told, --resume {folder.name} tells the rest"
    return f"{name}: {counted(told, 'round')} told"


def report_round(name: str, folder: Path, record: dict[str, Any]) -> None:
    """One run: configuration, the steps, the final metrics."""
    where, seed = record["provenance"], record["seed"]
    config = trackers.configuration(
        record["case"], record["case_hash"], where, seed=seed, run_id=record["run_id"],
        device=record["device"],
    )  # fmt: skip
    run = f"{trackers.run_name(record['case_id'], where)}-seed{seed}"
    tracker = trackers.open_tracker(name, run, folder, config, live=False)
    rows = trackers.step_rows(record)
    with trackers.failures_of(name):
        for step, values in rows:
            tracker.log(values, step=step)
        tracker.log(trackers.final_values(record, record["null_reasons"]), step=rows[-1][0])
        tracker.finish()
