"""Adapters against full fine-tuning: the arithmetic by hand, and the page as committed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from report_files import record, session

from peftbench.metrics import METRICS
from peftbench.show import read_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import against_full
from against_full import GAP, against, claim_line, comparisons, read_comparable

ROOT = Path(__file__).parent.parent


def case(adapter: str, rounds: list[dict], method: str = "sft", model: str = "m") -> dict:
    """A record whose rounds have these values; its own are the first round's."""
    made = record(model, adapter, method, **rounds[0])
    own = {"start_unix_s": 1.0, "items": {"preference_correct": "01"}}
    made["rounds"] = [
        {name: made[name] for name in METRICS} | own | {"seed": seed} | values
        for seed, values in enumerate(rounds)
    ]
    return made


def test_a_ratio_over_seeds_is_the_mean_of_logarithms_with_students_interval():
    full = case("full", [{"train_s": 2.0}, {"train_s": 4.0}])
    lora = case("lora", [{"train_s": 1.0}, {"train_s": 8.0 / 2.25}])
    found = against(full, lora).claims["Time"]
    # the mean of the logarithms of 1/2 and of 8/9 is that of 2/3; t of one degree is tan(0.45 pi)
    assert found.value == pytest.approx(2 / 3)
    error = abs(math.log(0.5) - math.log(8 / 9)) / 2  # of the mean of two
    reach = math.tan(0.45 * math.pi) * error
    assert found.low == pytest.approx(2 / 3 * math.exp(-reach))
    assert found.high == pytest.approx(2 / 3 * math.exp(reach))
    assert found.holds() is None  # two seeds that far apart tell nothing


def test_one_round_holds_beyond_the_margin_alone():
    full = case("full", [{"train_s": 100.0, "adapter_bytes": 1000}])
    for seconds, holds in ((96.0, True), (98.0, None), (102.0, None), (104.0, False)):
        one = against(full, case("lora", [{"train_s": seconds, "adapter_bytes": 10}]))
        assert one.claims["Time"].holds() is holds, seconds
        assert one.claims["Storage"].text() == "0.01"
        assert one.claims["Storage"].holds() is True


def test_the_gap_and_quality_of_one_round_are_paired_by_item():
    def items(trained: list[float], held_out: list[float], windows: list[float]) -> dict:
        return {
            "trained_pair_nll_nats": trained, "trained_pair_tokens": [1, 1],
            "held_out_pair_nll_nats": held_out, "held_out_pair_tokens": [2, 2],
            "window_nll_nats": windows, "window_tokens": [4, 4],
        }  # fmt: skip

    # per item the adapter differs by 0 and 2 nats where trained on, by 1 each where held out
    full = case("full", [{GAP: 0.5, "nll_per_token": 3.0, "items": items([1, 9], [8, 2], [9, 1])}])
    own = {GAP: 0.0, "nll_per_token": 3.5, "items": items([1, 11], [9, 3], [11, 3])}
    found = against(full, case("lora", [own]))
    z = 1.6449  # of 90 %
    # residuals of -1 and +1 about 1: sqrt((1 + 1) * 2) / 2 = 1 nat a token; held out 0
    gap = found.claims["Over-fitting"]
    assert (gap.value, gap.high) == pytest.approx((-0.5, -0.5 + z), abs=1e-3)
    assert gap.holds() is None
    # both windows by 2 nats: the difference is known exactly, and higher is worse
    assert (found.quality.value, found.quality.low, found.quality.high) == (0.5, 0.5, 0.5)
    assert found.quality.holds() is False


def test_more_of_what_is_better_is_better():
    items = {"preference_correct": "0101"}
    full = case("full", [{"preference_accuracy": 0.5, "items": items}], "dpo")
    better = {"preference_accuracy": 1.0, "items": {"preference_correct": "1111"}}
    found = against(full, case("lora", [better], "dpo")).quality
    # gains of 1, 0, 1, 0: sqrt(1/3) / 2 = 0.2887
    assert found.text() == f"+50.0 % ({50 - 164.49 * 0.288675:+.1f} % to +97.5 %)"
    assert found.holds() is True


def test_the_sentence_counts_cases_by_adapter():
    rows = []
    for model, factor in (("a", 0.5), ("b", 1.3)):
        full = case("full", [{"train_s": 10.0}], model=model)
        rows.append(against(full, case("lora", [{"train_s": 10 * factor}], model=model)))
        rows.append(against(full, case("ia3", [{"train_s": 9.0}], model=model)))
    assert claim_line("Time", rows) == (
        "- **Time** (it trains in less time): holds for 1 of 2 adapters: `ia3` (0.90)."
        " Not for `lora` (0.50 to 1.30), holds in 1 of 2 cases."
    )
    assert claim_line("Compute", rows).endswith("not measured in these records.")


def test_each_model_and_method_comes_from_the_newest_session_with_full(tmp_path):
    def cases(*told: tuple[str, str, float]) -> list[dict]:
        return [case(adapter, [{"train_s": s}], method) for adapter, method, s in told]

    older = cases(("full", "sft", 10), ("lora", "sft", 5), ("full", "dpo", 10), ("lora", "dpo", 8))
    newer = cases(("full", "sft", 10), ("lora", "sft", 7), ("lora", "dpo", 1))
    newer += cases(("full", "infer", 2), ("lora", "infer", 1))  # these train nothing
    files = [session(tmp_path / "a.json", older), session(tmp_path / "b.json", newer, number=1)]
    found = comparisons([read_comparable(file) for file in files])
    times = {row.method: (file.name, row.claims["Time"].text()) for file, row in found}
    assert times == {"sft": ("b.json", "0.70"), "dpo": ("a.json", "0.80")}


def test_a_number_of_another_definition_is_missing_with_the_reason(tmp_path):
    rows = [case(a, [{"train_flops": n}]) for a, n in (("full", 10), ("lora", 5))]
    file = session(tmp_path / "a.json", rows)
    found = [json.loads(file.read_text())]
    for version, holds in ((METRICS["train_flops"].version, True), (1, None)):
        found[0]["peftbench"]["metric_versions"]["train_flops"] = version
        file.write_text(json.dumps(found[0]))
        ((_, row),) = comparisons([read_comparable(file)])
        assert (row.claims["Compute"] is None) == (holds is None)
    assert row.missing["train_flops"] == "the file has it by definition 1"


def test_the_committed_page_is_what_the_committed_records_say(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = (ROOT / "docs" / "against-full.md").read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(committed, encoding="utf-8")
    against_full.main([str(page), *map(str, sorted(Path("results").glob("*/*/*.json")))])
    assert page.read_text(encoding="utf-8") == committed, "run `make against-full`"
    assert "| tiny-gpt2, sft | lora (reparametrised) |" in committed


def test_a_record_older_than_the_gap_has_none_and_says_why():
    file = ROOT / "results" / "xeon-amx-2c" / "quick" / "2026-11-22-1981029.json"
    for row in read_rows(file):
        assert row[GAP] is None
        assert row["null_reasons"][GAP] == "the file is older than this metric"
