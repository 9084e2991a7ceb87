"""A case as the page shows it: the numbers, why one is missing, its curve and its phases."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from peftbench.adapters import ADAPTERS
from peftbench.compare.load import CaseRow
from peftbench.compare.pairing import value
from peftbench.methods import INFER, METHODS
from peftbench.metrics import METRICS, kind_of, phase_names
from peftbench.report.sources import Part
from peftbench.summary import MEMORY_SOURCES

MEMORY = {metric: words for words, metric in MEMORY_SOURCES.items()}
"""The peak to show, first that was measured; as `peftbench show` chooses it."""

PHASE_MEMORY = {
    "nvml": "GPU memory that NVML saw",
    "torch_peak_reserved_bytes": "GPU memory that torch reserved",
    "host_peak_rss_bytes": "resident memory beyond that after the imports (no GPU)",
}
CURVES = {
    "loss": ("optimiser step", "loss, nats"),
    "reward": ("update", "mean reward of the sampled completions"),
}
"""What a training curve shows, by axis: PPO's loss says nothing of its progress."""

CURVE_POINTS = 120  # of a training curve: what a panel of a few hundred pixels can show
SMOOTHED_SHARE = 0.1  # of the steps


@dataclass(frozen=True)
class Case:
    """`values` has every metric; the reason of each None is in `reasons`."""

    case_id: str
    case_hash: str
    model: str
    adapter: str
    method: str
    status: str
    reason: str  # of a case that did not end ok
    values: dict[str, float | None]
    reasons: dict[str, str]
    memory: str | None  # the metric of MEMORY that is its peak
    phases: tuple[tuple[str, float | None, float | None], ...]  # name, seconds, bytes at the peak
    phase_memory: str | None  # a key of PHASE_MEMORY
    curve_kind: str  # a key of CURVES
    curve: tuple[tuple[int, float], ...]  # step and smoothed value
    disturbances: tuple[str, ...]
    rounds: int
    record: dict[str, Any]

    @property
    def is_inference(self) -> bool:
        return kind_of(self.case_id) == "infer"

    @property
    def memory_bytes(self) -> float | None:
        return None if self.memory is None else self.values[self.memory]


def cases_of(part: Part) -> list[Case]:
    """The newest session's cases, in the order of the file."""
    return [case_of(row, part.records[key]) for key, row in part.newest.cases.items()]


def case_of(row: CaseRow, record: dict[str, Any]) -> Case:
    model, adapter, method = axes_of(row)
    values = {name: value(row, name) for name in METRICS}
    memory = next((name for name in MEMORY if values[name] is not None), None)
    source, phases = phases_of(record)
    return Case(
        row.case_id, row.case_hash, model, adapter, method, row.status, reason_of(row, record),
        values, {n: null_reason(row, n) for n in METRICS if values[n] is None}, memory, phases,
        source, *curve_of(record), disturbances_of(record), len(row.rounds), record,
    )  # fmt: skip


def axes_of(row: CaseRow) -> tuple[str, str, str]:
    """Model, adapter and method; out of the id where a case that failed does not say them."""
    found = (row.axes["model"], row.axes["adapter"], row.axes["method"])
    if "?" not in found:
        return found
    model, _, method = row.case_id.rpartition("-")
    model, _, adapter = model.rpartition("-")
    known = model and adapter in ADAPTERS and method in (*METHODS, INFER)
    return (model, adapter, method) if known else found


def reason_of(row: CaseRow, record: dict[str, Any]) -> str:
    if row.status == "ok":
        return ""
    phase = record.get("phase")
    return (f"in {phase}: " if phase else "") + (row.reason or "no reason is given")


def null_reason(row: CaseRow, metric: str) -> str:
    if row.status != "ok":
        return f"the case ended as {row.status}"
    for entry in row.rounds:
        if metric in entry.broken:
            return entry.broken[metric]
    kind = kind_of(row.case_id)
    if kind not in METRICS[metric].kinds:
        return f"not a number of a case that {'trains' if kind == 'train' else 'only answers'}"
    return row.null_reasons.get(metric, "the file is older than this metric")


def phases_of(
    record: dict[str, Any],
) -> tuple[str | None, tuple[tuple[str, float | None, float | None], ...]]:
    """(key of PHASE_MEMORY, seconds and peak of each phase that ran, in order)."""
    phases = record.get("phases") or {}
    order = phase_names(kind_of(str(record.get("case_id", ""))))
    names = [n for n in order if n in phases] + [n for n in phases if n not in order]
    peaks = {source: phase_peaks(record, phases, source) for source in PHASE_MEMORY}
    source = next((s for s, found in peaks.items() if any(found.values())), None)
    known = peaks[source] if source else {}
    return source, tuple((n, number(phases[n].get("seconds")), known.get(n)) for n in names)


def phase_peaks(
    record: dict[str, Any], phases: dict[str, Any], source: str
) -> dict[str, float | None]:
    """Bytes by phase; on the host without what the imports alone take."""
    if source == "nvml":
        return nvml_peaks(record)
    found = {name: number(phase.get(source)) for name, phase in phases.items()}
    if source != "host_peak_rss_bytes":
        return found
    peak, growth = (number(record.get(n)) for n in (source, "host_peak_rss_delta_bytes"))
    start = peak - growth if peak is not None and growth is not None else 0.0
    return {n: None if size is None else max(size - start, 0.0) for n, size in found.items()}


def nvml_peaks(record: dict[str, Any]) -> dict[str, float | None]:
    """The process's own peak by phase on the device that trained, else the device's."""
    gpu = record.get("gpu") or {}
    own = [d for d in gpu.get("devices") or [] if d.get("uuid") == gpu.get("device_uuid")]
    found: dict[str, float | None] = {}
    for name, phase in (own[0].get("phases") or {}).items() if own else ():
        sizes = (number(phase.get(f"nvml_{of}_peak_bytes")) for of in ("process", "device"))
        found[name] = next((size for size in sizes if size is not None), None)
    return found


def curve_of(record: dict[str, Any]) -> tuple[str, tuple[tuple[int, float], ...]]:
    """(key of CURVES, points): step from 1 and a running mean over SMOOTHED_SHARE of the steps.

    Rounds are averaged; where they differ in length it is the first alone.
    """
    rounds = record.get("rounds") or [record]
    kind = "reward" if any(r.get("ppo_history") for r in rounds) else "loss"
    series = [found for r in rounds if (found := seen_in(r, kind))]
    if not series:
        return kind, ()
    if len({len(found) for found in series}) > 1:
        series = series[:1]
    means = [mean_of(at) for at in zip(*series, strict=True)]
    reach = max(round(SMOOTHED_SHARE * len(means)), 1)
    smooth = [mean_of(tuple(means[max(i - reach + 1, 0) : i + 1])) for i in range(len(means))]
    stride = -(-len(smooth) // CURVE_POINTS)
    kept = sorted({*range(0, len(smooth), stride), len(smooth) - 1})
    return kind, tuple((i + 1, v) for i in kept if (v := smooth[i]) is not None)


def seen_in(entry: dict[str, Any], kind: str) -> list[float | None]:
    """One round's values by step."""
    if kind == "reward":
        return [number(row.get("reward_mean")) for row in entry.get("ppo_history") or []]
    return [number(loss) for loss in entry.get("losses") or []]


def mean_of(values: tuple[float | None, ...]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def number(value: Any) -> float | None:
    """A finite number, or nothing: files may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None


def disturbances_of(record: dict[str, Any]) -> tuple[str, ...]:
    found = record.get("disturbances")
    return tuple(str(d) for d in found) if isinstance(found, list) else ()
