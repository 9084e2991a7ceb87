"""`--shard i/n`: one part of a matrix, for the tasks of a Slurm array or a CI matrix.

Every task works out the same division by itself, from what all of them are given, so nothing has to
be handed out. `peftbench merge` makes one session of their files again.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.case import Case
from peftbench.compare.order import files_below
from peftbench.errors import UserError
from peftbench.result_files import case_records, read_json, reading


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Raises: UserError for anything but i/n with 1 <= i <= n."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f"--shard {text!r} is no part of a run; give i/n with i from 1 to n, as in 2/8"
            )
        return cls(int(match[1]), int(match[2]))

    def to_dict(self, case_ids: Sequence[str]) -> dict[str, Any]:
        """For the run's file: `peftbench merge` tells by it whether the parts are of one whole."""
        digest = hashlib.sha256("\n".join(case_ids).encode()).hexdigest()[:16]
        return {"index": self.index, "count": self.count, "all_cases": len(case_ids),
                "all_cases_digest": digest}  # fmt: skip


def expected_seconds(path: Path) -> dict[str, float]:
    """Seconds of one round of each case of earlier records, by case id: the median of them all.

    Raises: UserError for a path that is no result file, and no folder of them.
    """
    found: dict[str, list[float]] = {}
    for file in files_below(path) if path.is_dir() else [path]:
        data = read_json(file)
        with reading(file):
            for record in case_records(data):
                rounds = record.get("rounds") or [record]
                seconds = [r["total_s"] for r in rounds if r.get("total_s") is not None]
                found.setdefault(str(record["case_id"]), []).extend(seconds)
    return {case_id: statistics.median(seconds) for case_id, seconds in found.items() if seconds}


def lengths(case_ids: Sequence[str], seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every case; one of unknown length counts as the median of the others."""
    usual = statistics.median(seconds.values()) if seconds else 1.0
    return {case_id: seconds.get(case_id, usual) for case_id in case_ids}


def longest_first(cases: Sequence[Case], seconds: Mapping[str, float]) -> list[Case]:
    """So that the last rounds to end are short ones; the order given where lengths are equal."""
    length = lengths([case.id for case in cases], seconds)
    return sorted(cases, key=lambda case: -length[case.id])


def parts(case_ids: Sequence[str], count: int, seconds: Mapping[str, float]) -> list[list[str]]:
    """The cases of each of `count` parts, in the order given; every case is in exactly one.

    The longest case goes first, each to the part that has the least so far: never worse than 4/3 of
    the best division (Graham 1969). A case of unknown length counts as the median of the others.
    Raises: UserError for more parts than cases.
    """
    if count > len(case_ids):
        raise UserError(f"--shard asks for {count} parts of {len(case_ids)} cases; use fewer")
    length = lengths(case_ids, seconds)
    load = [0.0] * count
    part_of: dict[str, int] = {}
    for case_id in sorted(case_ids, key=lambda c: -length[c]):  # sorted is stable: ties by order
        part_of[case_id] = min(range(count), key=load.__getitem__)
        load[part_of[case_id]] += length[case_id]
    return [[c for c in case_ids if part_of[c] == index] for index in range(count)]
