"""Going on with a run that was interrupted: its finished rounds, and what must not have changed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftbench import provenance
from peftbench.case import Case
from peftbench.errors import UserError
from peftbench.privacy import without_paths
from peftbench.record import remove_half_written


class ReplayClock:
    """time.perf_counter that can be set forward: so a round that was measured before an interrupt
    tells pytest-benchmark the time that it took then."""

    __name__ = "perf_counter"

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self._ahead_s

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds


def earlier_rounds(
    folder: Path, run_id: str, cases: Iterable[Case]
) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished rounds of an interrupted run, by case hash and seed.

    Files that are not rounds of this run are left alone, with a warning that names them.
    Raises: UserError if there is no such run, or if it was made by another commit, other libraries
    or with other settings.
    """
    if not folder.is_dir():
        runs = sorted(f.name for f in folder.parent.glob("*") if f.is_dir())
        raise UserError(
            f"no run {run_id!r} in {without_paths(str(folder.parent))}; there are:"
            f" {', '.join(runs[-5:]) or 'none'}"
        )
    remove_half_written(folder)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    here = provenance.describe()
    asked = {case.id: case for case in cases}
    for file in sorted(folder.glob("*.json")):
        record = round_of(file, run_id)
        if record is None:
            warnings.warn(f"{file.name} is no round of run {run_id}: left alone", stacklevel=2)
            continue
        # what a cluster's node measured was never this machine's
        difference = provenance_difference(
            record["provenance"], here, other_machine="dispatch" in record
        )
        if difference is None and record["case_id"] in asked:
            difference = settings_difference(record, asked[record["case_id"]])
        if difference is not None:
            raise UserError(f"cannot resume {run_id}: {difference}; start a new run")
        found[record["case_hash"], record["seed"]] = record
    return found


def round_of(file: Path, run_id: str) -> dict[str, Any] | None:
    """The round that a file holds; None for a torn file or one that is no round of this run."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        needed = [record[n] for n in ("case_id", "case_hash", "seed", "case", "provenance")]
        return record if record["run_id"] == run_id and None not in needed else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_difference(record: dict[str, Any], case: Case) -> str | None:
    """The first setting that a case of the same name has otherwise now: one sentence, or None."""
    if record["case_hash"] == case.hash:
        return None
    now = case.public().to_dict()["settings"]
    then = record["case"]["settings"]
    for name, value in now.items():
        if name in then and then[name] != value:
            return f"{case.id} had {name} {then[name]}, now it is {value}"
    return f"{case.id} had the hash {record['case_hash']}, now it is {case.hash}"


def provenance_difference(
    then: dict[str, Any], now: dict[str, Any], *, other_machine: bool = False
) -> str | None:
    """The first thing that a run would mix: one sentence, or None."""
    machine = () if other_machine else ("cpu", "cpu_cores")
    for name in ("commit", "commit_dirty", "python", *machine):
        if then.get(name) != now.get(name):
            return f"its {name} was {then.get(name)}, now it is {now.get(name)}"
    before, after = then.get("libraries", {}), now.get("libraries", {})
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return f"its {name} was {before.get(name)}, now it is {after.get(name)}"
    return None
