"""How each metric is compared: its class and margin, what a project changes, what it has accepted.

[tool.peftbench.metrics.train_s]                # pyproject.toml
margin = 0.05
cases = { "*-qlora-*" = { margin = 0.10 } }

[[change]]                                      # peftbench-acknowledged.toml
metric = "trainable_params"
case = "*-lora-*"
commit = "a1b2c3d"
reason = "rank 16 is the new default"
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from peftbench.errors import UserError, unknown_name
from peftbench.metrics import (
    METRICS,
    TASK_METRICS,
    Direction,
    MetricClass,
    kind_of,
    metric_of,
    metrics_of,
)
from peftbench.summary import MIB

ACKNOWLEDGED_FILE = "peftbench-acknowledged.toml"
GATED_CLASSES = ("exact", "tight", "noisy", "seeded")

# Compared only where a project asks (`ignore = false`): each is a part or another form of one that
# is compared, or too short to be timed.
NOT_GATED: dict[str, str] = {
    "first_step_s": "a single step",
    "step_p95_s": "a few steps of a round decide it",
    "attach_s": "milliseconds",
    "data_s": "data preparation, not the method's",
    "reference_s": "a part of method_s",
    "warmup_s": "a part of method_s",
    "sft_s": "a part of method_s",
    "reward_model_s": "a part of method_s",
    "rollout_s": "a part of train_s",
    "score_s": "a part of train_s",
    "update_s": "a part of train_s",
    "evaluate_s": "the benchmark's own evaluation",
    "save_s": "milliseconds",
    "total_s": "the sum of all phases",
    "nvml_process_peak_bytes": "peak_gpu_memory_bytes is this or the next",
    "nvml_device_peak_bytes": "peak_gpu_memory_bytes is this or the one before",
    "host_peak_rss_bytes": "host_peak_rss_delta_bytes plus what the imports take",
    "nll_per_token": "the logarithm of perplexity",
    "bits_per_byte": "the logarithm of perplexity, by the byte",
}
# What PPO's own samples decide: bit for bit the same on one CPU, and never on a GPU or after an
# upgrade. They are compared of all other methods.
OF_SAMPLES = tuple((name, "*ppo", {"ignore": True}) for name in ("train_tokens", "train_flops"))
LEAST_BYTES = {"torch": 2 * MIB, "nvml": 64 * MIB, "peak": 64 * MIB, "host": 16 * MIB}


@dataclass(frozen=True)
class Rule:
    """`margin` is relative; for accuracies, and where `is_difference`, it is absolute.

    `least_bytes` is the margin of a memory metric below which its own never goes.
    """

    metric: str
    unit: str
    metric_class: MetricClass
    direction: Direction
    margin: float
    least_bytes: int
    ignore: bool

    @property
    def is_difference(self) -> bool:
        """Shares differ by points, not by ratios; perplexities, nats and bits do not."""
        relative = self.unit in ("nats", "bits") or self.metric == "perplexity"
        return self.metric_class == "seeded" and not relative

    @property
    def sign(self) -> float:
        """What turns a change into a worsening."""
        return -1.0 if self.direction == "higher" else 1.0


@dataclass(frozen=True)
class Acknowledged:
    """A change that somebody has accepted."""

    metric: str
    case: str
    commit: str
    reason: str

    def covers(self, metric: str, case_id: str) -> bool:
        return fnmatch.fnmatchcase(metric, self.metric) and fnmatch.fnmatchcase(case_id, self.case)


@dataclass(frozen=True)
class Rules:
    """What holds for a project; `overrides` are (metric, case pattern, keys) in file order."""

    overrides: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    acknowledged: tuple[Acknowledged, ...] = ()
    session_noise_ratio: float = 0.02

    def of(self, metric: str, case_id: str) -> Rule:
        rule = default_rule(metric)
        for name, pattern, keys in (*OF_SAMPLES, *self.overrides):
            if name in (metric, metric.partition(":")[0]) and fnmatch.fnmatchcase(case_id, pattern):
                rule = replace(rule, **keys)
        return rule

    def gated(self, case_id: str, tasks: Iterable[str] = ()) -> list[Rule]:
        """The rules of every metric of the case that is compared, in the order of METRICS, then
        those of the metrics of its `tasks`."""
        names = [*metrics_of(kind_of(case_id)), *sorted(tasks)]
        rules = (self.of(name, case_id) for name in names)
        return [r for r in rules if not r.ignore and r.metric_class in GATED_CLASSES]


@cache
def default_rule(name: str) -> Rule:
    metric = metric_of(name)
    least = LEAST_BYTES.get(name.partition("_")[0], 0) if metric.unit == "bytes" else 0
    return Rule(
        name, metric.unit, metric.metric_class, metric.direction, metric.margin_ratio,
        least if metric.metric_class == "tight" else 0, name in NOT_GATED,
    )  # fmt: skip


def read_rules(start: Path) -> Rules:
    """The rules of the project around a folder: its pyproject.toml and what that names.

    Raises: UserError for a name, key or value that means nothing.
    """
    folders = [start.resolve(), *start.resolve().parents]
    root = next((f for f in folders if (f / "pyproject.toml").is_file()), None)
    if root is None:
        return Rules(acknowledged=read_acknowledged(start / ACKNOWLEDGED_FILE))
    file = root / "pyproject.toml"
    tool = _toml(file).get("tool", {}).get("peftbench", {})
    compare = tool.get("compare", {})
    for key in compare.keys() - {"acknowledged", "session_noise"}:
        raise unknown_name(f"key of [tool.peftbench.compare] in {file.name}", key,
                           ["acknowledged", "session_noise"])  # fmt: skip
    named = compare.get("acknowledged")
    if named is not None and not (root / str(named)).is_file():
        raise UserError(f"{file.name} names {named!r} as acknowledged changes: no such file")
    return Rules(
        overrides=tuple(_overrides(file.name, tool.get("metrics", {}))),
        acknowledged=read_acknowledged(root / (named or ACKNOWLEDGED_FILE)),
        session_noise_ratio=_ratio(file.name, "session_noise", compare.get("session_noise", 0.02)),
    )


def _overrides(file: str, metrics: Any) -> list[tuple[str, str, dict[str, Any]]]:
    found = []
    for name, given in metrics.items():
        if name not in METRICS and name.partition(":")[0] not in TASK_METRICS:
            raise unknown_name(f"metric in [tool.peftbench.metrics] of {file}", name, METRICS)
        if not isinstance(given, dict):
            raise UserError(f"{file}: {name} is {given!r}; write {{ margin = 0.05 }}")
        cases = given.get("cases", {})
        general = {k: v for k, v in given.items() if k != "cases"}
        for pattern, keys in {"*": general, **cases}.items():
            found.append((name, pattern, _checked_keys(f"{file}: {name}", keys)))
    return found


def _checked_keys(where: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Rule out of `margin`, `class` and `ignore`."""
    out: dict[str, Any] = {}
    for key, value in keys.items():
        if key == "margin":
            out["margin"] = _ratio(where, key, value)
        elif key == "class":
            if value not in get_args(MetricClass):
                raise unknown_name(f"class for {where}", str(value), get_args(MetricClass))
            out["metric_class"] = value
        elif key == "ignore" and isinstance(value, bool):
            out["ignore"] = value
        elif key == "ignore":
            raise UserError(f"{where}: ignore is {value!r}; it must be true or false")
        else:
            raise unknown_name(f"key for {where}", key, ["margin", "class", "ignore", "cases"])
    return out


