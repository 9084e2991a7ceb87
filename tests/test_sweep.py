"""The table of a sweep: the best rate of each case by what its method optimises."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import sweep


def record(case_id, method, **values):
    return {"case_id": case_id, "case": {"method": method}, "status": "ok"} | values


def test_the_best_rate_is_bold_and_a_divergence_is_named():
    found = {
        "1e-3": [record("a-sft", "sft", nll_per_token=2.0, nll_per_token_base=3.0),
                 record("a-dpo", "dpo", preference_accuracy=0.8, preference_accuracy_base=0.5)],
        "1e-2": [record("a-sft", "sft", nll_per_token=1.5, nll_per_token_base=3.0),
                 {"case_id": "a-dpo", "case": {"method": "dpo"}, "status": "invalid"}],
    }  # fmt: skip
    assert sweep.table(found) == [
        "| case | metric | base | 1e-3 | 1e-2 |",
        "|---|---|--:|--:|--:|",
        "| a-sft | nll_per_token | 3 | 2 | **1.5** |",
        "| a-dpo | preference_accuracy | 0.5 | **0.8** | invalid |",
    ]
