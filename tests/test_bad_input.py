"""What a user can get wrong: one line, before any training starts, pytest's exit code 4."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCH = str(ROOT / "bench")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def model_folder(path: Path, *, config: bool = True, weights: str = "model.safetensors") -> Path:
    path.mkdir()
    if config:
        values = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 64, "n_embd": 8}
        (path / "config.json").write_text(json.dumps(values | {"n_layer": 1, "n_head": 1}))
    if weights:
        (path / weights).write_bytes(b"x")
    return path


ROW = {"prompt": "a b", "chosen": " c d e", "rejected": " f g h"}

# name -> (options, what the line must hold); {tmp} is an empty folder of the test
NAMES = {
    "model": (["--models", "tiny-gpt3"], "unknown model 'tiny-gpt3'; did you mean tiny-gpt2"),
    "adapter": (["--adapters", "lorra"], "unknown adapter 'lorra'; did you mean"),
    "method": (["--methods", "sft,dop"], "unknown method 'dop'; did you mean dpo"),
    "preset": (["--preset", "quik"], "unknown preset 'quik'; did you mean quick"),
    "data": (["--data", "tinywki"], "did you mean tinywiki"),
    "engine": (["--engine", "jax"], "unknown engine 'jax'; choose from: native, trl"),
    "weights": (["--weights", "zero"], "unknown weights 'zero'"),
    "device": (["--device", "tpu"], "unknown device 'tpu'"),
    "dtype": (["--dtype", "fp8"], "unknown dtype 'fp8'"),
    "targets": (["--targets", "k"], "unknown targets 'k'"),
    "schedule": (["--schedule", "cosine"], "unknown schedule 'cosine'"),
    "optimizer": (["--optimizer", "lion"], "unknown optimizer 'lion'"),
    "no models": (["--models", ","], "--models is empty"),
    "batch of 0": (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
    "0 pairs": (["--pairs", "0"], "pairs is 0; it must be at least 1"),
    "0 rounds": (["--rounds", "0"], "rounds is 0; it must be at least 1"),
    "too few steps": (["--pairs", "16"], "nothing is left to time"),
    "negative rate": (["--learning-rate", "-1"], "learning_rate is -1.0"),
    "models of one name": (["--models", "{tmp}/a/m,{tmp}/b/m"], "have one name, 'm'"),
    "model of a user who is not": (["--models", "~no-such-user/x"], "no-such-user"),
    "data of a user who is not": (["--data", "~no-such-user/x"], "no-such-user"),
    "rate is nan": (["--learning-rate", "nan"], "learning_rate is nan"),
    "minibatch beyond the batch": (
        ["--methods", "ppo", "--ppo-minibatch-size", "64"],
        "multiple of the minibatch, which is 64",
    ),
    "no update to time": (["--methods", "ppo", "--pairs", "32"], "nothing is left to time"),
    "truth of other text": (
        ["--methods", "ppo", "--reward", "true", "--data", "synthetic"],
        "known of tinywiki only",
    ),
    "response beyond context": (
        ["--methods", "ppo", "--completion-length", "600"],
        "but the model's context is",
    ),
    "beta of 0": (["--beta", "0"], "beta is 0.0; it must be a number above 0"),
    "benchmarks disabled": (["--benchmark-disable"], "do not work with bench/"),
    "no time for a case": (["--case-timeout", "0"], "it must be above 0"),
    "batch is a word": (["--batch-size", "big"], "invalid int value: 'big'"),
    "prompt beyond context": (["--prompt-length", "600"], "but the model's context is"),
    "window beyond context": (["--eval-context", "4096"], "but the model's context is"),
    "stride beyond window": (["--eval-stride", "256"], "eval_stride is 256"),
    "missing data file": (["--data", "{tmp}/none.jsonl"], "none.jsonl"),
    "results under a file": (["--results-dir", "{tmp}/file/x"], "cannot be written"),
    "gated without token": (["--models", "llama-7b"], "HF_TOKEN"),
    "hub out of reach": (["--models", "someone/something"], "--weights random"),
    "data hub out of reach": (["--data", "someone/pairs"], "tinywiki"),
}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No token, no Hub cache, and a Hub that refuses at once."""
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def refuse(arguments: list[str], tmp_path: Path, capfd: Any) -> str:
    """Run pytest on bench/ and return its one line; checks exit code 4 and that nothing ran.

    In this process, which saves a second each; those that ask the Hub have one of their own, since
    its library reads the environment when it is imported.
    """
    command = [BENCH, "-p", "no:cacheprovider", "--rootdir", str(ROOT),
               "--results-dir", str(tmp_path / "runs"), *arguments]  # fmt: skip
    if any(name in " ".join(arguments) for name in ("llama-7b", "someone/")):
        out = subprocess.run(
            [sys.executable, "-m", "pytest", *command],
            capture_output=True, text=True, env=os.environ, cwd=tmp_path, timeout=240,
        )  # fmt: skip
        code, text = out.returncode, out.stdout + out.stderr
    else:
        with contextlib.chdir(tmp_path):
            code = pytest.main(command)
        text = "".join(capfd.readouterr())
    assert code == 4, text
    assert "Traceback" not in text
    assert "tokens/s" not in text  # no case ran
    # an option that argparse itself refuses comes below a usage line and has ": error: " in it
    lines = [line for line in text.splitlines() if ": error: " in line] or [
        line for line in text.splitlines() if line.startswith("ERROR: ")
    ]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_option_gives_one_line_and_exit_code_4(name, tmp_path, offline, capfd):
    (tmp_path / "file").write_text("")
    options, says = NAMES[name]
    line = refuse([o.format(tmp=tmp_path) for o in options], tmp_path, capfd)
    assert says in line


