"""How rounds end badly, and that nothing measured is lost by it: real signals, real limits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from peftbench.case import parse_bytes
from peftbench.record import dumps
from peftbench.session import provenance_difference
from peftbench.worker import oom_bytes, outcome_of

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "smoke", "--pairs", "32", "--batch-size", "8", "--eval-tokens", "600",
        "--eval-pairs", "20", "--threads", "1"]  # fmt: skip
LONG = ["--pairs", "1600"]  # seconds of training, so that something can happen meanwhile


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", str(ROOT / "bench"), "--rootdir", str(ROOT),
         "-p", "no:cacheprovider", f"--benchmark-json={folder / 'run.json'}", "--results-dir",
         str(folder / "runs"), *TINY, *arguments],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "200", "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


def family(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    children: dict[int, list[int]] = {}
    for line in out.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            yield child
            todo.append(child)


def wait_for(what: Callable[[], object], seconds: float = 120.0) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing came of it within {seconds} s")


def child_of(process: subprocess.Popen[str], case: str) -> int:
    """The pid of the child that runs a case: its standard output is the case's log."""

    def found() -> int | None:
        for pid in family(process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/fd/1").readlink().name.startswith(case):
                    return pid
        return None

    pid = wait_for(found)
    assert isinstance(pid, int)
    return pid


def cases(folder: Path) -> dict[str, dict]:
    run = json.loads((folder / "run.json").read_text())
    return {case["case_id"]: case for case in run["peftbench"]["cases"]}


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run, a zombie that nobody has waited for excepted."""
    states = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return [pid for pid, state in states.items() if state not in "ZX"]


def assert_nothing_left(folder: Path, pids: Iterable[int]) -> None:
    """`pids`: everything that the run had started."""
    seen = list(pids)
    assert len(seen) >= 2  # the fork server and a child
    wait_for(lambda: not alive(seen), 10)
    assert list(folder.rglob(".tmp-*")) == []


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGKILL, "9"), pytest.param(signal.SIGSEGV, "11", marks=pytest.mark.verify)],
)
def test_a_child_killed_by_a_signal_is_crashed_and_the_next_case_runs(tmp_path, number, name):
    process = start(tmp_path, "--methods", "sft", *LONG)
    child = child_of(process, "tiny-gpt2-lora-sft")
    started = set(family(process.pid))
    os.kill(child, number)
    code, text = finish(process)
    assert code == 1, text
    lora, full = (cases(tmp_path)[f"tiny-gpt2-{a}-sft"] for a in ("lora", "full"))
    assert lora["status"] == "crashed"
    assert lora["reason"] == f"the process died with signal {name}"
    assert full["status"] == "ok"
    assert_nothing_left(tmp_path, started)
    out = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "run.json")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "tiny-gpt2-full-sft" in out.stdout


@pytest.mark.verify
def test_a_child_that_stands_still_is_a_timeout(tmp_path):
    process = start(tmp_path, "--methods", "sft", "--adapters", "lora", *LONG,
                    "--case-timeout", "12")  # fmt: skip
    child = child_of(process, "tiny-gpt2-lora-sft")
    started = set(family(process.pid))
    os.kill(child, signal.SIGSTOP)
    code, text = finish(process)
    assert code == 1, text
    assert cases(tmp_path)["tiny-gpt2-lora-sft"]["status"] == "timeout"
    assert_nothing_left(tmp_path, started)


def test_ctrl_c_keeps_what_is_finished_and_prints_the_table(tmp_path):
    process = start(tmp_path, "--methods", "sft", "--adapters", "lora,full", *LONG)  # fmt: skip
    wait_for(lambda: list((tmp_path / "runs").glob("*/tiny-gpt2-lora-sft-*.json")))
    started = set(family(process.pid))
    process.send_signal(signal.SIGINT)
    code, text = finish(process)
    assert code == 2, text
    statuses = {name: case["status"] for name, case in cases(tmp_path).items()}
    assert statuses == {"tiny-gpt2-lora-sft": "ok", "tiny-gpt2-full-sft": "interrupted"}
    assert "peftbench: 2 cases" in text
    assert_nothing_left(tmp_path, started)


def test_a_round_beyond_its_memory_limit_is_out_of_memory(tmp_path):
    process = start(tmp_path, "--methods", "sft", "--adapters", "lora", "--eval-batch-size", "4096",
                    "--eval-tokens", "300000", "--host-memory-limit", "700MiB")  # fmt: skip
    code, text = finish(process)
    assert code == 0, text  # out of memory is an answer
    case = cases(tmp_path)["tiny-gpt2-lora-sft"]
    assert case["status"] == "oom", case
    assert case["phase"].removeprefix("base: ") == "evaluate"
    assert case["oom"]["bytes_asked"] > 10_000_000


def test_a_run_killed_at_a_random_moment_is_resumed_and_repeats_nothing(tmp_path):
    options = ["--adapters", "lora,full", "--methods", "sft", "--rounds", "2"]
    process = start(tmp_path, *options)
    wait_for(lambda: list((tmp_path / "runs").glob("*/*-r0.json")))
    time.sleep(random.Random(str(tmp_path)).uniform(0, 6))
    started = set(family(process.pid))
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(started), 10)  # the child does not train on for nobody
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / ".tmp-torn").write_text("{")
    before = {f.name: f.read_bytes() for f in folder.glob("*-r?.json")}
    (folder / "torn.json").write_text('{"case_hash": ')
    code, text = finish(start(tmp_path, *options, "--resume", folder.name))
    assert code == 0, text
    assert "torn.json is no round of run" in text
    assert not (folder / ".tmp-torn").exists()
    after = {f.name: f.read_bytes() for f in folder.glob("*-r?.json")}
    assert before.items() <= after.items()
    assert len(after) == 4
    run = json.loads((tmp_path / "run.json").read_text())
    for benchmark in run["benchmarks"]:
        ours = [r["train_s"] for r in benchmark["extra_info"]["rounds"]]
        assert benchmark["stats"]["data"] == pytest.approx(ours, abs=0.05)
        assert [r["seed"] for r in benchmark["extra_info"]["rounds"]] == [0, 1]
    assert (folder / "torn.json").read_text() == '{"case_hash": '

    changed = json.loads((folder / next(iter(after))).read_text())
    changed["provenance"]["libraries"]["peft"] = "0.1"
    (folder / next(iter(after))).write_text(dumps(changed))
    code, text = finish(start(tmp_path, *options, "--resume", folder.name))
    assert code == 4
    assert f"cannot resume {folder.name}: its peft was 0.1, now it is" in text
    code, text = finish(start(tmp_path, *options, "--resume", "yesterday"))
    assert code == 4
    assert f"no run 'yesterday' in ./runs; there are: {folder.name}" in text


def test_what_a_resumed_run_would_mix_is_named():
    now = {"commit": "b", "commit_dirty": False, "python": "3.11.7", "cpu": "x", "cpu_cores": 2,
           "libraries": {"peft": "1", "torch": "2"}}  # fmt: skip
    assert provenance_difference(now, now) is None
    assert provenance_difference(now | {"commit": "a"}, now) == "its commit was a, now it is b"
    assert provenance_difference(now | {"cpu_cores": 4}, now) == "its cpu_cores was 4, now it is 2"
    added = now | {"libraries": {"peft": "1"}}
    assert provenance_difference(added, now) == "its torch was None, now it is 2"


CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.81 GiB of"
    " which 10.19 MiB is free. Including non-PyTorch memory, this process has 139.79 GiB in use."
)


def test_an_out_of_memory_tells_what_was_asked_and_what_was_free():
    import torch

    outcome = outcome_of(torch.OutOfMemoryError(CUDA_OOM), "train")
    assert (outcome.status, outcome.phase) == ("oom", "train")
    assert outcome.memory == {
        "bytes_asked": 20 * 2**20,
        "bytes_total": round(139.81 * 2**30),
        "bytes_free": round(10.19 * 2**20),
    }
    asked = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."
    assert oom_bytes(asked) == {"bytes_asked": 4294967296}
    assert outcome_of(RuntimeError(asked), "load").status == "oom"
    assert outcome_of(RuntimeError("std::bad_alloc"), "load").status == "oom"
    assert outcome_of(MemoryError(), "load").memory == {}
    assert outcome_of(RuntimeError("something else"), "load").status == "failed"


def test_sizes_are_read_with_their_units():
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("1.5 MiB") == 3 * 2**19
    assert parse_bytes("77") == 77
    for wrong in ("24GB", "GiB", "-1", "lots"):
        with pytest.raises(ValueError, match="is no size; write for example 24GiB"):
            parse_bytes(wrong)
