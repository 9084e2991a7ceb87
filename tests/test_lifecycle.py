"""How rounds end badly, and that nothing measured is lost by it: real signals, real limits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from bench_run import bench, cases, finish, namespace, own_compare, read, rows, start

from peftbench.case import Case, Settings, parse_bytes
from peftbench.errors import UserError
from peftbench.out_of_memory import oom_bytes
from peftbench.progress import Progress
from peftbench.record import dumps
from peftbench.resume import provenance_difference, settings_difference
from peftbench.session import Session
from peftbench.worker import outcome_of

LONG = ["--pairs", "800"]  # seconds of training, so that something can happen meanwhile


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


def child_of(process: subprocess.Popen[str], case: str, log_end: str = ".log") -> int:
    """The pid of the child that runs a case: its standard output is the case's log."""

    def found() -> int | None:
        for pid in family(process.pid):
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/fd/1").readlink().name
                if name.startswith(case) and name.endswith(log_end):
                    return pid
        return None

    pid = wait_for(found)
    assert isinstance(pid, int)
    return pid


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


@pytest.mark.verify  # the normal suite has a segmentation fault among the ways to end
def test_a_killed_child_is_crashed_and_the_next_case_runs(tmp_path):
    process = start(tmp_path, "--methods", "sft", *LONG)
    child = child_of(process, "tiny-gpt2-lora-sft")
    started = set(family(process.pid))
    os.kill(child, signal.SIGKILL)
    code, text = finish(process)
    assert code == 1, text
    lora, full = (cases(read(tmp_path))[f"tiny-gpt2-{a}-sft"] for a in ("lora", "full"))
    assert lora["status"] == "crashed"
    assert lora["reason"] == "the process died with signal 9"
    assert full["status"] == "ok"
    assert_nothing_left(tmp_path, started)
    assert "tiny-gpt2-full-sft" in own_compare(tmp_path)


@pytest.mark.verify
def test_a_child_that_stands_still_is_a_timeout(tmp_path):
    process = start(tmp_path, "--methods", "sft", "--adapters", "lora", *LONG,
                    "--case-timeout", "12")  # fmt: skip
    child = child_of(process, "tiny-gpt2-lora-sft")
    started = set(family(process.pid))
    os.kill(child, signal.SIGSTOP)
    code, text = finish(process)
    assert code == 1, text
    assert cases(read(tmp_path))["tiny-gpt2-lora-sft"]["status"] == "timeout"
    assert_nothing_left(tmp_path, started)


TOKEN = "hf_plantedSecretOfTheUser"
CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.81 GiB of"
    " which 10.19 MiB is free. Including non-PyTorch memory, this process has 139.79 GiB in use."
)
# Python runs this file in every process; only the fork server, and so each child, takes part
SABOTAGE = f"""
import ctypes, os, sys
if "multiprocessing.forkserver" in " ".join(sys.orig_argv):
    import torch
    from peftbench import training
    honest, calls = training.batch_loss, []
    def batch_loss(*arguments, **named):
        calls.append(1)
        loss = honest(*arguments, **named)
        case = os.path.basename(os.readlink("/proc/self/fd/1"))
        if len(calls) < 4:
            return loss
        if "lora-sft" in case:
            raise torch.OutOfMemoryError({CUDA_OOM!r})
        if "full-sft" in case:
            return loss * float("nan")
        if "full-dpo" in case:
            ctypes.string_at(0)
        if "lora-dpo" in case:
            print("the token is", os.environ["HF_TOKEN"], flush=True)
            raise ConnectionError("no answer from https://user:password-1@hub/?t={TOKEN}")
        return loss
    training.batch_loss = batch_loss
"""


