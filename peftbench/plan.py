"""`peftbench plan`: what a matrix will take on so many devices, estimated from earlier records.

A round's seconds are the median of earlier rounds of the same case on the same kind of machine.
The rest of a session (start-up, bases, what lies between two rounds) is taken from the same
sessions. The rounds are then handed out as a dispatcher does: in order, each to the device that is
free first.
"""

from __future__ import annotations

import calendar
import heapq
import math
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftbench.adapters import ADAPTERS
from peftbench.case import Case
from peftbench.compare.order import files_below
from peftbench.errors import UserError
from peftbench.metrics import kind_of
from peftbench.progress import clock
from peftbench.result_files import case_records, read_json, reading, session_part
from peftbench.summary import MIB, table

Base = tuple[str, str, bool]  # model, dtype of the weights, whether they are quantised
EXACT, OTHER_SETTINGS, ALIKE = "the same case", "other settings", "cases alike"
MOST_LIFETIMES = 5.0  # of a device that the longest round may take: one in 150 then ends
_PEAKS = ("peak_gpu_memory_bytes", "host_peak_rss_bytes")  # the first that was measured


@dataclass(frozen=True)
class PastRound:
    """One earlier round, its numbers as they were recorded."""

    case_id: str
    case_hash: str
    kind: tuple[str, str]  # model, method
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Past:
    """One earlier session, or of one over several machines what ran on one of them.

    `is_whole`: one round came after the other on one machine, from a start that is known, so that
    what lies beside the rounds can be told; else it is 0.
    """

    machine: str
    start_unix_s: float
    rounds: tuple[PastRound, ...]
    is_whole: bool
    wall_s: float = 0.0  # from the session's start to its end
    bases_s: dict[Base, float] = field(default_factory=dict)
    start_up_s: float = 0.0  # until the first round's child, sentinels included
    between_s: float = 0.0  # of a round: what its phases do not hold


@dataclass(frozen=True)
class Expected:
    """What one round of a case is expected to take, and how that is known."""

    case: Case
    seconds: float
    energy_j: float | None  # of its training window
    peak_bytes: int | None
    source: str  # EXACT, OTHER_SETTINGS or ALIKE
    bases: tuple[Base, ...]


@dataclass(frozen=True)
class Costs:
    """Seconds of a session beside its rounds."""

    start_up_s: float  # of a device's first round
    between_s: float  # of every round
    bases_s: dict[Base, float]  # of the first round on a device that needs the base
    dispatch_s: float = 0.0  # the driver's, of every round, one after the other


@dataclass(frozen=True)
class Failures:
    """Devices that are lost: each after exponentially distributed hours, back after some time."""

    mean_hours: float = float("inf")
    away_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True)
class Outlook:
    """What handing out the rounds comes to."""

    makespan_s: float
    busy_s: float  # of all devices
    lost_s: float  # of attempts that a lost device ended
    lost_rounds: int
    dispatch_s: float  # of the driver


def read_past(path: Path) -> list[Past]:
    """Every session of a file or below a folder. Raises: UserError."""
    found = []
    for file in files_below(path) if path.is_dir() else [path]:
        data = read_json(file)
        with reading(file):
            found += past_of(data)
    return found


def past_of(data: Any) -> list[Past]:
    """A session, one for each machine; none of a file without a round."""
    by_machine: dict[str, list[PastRound]] = defaultdict(list)
    for record in case_records(data):
        if record["status"] == "ok":
            kind = (str(record["case"]["model"]), str(record["case"]["method"]))
            by_machine[machine_of(record)] += [
                PastRound(str(record["case_id"]), str(record["case_hash"]), kind, entry)
                for entry in record.get("rounds") or [record]
                if entry.get("total_s") is not None
            ]
    found = [(machine, rounds) for machine, rounds in by_machine.items() if rounds]
    if len(found) == 1:
        return [_whole(*found[0], session_part(data))]
    return [_part(machine, rounds) for machine, rounds in found]


def _part(machine: str, rounds: list[PastRound]) -> Past:
    starts_s = [r.numbers["start_unix_s"] for r in rounds]
    return Past(machine, min(starts_s), tuple(rounds), is_whole=False)


