"""`peftbench train`: what it leaves behind, and that an interrupted training goes on as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftbench import train_command
from peftbench.case import Case, Settings
from peftbench.checkpoint import HEADER, checkpoint_file, steps_done
from peftbench.cli import main
from peftbench.data.loading import load_task
from peftbench.errors import UserError
from peftbench.evaluation import evaluating, score_text, text_metrics
from peftbench.train_command import Keeping, StoppedError, differences, train_case

ROOT = Path(__file__).parent.parent
TINY = ROOT / "peftbench" / "tiny" / "tiny-gpt2"
SETTINGS = Settings(
    pairs=32, batch_size=4, prompt_length=32, completion_length=32, eval_tokens=512,
    eval_context=64, eval_stride=32, eval_pairs=16, eval_completions=8, eval_samples=1,
    ppo_batch_size=8, ppo_epochs=2,
)  # fmt: skip
SMALL = ["--preset", "smoke", "--pairs", "48", "--batch-size", "4", "--eval-completions", "8"]


@pytest.fixture(autouse=True)
def one_state():
    """A training sets threads and seeds of its process."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(random)


def trained(folder: Path, adapter: str, method: str, **more) -> dict:
    given = {"resume": False, "overwrite": False, "checkpoint_every_s": 3600.0} | more
    train_case(Case("tiny-gpt2", adapter, method, SETTINGS), folder, **given)
    return json.loads((folder / "training.json").read_text())


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "lora"
    trained(folder, "lora", "dpo")
    return folder


def test_peft_alone_loads_it_and_scores_what_the_record_says(lora):
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, lora).eval()
    tokenizer = AutoTokenizer.from_pretrained(lora)
    task = load_task(SETTINGS, tokenizer, base.config.vocab_size)
    with evaluating(model, SETTINGS):
        score = score_text(model, task.test_tokens, 64, 32, 8)
    found = json.loads((lora / "training.json").read_text())["metrics"]
    assert text_metrics(score, task.test_bytes)["perplexity"] == pytest.approx(
        found["perplexity"], rel=1e-5
    )
    assert found["perplexity"] != pytest.approx(found["perplexity_base"], rel=1e-3)
    assert found["adapter_bytes"] == len(weights(lora))
    assert found["trainable_params"] == sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )


