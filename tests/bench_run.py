"""How tests run `pytest bench` for real: in a process of its own, with the smallest budget."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--preset", "smoke", "--pairs", "32", "--batch-size", "8", "--eval-tokens", "600",
         "--eval-pairs", "20", "--eval-completions", "8", "--threads", "1"]  # fmt: skip


def start(
    folder: Path,
    *arguments: str,
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """`pytest bench` with its file in `folder`/run.json and its rounds under `folder`/runs."""
    # where these tests have imported torch's compiler, that has put its own choice in their place
    ours = {name: v for name, v in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return subprocess.Popen(
        [*before, sys.executable, "-m", "pytest", str(ROOT / "bench"), "--rootdir", str(ROOT),
         "-p", "no:cacheprovider", f"--benchmark-json={folder / 'run.json'}", "--results-dir",
         str(folder / "runs"), *SMALL, *arguments],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=ours | {"COLUMNS": "200", "OMP_WAIT_POLICY": "passive"} | (environment or {}),
        # a shell's background jobs ignore Ctrl-C, and so would what these tests send it to
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what was printed)."""
    text, _ = process.communicate(timeout=400)
    return process.returncode, text


def bench(
    folder: Path,
    *arguments: str,
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> tuple[int, str, dict]:
    """(exit code, what was printed, the JSON)."""
    code, text = finish(start(folder, *arguments, before=before, environment=environment))
    return code, text, read(folder)


def read(folder: Path) -> dict:
    """The run's file, which must be strict JSON; {} if there is none."""
    target = folder / "run.json"
    text = target.read_text() if target.exists() else "{}"
    run: dict = json.loads(text, parse_constant=_refuse_constant)
    return run


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} in the JSON")


def rows(run: dict) -> dict[str, dict]:
    """The records of the cases that have a time, by id."""
    return {b["extra_info"]["case_id"]: b["extra_info"] for b in run["benchmarks"]}


def cases(run: dict) -> dict[str, dict]:
    """Every case's status, by id."""
    return {case["case_id"]: case for case in run["peftbench"]["cases"]}


def own_compare(folder: Path) -> str:
    """What pytest-benchmark's own compare prints of the run's file; it must be able to load it."""
    out = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(folder / "run.json")],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "Traceback" not in out.stderr
    return out.stdout


def namespace(*kinds: str) -> tuple[str, ...]:
    """The start of a command that runs in namespaces of its own, as root in there."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare: apt-get install util-linux")
    own = ("unshare", *(f"--{kind}" for kind in kinds), "--map-root-user")
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode != 0:
        own = own[:-1]  # already root in a container that forbids user namespaces
    check = subprocess.run([*own, "true"], check=False, capture_output=True, text=True)
    if check.returncode != 0:
        pytest.skip(f"this system forbids namespaces: {check.stderr.strip()}")
    return own
