"""The comparison scripts: what they conclude from numbers, and our side of PPO's work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "peers"))

import compare_pairs  # noqa: E402
import compare_ppo  # noqa: E402
import own_pairs  # noqa: E402
from compare_ppo import TINY, folder_of, in_turns, of_floor, of_runs, together, token_prompts  # noqa: E402
from sides import Goal, run_side, steady, table  # noqa: E402
from work import PPOWork  # noqa: E402


def test_a_goal_is_met_on_its_side_of_the_limit():
    assert Goal("speed", 2.8, 2.8).met
    assert not Goal("speed", 2.79, 2.8).met
    assert Goal("memory", 0.4, 0.4, at_most=True).met
    assert not Goal("memory", 0.41, 0.4, at_most=True).met
    assert Goal("memory", 0.41, 0.4, at_most=True).line().startswith("MISSED")


def test_a_steady_time_leaves_the_first_out():
    assert steady([9.0, 1.0, 3.0, 2.0]) == 2.0


def test_sides_take_turns_and_a_sides_turns_are_one_outcome(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_ppo, "KEPT", tmp_path / "peers" / "sides.json")

    def outcome(seconds: list[float], floor_s: float, peak: int) -> dict:
        run = {"update_s": seconds, "floor": {"learn_s": floor_s}}
        return {"runs": [run], "peak_growth_bytes": peak, "other_cpu_ratio": floor_s,
                "machine": {"matmul_flops_per_s": 10 * floor_s}}  # fmt: skip

    order: list[str] = []
    left = {"own": [outcome([9, 1, 2], 1, 7), outcome([9, 4, 5], 3, 6)],
            "peer": [outcome([9, 9], 1, 1)] * 2}  # fmt: skip
    run = {name: lambda name=name: (order.append(name), left[name].pop(0))[1] for name in left}
    found = in_turns(run, 2)
    assert order == ["own", "peer", "own", "peer"]
    own = together(found["own"])
    assert of_runs(own, "update_s") == 3  # of 1, 2, 4, 5: the first of each run is left out
    assert of_floor(own, "learn_s") == 2
    assert own["peak_growth_bytes"] == 7
    assert own["other_cpu_ratio"] == 2
    assert own["machine"] == {"matmul_flops_per_s": 20}
    assert "own, turn 2 of 2" in capsys.readouterr().err
    assert json.loads(compare_ppo.KEPT.read_text()) == found


def test_a_comparison_makes_its_table_of_what_every_side_gives(tmp_path, monkeypatch):
    """Each side's outcome in the form that its script writes, with numbers that are easy to see."""
    monkeypatch.setattr(compare_ppo, "KEPT", tmp_path / "sides.json")
    monkeypatch.setattr(compare_ppo, "TURNS", 2)
    order: list[tuple[str, str, str]] = []

    def side(python: Path, script: str, work: dict[str, Any]) -> dict[str, Any]:
        order.append((script, work.get("value", ""), work.get("compile", "")))
        if script == "own_pairs.py":
            return {"step_s": [1.0], "peak_growth_bytes": 2**30, "trainable_params": 5}
        factor = 3.0 if script == "trl_ppo.py" else 1.0
        run = {name: [9.0, factor, factor] for name in ("update_s", "rollout_s", "score_s",
                                                        "learn_s")}  # fmt: skip
        if script == "own_ppo.py":
            rates = {"read_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
            run |= {"floor": rates | {"token_step_s": 0.01, "rollout_s": 0.5, "learn_s": 0.8,
                                      "score_s": 0.5, "read_bytes_per_step": 1e8},
                    "compile_s": 4.0, "compilation": {"cache": "cold", "layers": {"policy": 30},
                                                      "graph_breaks": 0}}  # fmt: skip
        return {"runs": [run | {"trainable_params": 7}], "peak_growth_bytes": factor * 2**30,
                "other_cpu_ratio": 0.0,
                "machine": {"matmul_flops_per_s": 1e11, "read_bytes_per_s": 1e10}}  # fmt: skip

    monkeypatch.setattr(compare_ppo, "run_side", side)
    numbers, text = compare_ppo.measure(Path("python"), "smoke")
    assert len(order) == 2 * 6 + 1
    assert order[:6] == order[6:12]
    assert order[12][0] == "own_pairs.py"
    assert [goal["value"] for goal in numbers["goals"]] == pytest.approx(
        [3, 3, 3, 1 / 3, 1 / 3, 1 / 3, 1, 2, 1.25]
    )
    assert text.count("MISSED") == 0
    assert "(policy 30) in 4.0 s (cold cache), 4.0 s (cold cache) before" in text


def test_pairs_compare_both_our_sides_with_the_same_step_of_trl(monkeypatch):
    def outcome(step_s: float, losses: list[float], **more: Any) -> dict[str, Any]:
        return {"step_s": [9.0, step_s, step_s, step_s], "reference_s": 4.0, "losses": losses,
                "peak_growth_bytes": 2**20 * int(10 * step_s)} | more  # fmt: skip

    def run_side(python: Path, script: str, work: dict[str, Any]) -> dict[str, Any]:
        if script == "trl_pairs.py":
            return outcome(8.0, [1.0, 1.0])
        floors = {"step_floor_s": 1.0, "reference_floor_s": 0.5}
        if work["compile"] == "none":
            return outcome(3.0, [1.0, 1.0001], **floors)
        compilation = {"cache": "cold", "graph_breaks": 0}
        return outcome(1.0, [1.0, 1.1], compile_s=7.0, compilation=compilation, **floors)

    monkeypatch.setattr(compare_pairs, "run_side", run_side)
    found, text = compare_pairs.measure("pairs-dpo-float32", "full")
    # a step of ours and its quarter of the reference beside 8 s: 3 + 1, and 1 + 1 compiled
    eager, compiled = found["goals"][:4], found["goals"][4:]
    assert [goal["value"] for goal in eager] == pytest.approx([2.0, 0.375, 1e-4, 0.375])
    assert [goal["value"] for goal in compiled] == pytest.approx([4.0, 0.125, 0.1, 0.75])
    assert [goal["met"] for goal in eager] == [False, True, True, False]
    assert [goal["met"] for goal in compiled] == [True, True, False, True]
    assert all(goal["name"].endswith(", compiled") for goal in compiled)
    assert "dpo: compiling took 7.0 s (cold cache), 0 graph breaks" in text
    assert set(found["rows"][0]["sides"]) == {
        "peftbench", "peftbench, compiled", "trl", "trl defaults", "trl precomputed"
    }  # fmt: skip


def test_the_reference_and_the_compiling_are_told_apart(monkeypatch):
    now_s = iter([10.0, 13.0, 20.0])
    monkeypatch.setattr(own_pairs.time, "perf_counter", lambda: next(now_s))
    clock = own_pairs.Clock(meter=None)
    clock.prepared()
    clock.stage("compile")
    clock.reference_done()
    assert clock.taken_s == {"reference": 3.0, "compile": 7.0}


@pytest.mark.verify
def test_our_side_of_the_pairs_compiled_learns_as_the_eager_one():
    from dataclasses import asdict, replace

    eager = compare_ppo.dpo_work(compare_ppo.real_work("tiny"))
    sides = [replace(eager, compile=how) for how in ("none", "layers")]
    found = [run_side(Path(sys.executable), "own_pairs.py", asdict(work)) for work in sides]
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], abs=1e-4)
    assert all(side["reference_s"] > 0 for side in found)
    assert found[0]["compile_s"] == 0
    assert found[0]["compilation"] is None
    assert found[1]["compile_s"] > 0
    assert found[1]["compilation"]["graph_breaks"] == 0