def _whole(machine: str, rounds: list[PastRound], ours: dict[str, Any]) -> Past:
    """With what lay beside the rounds, unless the session was resumed, merged or a cluster's."""
    sentinels = ours.get("sentinels") or {}
    start, end = sentinels.get("start") or {}, sentinels.get("end") or {}
    starts_s = [r.numbers["start_unix_s"] for r in rounds]
    ended_s = max(r.numbers["start_unix_s"] + r.numbers["total_s"] for r in rounds)
    if "start_unix_s" not in start or start["start_unix_s"] > min(starts_s):
        return _part(machine, rounds)
    if "start_unix_s" in end:
        ended_s = max(ended_s, end["start_unix_s"] + end["seconds"])
    begun_s = _begun_unix_s(ours, start["start_unix_s"])
    start_up_s = start["start_unix_s"] + start["seconds"] - begun_s
    bases_s: dict[Base, float] = {}
    for base in ours.get("bases") or []:
        key = (str(base["model"]), str(base["dtype"]), bool(base["quantized"]))
        bases_s[key] = bases_s.get(key, 0.0) + math.fsum(base["phases"].values())
    rest_s = ended_s - begun_s - start_up_s - math.fsum(bases_s.values())
    rest_s -= math.fsum(r.numbers["total_s"] for r in rounds)
    if rest_s < 0:  # rounds ran side by side
        return _part(machine, rounds)
    return Past(
        machine, begun_s, tuple(rounds), True, ended_s - begun_s, bases_s, start_up_s,
        rest_s / len(rounds),
    )  # fmt: skip


def _begun_unix_s(ours: dict[str, Any], otherwise: float) -> float:
    """When the session began, by its run's name (20261122T212419Z-f6030b)."""
    try:
        named = time.strptime(str(ours.get("run_id")).partition("-")[0], "%Y%m%dT%H%M%SZ")
    except ValueError:
        return otherwise
    return min(float(calendar.timegm(named)), otherwise)


def machine_of(record: dict[str, Any]) -> str:
    """The GPU's name, or the CPU's with its cores."""
    if record.get("device") != "cpu":
        return str(record.get("device", "?"))
    where = record.get("provenance") or {}
    return f"{where.get('cpu', '?')}, {record.get('threads', '?')} threads"


def of_one_machine(past: Sequence[Past], wanted: str | None) -> list[Past]:
    """The sessions of the machine whose name holds `wanted`, or of the newest one's.

    Raises: UserError where there is none.
    """
    if not past:
        raise UserError("no earlier session has a round in it; give --records files or folders")
    machines = dict.fromkeys(p.machine for p in past)
    if wanted is None:
        name = max(past, key=lambda p: p.start_unix_s).machine
    else:
        alike = [m for m in machines if wanted.lower() in m.lower()]
        names = [wanted] if wanted in machines else alike  # one name may be part of another
        if len(names) != 1:
            raise UserError(
                f"--machine {wanted!r} is {len(names)} of the machines in the records; there are:"
                f" {'; '.join(machines)}"
            )
        name = names[0]
    return [p for p in past if p.machine == name]


def bases_of(case: Case) -> tuple[Base, ...]:
    """The bases that a session scores for the case, if no other case has needed them."""
    if kind_of(case.id) == "infer" or not case.settings.measures_quality:
        return ()
    quantized = ADAPTERS[case.adapter].quantization is not None
    kinds = (True, False) if quantized else (False,)
    return tuple((case.public().model, case.weights_dtype, kind) for kind in kinds)


def expect(cases: Iterable[Case], past: Sequence[Past]) -> tuple[list[Expected], list[Case]]:
    """What each case's rounds will take; and the cases that nothing is known of.

    Known by the case's hash; else by its name, with other settings; else by the model and method.
    """
    by_hash: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for session in past:
        for found in session.rounds:
            by_hash[found.case_hash].append(found.numbers)
            by_id[found.case_id].append(found.numbers)
            by_kind[found.kind].append(found.numbers)
    known, unknown = [], []
    for case in cases:
        kind = (case.public().model, case.method)
        for source, rounds in (
            (EXACT, by_hash.get(case.hash)),
            (OTHER_SETTINGS, by_id.get(case.id)),
            (ALIKE, by_kind.get(kind)),
        ):
            if rounds:
                known.append(_expected(case, rounds, source))
                break
        else:
            unknown.append(case)
    return known, unknown


def _expected(case: Case, rounds: list[dict[str, Any]], source: str) -> Expected:
    def median(name: str) -> float | None:
        values = [r[name] for r in rounds if r.get(name) is not None]
        return statistics.median(values) if values else None

    seconds = median("total_s")
    assert seconds is not None  # a round without it is none, see past_of
    peak = next((p for p in map(median, _PEAKS) if p is not None), None)
    return Expected(
        case, seconds, median("energy_j"), None if peak is None else round(peak), source,
        bases_of(case),
    )  # fmt: skip


