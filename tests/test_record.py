"""Records: complete, strict, and their rounds kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from peftbench.metrics import METRICS, TASK_METRICS, glossary
from peftbench.record import dumps, measured, merge_rounds, write_atomically

REASONS = dict.fromkeys(METRICS, "not measured here")


def test_a_value_the_table_lacks_is_refused():
    with pytest.raises(KeyError, match="speed"):
        measured({"speed": 1.0}, REASONS)


def test_a_null_needs_a_reason():
    with pytest.raises(ValueError, match="train_s was not measured and no reason"):
        measured({}, {name: "why" for name in METRICS if name != "train_s"})


def test_nan_becomes_null_and_says_so():
    record = measured({"perplexity": math.inf, "train_s": 2.0}, REASONS)
    assert record["perplexity"] is None
    assert record["null_reasons"]["perplexity"] == "the value is inf"
    assert record["train_s"] == 2.0
    assert "train_s" not in record["null_reasons"]


def test_rounds_merge_to_their_median_and_are_kept():
    rounds = [
        measured({"train_s": s, "pairs": 7}, REASONS) | {"seed": i, "losses": [s]}
        for i, s in enumerate((5.0, 1.0, 2.0))
    ]
    merged = merge_rounds(rounds)
    assert merged["train_s"] == 2.0
    assert merged["pairs"] == 7
    assert isinstance(merged["pairs"], int)
    assert [r["train_s"] for r in merged["rounds"]] == [5.0, 1.0, 2.0]
    assert [r["seed"] for r in merged["rounds"]] == [0, 1, 2]


def test_a_metric_that_one_round_lacks_is_null_in_the_merged_record():
    rounds = [
        measured({"train_s": 1.0}, REASONS),
        measured({}, REASONS | {"train_s": "clock lost"}),
    ]
    merged = merge_rounds(rounds)
    assert merged["train_s"] is None
    assert merged["null_reasons"]["train_s"] == "clock lost"


def test_a_task_merges_to_its_medians_and_each_round_keeps_its_items():
    tasks = [
        dict.fromkeys(TASK_METRICS) | {"task_accuracy": share, "task_items": 4, "correct": items}
        for share, items in ((0.75, "1110"), (0.25, "0100"), (0.5, "0110"))
    ]
    rounds = [measured({}, REASONS) | {"tasks": {"cloze": task}} for task in tasks]
    rounds[0]["disturbances"] = ["a shared GPU"]
    merged = merge_rounds(rounds)
    assert merged["tasks"]["cloze"]["task_accuracy"] == 0.375
    assert merged["tasks"]["cloze"]["task_items"] == 4
    assert merged["tasks"]["cloze"]["task_accuracy_norm"] is None
    assert [r["tasks"]["cloze"]["correct"] for r in merged["rounds"]] == ["1110", "0100", "0110"]


def test_json_is_strict():
    with pytest.raises(ValueError, match="JSON"):
        dumps({"x": math.nan})


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "a.json"
    write_atomically(target, "old")
    with pytest.raises(TypeError):
        write_atomically(target, None)  # type: ignore[arg-type]
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", METRICS)
def test_metric_rows_are_complete(name):
    metric = METRICS[name]
    assert metric.definition.endswith(".")
    units = {"s": "_s", "bytes": "_bytes", "ratio": ("_ratio", "accuracy", "_base", "_se")}
    stem = name.removesuffix("_low").removesuffix("_high")
    if metric.unit in units and "accuracy" not in name:
        assert stem.endswith(units[metric.unit])
    assert metric.version >= 1


@pytest.mark.parametrize("name", ["README.md", "README.es.md"])
def test_readme_glossary_is_the_table(name):
    readme = Path(__file__).parent.parent / name
    assert glossary() in readme.read_text(), "run `make glossary`"


def test_glossary_is_valid_markdown_rows():
    rows = glossary().splitlines()
    assert len(rows) == len(METRICS) + len(TASK_METRICS) + 2
    assert all(row.count("|") == 6 for row in rows)
    assert json.dumps(rows)
