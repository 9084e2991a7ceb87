"""The real thing: pytest runs the matrix in real child processes and writes the real JSON."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys

import pytest
from bench_run import ROOT, bench, cases, namespace, own_compare, rows

from peftbench.case import Case, Settings
from peftbench.errors import InvalidTrainingError
from peftbench.metrics import PHASES, metrics_of
from peftbench.worker import PRELOAD_CUDA, outcome_of


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    some = "not (full and sft) and not (qlora and dpo)"  # each axis twice, in four cases of six
    code, text, run = bench(folder, "--rounds", "2", "--adapters", "lora,full,qlora", "-k", some)
    assert code == 0, text
    return folder, text, run


def test_every_case_is_in_the_file_and_ok(smoke):
    _, _, run = smoke
    ids = {f"tiny-gpt2-{name}" for name in ("lora-sft", "lora-dpo", "full-dpo", "qlora-sft")}
    assert set(rows(run)) == ids
    assert {name: case["status"] for name, case in cases(run).items()} == dict.fromkeys(ids, "ok")
    assert all(b["params"]["model"] == "tiny-gpt2" for b in run["benchmarks"])


def test_stats_are_the_training_time(smoke):
    differences = []
    for benchmark in smoke[2]["benchmarks"]:
        rounds, theirs = benchmark["extra_info"]["rounds"], benchmark["stats"]["data"]
        assert len(rounds) == len(theirs) == 2
        for ours, seconds in zip(rounds, theirs, strict=True):
            difference = seconds - ours["train_s"]
            # no phase but training is in it, however busy the machine is
            assert 0 <= difference < 0.2 * (ours["total_s"] - ours["train_s"])
            differences.append(difference)
    # two messages through a pipe; a busy machine may hold one of them up, not most
    assert statistics.median(differences) < 0.02


def test_every_metric_is_a_number_or_null_with_a_reason(smoke):
    for row in rows(smoke[2]).values():
        for name in metrics_of("train"):
            assert (row[name] is None) == (name in row["null_reasons"]), name
            assert row[name] is None or isinstance(row[name], (int, float)), name
        for name in (
            "train_s",
            "tokens_per_s",
            "perplexity",
            "preference_accuracy",
            "moved_ratio",
            "kl_to_base_nats_per_token",
            "host_peak_rss_delta_bytes",
            "reward_margin",
            "generalization_gap_nats_per_token",
            "generalization_gap_nats_per_token_se",
        ):
            assert row[name] is not None, (name, row["null_reasons"].get(name))


def test_phases_add_up_to_the_total(smoke):
    for row in rows(smoke[2]).values():
        seconds = {name: p["seconds"] for name, p in row["phases"].items()}
        assert set(seconds) <= set(PHASES)
        assert sum(seconds.values()) == pytest.approx(row["rounds"][0]["total_s"], rel=1e-6)
        for name in ("load", "attach", "data", "warmup", "train", "evaluate", "save"):
            assert seconds[name] > 0


def test_counts_equal_arithmetic(smoke):
    for name, row in rows(smoke[2]).items():
        assert row["steps"] == 4  # 32 pairs in batches of 8
        assert row["pairs"] == 32
        assert row["eval_pairs_scored"] == 20
        assert 500 < row["eval_tokens_scored"] < 600
        for r in row["rounds"]:  # 2 of the 4 steps warm up
            assert r["samples_per_s"] * r["train_s"] == pytest.approx(16)
        assert row["trainable_ratio"] == row["trainable_params"] / row["total_params"]
        if "lora" in name:  # 4 layers x 4 linears, r = 8: sums of r (in + out)
            shapes = [(128, 384), (128, 128), (128, 512), (512, 128)]
            assert row["trainable_params"] == 4 * sum(8 * (i + o) for i, o in shapes)


def test_rounds_differ_by_seed(smoke):
    row = rows(smoke[2])["tiny-gpt2-lora-sft"]
    first, second = row["rounds"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["losses"] != second["losses"]


def test_reference_is_charged_to_the_method(smoke):
    dpo, sft = (rows(smoke[2])[f"tiny-gpt2-lora-{m}"] for m in ("dpo", "sft"))
    for r in dpo["rounds"]:
        assert r["method_s"] == pytest.approx(r["reference_s"] + r["warmup_s"] + r["train_s"])
    assert sft["reference_s"] is None
    assert sft["null_reasons"]["reference_s"] == "sft has no reference"
    assert dpo["first_loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # log 2: the policy is the reference


def test_ppo_and_the_pipelines_leave_records_that_add_up(tmp_path):
    code, text, run = bench(
        tmp_path, "--adapters", "lora", "--methods", "ppo,sft+dpo,sft+ppo", "--ppo-batch-size",
        "16", "--eval-completions", "16",
    )  # fmt: skip
    assert code == 0, text
    found = {name.removeprefix("tiny-gpt2-lora-"): row for name, row in rows(run).items()}
    assert set(found) == {"ppo", "sft+dpo", "sft+ppo"}
    for method, row in found.items():
        for name in metrics_of("train"):
            assert (row[name] is None) == (name in row["null_reasons"]), (method, name)
        stages = ("sft_s", "reward_model_s", "reference_s", "warmup_s", "train_s")
        assert row["method_s"] == pytest.approx(sum(row[n] or 0.0 for n in stages))
        assert (row["sft_s"] is None) == (method == "ppo")
        assert (row["reward_model_s"] is None) == (method == "sft+dpo")
        assert row["true_reward_base"] is not None
        assert row["pairs"] == 32
        read_completions = row["generalization_gap_nats_per_token"] is not None
        assert read_completions == (method != "ppo")
    assert "completions of its own" in str(found["ppo"]["null_reasons"])
    dpo = found["sft+dpo"]
    assert dpo["first_loss"] == pytest.approx(0.6931, abs=1e-3)  # its reference is where it starts
    assert dpo["ppo_history"] is None
    shapes = [(128, 384), (128, 128), (128, 512), (512, 128)]
    for row in (found["ppo"], found["sft+ppo"]):
        assert row["trainable_params"] == 4 * sum(8 * (i + o) for i, o in shapes)  # as LoRA's SFT
        parts = row["rollout_s"] + row["score_s"] + row["update_s"]
        assert parts == pytest.approx(row["train_s"], rel=0.05)
        assert [update["episodes"] for update in row["ppo_history"]] == [16, 16]
        assert row["steps"] == 2 * 4 * 2  # updates x epochs x minibatches of 8
        assert row["rounds"][0]["ppo_history"] == row["ppo_history"]
        assert 0 <= row["win_ratio"] <= 1
        assert 0 <= row["reward_model_accuracy"] <= 1
    # of a pipeline's reference the adapter is a copy, float32
    assert found["sft+ppo"]["reference_bytes"] == 4 * found["sft+ppo"]["trainable_params"]
    assert found["ppo"]["reference_bytes"] == 0


def test_a_reward_that_is_not_finite_is_invalid():
    outcome = outcome_of(InvalidTrainingError("the reward of completion 3 is nan"), "warmup")
    assert (outcome.status, outcome.phase) == ("invalid", "warmup")
    assert outcome.reason == "the reward of completion 3 is nan"


def test_qlora_records_both_bases(smoke):
    quantized, plain = (rows(smoke[2])[f"tiny-gpt2-{a}-sft"] for a in ("qlora", "lora"))
    assert quantized["perplexity_unquantized_base"] == plain["perplexity_base"]
    assert quantized["perplexity_base"] != plain["perplexity_base"]
    assert quantized["quantized_modules"] == 16
    assert quantized["base_bytes"] < plain["base_bytes"]
    assert plain["quantization"] is None
    assert quantized["quantization"] == {
        "type": "nf4", "double_quantization": True, "block_size": 64, "compute_dtype": "float32"
    }  # fmt: skip


def test_merging_is_checked_where_an_adapter_merges(smoke):
    found = rows(smoke[2])
    for name in ("lora-sft", "lora-dpo", "qlora-sft"):
        row = found[f"tiny-gpt2-{name}"]
        assert 0 < row["merge_max_logit_difference"] < 1e-3  # float32: rounding only
        assert row["merge_s"] > 0
    full = found["tiny-gpt2-full-dpo"]
    assert full["merge_s"] is full["merge_max_logit_difference"] is None
    assert full["null_reasons"]["merge_s"].startswith("full does not merge")


def test_time_outside_the_cases_is_accounted_for(smoke):
    ours = smoke[2]["peftbench"]
    bases = {(b["model"], b["quantized"], b["dtype"]) for b in ours["bases"]}
    assert bases == {("tiny-gpt2", False, "float32"), ("tiny-gpt2", True, "float32")}
    assert all(b["phases"]["evaluate"] > 0 for b in ours["bases"])
    assert set(ours["sentinels"]) == {"start", "end"}
    assert all(s["seconds"] > 0 for s in ours["sentinels"].values())


def test_every_round_is_on_disk_with_its_provenance(smoke):
    folder, _, run = smoke
    files = list((folder / "runs" / run["peftbench"]["run_id"]).glob("*.json"))
    assert len(files) == 8
    record = json.loads(files[0].read_text())
    assert record["provenance"]["libraries"]["torch"].startswith("2.")
    assert len(record["weights_hash"]) >= 12
    assert record["samples"][0].keys() == {"prompt", "before", "after"}
    text = json.dumps(run["benchmarks"][0]["extra_info"])
    assert str(ROOT) not in text  # no path of the user's machine


def test_a_local_model_and_data_set_are_recorded_by_name_not_by_place(tmp_path):
    """Two copies in two places: one case hash, and the file tells no place."""

    def place(name: str) -> tuple[str, str]:
        folder = tmp_path / name
        shutil.copytree(ROOT / "peftbench/tiny/tiny-gpt2", folder / "my-model")
        pairs = [
            {"prompt": f"p {i} is", "chosen": f" good {i} .", "rejected": f" bad {i} ."}
            for i in range(120)
        ]
        (folder / "my-pairs.jsonl").write_text("\n".join(json.dumps(p) for p in pairs))
        return str(folder / "my-model"), str(folder / "my-pairs.jsonl")

    model, data = place("here")
    code, text, run = bench(
        tmp_path, "--models", model, "--data", data, "--adapters", "ia3", "--methods", "sft"
    )
    assert code == 0, text
    row = rows(run)["my-model-ia3-sft"]
    assert (row["case"]["model"], row["data"]) == ("my-model", "my-pairs.jsonl")
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()
    model, data = place("there")
    settings = Settings(**(row["case"]["settings"] | {"data": data}))
    assert Case(model, "ia3", "sft", settings).hash == row["case_hash"]


def test_the_screen_shows_cases_progress_and_a_table(smoke):
    text = smoke[1]
    assert "[1/4] tiny-gpt2-lora-sft ..." in text
    assert "elapsed, about" in text
    header = next(line for line in text.splitlines() if line.startswith("case "))
    assert "trainable" in header
    assert "status" in header
    assert "entropy floor is" in text


def test_pytest_benchmarks_own_compare_reads_the_file(smoke):
    assert "tiny-gpt2-lora-sft" in own_compare(smoke[0])


def test_a_case_over_its_time_limit_is_a_timeout(tmp_path):
    code, _, run = bench(
        tmp_path, "--adapters", "lora", "--methods", "sft", "--case-timeout", "0.01"
    )
    assert code == 1
    (case,) = run["peftbench"]["cases"]
    assert case["status"] == "timeout"
    assert "0.01 s" in case["reason"]


def test_the_trl_engine_runs_the_same_case(tmp_path, smoke):
    code, text, run = bench(
        tmp_path, "--engine", "trl", "--adapters", "lora", "--methods", "dpo", "--rounds", "1"
    )
    assert code == 0, text
    ours, theirs = (rows(r)["tiny-gpt2-lora-dpo"] for r in (smoke[2], run))
    assert theirs["data_digest"] == ours["data_digest"]
    assert theirs["rounds"][0]["losses"] == pytest.approx(ours["rounds"][0]["losses"], rel=1e-3)
    assert theirs["train_s"] > 0


def test_random_weights_measure_time_but_not_quality(tmp_path):
    code, text, run = bench(
        tmp_path, "--models", "tiny-llama", "--weights", "random", "--adapters", "ia3",
        "--methods", "sft",
    )  # fmt: skip
    assert code == 0, text
    row = rows(run)["tiny-llama-ia3-sft"]
    assert row["train_s"] > 0
    assert row["perplexity"] is None
    assert row["null_reasons"]["perplexity"] == "random weights (seed 0): quality means nothing"
    assert row["weights_hash"] == "random, seed 0"


def test_collecting_the_nightly_matrix_imports_no_torch(tmp_path):
    code = (
        "import sys, pytest;"
        f"pytest.main([{str(ROOT / 'bench')!r}, '--collect-only', '-q', '--preset', 'nightly',"
        " '-p', 'no:cacheprovider']);"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "test_train[llama-7b-qlora-orpo]" in out.stdout
    assert out.stdout.splitlines()[-1] == "False"


def test_without_a_network_a_seed_repeats_bit_for_bit(tmp_path, smoke):
    """The whole run in a network namespace of its own, where only loopback exists."""
    cut = namespace("net")
    devices = subprocess.run(
        [*cut, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True
    )
    assert {line.split(":")[0].strip() for line in devices.stdout.splitlines()[2:]} == {"lo"}
    options = ("--adapters", "lora", "--methods", "sft", "--seed", "1")
    code, text, run = bench(tmp_path, *options, before=cut)
    assert code == 0, text
    second = rows(smoke[2])["tiny-gpt2-lora-sft"]["rounds"][1]
    assert second["seed"] == 1
    assert rows(run)["tiny-gpt2-lora-sft"]["losses"] == second["losses"]


def test_preloading_for_cuda_builds_asks_nothing_of_the_device():
    """A forked child cannot use CUDA once the server has: every query of torch.cuda raises here."""
    code = f"""
import torch
def refuse(*args, **kwargs):
    raise AssertionError("the fork server touched CUDA")
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties",
             "current_device", "init", "_lazy_init", "is_bf16_supported", "get_device_name"):
    setattr(torch.cuda, name, refuse)
for module in {PRELOAD_CUDA!r}:
    __import__(module)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_left_running(smoke):
    out = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    folder = str(smoke[0])
    assert not [line for line in out.splitlines() if folder in line and "ps -eo" not in line]
