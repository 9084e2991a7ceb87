"""How cost grows: what the table says of records with known times and operations."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import growth

from peftbench.errors import UserError


def record(step_s: float, flops: float, **changes: Any) -> dict[str, Any]:
    """Six steps, two of which warm up, on a machine of 100 operations a second."""
    timed_s = 4 * step_s
    return {
        "status": "ok", "steps": 6, "train_flops": 4 * flops, "flops_per_s": flops / step_s,
        "mfu_ratio": 4 * flops / timed_s / 100, "step_p50_s": step_s, "total_params": 1000,
        "peak_gpu_memory_bytes": None, "torch_peak_reserved_bytes": None,
        "host_peak_rss_delta_bytes": 3 * 2**20, "disturbances": [],
    } | changes  # fmt: skip


def measured(points: list[tuple[int, int, float, float]]) -> list[Any]:
    return [growth.measured_of("m", b, n, record(s, f)) for b, n, s, f in points]


def test_a_step_and_its_floor_are_the_records():
    (found,) = measured([(4, 128, 2.0, 150.0)])
    assert found.cost.machine_flops_per_s == pytest.approx(100)
    assert found.cost.tokens_per_s == 256
    assert found.cost.flops == 150
    unknown = growth.measured_of("m", 4, 128, record(2.0, 150.0, mfu_ratio=None))
    assert unknown.cost.machine_flops_per_s is None
    assert growth.best_rate([found, unknown]) == pytest.approx(100)
    assert growth.best_rate([unknown]) is None


def test_what_grows_faster_than_its_work_is_said():
    found = measured([
        (1, 128, 1.0, 100.0), (2, 128, 2.0, 200.0), (4, 128, 6.0, 400.0), (4, 64, 2.9, 190.0),
        (4, 256, 13.0, 850.0),
    ])  # fmt: skip
    found.append(growth.measured_of("m", 4, 512, {"status": "oom", "reason": "out of memory"}))
    lines = growth.table(found)[2:]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    assert [(c[1], c[2], c[7], c[9]) for c in cells[:-1]] == [
        ("1", "128", "", ""), ("2", "128", "1.00", ""), ("4", "128", "1.50", "more than linear"),
        ("4", "64", "", ""), ("4", "128", "0.98", ""), ("4", "256", "1.02", ""),
    ]  # fmt: skip
    assert [c[6] for c in cells[:3]] == ["1.00", "1.00", "1.50"]
    assert cells[-1][3] == "oom"
    assert cells[-1][-1] == "out of memory"


def test_the_picture_has_every_model_with_its_floor_along_three_axes():
    found = [m for n in ("a", "b") for m in (
        growth.measured_of(n, 4, 128, record(2.0, 150.0)),
        growth.measured_of(n, 8, 128, record(4.0, 300.0)),
        growth.measured_of(n, 4, 256, record(4.1, 310.0)),
    )]  # fmt: skip
    lines = growth.figure(found, "title").data
    assert [line.name for line in lines if line.xaxis == "x"] == ["a", "a: floor", "b", "b: floor"]
    by_length = [line for line in lines if line.xaxis == "x2"]
    assert [tuple(line.x) for line in by_length] == [(128, 256)] * 4
    assert tuple(by_length[1].y) == pytest.approx((1.5, 3.1))
    assert tuple(lines[-1].y) == pytest.approx((1.5, 1.5))


def test_every_point_of_both_axes_is_a_case_once():
    points = growth.plan(["tiny-gpt2"])
    assert len(points) == len(set(points)) == len(growth.BATCHES) + len(growth.LENGTHS) - 1
    options = SimpleNamespace(adapter="lora", method="sft", dtype="float32", device="cpu")
    settings = growth.case_of("tiny-gpt2", options, 16, 128).settings
    assert (settings.batch_size, settings.pairs) == (16, 16 * growth.STEPS)
    assert settings.prompt_length + settings.completion_length == 128
    with pytest.raises(UserError, match="context"):
        growth.case_of("tiny-gpt2", options, 4, 1024)


def test_what_was_written_is_read_back(tmp_path):
    found = [*measured([(4, 128, 2.0, 150.0)]), growth.Measured("m", 8, 128, "oom", "why")]
    file = tmp_path / "growth.json"
    facts = {"schema": "peftbench-growth", "title": "t"}
    file.write_text(json.dumps(facts | {"cases": [asdict(m) for m in found]}))
    assert growth.read(file) == (facts, found)
    file.write_text("{}")
    with pytest.raises(UserError, match="no file of this script"):
        growth.read(file)