def _ratio(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10:
        raise UserError(f"{where}: {key} is {value!r}; it must be a ratio such as 0.05")
    return float(value)


def read_acknowledged(file: Path) -> tuple[Acknowledged, ...]:
    """The entries of a file of accepted changes; none where there is no file.

    Raises: UserError for an entry that lacks a key or whose metric does not exist.
    """
    if not file.is_file():
        return ()
    entries = _toml(file).get("change", [])
    found = []
    for number, entry in enumerate(entries, start=1):
        where = f"{file.name}, change {number}"
        for key in ("metric", "case", "commit", "reason"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                raise UserError(f"{where}: {key} is missing; give metric, case, commit and reason")
        family = entry["metric"].partition(":")[0]
        if not fnmatch.filter([*METRICS, *TASK_METRICS, "status"], family):
            raise unknown_name(f"metric in {where}", entry["metric"], METRICS)
        if len(entry["commit"]) < 7 and "==" not in entry["commit"]:
            raise UserError(
                f"{where}: commit is {entry['commit']!r}; give 7 or more of its digits, or"
                " library==version"
            )
        found.append(Acknowledged(**{k: entry[k] for k in ("metric", "case", "commit", "reason")}))
    return tuple(found)


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file.name} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file.name} is no valid TOML: {error}") from None
