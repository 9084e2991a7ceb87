"""The real thing: pytest runs the matrix in real child processes and writes the real JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.metrics import METRICS, PHASES
from peftbench.worker import PRELOAD_CUDA

ROOT = Path(__file__).parent.parent
SMALL = ["--preset", "smoke", "--pairs", "32", "--batch-size", "8", "--eval-tokens", "600",
         "--eval-pairs", "20", "--threads", "1"]  # fmt: skip


def bench(folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> tuple[int, str, dict]:
    """(exit code, what was printed, the JSON) of `pytest bench` with the smallest budget."""
    target = folder / "run.json"
    out = subprocess.run(
        [*before, sys.executable, "-m", "pytest", str(ROOT / "bench"), "--rootdir", str(ROOT),
         "-p", "no:cacheprovider", f"--benchmark-json={target}", "--results-dir",
         str(folder / "runs"), *SMALL, *arguments],
        capture_output=True, text=True, cwd=folder, timeout=400,
        env=os.environ | {"COLUMNS": "200", "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    text = target.read_text() if target.exists() else "{}"
    return out.returncode, out.stdout + out.stderr, json.loads(text, parse_constant=refuse_constant)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} in the JSON")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    code, text, run = bench(folder, "--rounds", "2", "--adapters", "lora,full,qlora")
    assert code == 0, text
    return folder, text, run


def rows(run: dict) -> dict[str, dict]:
    return {b["extra_info"]["case_id"]: b["extra_info"] for b in run["benchmarks"]}


def test_every_case_is_in_the_file_and_ok(smoke):
    _, _, run = smoke
    ids = {f"tiny-gpt2-{a}-{m}" for a in ("lora", "full", "qlora") for m in ("sft", "dpo")}
    assert set(rows(run)) == ids
    assert {c["case_id"]: c["status"] for c in run["peftbench"]["cases"]} == dict.fromkeys(
        ids, "ok"
    )
    assert all(b["params"]["model"] == "tiny-gpt2" for b in run["benchmarks"])


def test_stats_are_the_training_time(smoke):
    for benchmark in smoke[2]["benchmarks"]:
        ours = [r["train_s"] for r in benchmark["extra_info"]["rounds"]]
        theirs = benchmark["stats"]["data"]
        assert len(ours) == len(theirs) == 2
        # generous on a busy machine; the two clocks differ by a message through a pipe
        assert all(abs(a - b) < 0.05 for a, b in zip(ours, theirs, strict=True))


def test_every_metric_is_a_number_or_null_with_a_reason(smoke):
    for row in rows(smoke[2]).values():
        for name in METRICS:
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
        timed_pairs = 16  # 2 of the 4 steps warm up
        assert row["samples_per_s"] * row["train_s"] == pytest.approx(timed_pairs, rel=0.5)
        assert row["trainable_ratio"] == row["trainable_params"] / row["total_params"]
        if "lora" in name:  # 4 layers x 4 linears, r = 8: sums of r (in + out)
            shapes = [(128, 384), (128, 128), (128, 512), (512, 128)]
            assert row["trainable_params"] == 4 * sum(8 * (i + o) for i, o in shapes)


def test_rounds_differ_by_seed_and_a_seed_repeats_bit_for_bit(smoke, tmp_path):
    row = rows(smoke[2])["tiny-gpt2-lora-sft"]
    first, second = row["rounds"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["losses"] != second["losses"]
    _, _, again = bench(tmp_path, "--seed", "1", "--adapters", "lora", "--methods", "sft")
    assert rows(again)["tiny-gpt2-lora-sft"]["losses"] == second["losses"]


def test_reference_is_charged_to_the_method(smoke):
    dpo, sft = (rows(smoke[2])[f"tiny-gpt2-lora-{m}"] for m in ("dpo", "sft"))
    for r in dpo["rounds"]:
        assert r["method_s"] == pytest.approx(r["reference_s"] + r["warmup_s"] + r["train_s"])
    assert sft["reference_s"] is None
    assert sft["null_reasons"]["reference_s"] == "sft has no reference"
    assert dpo["first_loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # log 2: the policy is the reference


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


def test_every_round_is_on_disk_with_its_provenance(smoke):
    folder, _, run = smoke
    files = list((folder / "runs" / run["peftbench"]["run_id"]).glob("*.json"))
    assert len(files) == 12
    record = json.loads(files[0].read_text())
    assert record["provenance"]["libraries"]["torch"].startswith("2.")
    assert len(record["weights_hash"]) >= 12
    assert record["samples"][0].keys() == {"prompt", "before", "after"}
    text = json.dumps(run["benchmarks"][0]["extra_info"])
    assert str(ROOT) not in text  # no path of the user's machine


def test_a_local_model_and_data_set_are_recorded_by_name_not_by_place(tmp_path):
    """Two copies in two places: one case hash, and the file tells neither place."""
    hashes = set()
    for place in ("here", "there"):
        folder = tmp_path / place
        shutil.copytree(ROOT / "peftbench/tiny/tiny-gpt2", folder / "my-model")
        pairs = [
            {"prompt": f"p {i} is", "chosen": f" good {i} .", "rejected": f" bad {i} ."}
            for i in range(120)
        ]
        (folder / "my-pairs.jsonl").write_text("\n".join(json.dumps(p) for p in pairs))
        code, text, run = bench(
            folder, "--models", str(folder / "my-model"), "--data", str(folder / "my-pairs.jsonl"),
            "--adapters", "ia3", "--methods", "sft",
        )  # fmt: skip
        assert code == 0, text
        row = rows(run)["my-model-ia3-sft"]
        assert (row["case"]["model"], row["data"]) == ("my-model", "my-pairs.jsonl")
        assert str(tmp_path) not in (folder / "run.json").read_text()
        hashes.add((row["case_hash"], row["data_digest"]))
    assert len(hashes) == 1


def test_the_screen_shows_cases_progress_and_a_table(smoke):
    text = smoke[1]
    assert "[1/6] tiny-gpt2-lora-sft ..." in text
    assert "elapsed, about" in text
    header = next(line for line in text.splitlines() if line.startswith("case "))
    assert "trainable" in header
    assert "status" in header
    assert "entropy floor is" in text


def test_pytest_benchmarks_own_compare_reads_the_file(smoke):
    folder, _, _ = smoke
    out = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(folder / "run.json")],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "tiny-gpt2-lora-sft" in out.stdout


def test_a_failing_case_keeps_the_others_and_the_file(tmp_path):
    """A learning rate of 1e30 makes the loss NaN: `invalid`; the file stays readable."""
    code, text, run = bench(
        tmp_path, "--adapters", "lora", "--learning-rate", "1e30", "--max-grad-norm", "0"
    )
    assert code == 1, text
    assert {c["status"] for c in run["peftbench"]["cases"]} == {"invalid"}
    assert all("the loss is nan" in c["reason"] for c in run["peftbench"]["cases"])
    assert run["benchmarks"] == []
    out = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "run.json")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "Traceback" not in out.stderr


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


def test_the_network_is_not_needed(tmp_path):
    """The whole run in a network namespace of its own, where only loopback exists."""
    cut = ("unshare", "--net", "--map-root-user")
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare: apt-get install util-linux")
    if subprocess.run([*cut, "true"], check=False, capture_output=True).returncode != 0:
        cut = cut[:2]  # already root in a container that forbids user namespaces
    check = subprocess.run([*cut, "cat", "/proc/net/dev"], capture_output=True, text=True)
    if check.returncode != 0:
        pytest.skip("this system forbids network namespaces: " + check.stderr.strip())
    interfaces = {line.split(":")[0].strip() for line in check.stdout.splitlines()[2:]}
    assert interfaces == {"lo"}
    code, text, run = bench(tmp_path, "--adapters", "lora", "--methods", "sft", before=cut)
    assert code == 0, text
    assert rows(run)["tiny-gpt2-lora-sft"]["status"] == "ok"


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
