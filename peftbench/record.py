"""What one round of one case measured: plain values, strict JSON, written at once.

Format history: 1 (first).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftbench.metrics import METRICS, TASK_METRICS, Kind, metrics_of

FORMAT = 1

STATUSES = (
    "ok", "oom", "timeout", "crashed", "failed", "invalid", "skipped", "interrupted",
)  # fmt: skip


def measured(
    values: dict[str, float | int | None], reasons: dict[str, str], kind: Kind = "train"
) -> dict[str, Any]:
    """Every metric that a case of this kind measures: its value, or null with a reason.

    `reasons` gives the reason of each null; a value that is not finite becomes null and says so.
    Raises: KeyError for a name that is none of them, ValueError for a null without a reason.
    """
    unknown = sorted(set(values) - set(metrics_of(kind)))
    if unknown:
        raise KeyError(f"not in METRICS: {', '.join(unknown)}")
    out: dict[str, Any] = {}
    nulls: dict[str, str] = {}
    for name in metrics_of(kind):
        value = values.get(name)
        if value is not None and not math.isfinite(value):
            nulls[name], value = f"the value is {value}", None
        elif value is None:
            if name not in reasons:
                raise ValueError(f"{name} was not measured and no reason is given")
            nulls[name] = reasons[name]
        out[name] = value
    return out | {"null_reasons": nulls}


def add_max_and_sum(ranks: dict[str, Any], name: str) -> None:
    """Beside what each rank has of a quantity the largest and the sum; None where one has none."""
    values = [rank[name] for rank in ranks["each"]]
    known = None not in values
    ranks["max"][name] = max(values) if known else None
    ranks["sum"][name] = sum(values) if known else None


def merge_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several rounds: each metric's median, all rounds kept under `rounds`.

    Everything else (provenance, samples, phases) is the first round's. A metric that is null in
    any round is null, with that round's reason. Rounds that were disturbed (a shared or throttled
    device) are kept but left out of the medians, unless all of them were.
    """
    calm = [r for r in rounds if not r.get("disturbances")] or rounds
    first = rounds[0]
    merged = dict(first)
    nulls = dict(first["null_reasons"])
    for name in [n for n in METRICS if n in first]:
        values = [r[name] for r in calm]
        if None in values:
            merged[name] = None
            nulls[name] = calm[values.index(None)]["null_reasons"][name]
        else:
            nulls.pop(name, None)
            middle = statistics.median(values)
            merged[name] = int(middle) if isinstance(values[0], int) and middle % 1 == 0 else middle
    merged["null_reasons"] = nulls
    merged["tasks"] = {
        name: _merged_task([r["tasks"][name] for r in calm]) for name in first.get("tasks", {})
    }
    keep = ("seed", "losses", "ppo_history", "compilation", "items", "tasks", "start_unix_s",
            "disturbances", "dispatch", *METRICS)  # fmt: skip
    merged["disturbances"] = sorted({d for r in rounds for d in r.get("disturbances", [])})
    merged["calm_rounds"] = sum(not r.get("disturbances") for r in rounds)
    merged["rounds"] = [{k: r[k] for k in keep if k in r} for r in rounds]
    return merged


def _merged_task(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One task over the rounds: medians; which items came out right is the first round's."""
    merged = dict(rounds[0])
    for name in TASK_METRICS:
        values = [r[name] for r in rounds]
        merged[name] = None if None in values else statistics.median(values)
    return merged


def dumps(data: Any) -> str:
    """Strict JSON: a NaN or an infinity raises ValueError instead of being written."""
    return json.dumps(data, allow_nan=False, ensure_ascii=False, indent=1)


def write_atomically(path: Path, text: str) -> None:
    """The file has either its old content or all of the new."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new empty file beside `path` to write to; at the end it is on the disk and takes its place,
    or, where that failed, is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o644)  # mkstemp's files are their owner's alone
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_half_written(folder: Path) -> None:
    """What a killed run was writing, and the scratch folders of its children."""
    for path in folder.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
