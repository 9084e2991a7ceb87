"""Inference cases: the arithmetic of their numbers, their checks, and a real `pytest bench`."""

from __future__ import annotations

import copy
import json
import random
import statistics
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_run import bench, cases, own_compare, rows

from peftbench import adapters, infer_values, inference, models, show
from peftbench.agreement import AGREEMENT_RATIO, logit_difference, probe_logits
from peftbench.case import PRESETS, Case, Settings, of_its_kind
from peftbench.compare.compare import compare
from peftbench.compare.load import session_of
from peftbench.compare.rules import Rules
from peftbench.errors import InvalidInferenceError, UserError
from peftbench.export import rows as exported
from peftbench.infer_values import Turn, median_interval, order, speed_values
from peftbench.methods import INFER
from peftbench.metrics import METRICS, VARIANTS, kind_of, metrics_of
from peftbench.preflight import preflight_inference
from peftbench.report.html import write_report
from peftbench.summary import inference_cells
from peftbench.worker import outcome_of

SETTINGS = Settings(
    infer_batch_size=2, infer_prompt_tokens=8, infer_new_tokens=5, infer_turns=6, threads=1,
    prefix_tokens=4,
)  # fmt: skip
MERGING = ("lora", "ia3", "dora", "rslora", "vera", "ln")


def case_of(adapter: str, model: str = "tiny-gpt2", **settings: Any) -> Case:
    return Case(model, adapter, INFER, replace(SETTINGS, **settings))


def trees_of(case: Case) -> dict[str, Any]:
    base = inference.load_base(case, torch.device("cpu"))
    return {"base": base, "unmerged": inference.adapted_tree(base, case)}


# --- arithmetic


def test_rates_are_the_batch_over_the_median_turn():
    turns = [(0.02, 0.4), (0.01, 0.8), (0.04, 0.6)]  # seconds of prefill and of 4 decode steps
    values = speed_values([{"base": Turn(*t)} for t in turns], SETTINGS)
    assert values["base_prefill_s"] == 0.02
    assert values["base_decode_s"] == pytest.approx(0.6 / 4)
    assert values["base_prefill_tokens_per_s"] == pytest.approx(2 * 8 / 0.02)
    assert values["base_decode_tokens_per_s"] == pytest.approx(2 * 4 / 0.6)
    assert not [name for name in values if "ratio" in name]


def test_ratios_are_paired_so_a_drift_of_the_machine_cancels():
    """It becomes ten times slower; merged takes as long as the base, unmerged 1.5 times."""
    cycles = [
        {"base": Turn(s, 2 * s), "unmerged": Turn(1.5 * s, 3 * s), "merged": Turn(s, 2 * s)}
        for s in (0.1 * (1 + i) for i in range(10))
    ]
    values = speed_values(cycles, SETTINGS)
    for part in ("prefill", "decode"):
        for end in ("", "_low", "_high"):
            assert values[f"merged_{part}_ratio{end}"] == pytest.approx(1.0)
            assert values[f"unmerged_{part}_ratio{end}"] == pytest.approx(1.5)


def test_the_ratio_of_base_to_base_is_around_1_as_often_as_the_interval_says():
    """Both sides are drawn from one noisy distribution with a common drift: 400 made runs."""
    draw = random.Random(5)
    covered, medians = 0, []
    for _ in range(400):
        cycles = []
        for i in range(24):
            drift = 1 + 0.5 * i / 24
            base, other = (0.01 * drift * draw.lognormvariate(0, 0.05) for _ in range(2))
            cycles.append({"base": Turn(base, base), "merged": Turn(other, other)})
        values = speed_values(cycles, SETTINGS)
        covered += values["merged_decode_ratio_low"] <= 1 <= values["merged_decode_ratio_high"]
        medians.append(values["merged_decode_ratio"])
    assert statistics.fmean(medians) == pytest.approx(1.0, abs=0.003)
    # at least 95 % by construction (0.977 for 24 turns); 6 standard errors of 400 runs below
    assert covered / 400 > 0.93
    assert covered < 400