def costs_of(past: Sequence[Past], dispatch_s: float = 0.0) -> Costs:
    """Medians over the whole sessions. Raises: UserError where there is none."""
    whole = [p for p in past if p.is_whole]
    if not whole:
        raise UserError(
            "none of the records is a session on one machine from start to end, which would tell"
            " what lies beside the rounds; give one with --records"
        )
    bases: dict[Base, list[float]] = defaultdict(list)
    for session in whole:
        for base, seconds in session.bases_s.items():
            bases[base].append(seconds)
    return Costs(
        statistics.median(p.start_up_s for p in whole),
        statistics.median(p.between_s for p in whole),
        {base: statistics.median(seconds) for base, seconds in bases.items()},
        dispatch_s,
    )


def check_failures(expected: Sequence[Expected], costs: Costs, failures: Failures) -> None:
    """Raise UserError where a round would hardly ever end before its device fails."""
    longest_s = max(e.seconds for e in expected) + costs.start_up_s + costs.between_s
    longest_s += math.fsum(costs.bases_s.values())
    if longest_s > MOST_LIFETIMES * failures.mean_hours * 3600:
        raise UserError(
            f"--mean-hours is {failures.mean_hours:g}, but a round takes up to"
            f" {longest_s / 3600:.2g} hours and would hardly ever end; give more"
        )


def simulate(
    expected: Sequence[Expected],
    rounds: int,
    devices: int,
    costs: Costs,
    failures: Failures | None = None,
) -> Outlook:
    """Hand out every case's rounds in order, each to the device that is free first.

    A device's first round pays the start-up, and the first that needs a base its scoring. A lost
    device takes its round with it, which is handed out again once that is known; when the device is
    back it starts anew.
    """
    failures = failures or Failures()
    dice = random.Random(failures.seed)
    waiting = deque(e for e in expected for _ in range(rounds))
    lost: list[tuple[float, int, Expected]] = []  # a heap, by when it is known
    free = [(0.0, device) for device in range(devices)]  # a heap: sorted already
    ready: list[set[Base] | None] = [None] * devices  # bases scored; None: not started

    def lifetime_s() -> float:
        return dice.expovariate(1.0) * failures.mean_hours * 3600

    def lose(device: int) -> None:
        """It is back after a while, as new."""
        back_s = dies_s[device] + failures.away_s
        dies_s[device], ready[device] = back_s + lifetime_s(), None
        heapq.heappush(free, (back_s, device))

    dies_s = [lifetime_s() for _ in range(devices)]
    driver_s = makespan_s = busy_s = lost_s = 0.0
    lost_rounds = dispatched = 0
    while waiting or lost:
        free_s, device = heapq.heappop(free)
        from_lost = bool(lost) and (lost[0][0] <= free_s or not waiting)
        start_s = max(driver_s, free_s, lost[0][0] if from_lost else 0.0) + costs.dispatch_s
        if dies_s[device] <= start_s:  # before it had anything to do
            lose(device)
            continue
        task = heapq.heappop(lost)[2] if from_lost else waiting.popleft()
        driver_s, dispatched = start_s, dispatched + 1
        seconds, scored = task.seconds + costs.between_s, ready[device]
        if scored is None:
            seconds, scored = seconds + costs.start_up_s, set()
        seconds += math.fsum(costs.bases_s.get(b, 0.0) for b in task.bases if b not in scored)
        if dies_s[device] < start_s + seconds:
            lost_rounds, lost_s = lost_rounds + 1, lost_s + dies_s[device] - start_s
            heapq.heappush(lost, (dies_s[device], dispatched, task))
            lose(device)
            continue
        ready[device] = scored | set(task.bases)
        busy_s += seconds
        makespan_s = max(makespan_s, start_s + seconds)
        heapq.heappush(free, (start_s + seconds, device))
    return Outlook(makespan_s, busy_s, lost_s, lost_rounds, dispatched * costs.dispatch_s)


