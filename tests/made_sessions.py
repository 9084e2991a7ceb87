"""Result files for the tests of the comparison, made of a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftbench.metrics import METRICS

VALUES = {
    "train_s": 2.0, "method_s": 2.5, "step_p50_s": 0.05, "load_s": 0.5,
    "host_peak_rss_delta_bytes": 100 * 2**20, "total_params": 1_000_000, "trainable_params": 4096,
    "adapter_bytes": 2**18, "steps": 48, "train_tokens": 13051, "learning_rate": 0.004,
    "perplexity": 12.0, "preference_accuracy": 0.75, "reward_margin": 0.8,
    "next_token_accuracy": 0.5,
}  # fmt: skip
SENTINELS = {
    "device": "cpu", "matmul_float32_flops_per_s": 2e11, "matmul_bfloat16_flops_per_s": 4e11,
    "copy_bytes_per_s": 9e9, "launch_s": 4e-6,
}  # fmt: skip
LIBRARIES = {"torch": "2.13.0", "peft": "0.21.2"}
OUTCOMES = "1110" * 25


def case(name: str, *, hash_: str = "", seeds: int = 1, **changes: Any) -> dict[str, Any]:
    """A case's record. Every key of `changes` replaces a number or a fact of all rounds."""
    model, adapter, method = [*name.split("-"), "?", "?"][:3]
    numbers = dict.fromkeys(METRICS) | VALUES
    numbers |= {k: v for k, v in changes.items() if k in METRICS}
    facts = {k: v for k, v in changes.items() if k not in METRICS}
    rounds = [
        {"seed": seed, "disturbances": facts.get("disturbances", []), "start_unix_s": 1.7e9,
         "items": {"preference_correct": facts.get("outcomes", OUTCOMES)},
         "tasks": facts.get("tasks", {}), **numbers}
        for seed in range(seeds)
    ]  # fmt: skip
    return {
        "format": 1, "status": "ok", "case_id": name, "case_hash": hash_ or f"{name:_<12}"[:12],
        "case": {"model": model, "adapter": adapter, "method": method, "settings": {}},
        "device": "cpu", "threads": 2, "data_digest": "d", "weights_hash": "w",
        "null_reasons": {n: "not here" for n, v in numbers.items() if v is None},
        **numbers, "rounds": rounds, **facts,
    }  # fmt: skip


def task(outcomes: str, digest: str = "t") -> dict[str, Any]:
    """What a record has of one task."""
    share = outcomes.count("1") / len(outcomes)
    return {"task_accuracy": share, "correct": outcomes, "digest": digest}


def stopped(name: str, status: str, reason: str = "out of memory") -> dict[str, Any]:
    return {"case_id": name, "case_hash": f"{name:_<12}"[:12], "status": status, "phase": "train",
            "reason": reason}  # fmt: skip


def session(
    cases: list[dict[str, Any]], *, run_id: str = "run-a", commit: str = "a" * 40,
    start_unix_s: float = 1.7e9, libraries: dict[str, str] | None = None,
    sentinels: dict[str, Any] | None = None, **of_peftbench: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `--benchmark-json` writes."""
    ok = [c for c in cases if c["status"] == "ok"]
    for number, record in enumerate(ok):
        record["run_id"] = run_id
        record["provenance"] = {
            "commit": commit, "commit_dirty": False, "cpu": "Some CPU",
            "libraries": libraries or LIBRARIES, "library_commits": {},
        }  # fmt: skip
        for entry in record["rounds"]:
            entry["start_unix_s"] = start_unix_s + number
    listed = [{k: c[k] for k in ("case_id", "case_hash", "status", "phase", "reason") if k in c}
              for c in cases]  # fmt: skip
    ours = {
        "format": 1, "run_id": run_id, "metric_versions": dict.fromkeys(METRICS, 1),
        "sentinels": {"start": sentinels or SENTINELS, "end": None}, "cases": listed,
    }  # fmt: skip
    return {
        "machine_info": {}, "commit_info": {}, "benchmarks": [{"extra_info": c} for c in ok],
        "version": "5.3.1", "peftbench": ours | of_peftbench,
    }  # fmt: skip


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path