@pytest.mark.parametrize("n", [6, 7, 24, 30, 101])
def test_the_interval_is_the_narrowest_pair_of_order_statistics_with_its_confidence(n):
    values = [float(i) for i in range(1, n + 1)]
    random.Random(n).shuffle(values)
    found = median_interval(values)
    assert found is not None
    low, high = found
    assert low + high == n + 1  # symmetric

    def outside(rank: int) -> float:  # that the median is below the value of this rank, or above
        return 2 * sum(comb(n, i) for i in range(rank)) / 2**n

    assert outside(int(low)) <= 0.05 < outside(int(low) + 1)


def test_below_six_turns_there_is_no_interval():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None  # 2 / 2^5 is above 5 %


@pytest.mark.parametrize("variants", [VARIANTS, VARIANTS[:2]])
def test_each_model_comes_equally_often_at_each_place_and_after_each_other(variants):
    cycles = [order(i, variants) for i in range(6)]
    assert set(Counter(p for cycle in cycles for p in enumerate(cycle)).values()) == {
        6 // len(variants)
    }
    after = Counter(pair for c in cycles for pair in pairwise(c))
    assert len(set(after.values())) == 1


# --- decoding


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize("adapter", ["base", "lora", "prefix"])
def test_greedy_decoding_is_that_of_transformers_generate(model, adapter):
    case = case_of("lora" if adapter == "base" else adapter, model)
    trees = trees_of(case)
    inference.give_effect(trees["base"], trees["unmerged"], 3)
    tree = trees["base" if adapter == "base" else "unmerged"]
    prompt = inference.prompt_ids(trees["base"], replace(SETTINGS, infer_batch_size=3))
    found = inference.answer(tree, prompt, 12)
    tree.config.use_cache = True
    with torch.no_grad():
        wanted = tree.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=12, min_new_tokens=12, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert found.tokens.shape == (3, 12)
    assert torch.equal(found.tokens, wanted[:, -12:])
    assert len(set(found.tokens.flatten().tolist())) > 3  # no token is repeated for ever


def test_cache_and_weights_are_counted_as_arithmetic_says():
    trees = trees_of(case_of("prefix"))
    config = trees["base"].config
    prompt = inference.prompt_ids(trees["base"], SETTINGS)
    # keys and values; the last new token is never read
    per_position = 2 * config.n_layer * config.n_embd * 4 * 2
    assert inference.answer(trees["base"], prompt, 5).cache_bytes == (8 + 4) * per_position
    assert inference.answer(trees["unmerged"], prompt, 5).cache_bytes == (4 + 12) * per_position
    grown = models.parameter_bytes(trees["unmerged"]) - models.parameter_bytes(trees["base"])
    assert grown == 4 * 2 * config.n_layer * config.n_embd * 4


def test_the_base_is_left_as_it_was_by_an_adapter_on_its_weights():
    trees = trees_of(case_of("ia3"))
    before = probe_logits(trees["base"])
    inference.give_effect(trees["base"], trees["unmerged"], 0)
    assert torch.equal(probe_logits(trees["base"]), before)
    shared = trees["base"].get_input_embeddings().weight
    assert trees["unmerged"].get_input_embeddings().weight is shared


# --- agreement


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [*((a, "bfloat16") for a in MERGING), ("lora", "float32"), ("vera", "float32")],
)
def test_every_adapter_that_merges_agrees_with_an_effect_to_be_seen(adapter, dtype):
    case = case_of(adapter, "tiny-llama", dtype=dtype)
    trees = trees_of(case)
    zero = logit_difference(
        probe_logits(trees["base"]), probe_logits(adapters.merged(trees["unmerged"], adapter))
    )
    inference.give_effect(trees["base"], trees["unmerged"], 0)
    trees["merged"] = adapters.merged(trees["unmerged"], adapter)
    found = inference.compared(trees, case) | {"zero_merge_logit_ratio": zero}
    inference.check_agreement(found, case)
    assert found["effect_logit_ratio"] > inference.EFFECT


def sabotaged(model: Any, adapter: str) -> Any:
    """A merge that folds a hundredth of the adapter in."""
    weak = copy.deepcopy(model)
    for name, parameter in weak.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.01
    return weak.merge_and_unload()


class Silent:
    def phase(self, name: str) -> None: ...
    def ready(self) -> None: ...
    def trained(self, seconds: float) -> None: ...