def test_a_full_model_loads_with_transformers_alone(tmp_path):
    trained(tmp_path / "full", "full", "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert model.config.use_cache
    moved = model.get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(TINY).get_input_embeddings().weight
    assert (moved != before).any()


def test_the_folder_has_a_card_and_no_path_of_this_machine(lora):
    names = {f.name for f in lora.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
            "training.json"} <= names  # fmt: skip
    assert not any("checkpoint" in name or name == "begun.json" for name in names)
    card = (lora / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "PeftModel.from_pretrained" in card
    assert "| perplexity |" in card
    for file in lora.iterdir():
        text = file.read_bytes()
        assert str(ROOT).encode() not in text, file.name
        assert str(lora.parent).encode() not in text, file.name


@pytest.mark.parametrize(
    ("adapter", "method", "stage", "at"),
    [("lora", "dpo", "dpo", 3), ("full", "sft+dpo", "sft", 5), ("prefix", "sft+dpo", "dpo", 2),
     ("lora", "ppo", "ppo", 1), ("qlora", "orpo", "orpo", 1)],
)  # fmt: skip
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch, adapter, method, stage, at):
    whole = trained(tmp_path / "whole", adapter, method)
    done = Keeping.step_done

    def interrupted(self, state):
        if (state.stage, state.step) == (stage, at):
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the middle of a step
        done(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Keeping, "step_done", interrupted)
        with pytest.raises(StoppedError, match=f"{stage}, step {at} of"):
            trained(tmp_path / "parts", adapter, method)
    assert steps_done(checkpoint_file(tmp_path / "parts", stage))[0] == at
    resumed = trained(tmp_path / "parts", adapter, method, resume=True)
    assert resumed["losses"] == whole["losses"]
    assert resumed["metrics"] == whole["metrics"]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_how_far_a_training_has_come_is_in_the_header(tmp_path, monkeypatch):
    @contextmanager
    def header_of(file, framework):
        assert framework == "numpy"  # for torch the file is opened twice, a running training's too
        with safe_open(file, framework=framework) as opened:
            yield SimpleNamespace(metadata=opened.metadata)  # whoever asks for a tensor fails

    header = {"version": 1, "stage": "sft", "step": 3, "steps": 12}
    file = checkpoint_file(tmp_path, "sft")
    save_file({"parameter.0": torch.zeros(4)}, file, metadata={HEADER: json.dumps(header)})
    monkeypatch.setattr("peftbench.checkpoint.safe_open", header_of)
    assert steps_done(file) == (3, 12)


def run(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "peftbench", "train", "--model", "tiny-gpt2", "--adapter",
               "lora", "--method", "sft", "--output", str(folder), *SMALL, *more]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    parts, file = tmp_path / "parts", checkpoint_file(tmp_path / "parts", "sft")
    killed = run(parts, "--checkpoint-every", "0")
    deadline = time.monotonic() + 120
    while not (file.is_file() and steps_done(file)[0] >= 3):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (parts / "training.json").exists()
    resumed, whole = run(parts, "--resume"), run(tmp_path / "whole")
    for process in (resumed, whole):
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert "talk to it: peftbench infer --model tiny-gpt2" in out
        assert "Warning" not in err
    found, expected = (json.loads((f / "training.json").read_text())
                       for f in (parts, tmp_path / "whole"))  # fmt: skip
    assert found["losses"] == expected["losses"]
    assert weights(parts) == weights(tmp_path / "whole")


def test_a_folder_that_must_not_be_touched_is_one_line(tmp_path, lora, capsys):
    case = Case("tiny-gpt2", "lora", "dpo", SETTINGS)

    def refused(folder: Path, words: str, of: Case = case, **more: bool) -> None:
        given = {"resume": False, "overwrite": False} | more
        with pytest.raises(UserError, match=words):
            train_command.prepare_folder(folder, of, **given)

    refused(lora, "finished training")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(tmp_path / "mine", "no training of peftbench", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    refused(tmp_path / "mine" / "thesis.txt", "is a file")
    train_command.prepare_folder(tmp_path / "begun", case, resume=False, overwrite=False)
    refused(tmp_path / "begun", r"interrupted training \(before its first checkpoint\).*--resume")
    torn = tmp_path / "begun" / ".tmp-torn"  # of a checkpoint that a killed training was writing
    torn.write_bytes(b"x")
    train_command.prepare_folder(tmp_path / "begun", case, resume=True, overwrite=False)
    assert not torn.exists()
    other = replace(case, settings=replace(SETTINGS, rank=16))
    refused(tmp_path / "begun", "begun with rank 8, now 16", of=other, resume=True)
    checkpoint_file(tmp_path / "begun", "dpo").write_bytes(b"not safetensors")
    refused(tmp_path / "begun", "damaged", resume=False)
    assert main(["train", "--model", "tiny-gpt2", "--adapter", "lora", "--method", "dpo",
                 "--output", str(lora), *SMALL]) == 2  # fmt: skip
    assert capsys.readouterr().err.startswith("peftbench: ")


def test_differences_name_what_changed():
    before = Case("tiny-gpt2", "lora", "dpo", SETTINGS).to_dict()
    now = Case("tiny-gpt2", "lora", "sft", replace(SETTINGS, seed=3)).to_dict()
    assert differences(before, now) == ["method dpo, now sft", "seed 0, now 3"]
    assert differences(before, before) == []


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--adapter", "lorra"], "did you mean lora", 2),
        (["--method", "dpoo"], "did you mean dpo", 2),
        (["--model", "tiny-gpt3"], "did you mean tiny-gpt2", 2),
        (["--preset", "quik"], "did you mean quick", 2),
        (["--data", "./nowhere.jsonl"], "no file or folder './nowhere.jsonl'", 2),
        (["--engine", "trl"], "native engine", 2),
        (["--checkpoint-every", "-1"], "checkpoint-every is -1.0", 2),
        (["--pairs", "4"], "nothing is left to time", 2),
        (["--learning-rate", "1e30"], "lower --learning-rate", 5),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words, code):
    given = {"--model": "tiny-gpt2", "--adapter": "lora", "--method": "sft",
             "--output": str(tmp_path / "o")}  # fmt: skip
    given |= dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert main(["train", *(word for pair in given.items() for word in pair)]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_pushing_without_a_token_or_a_hub_keeps_the_folder(lora, monkeypatch):
    with pytest.raises(UserError, match="set HF_TOKEN"):
        train_command.push_to_hub(lora, "someone/something", None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot push to 'someone/something'") as caught:
        train_command.push_to_hub(lora, "someone/something", "hf_secretsecretsecret")
    assert "secretsecret" not in str(caught.value)
    assert weights(lora)
