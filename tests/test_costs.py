"""The table of PPO's cost: its arithmetic on records made by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from costs import cost_rows


def record(adapter: str, method: str, method_s: float, **changes: object) -> dict:
    return {
        "status": "ok", "case": {"model": "m", "adapter": adapter, "method": method},
        "method_s": method_s, "pairs": 100, "peak_gpu_memory_bytes": None,
        "torch_peak_reserved_bytes": None, "host_peak_rss_delta_bytes": 50 * 2**20,
        "preference_accuracy_base": 0.5, "preference_accuracy": 0.75, "true_reward_base": None,
        "true_reward": None, "kl_to_base_nats_per_token": 1.0,
    } | changes  # fmt: skip


def test_a_method_at_a_quarter_of_ppos_seconds_reads_four_times_the_pairs():
    records = [
        record("lora", "dpo", 5.0),
        record("lora", "ppo", 20.0, true_reward_base=0.1, true_reward=0.2),
        record("ia3", "dpo", 1.0),  # no PPO to compare it with
        record("full", "ppo", 1.0, status="oom"),
    ]
    assert cost_rows(records) == [
        "| m, lora | dpo | 5.0 | 25% | 400 | 50 | 50.0% -> 75.0% | - | 1.00 |",
        "| m, lora | ppo | 20.0 | 100% | 100 | 50 | 50.0% -> 75.0% | 0.100 -> 0.200 | 1.00 |",
    ]