def test_a_sabotaged_merge_makes_the_round_invalid(monkeypatch):
    monkeypatch.setattr(adapters, "merged", sabotaged)
    monkeypatch.setattr(inference.pipeline, "prepare_process", lambda s: torch.device("cpu"))
    with pytest.raises(InvalidInferenceError, match="merged and unmerged differ by") as error:
        inference.run_infer_round(case_of("lora"), Silent())
    assert outcome_of(error.value, "check").status == "invalid"


def test_agreement_is_refused_for_each_thing_that_it_stands_on():
    case, fine = case_of("lora"), {"merge_logit_ratio": 0.0, "zero_merge_logit_ratio": 0.0}
    limit = AGREEMENT_RATIO["float32"]
    inference.check_agreement(fine | {"effect_logit_ratio": 0.5}, case)
    # what merging rounds grows with what is merged
    inference.check_agreement({"merge_logit_ratio": 2 * limit, "effect_logit_ratio": 0.5}, case)
    for name, value in (
        ("merge_logit_ratio", 3 * limit), ("zero_merge_logit_ratio", 2 * limit),
        ("merge_logit_ratio", float("nan")), ("effect_logit_ratio", 0.0),
        ("effect_logit_ratio", float("nan")),
    ):  # fmt: skip
        with pytest.raises(InvalidInferenceError):
            inference.check_agreement(fine | {"effect_logit_ratio": 0.5} | {name: value}, case)


# --- what is not there, and why


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("prefix", "prefix does not merge: learned keys"),
        ("full", "full does not merge"),
        ("qlora", "--infer-merge-4bit"),
    ],
)
def test_what_does_not_merge_has_no_merged_numbers_and_says_why(adapter, says):
    case = case_of(adapter)
    reasons = infer_values.null_reasons(case, "cpu", None)
    merged = [n for n in metrics_of("infer") if "merged" in n and "unmerged" not in n]
    assert len(merged) > 12
    assert all(says in reasons[name] for name in merged)
    assert infer_values.variants_of(case) == ("base", "unmerged")


def test_qlora_merges_where_it_is_asked_for():
    case = case_of("qlora", infer_merge_4bit=True)
    assert infer_values.variants_of(case) == VARIANTS
    assert "merged_decode_s" not in infer_values.null_reasons(case, "cpu", None)


def test_the_kinds_share_what_both_measure_and_nothing_else():
    train, infer = set(metrics_of("train")), set(metrics_of("infer"))
    assert train | infer == set(METRICS)
    assert {"load_s", "total_params", "base_bytes"} <= train & infer
    assert "train_s" not in infer
    assert not [n for n in train if n.startswith(("merged_", "unmerged_"))]
    assert [kind_of(i) for i in ("m-lora-infer", "m-infer-lora-sft")] == ["infer", "train"]


def test_settings_of_one_kind_do_not_move_the_hash_of_the_other():
    mixed = replace(Settings(), pairs=100, infer_turns=60, rank=4)
    assert of_its_kind(mixed, "sft") == replace(Settings(), pairs=100, rank=4)
    assert of_its_kind(mixed, INFER) == replace(Settings(), infer_turns=60, rank=4)


def test_an_answer_longer_than_the_context_is_refused_with_the_prefix_counted():
    context = models.model_context("tiny-gpt2", "pretrained")
    fits = case_of("prefix", infer_prompt_tokens=context - 4 - 5)
    preflight_inference([fits])
    with pytest.raises(UserError, match="--infer-prompt-tokens"):
        preflight_inference([replace(
            fits, settings=replace(fits.settings, infer_prompt_tokens=context - 4 - 4)
        )])  # fmt: skip


# --- the whole


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    folder = tmp_path_factory.mktemp("infer")
    code, text, found = bench(
        folder, "--methods", "infer,sft", "--adapters", "lora,full", "-k", "infer or lora",
        "--infer-turns", "6",
        "--infer-new-tokens", "4", "--infer-prompt-tokens", "16", "--infer-batch-size", "2",
    )  # fmt: skip
    assert code == 0, text
    return folder, text, found


