"""`peftbench fit`: what fits is found by trying, and the limit is what decides."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_sessions as made
import pytest

from peftbench.case import Settings
from peftbench.cli import main
from peftbench.fit import Choice, Fit, answer_lines, choices, probe_case

LORA = Choice("lora", "sft", 64, False)


def test_every_combination_the_shortest_first():
    found = choices(["lora", "full"], ["sft"], [128, 64])
    assert len(found) == len(set(found)) == 8
    assert [c.length for c in found[:2]] == [64, 128]


def test_a_probe_is_a_few_steps_of_exactly_this_length():
    case = probe_case("tiny-gpt2", Choice("lora", "dpo", 65, True), 8, Settings())
    settings = case.settings
    assert (settings.steps, settings.batch_size, settings.gradient_accumulation) == (3, 8, 1)
    assert (settings.prompt_length, settings.completion_length) == (33, 32)
    assert settings.gradient_checkpointing
    assert not settings.measures_quality
    ppo = probe_case("tiny-gpt2", Choice("lora", "ppo", 64, False), 8, Settings()).settings
    assert (ppo.ppo_updates, ppo.ppo_minibatches, ppo.ppo_warmup_updates) == (3, 1, 1)


def test_the_answer_names_the_fastest_and_the_best_that_fit(tmp_path):
    losses = {"m-lora-sft": 2.0, "m-full-sft": 1.0, "m-ia3-sft": 3.0}
    records = [made.case(name, nll_per_token=loss) for name, loss in losses.items()]
    file = made.write(tmp_path / "a.json", made.session(records))
    found = [
        Fit(LORA, 4, 1000.0, 2**20, "oom at 8"),
        Fit(Choice("ia3", "sft", 64, True), 8, 1500.0, 2**20, "oom at 16"),
        Fit(Choice("full", "sft", 64, False), 0, None, None, "oom at 1"),
    ]
    text = "\n".join(answer_lines(found, 2**30, [file]))
    assert "fastest that fits: ia3 sft, 64 tokens, checkpointing: batch 8, 1,500 tokens/s" in text
    assert "best nll_per_token that fits, sft: lora (2," in text
    assert "oom at 1" in text
    assert "give --results" in "\n".join(answer_lines(found[:1], 2**30, []))
    assert "nothing fits into 1,024 MiB" in "\n".join(answer_lines(found[2:], 2**30, []))


@pytest.mark.verify
def test_more_memory_fits_a_larger_batch(tmp_path, monkeypatch, capfd):
    """Two limits on a real model; the larger one has at least twice the batch of the smaller."""
    monkeypatch.chdir(tmp_path)
    batches = []
    for memory in ("300MiB", "700MiB"):
        code = main(["fit", "--model", "tiny-gpt2", "--memory", memory, "--adapters", "lora",
                     "--methods", "sft", "--lengths", "192"])  # fmt: skip
        out = capfd.readouterr().out
        assert code == 0, out
        rows = re.findall(r"^lora +sft +192 +(no|yes) +(\d+|-) .*$", out, re.MULTILINE)
        assert [kind for kind, _ in rows] == ["no", "yes"], out
        batches.append([0 if batch == "-" else int(batch) for _, batch in rows])
        assert "oom at" in out
        assert "fastest that fits" in out
    assert all(large >= 2 * small for small, large in zip(*batches, strict=True))
    assert Path("output/fit").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the children")
def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    """As a terminal sends it: to the fork server as well, in the middle of its imports."""
    with subprocess.Popen(
        [sys.executable, "-m", "peftbench", "fit", "--model", "tiny-gpt2", "--memory", "300MiB"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C, and so would this one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ends = time.monotonic() + 60
        while len(children.read_text().split()) < 2:  # the resource tracker and the server
            assert time.monotonic() < ends
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapters", "lorra"], "did you mean lora"),
        (["--methods", "dpoo"], "did you mean dpo"),
        (["--lengths", "short"], "write numbers of tokens"),
        (["--lengths", "1"], "at least 2 tokens"),
        (["--lengths", "4096"], "the context of tiny-gpt2 is 512 tokens"),
        (["--model", "tiny-gpt3"], "did you mean tiny-gpt2"),
        (["--memory", "24"], "--memory is 24 bytes; give at least 1MiB, for example 24GiB"),
        (["--threads", "-1"], "threads is -1"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    given = {"--model": "tiny-gpt2", "--memory": "1GiB"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert main(["fit", *(word for pair in given.items() for word in pair)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
