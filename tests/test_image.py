"""The image's scripts, as far as a machine without an engine can try them: what they ask docker
for, and one line for what is missing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKER = """#!/bin/sh
if [ "$1" = run ]; then printf '%s\\n' "$@" > "$ASKED"; fi
[ "$1" != "$FAILS" ]
"""


@pytest.fixture
def machine(tmp_path):
    """Programs that stand in for docker and the NVIDIA driver; what docker was asked to run."""
    programs, asked = tmp_path / "bin", tmp_path / "asked"
    programs.mkdir()
    for name, text in (("docker", DOCKER), ("nvidia-smi", "#!/bin/sh\nexit 0\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), "ASKED": str(asked),
           "FAILS": "", "HF_TOKEN": "hf_plantedtokenplantedtoken"}  # fmt: skip

    def run(*command: str, **more: str) -> tuple[int, str, list[str]]:
        done = subprocess.run(
            command, cwd=ROOT, env=env | {"OUTPUT": str(tmp_path / "out")} | more,
            capture_output=True, text=True,
        )  # fmt: skip
        words = asked.read_text().splitlines() if asked.exists() else []
        assert "plantedtoken" not in done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr, words

    run.programs = programs
    return run


def test_train_passes_gpu_user_token_by_name_and_volumes(machine, tmp_path):
    code, _, asked = machine("make", "train", "PEFT=ia3", "MODEL=gpt-2", "METHOD=dpo", "DATA=x")
    assert code == 0
    assert asked[:2] == ["run", "--rm"]
    at = {word: asked[i + 1] for i, word in enumerate(asked[:-1]) if word.startswith("-")}
    assert at["--gpus"] == "all"
    assert at["--user"] == f"{os.getuid()}:{os.getgid()}"
    assert {"HUGGINGFACE_TOKEN", "HF_TOKEN"} <= set(asked)
    assert not any("plantedtoken" in word for word in asked)
    assert f"{tmp_path / 'out'}:/peftbench/output" in asked
    assert f"{tmp_path / '.cache/peftbench-image'}:/cache" in asked
    end = asked[asked.index("peftbench") :]
    assert end == ["peftbench", "train", "--model", "gpt-2", "--adapter", "ia3", "--method", "dpo",
                   "--data", "x"]  # fmt: skip


def test_infer_and_shell(machine):
    asked = machine("make", "infer", "PEFT=lora", "MODEL=gpt-2", GPUS="none")[2]
    assert "--gpus" not in asked
    assert asked[-5:] == ["infer", "--model", "gpt-2", "--adapter", "lora"]
    asked = machine("make", "shell", IMAGE="mine:1")[2]
    assert asked[-3:] == ["--entrypoint", "bash", "mine:1"]


@pytest.mark.parametrize(
    ("missing", "fails", "words"),
    [
        ("docker", "", "docker is not installed"),
        ("", "version", "no engine that answers"),
        ("", "image", "no image peftbench yet; make build"),
        ("nvidia-smi", "", "no NVIDIA driver is installed here"),
    ],
)
def test_what_is_missing_is_one_line(machine, missing, fails, words):
    if missing:
        (machine.programs / missing).unlink()
    code, out, asked = machine("scripts/image.sh", "train", FAILS=fails)
    assert (code, asked) == (2, [])
    assert words in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["PEFT=lora"], "MODEL is missing"),
        (["MODEL=gpt-2"], "PEFT is missing"),
        ([], "PEFT and MODEL are missing"),
    ],
)
def test_make_says_what_was_left_out(machine, arguments, words):
    code, out, asked = machine("make", "-s", "train", *arguments)
    assert code != 0
    assert asked == []
    assert words in out.splitlines()[0]


def test_the_image_has_what_it_needs_and_no_more():
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert "gcc" in text
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    assert not re.search(r"(ARG|ENV).*TOKEN", text)
    kept = (ROOT / ".dockerignore").read_text().split()
    copied = {
        w for line in text.splitlines() if line.startswith("COPY") for w in line.split()[1:-1]
    }
    assert {f"!{name}" for name in copied} == {w for w in kept if w.startswith("!")}
    for name in copied:
        assert (ROOT / name).exists()