def test_each_way_to_end_has_its_status_and_leaves_nothing_behind(tmp_path, tmp_path_factory):
    """In one run: out of GPU memory, NaN, an exception with a token in it, a segmentation fault."""
    temporary = tmp_path_factory.mktemp("t")  # a socket's path must be short
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(SABOTAGE)
    environment = {
        "PYTHONPATH": str(tmp_path / "inject"), "TMPDIR": str(temporary),
        "HF_TOKEN": TOKEN, "GIT_URL": f"https://user:{TOKEN}@somewhere.example/repository",
    }  # fmt: skip
    semaphores = set(Path("/dev/shm").iterdir())
    code, text, run = bench(tmp_path, "--adapters", "lora,full,ia3", environment=environment)
    assert code == 1, text
    found = cases(run)
    assert {name.removeprefix("tiny-gpt2-"): c["status"] for name, c in found.items()} == {
        "lora-sft": "oom", "lora-dpo": "failed", "full-sft": "invalid", "full-dpo": "crashed",
        "ia3-sft": "ok", "ia3-dpo": "ok",
    }  # fmt: skip
    assert {c["phase"] for c in found.values() if c["status"] in ("oom", "failed")} == {"train"}
    oom = found["tiny-gpt2-lora-sft"]
    assert oom["oom"]["bytes_asked"] == 20 * 2**20
    assert oom["oom"]["bytes_free"] == round(10.19 * 2**20)
    assert found["tiny-gpt2-full-sft"]["reason"] == "the loss is nan at step 4"
    assert found["tiny-gpt2-full-dpo"]["reason"] == "the process died with signal 11"
    failed = found["tiny-gpt2-lora-dpo"]["reason"]
    assert failed.startswith("ConnectionError: no answer from https://***@hub/?t=*** (")
    assert "sitecustomize.py" in failed  # the last frame
    assert "tiny-gpt2-ia3-dpo" in own_compare(tmp_path)

    assert TOKEN not in text
    assert "Traceback" in text  # of the case that failed, without its secrets
    written = [f for folder in (tmp_path / "runs", temporary) for f in folder.rglob("*")]
    files = [tmp_path / "run.json", *(f for f in written if f.is_file())]
    assert any("the token is ***" in f.read_text() for f in files)
    assert [f for f in files if TOKEN in f.read_text() or "password-1" in f.read_text()] == []
    # torch makes the folder of its compiler's cache on import, for every process of the user
    left = {f.name.partition("_")[0] for f in temporary.iterdir()}
    assert left <= {"torchinductor"}
    assert list(tmp_path.rglob(".tmp-*")) == []
    # a run of a test beside this one has some for a while; one that is left behind stays
    new = set(Path("/dev/shm").iterdir()) - semaphores
    wait_for(lambda: not any(file.exists() for file in new), 90)
    assert (
        str(tmp_path)
        not in subprocess.run(
            ["ps", "-eo", "args"], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.verify
def test_a_full_disk_keeps_what_was_written_and_says_how_to_go_on(tmp_path):
    """A real one: a small file system of its own, filled while the second case runs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own = namespace("mount")
    keeper = subprocess.Popen(
        [*own, "sh", "-c", f"mount -t tmpfs -o size=16m none {disk} && exec sleep 600"]
    )
    enter = ("nsenter", "-t", str(keeper.pid), "--mount")
    if "--map-root-user" in own:
        enter += ("--user", "--preserve-credentials")
    inside = Path(f"/proc/{keeper.pid}/root{disk}")
    options = ("--methods", "sft", "--results-dir", str(disk / "runs"),
               f"--benchmark-json={disk / 'run.json'}")  # fmt: skip
    try:
        wait_for(lambda: inside.is_mount())
        process = start(tmp_path, *options, before=enter)
        (first,) = wait_for(lambda: list(inside.glob("runs/*/tiny-gpt2-lora-sft-*-r0.json")))
        with contextlib.suppress(OSError), (inside / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        code, text = finish(process)
        assert code == 3, text
        assert "tiny-gpt2-full-sft  failed in save: " in text
        assert "No space left on device" in text
        assert "run.json could not be written (No space left on device)" in text
        assert "Traceback" not in text
        assert json.loads(first.read_text())["status"] == "ok"
        run_id = first.parent.name
        assert f"run again with --resume {run_id}" in text

        (inside / "filler").unlink()
        code, text = finish(start(tmp_path, *options, "--resume", run_id, before=enter))
        assert code == 0, text
        run = json.loads((inside / "run.json").read_text())
        assert {c["status"] for c in cases(run).values()} == {"ok"}
        assert "[2/2] tiny-gpt2-full-sft" in text

        subprocess.run([*enter, "mount", "-o", "remount,ro", str(disk)], check=True)
        code, text = finish(start(tmp_path, *options, before=enter))
        assert code == 4, text
        assert "cannot be written (Read-only file system); give another with --results-dir" in text
        assert "Traceback" not in text
        assert json.loads(first.read_text())["status"] == "ok"
    finally:
        keeper.kill()
        keeper.wait()


def test_ctrl_c_keeps_what_is_finished_and_prints_the_table(tmp_path):
    process = start(tmp_path, "--methods", "sft", "--adapters", "lora,full", *LONG)  # fmt: skip
    child_of(process, "tiny-gpt2-full-sft")
    started = set(family(process.pid))
    process.send_signal(signal.SIGINT)
    code, text = finish(process)
    assert code == 2, text
    statuses = {name: case["status"] for name, case in cases(read(tmp_path)).items()}
    assert statuses == {"tiny-gpt2-lora-sft": "ok", "tiny-gpt2-full-sft": "interrupted"}
    assert "peftbench: 2 cases" in text
    assert_nothing_left(tmp_path, started)


def test_a_round_beyond_its_memory_limit_is_out_of_memory(tmp_path):
    process = start(tmp_path, "--methods", "sft", "--adapters", "lora", "--eval-batch-size", "4096",
                    "--eval-tokens", "300000", "--host-memory-limit", "700MiB")  # fmt: skip
    code, text = finish(process)
    assert code == 0, text  # out of memory is an answer
    case = cases(read(tmp_path))["tiny-gpt2-lora-sft"]
    assert case["status"] == "oom", case
    assert case["phase"].removeprefix("base: ") == "evaluate"
    assert case["oom"]["bytes_asked"] > 10_000_000


def kill_and_resume(folder: Path, options: list[str], wait: Callable[[], object]) -> str:
    """Kill pytest -9 when `wait` returns, resume the run, and hold what must be true of both.

    Returns the run's id.
    """
    process = start(folder, *options)
    wait()
    started = set(family(process.pid))
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(started), 10)  # the child does not train on for nobody
    runs = list((folder / "runs").iterdir())
    if not runs:  # nothing had begun
        return ""
    (runs_folder,) = runs
    (runs_folder / ".tmp-torn").write_text("{")
    (runs_folder / "torn.json").write_text('{"case_hash": ')
    before = {f.name: f.read_bytes() for f in runs_folder.glob("*-r?.json")}
    code, text = finish(start(folder, *options, "--resume", runs_folder.name))
    assert code == 0, text
    said = re.findall(r"\((\d+) of \d+ rounds from before the interrupt\)", text)
    assert sum(map(int, said)) == len(before)
    assert "torn.json is no round of run" in text
    assert (runs_folder / "torn.json").read_text() == '{"case_hash": '
    assert list(runs_folder.glob(".tmp-*")) == []
    after = {f.name: f.read_bytes() for f in runs_folder.glob("*-r?.json")}
    assert before.items() <= after.items()  # finished rounds are not repeated
    for benchmark in read(folder)["benchmarks"]:
        ours = [r["train_s"] for r in benchmark["extra_info"]["rounds"]]
        assert benchmark["stats"]["data"] == pytest.approx(ours, abs=0.05)
    return runs_folder.name


def records_of(run: dict) -> dict[tuple[str, int], list[float]]:
    """What an undisturbed run gives again: each round's losses, by case and seed."""
    return {
        (name, r["seed"]): r["losses"] for name, row in rows(run).items() for r in row["rounds"]
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(records of the smoke preset, seconds that it took)."""
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    code, text, run = bench(folder)
    assert code == 0, text
    return records_of(run), time.monotonic() - began


@pytest.mark.verify
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_any_moment_is_resumed_to_the_same_records(tmp_path, undisturbed, number):
    moment_s = random.Random(number).uniform(0.0, undisturbed[1])
    run_id = kill_and_resume(tmp_path, [], lambda: time.sleep(moment_s))
    if run_id == "":
        assert moment_s < 10  # so early that no folder was there
        return
    assert records_of(read(tmp_path)) == undisturbed[0]


def test_a_killed_run_is_resumed_and_a_changed_one_refused(tmp_path):
    options = ["--adapters", "lora,full", "--methods", "sft", "--rounds", "2"]
    run_id = kill_and_resume(
        tmp_path, options, lambda: wait_for(lambda: list(tmp_path.glob("runs/*/*-r0.json")))
    )
    folder = tmp_path / "runs" / run_id
    assert set(records_of(read(tmp_path))) == {
        (f"tiny-gpt2-{a}-sft", seed) for a in ("lora", "full") for seed in (0, 1)
    }
    after = sorted(f.name for f in folder.glob("*-r?.json"))
    assert len(after) == 4

    changed = json.loads((folder / next(iter(after))).read_text())
    peft = changed["provenance"]["libraries"]["peft"]
    changed["provenance"]["libraries"]["peft"] = "0.1"
    (folder / next(iter(after))).write_text(dumps(changed))
    code, text = finish(start(tmp_path, *options, "--resume", folder.name))
    assert code == 4
    assert f"cannot resume {folder.name}: its peft was 0.1, now it is" in text
    changed["provenance"]["libraries"]["peft"] = peft
    (folder / next(iter(after))).write_text(dumps(changed))
    code, text = finish(start(tmp_path, *options, "--seed", "7", "--resume", folder.name))
    assert code == 4
    assert f"cannot resume {folder.name}: tiny-gpt2-full-sft had seed 0, now it is 7" in text
    code, text = finish(start(tmp_path, *options, "--resume", "yesterday"))
    assert code == 4
    assert f"no run 'yesterday' in ./runs; there are: {folder.name}" in text


def test_a_round_of_another_device_is_not_reused(tmp_path):
    case = Case("tiny-gpt2", "lora", "sft")
    session = Session(tmp_path, Progress(1))
    session._earlier = {(case.hash, 0): {"device": "NVIDIA H200"}}
    session.sentinels["start"] = {"device": "NVIDIA H200"}
    assert session.earlier(case, 0) == {"device": "NVIDIA H200"}
    assert session.earlier(case, 1) is None
    session.sentinels["start"] = {"device": "cpu"}
    with pytest.raises(UserError, match="its rounds ran on NVIDIA H200, this device is cpu"):
        session.earlier(case, 0)


def test_a_setting_that_a_resumed_run_would_mix_is_named():
    case = Case("tiny-gpt2", "lora", "sft", Settings(seed=3))
    record = {"case_hash": case.hash, "case": case.public().to_dict()}
    assert settings_difference(record, case) is None
    assert settings_difference(record, case.with_seed(5)) == (
        "tiny-gpt2-lora-sft had seed 3, now it is 5"
    )


def test_what_a_resumed_run_would_mix_is_named():
    now = {"commit": "b", "commit_dirty": False, "python": "3.11.7", "cpu": "x", "cpu_cores": 2,
           "libraries": {"peft": "1", "torch": "2"}}  # fmt: skip
    assert provenance_difference(now, now) is None
    assert provenance_difference(now | {"commit": "a"}, now) == "its commit was a, now it is b"
    assert provenance_difference(now | {"cpu_cores": 4}, now) == "its cpu_cores was 4, now it is 2"
    added = now | {"libraries": {"peft": "1"}}
    assert provenance_difference(added, now) == "its torch was None, now it is 2"


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