FILES = {
    "empty file": ("a.jsonl", "", "empty"),
    "not json": ("a.jsonl", '{"prompt": "a"\n', "line 1"),
    "wrong columns": ("a.jsonl", json.dumps({"question": "q", "answer": "a"}), "question"),
    "empty chosen": ("a.jsonl", json.dumps(ROW | {"chosen": ""}), "chosen"),
    "number as prompt": ("a.jsonl", json.dumps(ROW | {"prompt": 3}), "prompt"),
    "too few rows": ("a.jsonl", json.dumps(ROW), "1"),
    "chosen equals rejected": ("a.jsonl", json.dumps(ROW | {"rejected": " c d e"}), "rejected"),
    "half a surrogate pair": ("a.jsonl", json.dumps(ROW | {"chosen": "a \ud83d b"}), "surrogate"),
    "unsupported kind": ("a.docx", "x", ".jsonl"),
    "not parquet": ("a.parquet", "x", "parquet"),
    "too little text": ("a.txt", " = A = \n\n a few words .\n", "give more text"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_data_file_gives_one_line_and_exit_code_4(name, tmp_path, capfd):
    file, text, says = FILES[name]
    write(tmp_path / file, text)
    line = refuse(["--data", str(tmp_path / file)], tmp_path, capfd)
    assert says in line
    assert file in line


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("no config", {"config": False}, "config.json"),
        ("no weights", {"weights": ""}, "safetensors"),
        ("pickle only", {"weights": "pytorch_model.bin"}, "only pickle checkpoints"),
    ],
)
def test_a_wrong_model_folder_gives_one_line_and_exit_code_4(name, make, says, tmp_path, capfd):
    folder = model_folder(tmp_path / "model", **make)
    assert says in refuse(["--models", str(folder)], tmp_path, capfd)


def test_an_impossible_combination_is_a_skip_with_its_sentence(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "pytest", BENCH, "-p", "no:cacheprovider", "--rootdir", str(ROOT),
         "--results-dir", str(tmp_path / "runs"), "--preset", "smoke", "--adapters", "prefix",
         "--methods", "sft", "--gradient-checkpointing", "-rs",
         f"--benchmark-json={tmp_path / 'run.json'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=240,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout
    assert "1 skipped" in out.stdout
    assert "gradient checkpointing turns off" in out.stdout
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["benchmarks"] == []
    assert [c["status"] for c in run["peftbench"]["cases"]] == ["skipped"]


def test_a_json_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "run.json", tmp_path):
        out = subprocess.run(
            [sys.executable, "-m", "pytest", str(ROOT / "bench"), "--preset", "smoke", "-p",
             "no:cacheprovider", f"--benchmark-json={target}"],
            capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False,
        )  # fmt: skip
        text = out.stdout + out.stderr
        assert out.returncode == 4, text
        assert f"{target}" in text or "benchmark-json" in text
        assert "Traceback" not in text
        assert "elapsed" not in text