def test_both_kinds_stand_in_one_file_each_with_its_own_metrics(run):
    folder, text, found = run
    assert {c: row["status"] for c, row in cases(found).items()} == dict.fromkeys(
        ("tiny-gpt2-lora-sft", "tiny-gpt2-lora-infer", "tiny-gpt2-full-infer"), "ok"
    )
    for case_id, row in rows(found).items():
        own = metrics_of(kind_of(case_id))
        assert {n for n in METRICS if n in row} == set(own)
        assert {n for n in own if row[n] is None} == set(row["null_reasons"])
    assert "tiny-gpt2-lora-infer" in own_compare(folder)
    lora = rows(found)["tiny-gpt2-lora-infer"]
    assert len(lora["turns"]) == 6
    assert lora["unmerged_weight_bytes"] - lora["base_weight_bytes"] == 4 * lora["trainable_params"]
    assert lora["merged_weight_bytes"] == lora["base_weight_bytes"]
    assert lora["base_decode_tokens_per_s"] == pytest.approx(2 / lora["base_decode_s"])
    assert lora["zero_merge_logit_ratio"] <= 1e-4 < lora["effect_logit_ratio"]
    (time_s,) = next(
        b["stats"]["data"] for b in found["benchmarks"] if "lora-infer" in b["name"]
    )  # fmt: skip
    assert time_s >= lora["measure_s"] > 0
    for cells in inference_cells(lora):
        assert cells[2] in text  # the table at the end of the run
    assert text.index("tiny-gpt2-lora-sft ...") < text.index("tiny-gpt2-lora-infer ...")


def test_the_commands_read_a_file_with_both_kinds(run, tmp_path):
    path = run[0] / "run.json"
    listed = show.read_rows(path)
    assert any("decode time x base" in line for line in show.overview_lines(listed))
    shown = "\n".join(show.record_lines(show.find_row(listed, "tiny-gpt2-lora-infer")))
    assert "merged_decode_ratio" in shown
    assert "train_s" not in shown
    assert "measure_s" not in "\n".join(show.record_lines(show.find_row(listed, "lora-sft")))
    table = {r["case_id"]: r for r in exported([path])}
    assert table["tiny-gpt2-lora-infer"]["train_s"] is None
    assert table["tiny-gpt2-lora-infer"]["base_decode_s"] > 0
    page = tmp_path / "r.html"
    write_report([path], page)
    assert "decode time x base" in page.read_text()
    only = json.loads(path.read_text())
    only["benchmarks"] = [b for b in only["benchmarks"] if "infer" in b["name"]]
    only["peftbench"]["cases"] = [c for c in only["peftbench"]["cases"] if "infer" in c["case_id"]]
    (tmp_path / "only.json").write_text(json.dumps(only))
    write_report([tmp_path / "only.json"], page)


def with_run_id(found: dict, run_id: str, **factors: float) -> dict:
    """A copy of a session, undisturbed, under another name; some metrics of lora multiplied."""
    changed: dict = json.loads(json.dumps(found))
    changed["peftbench"]["run_id"] = run_id
    for benchmark in changed["benchmarks"]:
        row = benchmark["extra_info"]
        for entry in (row, *row["rounds"]):
            entry |= {"run_id": run_id, "disturbances": []}
            if row["case_id"] == "tiny-gpt2-lora-infer":
                entry |= {name: entry[name] * factor for name, factor in factors.items()}
    return changed


def test_a_comparison_has_rows_of_each_kind_and_sees_a_slower_decode(run):
    sessions = [
        session_of("base", with_run_id(run[2], "base")),
        session_of("new", with_run_id(run[2], "new", merged_decode_s=3, merged_weight_bytes=2)),
    ]
    found = compare(*sessions, None, Rules())
    of_lora = {r.metric: r.verdict for r in found.rows if r.case_id == "tiny-gpt2-lora-infer"}
    assert of_lora["merged_decode_s"] in ("regressed", "suspect")
    assert of_lora["merged_weight_bytes"] == "changed"
    assert "train_s" not in of_lora
    of_sft = {r.metric for r in found.rows if r.case_id == "tiny-gpt2-lora-sft"}
    assert "train_s" in of_sft
    assert "base_decode_s" not in of_sft


def test_the_quick_preset_measures_inference_of_each_of_its_adapters():
    quick = PRESETS["quick"]
    assert {a for _, a, method in quick.cells() if method == INFER} == set(quick.adapters)
