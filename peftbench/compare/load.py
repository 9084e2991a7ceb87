"""Result files as sessions: every case's rounds by seed, its status, and where it ran.

A session may be spread over several files. A case is its id and its hash: two runs of one case in
one session put their rounds together, and the same round is taken once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peftbench.errors import UserError
from peftbench.metrics import METRICS
from peftbench.record import STATUSES
from peftbench.result_files import case_records, read_json, reading, session_part

VERDICT_SCHEMA = "peftbench-verdicts"
# what else this package and its scripts write may lie beside the results
OTHER_SCHEMAS = (VERDICT_SCHEMA, "peftbench-peers", "peftbench-sweep")
TASK_METRIC = "task_accuracy"  # of TASK_METRICS the one that is compared
Key = tuple[str, str]  # case id, case hash


@dataclass(frozen=True)
class Round:
    """One round's numbers; what is not a finite number is in `broken`, with what was found."""

    run_id: str
    seed: int
    disturbed: bool
    values: dict[str, float]
    broken: dict[str, str]
    outcomes: dict[str, str]  # by accuracy: "1" for each item that came out right, else "0"


@dataclass(frozen=True)
class CaseRow:
    """One case of one session. `environment` must match for two rows to be compared."""

    case_id: str
    case_hash: str
    status: str
    reason: str
    axes: dict[str, str]  # model, adapter, method
    environment: dict[str, str]
    inputs: dict[str, str]  # digests of data and weights
    null_reasons: dict[str, str]
    rounds: tuple[Round, ...]
    task_digests: dict[str, str] = field(default_factory=dict)  # of the items, by metric
    settings: dict[str, str] = field(default_factory=dict)  # a newer one is not there

    @cached_property
    def measured(self) -> frozenset[str]:
        """Names of the metrics that a round has a number of."""
        return frozenset().union(*(r.values for r in self.rounds))

    @cached_property
    def task_metrics(self) -> frozenset[str]:
        """Names of its single tasks' metrics, such as `task_accuracy:hellaswag`."""
        return frozenset(n for r in self.rounds for n in (*r.values, *r.broken) if ":" in n)

    @cached_property
    def calm_rounds(self) -> tuple[Round, ...]:
        """Those that count: the undisturbed, or all where every one was disturbed."""
        return tuple(r for r in self.rounds if not r.disturbed) or self.rounds

    @property
    def is_disturbed(self) -> bool:
        """In every round: its times say nothing."""
        return bool(self.rounds) and all(r.disturbed for r in self.rounds)


@dataclass(frozen=True)
class Session:
    """One run of the matrix on one commit."""

    name: str
    time_unix_s: float
    commit: str | None
    dirty: bool
    libraries: dict[str, str]
    library_commits: dict[str, str]
    sentinels: dict[str, float]  # seconds-like: larger is slower
    metric_versions: dict[str, int]
    cases: dict[Key, CaseRow]

    @cached_property
    def run_ids(self) -> frozenset[str]:
        """ "?" stands for a file that names none, and is no run."""
        found = (r.run_id for row in self.cases.values() for r in row.rounds)
        return frozenset(run_id for run_id in found if run_id != "?")


def read_session(path: Path) -> Session:
    """The session of one result file, or of one round's file of `--results-dir`.

    Raises: UserError for a file that is missing, no JSON, of another program, newer or damaged.
    """
    data = read_json(path)
    with reading(path):
        return session_of(path.name, data)


def session_of(name: str, data: Any) -> Session:
    """Raises: UserError, without the file's name, for JSON that is no session of ours."""
    listed, ours = case_records(data), session_part(data)
    cases: dict[Key, CaseRow] = {}
    for record in listed:
        row = case_row(record)
        key = (row.case_id, row.case_hash)
        cases[key] = merged_rows(cases[key], row) if key in cases else row
    return Session(
        name=name,
        time_unix_s=session_time(data, listed),
        **code_of(data, listed),
        sentinels=sentinel_seconds(ours.get("sentinels") or {}),
        metric_versions={str(k): int(v) for k, v in (ours.get("metric_versions") or {}).items()},
        cases=cases,
    )


def case_row(record: dict[str, Any]) -> CaseRow:
    """Raises: UserError for a status that no case ends with."""
    status = str(record["status"])
    if status not in STATUSES:
        raise UserError(f"has the unknown status {status!r} for {record['case_id']}")
    rounds = record.get("rounds") or [record]
    case = record.get("case") or {}
    return CaseRow(
        case_id=str(record["case_id"]),
        case_hash=str(record["case_hash"]),
        status=status,
        reason=str(record.get("reason") or ""),
        axes={axis: str(case.get(axis, "?")) for axis in ("model", "adapter", "method")},
        environment=environment_of(record) if status == "ok" else {},
        inputs={
            name: str(record[name]) for name in ("data_digest", "weights_hash") if record.get(name)
        },
        null_reasons=texts(record.get("null_reasons") or {}),
        rounds=tuple(round_of(r, record) for r in rounds) if status == "ok" else (),
        task_digests={
            task_metric(name): str(task["digest"])
            for name, task in (record.get("tasks") or {}).items()
        },
        settings=texts(case.get("settings") or {}),
    )


def texts(found: dict[str, Any]) -> dict[str, str]:
    """As it is where all are texts: the reasons of a hundred cases are some thousands."""
    if set(map(type, found.values())) <= {str}:
        return found
    return {name: str(value) for name, value in found.items()}