def test_a_table_has_columns_of_one_width():
    assert table(["", "s"], [["long name", "1.0"], ["b", "10.0"]]).splitlines() == [
        "              s",
        "---------  ----",
        "long name   1.0",
        "b          10.0",
    ]


def test_the_requirements_pin_every_version():
    lines = (ROOT / "scripts/peers/requirements-trl-1.12.txt").read_text().split()
    assert "trl==1.12.0" in lines
    assert all("==" in line for line in lines)


@pytest.mark.verify
def test_our_side_of_ppo_does_all_the_work_it_is_given():
    from dataclasses import asdict

    work = PPOWork(
        model=TINY, folder=folder_of(TINY), prompts=token_prompts(TINY, 8, 6), batch_size=4,
        micro_batch_size=2, response_length=5, updates=2, epochs=2, threads=1, rank=4, alpha=8,
        learning_rate=1e-3, kl_coef=0.05, value="adapter", counted_token=None, seeds=[0],
    )  # fmt: skip
    found = run_side(Path(sys.executable), "own_ppo.py", asdict(work))
    (run,) = found["runs"]
    assert run["response_tokens"] == [5.0, 5.0]
    # rank x (inputs + outputs) of q and v in 4 layers, for policy and value; a head of 128 + 1
    assert run["trainable_params"] == 2 * 4 * 2 * 4 * (128 + 128) + 129
    for total, *parts in zip(
        run["update_s"], run["rollout_s"], run["score_s"], run["learn_s"], strict=True
    ):
        assert sum(parts) == pytest.approx(total, rel=0.02)
    assert run["floor"]["learn_s"] > 0
    assert run["floor"]["rollout_s"] > run["floor"]["token_step_s"]
    assert found["peak_growth_bytes"] > 0