def plan_lines(
    expected: Sequence[Expected],
    unknown: Sequence[Case],
    rounds: int,
    devices: int,
    past: Sequence[Past],
    costs: Costs,
    failures: Failures,
) -> list[str]:
    """The estimate in words and as a table of the longest cases."""
    outlook = simulate(expected, rounds, devices, costs, failures)
    machine, count = past[0].machine, len(expected) * rounds
    used = outlook.busy_s / devices / outlook.makespan_s
    lines = [
        f"ESTIMATE, not a measurement: {count} rounds of {len(expected)} cases on {devices} x"
        f" {machine},",
        f"from {len(past)} earlier session{'s' * (len(past) != 1)} there",
        "",
        f"wall time     {clock(outlook.makespan_s)}",
        f"device time   {clock(outlook.busy_s)} ({used:.0%} of the devices' time)",
    ]  # fmt: skip
    energies = [e.energy_j for e in expected]
    if all(e is not None for e in energies):
        joules = rounds * sum(e for e in energies if e is not None)
        lines.append(f"energy        {joules / 3.6e6:.3f} kWh in the training windows")
    else:
        missing = sum(e is None for e in energies)
        lines.append(f"energy        not known: {missing} cases have no reading of it")
    peaks = [(e.peak_bytes, e.case.id) for e in expected if e.peak_bytes is not None]
    if peaks:
        most, case_id = max(peaks)
        lines.append(f"peak memory   {most / MIB:,.0f} MiB, of {case_id}")
    if failures.mean_hours != float("inf"):
        lines.append(
            f"lost          {outlook.lost_rounds} rounds and {clock(outlook.lost_s)} to devices"
            f" that fail every {failures.mean_hours:g} hours"
        )
    if costs.dispatch_s:
        lines.append(f"dispatching   {clock(outlook.dispatch_s)} of the driver's time")
    lines += ["", *_case_lines(expected, rounds)]
    for source, why in (
        (OTHER_SETTINGS, "known with other settings, as if they cost the same"),
        (ALIKE, "not known; taken as the model's others with this method"),
    ):
        names = [e.case.id for e in expected if e.source == source]
        if names:
            lines.append(f"{why}: {', '.join(names)}")
    if unknown:
        lines.append(f"LEFT OUT, nothing like it is in the records: {_names(unknown)}")
    return lines


def _case_lines(expected: Sequence[Expected], rounds: int, most: int = 10) -> list[str]:
    longest = sorted(expected, key=lambda e: -e.seconds)[:most]
    rows = [
        [
            e.case.id, f"{rounds * e.seconds:.1f}",
            "-" if e.energy_j is None else f"{rounds * e.energy_j:,.0f}",
            "-" if e.peak_bytes is None else f"{e.peak_bytes / MIB:,.0f}", e.source,
        ]
        for e in longest
    ]  # fmt: skip
    rest = len(expected) - len(longest)
    more = [f"and {rest} shorter ones"] if rest else []
    return [*table(["longest cases", "seconds", "joules", "peak MiB", "known from"], rows), *more]


def check_lines(expected: Sequence[Expected], rounds: int, costs: Costs, real: Past) -> list[str]:
    """The estimate beside a session that was run: one device, no failures."""
    planned = simulate(expected, rounds, 1, costs)
    by_hash: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for done in real.rounds:
        by_hash[done.case_hash].append(done.numbers)
    pairs = [(e, by_hash[e.case.hash]) for e in expected if e.case.hash in by_hash]
    lines = [
        f"beside {len(pairs)} of the {len(expected)} cases in a real session on {real.machine}"
    ]
    same = by_hash.keys() == {e.case.hash for e in expected}
    if same and real.is_whole and all(len(found) == rounds for _, found in pairs):
        lines.append(
            f"wall time     {planned.makespan_s:.1f} s planned, {real.wall_s:.1f} s real:"
            f" {planned.makespan_s / real.wall_s - 1:+.1%}"
        )
    else:
        why = "it has other cases or rounds" if real.is_whole else "it was not run in one go"
        lines.append(f"wall time     not comparable: {why}")
    for label, names, planned_values in (
        ("seconds", ("total_s",), [e.seconds for e, _ in pairs]),
        ("energy", ("energy_j",), [e.energy_j for e, _ in pairs]),
        ("peak memory", _PEAKS, [e.peak_bytes for e, _ in pairs]),
    ):
        errors = []
        for value, (_, found) in zip(planned_values, pairs, strict=True):
            measured = [next((r[n] for n in names if r.get(n) is not None), None) for r in found]
            known = [float(m) for m in measured if m is not None]
            if value is not None and known:
                errors.append(abs(value / statistics.median(known) - 1))
        text = "not measured on either side"
        if errors:
            middle = statistics.median(errors)
            text = f"of a case {middle:.1%} off (median), {max(errors):.1%} at most"
        lines.append(f"{label:<13} {text}")
    return lines


def _names(cases: Sequence[Case]) -> str:
    return ", ".join(case.id for case in cases)
