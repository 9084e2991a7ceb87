"""Result files for the report's tests: made up, but of the form that `pytest bench` writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from peftbench.metrics import METRICS, PHASES

NO_GPU = "the run used cpu, no GPU"
ADAPTERS = ("full", "lora", "qlora", "ia3", "prefix")
MIB = 2**20
HOSTILE = (
    '<script>window.pwned=1</script></script><img src=x onerror="window.pwned=1">\'`%{x}'
    "\x1b\x00\u202e\ud800&lt;"
)


def record(model: str, adapter: str, method: str, number: int = 0, **values: Any) -> dict:
    """A round's record of a CPU run: case `number` takes 1 + number seconds and MiB."""
    draw = random.Random(number)
    measured = {
        "train_s": 1.0 + number, "method_s": 1.5 + number, "tokens_per_s": 5000.0 + number,
        "host_peak_rss_bytes": (300 + number) * MIB,
        "host_peak_rss_delta_bytes": (100 + number) * MIB,
        "trainable_params": 1000 * (1 + number), "trainable_ratio": 0.01, "adapter_bytes": 2**18,
        "perplexity": 20.0 - number / 20, "perplexity_se": 0.5, "perplexity_base": 40.0,
        "bits_per_byte": 1.2, "preference_accuracy": 0.7 + number / 1000,
        "preference_accuracy_se": 0.02, "preference_accuracy_base": 0.5,
    } | values  # fmt: skip
    case_id = f"{model}-{adapter}-{method}"
    return {
        "format": 1, "status": "ok", "case_id": case_id, "case_hash": f"{hash_of(case_id):012x}",
        "case": {"model": model, "adapter": adapter, "method": method,
                 "settings": {"pairs": 384, "data": "tinywiki", "batch_size": 8}},
        "seed": 0, "device": "cpu", "threads": 2, "run_id": "20260102T030405Z-aaaaaa",
        **{name: measured.get(name) for name in METRICS},
        "null_reasons": {name: NO_GPU for name in METRICS if measured.get(name) is None},
        "disturbances": [],
        "phases": {n: {"seconds": 0.5, "host_peak_rss_bytes": (210 + 10 * i) * MIB,
                       "torch_peak_reserved_bytes": None} for i, n in enumerate(PHASES)},
        "losses": [2.0 / (1 + i / 10) + draw.gauss(0, 0.1) for i in range(64)],
        "samples": [{"prompt": f"The ship {i}", "before": "is a gate.", "after": f"is {adapter}."}
                    for i in range(4)],
        "provenance": {
            "peftbench": "0.1.0", "commit": "0" * 40, "commit_dirty": False, "python": "3.11.7",
            "libraries": {"torch": "2.13.0", "peft": "0.21.2"}, "library_commits": {},
            "platform": "Linux x86_64", "cpu": "Some CPU", "cpu_cores": 2,
            "memory_bytes": 8 * 2**30,
        },
    }  # fmt: skip


def hash_of(text: str) -> int:
    """The same in every process, other than hash()."""
    return int.from_bytes(text.encode("utf-8", "replace")[-6:], "big")


def session(
    path: Path, records: list[dict], *, number: int = 0, failed: list[dict] | None = None
) -> Path:
    """A session file; `number` gives its commit, its run and its time."""
    commit = f"{number + 1:x}" * 40
    for r in records:
        r["run_id"] = f"20260102T0304{number:02d}Z-aaaaaa"
        r["start_unix_s"] = 1_767_000_000.0 + 86400 * number
        r["provenance"] = r["provenance"] | {"commit": commit[:40]}
    listed = [{k: r[k] for k in ("case_id", "case_hash", "status")} for r in records]
    data = {
        "benchmarks": [{"extra_info": r} for r in records],
        "peftbench": {"format": 1, "run_id": "r", "sentinels": {},
                      "metric_versions": dict.fromkeys(METRICS, 1),
                      "cases": [*listed, *(failed or [])]},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def many(path: Path, models: int = 10, **options: Any) -> Path:
    """models x 5 adapters x 4 methods; a fifth of the cases has no perplexity."""
    records = []
    for m in range(models):
        for adapter in ADAPTERS:
            for method in ("sft", "dpo", "orpo", "ppo"):
                number = len(records)
                gone = {"perplexity": None} if number % 5 == 4 else {}
                records.append(record(f"model-{m}", adapter, method, number, **gone))
    return session(path, records, **options)


def hostile(path: Path) -> Path:
    """Every text that a record holds tries to become markup."""
    one = record(HOSTILE, HOSTILE, HOSTILE)
    one["phases"][HOSTILE] = {"seconds": 1.0, "host_peak_rss_bytes": 220 * MIB}
    one["null_reasons"] = dict.fromkeys(one["null_reasons"], HOSTILE)
    one["disturbances"] = [HOSTILE]
    one["samples"] = [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}]
    one["case"]["settings"] = {HOSTILE: HOSTILE}
    one["provenance"] |= {
        "libraries": {HOSTILE: HOSTILE}, "cpu": HOSTILE, "platform": HOSTILE, "python": HOSTILE,
        "environment": {HOSTILE: HOSTILE}, "container_image": HOSTILE,
    }  # fmt: skip
    two = record("model", "lora", HOSTILE, 1)
    two["provenance"] = one["provenance"]
    failed = {"case_id": f"{HOSTILE}-lora-sft", "case_hash": HOSTILE, "status": "failed",
              "phase": HOSTILE, "reason": HOSTILE}  # fmt: skip
    return session(path, [one, two], failed=[failed])