def task_metric(task: str) -> str:
    """As rows, rules and histories name a single task's accuracy."""
    return f"{TASK_METRIC}:{task}"


def metric_names(rows: Iterable[CaseRow]) -> list[str]:
    """METRICS and what single tasks of these rows have, in the order of a report."""
    return [*METRICS, *sorted({name for row in rows for name in row.task_metrics})]


def round_of(entry: dict[str, Any], record: dict[str, Any]) -> Round:
    values, broken = {}, {}
    tasks = {task_metric(name): task for name, task in (entry.get("tasks") or {}).items()}
    numbers = [(name, value) for name, value in entry.items() if name in METRICS]
    numbers += [(name, task.get(TASK_METRIC)) for name, task in tasks.items()]
    for name, value in numbers:
        if value is None:
            continue
        if (type(value) is float or type(value) is int) and math.isfinite(value):
            values[name] = value
        else:
            broken[name] = f"{value!r} is no finite number"[:80]
    outcomes = {"preference_accuracy": (entry.get("items") or {}).get("preference_correct")}
    outcomes |= {name: task.get("correct") for name, task in tasks.items()}
    return Round(
        run_id=str(entry.get("run_id") or record.get("run_id") or "?"),
        seed=int(entry.get("seed", 0)),
        disturbed=bool(entry.get("disturbances")),
        values=values,
        broken=broken,
        outcomes={n: found for n, found in outcomes.items() if isinstance(found, str)},
    )


def environment_of(record: dict[str, Any]) -> dict[str, str]:
    """What must be equal for two rows to be compared, where both know it: never a version."""
    device = str(record.get("device", "?"))
    found = {"device": device, "threads": str(record.get("threads", "?"))}
    if device == "cpu":
        found["cpu"] = str((record.get("provenance") or {}).get("cpu", "?"))
        return found
    del found["threads"]  # the CPU's threads do not train there
    devices = (record.get("gpu") or {}).get("devices") or []
    found["GPUs"] = str(len(devices))
    for own in devices:
        if own.get("uuid") == record.get("device_uuid"):
            found |= {n: str(own[n]) for n in ("mig", "power_limit_w") if own.get(n) is not None}
    return found


def session_time(data: dict[str, Any], records: list[dict[str, Any]]) -> float:
    """When the first round began, in seconds since 1970; 0 where the file does not say."""
    starts = [
        entry["start_unix_s"]
        for record in records
        for entry in (record.get("rounds") or [record])
        if isinstance(entry.get("start_unix_s"), (int, float))
    ]
    return min(starts, default=0.0)


def code_of(data: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Commit and library versions, from the first record that has a provenance."""
    found: dict[str, Any] = next((r["provenance"] for r in records if r.get("provenance")), {})
    info = data.get("commit_info") or {}
    commits = (found.get("library_commits") or {}).items()
    return {
        "commit": found.get("commit") or info.get("id"),
        "dirty": bool(found.get("commit_dirty", info.get("dirty", False))),
        "libraries": {str(k): str(v) for k, v in (found.get("libraries") or {}).items()},
        "library_commits": {k: str(v["commit"]) for k, v in commits if v.get("commit")},
    }


def sentinel_seconds(moments: dict[str, Any]) -> dict[str, float]:
    """Geometric mean over the session's moments, as time: a rate is turned over.

    What is neither a time nor a rate tells of the machine, not how fast it is.
    """
    logs: dict[str, list[float]] = {}
    for found in moments.values():
        for name, value in (found or {}).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name.endswith("_s") and is_number and math.isfinite(value) and value > 0:
                sign = -1 if name.endswith("_per_s") else 1
                logs.setdefault(name, []).append(sign * math.log(value))
    return {name: math.exp(math.fsum(found) / len(found)) for name, found in logs.items()}


def merged_rows(first: CaseRow, second: CaseRow) -> CaseRow:
    """Two runs of one case in one session: the failure of either, the rounds of both."""
    if "ok" not in (first.status, second.status) or first.status != second.status:
        return first if first.status != "ok" else second
    known = {(r.run_id, r.seed) for r in first.rounds}
    more = tuple(r for r in second.rounds if (r.run_id, r.seed) not in known)
    return replace(
        first,
        rounds=first.rounds + more,
        environment=both(first.environment, second.environment),
        inputs=both(first.inputs, second.inputs),
        task_digests=both(first.task_digests, second.task_digests),
    )


def both(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """Equal where they agree; a mixture equals neither of what it was made of."""
    names = sorted(first.keys() | second.keys())
    pairs = {name: (first.get(name, "?"), second.get(name, "?")) for name in names}
    return {name: a if a == b else f"{a} and {b}" for name, (a, b) in pairs.items()}


def merged(sessions: list[Session]) -> Session:
    """Files of one session as one; the first in time names code and libraries."""
    first = min(sessions, key=lambda s: (s.time_unix_s, s.name))
    cases: dict[Key, CaseRow] = {}
    sentinels: dict[str, list[float]] = {}
    for session in sorted(sessions, key=lambda s: (s.time_unix_s, s.name)):
        for key, row in session.cases.items():
            cases[key] = merged_rows(cases[key], row) if key in cases else row
        for name, seconds in session.sentinels.items():
            sentinels.setdefault(name, []).append(math.log(seconds))
    means = {name: math.exp(math.fsum(found) / len(found)) for name, found in sentinels.items()}
    names = " + ".join(sorted({s.name for s in sessions}))
    return replace(first, name=names, cases=cases, sentinels=means)
