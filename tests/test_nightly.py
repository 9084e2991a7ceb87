"""The nightly workflow: its script as it stands, on the smoke preset."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def night(history: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["scripts/nightly.sh", str(history), str(out)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PRESET": "smoke"} | environment,
    )  # fmt: skip


@pytest.mark.verify
def test_two_nights_of_the_pinned_leg(tmp_path):
    history = tmp_path / "history"
    first = night(history, tmp_path / "first")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "nothing to compare with yet" in (tmp_path / "first" / "summary.md").read_text()
    assert len(list((history / "pinned").glob("*.json"))) == 1
    second = night(history, tmp_path / "second")
    # times of less than a second may differ by anything on a shared machine: 1 is an answer too
    assert second.returncode in (0, 1), second.stdout + second.stderr
    out = tmp_path / "second"
    assert "| case | metric |" in (out / "summary.md").read_text()
    verdicts = json.loads((out / "run.verdicts.json").read_text())
    assert (verdicts["exit_code"] == 0) == (second.returncode == 0)
    assert "torch==" in (out / "versions.txt").read_text()
    assert (out / "report.html").stat().st_size > 100_000
    assert len(list((history / "pinned").glob("*.json"))) == 2


def test_a_mistake_is_one_line(tmp_path):
    found = night(tmp_path / "h", tmp_path / "o", LEG="latest")
    assert found.returncode == 2
    assert found.stderr == "nightly.sh: LEG is latest; it must be pinned or newest\n"
    assert not (tmp_path / "h").exists()


def test_the_workflows_call_what_there_is():
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        text = file.read_text()
        for script in re.findall(r"(?:scripts|\.ci)/[\w.]+", text):
            assert os.access(ROOT / script, os.X_OK), f"{file.name} calls {script}"
        assert "permissions:" in text
