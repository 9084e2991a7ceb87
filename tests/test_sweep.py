"""The plan and the table of a sweep: the best rate of each case by what its method optimises."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import sweep

from peftbench.adapters import ADAPTERS
from peftbench.errors import UserError
from peftbench.models import table_rate


def row(method, factor, value, base=3.0, status="ok", seed=0):
    metric = sweep.JUDGED[method]
    return {"model": "m", "adapter": "a", "method": method, "metric": metric, "factor": factor,
            "learning_rate": 1e-3 * factor, "seed": seed, "status": status, "value": value,
            "base": base if value is not None else None}  # fmt: skip


def test_the_best_rate_is_bold_and_a_divergence_is_named():
    rows = [
        row("sft", 1.0, 2.0), row("sft", 4.0, 1.5, seed=0), row("sft", 4.0, 1.7, seed=1),
        row("dpo", 1.0, 0.8, base=0.5), row("dpo", 4.0, None, status="invalid"),
    ]  # fmt: skip
    assert sweep.table(rows) == [
        "| case | metric | base | x 1 | x 4 | rate of x 1 | best rate |",
        "|---|---|--:|--:|--:|--:|--:|",
        "| m-a-dpo | preference_accuracy | 0.5 | **0.8** | invalid | 0.001 | 0.001 |",
        "| m-a-sft | nll_per_token | 3 | 2 | **1.6** | 0.001 | 0.004 |",
    ]


def test_the_table_rates_come_first_and_then_the_nearest_ones():
    options = argparse.Namespace(
        preset="quick", models="tiny-gpt2", adapters=["ln", "pissa"], methods=["dpo"],
        factors=[0.25, 1.0, 2.0], seeds=1, **dict.fromkeys(o.dest for o in sweep.SETTINGS),
    )  # fmt: skip
    found = [(f, c.adapter, c.settings.learning_rate) for f, c in sweep.plan(options)]
    assert found == [
        (f, a, pytest.approx(f * table_rate("tiny-gpt2", a, "dpo"), rel=1e-2))
        for f in (1.0, 2.0, 0.25)
        for a in ("ln", "pissa")
    ]
    assert len({c.hash for _, c in sweep.plan(options)}) == 6
    options.peftbench_pairs = 64
    assert {c.settings.pairs for _, c in sweep.plan(options)} == {64}
    assert sweep.changes(options) == {"pairs": 64}
    options.peftbench_pairs = 0
    with pytest.raises(UserError, match="pairs is 0; it must be at least 1"):
        sweep.plan(options)


def test_what_is_swept_unless_said_is_in_the_table_and_an_unknown_name_is_refused():
    assert set(sweep.UNTUNED.split(",")) <= set(ADAPTERS)
    with pytest.raises(UserError, match="unknown adapter 'pisa'; did you mean pissa"):
        sweep.names_of("adapter", "pisa", list(ADAPTERS))
