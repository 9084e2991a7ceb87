"""One run of the matrix, seen from the parent: rounds, bases, results on disk. Imports no torch."""

from __future__ import annotations

import json
import os
import secrets
import time
import warnings
from dataclasses import asdict, replace
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from peftbench import provenance
from peftbench.adapters import ADAPTERS
from peftbench.case import Case
from peftbench.errors import UserError
from peftbench.measuring.gpu import gpu_readings
from peftbench.measuring.nvml import Device, open_devices
from peftbench.measuring.sampler import Sampler, Trace
from peftbench.metrics import HEADLINE_PHASES
from peftbench.progress import Progress
from peftbench.record import FORMAT, dumps, merge_rounds, write_atomically
from peftbench.worker import Child, Outcome, RoundStoppedError, process_context


class Session:
    """What all cases of one pytest session share."""

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        rounds: int = 1,
        time_limit_s: float = 7200.0,
        resume: str | None = None,
    ) -> None:
        fresh = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + secrets.token_hex(3)
        self.run_id = resume or fresh
        self.folder = folder / self.run_id
        self.clock = ReplayClock()
        self.sentinels: dict[str, dict[str, Any] | None] = {}  # by moment: start, end
        self._earlier = {} if resume is None else earlier_rounds(self.folder, self.run_id)
        self.rounds = rounds
        self.progress = progress
        self.time_limit_s = time_limit_s
        self.rows: list[dict[str, Any]] = []  # every case's record or outcome, in order of ending
        self._bases: dict[str, dict[str, Any] | Outcome] = {}

    @cached_property
    def context(self) -> BaseContext:
        """Started with the first case: collecting must not pay for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return process_context()

    def child(self, job: dict[str, Any], name: str) -> Child:
        return Child(
            self.context, job, self.folder / f"{name}.log", self.progress.phase, self.time_limit_s
        )

    @cached_property
    def gpus(self) -> tuple[list[Device], str | None]:
        """The devices to watch through NVML, and why not all of them or none."""
        return open_devices(
            os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")
        )

    def sampler(self, case: Case) -> Sampler | None:
        """Watches the GPUs from this process; None where the case cannot use one."""
        if case.settings.device == "cpu" or provenance.torch_cuda_version() is None:
            return None
        devices, note = self.gpus
        return Sampler(devices, note=note)

    def time_machine(self, moment: str, case: Case) -> None:
        """Time the sentinels; a failure leaves None, for a case to meet in its own right."""
        job = {"kind": "sentinels", "case": case.to_dict()}
        self.progress.phase("time the machine")
        try:
            with self.child(job, f"sentinels-{moment}") as child:
                self.sentinels[moment] = child.receive("result")
        except RoundStoppedError:
            self.sentinels[moment] = None

    def peak_flops_per_s(self, case: Case) -> float | None:
        """The device's rate in a large matrix product of the case's compute dtype."""
        start = self.sentinels.get("start")
        return None if start is None else start[f"matmul_{case.settings.dtype}_flops_per_s"]

    def earlier(self, case: Case, seed: int) -> dict[str, Any] | None:
        """The record of a round that was finished before this run was interrupted.

        Raises: UserError if it was measured on another device.
        """
        record = self._earlier.get((case.hash, seed))
        start = self.sentinels.get("start")
        if record is not None and start is not None and record["device"] != start["device"]:
            raise UserError(
                f"cannot resume {self.run_id}: its rounds ran on {record['device']}, this device is"
                f" {start['device']}; start a new run"
            )
        return record

    def base_quality(self, case: Case, *, quantize: bool) -> dict[str, Any] | None:
        """What the untrained model scores; one child per session and base, then remembered.

        None where quality is not measured.
        """
        if not case.settings.measures_quality:
            return None
        # only what can move the base's own numbers: cases that share it share one scoring
        settings = case.settings
        key = dumps(
            {"model": case.model, "quantize": quantize, "weights_dtype": case.weights_dtype}
            | {n: v for n, v in asdict(settings).items() if n.startswith("eval_")}
            | {n: getattr(settings, n) for n in ("data", "dtype", "device", "threads", "weights",
                                                 "prompt_length", "completion_length", "pairs")}
        )  # fmt: skip
        if key not in self._bases:
            self.progress.phase("score the 4-bit base" if quantize else "score the base")
            job = {"kind": "base", "case": case.to_dict(), "quantize": quantize}
            try:
                with self.child(job, f"base-{len(self._bases)}") as child:
                    self._bases[key] = child.receive("result")
            except RoundStoppedError as stop:  # remembered: the next case would fail the same way
                self._bases[key] = replace(stop.outcome, phase=f"base: {stop.outcome.phase}")
        found = self._bases[key]
        if isinstance(found, Outcome):
            raise RoundStoppedError(found)
        return found

    def finish(self, case: Case, row: dict[str, Any]) -> None:
        """Keep a case's row and show it."""
        self.rows.append(row)
        self.progress.finished(result_line(row))

    def skip(self, case: Case, sentence: str) -> None:
        """A combination that cannot work: a row, but no child."""
        self.progress.case(case.id)
        self.finish(case, self.stopped(case, Outcome("skipped", "collect", sentence)))

    def stopped(self, case: Case, outcome: Outcome) -> dict[str, Any]:
        """The row of a case that has no record."""
        return {
            "format": FORMAT,
            "status": outcome.status,
            "phase": outcome.phase,
            "reason": without_paths(outcome.reason),
            "oom": outcome.memory or None,
            "case_id": case.id,
            "case_hash": case.hash,
            "case": case.public().to_dict(),
        }


def add_gpu_readings(record: dict[str, Any], trace: Trace) -> None:
    """Put what NVML saw into a round's record, in the place of the child's "not reported"."""
    windows = {
        name: (p["start_monotonic_s"], p["start_monotonic_s"] + p["seconds"])
        for name, p in record["phases"].items()
    }
    found = gpu_readings(trace, windows, HEADLINE_PHASES, record["device_uuid"])
    device = next((d for d in found.devices if d.uuid == found.device_uuid), None)
    phases = {} if device is None else device.phases
    energy_j = phases["train"].energy_j if phases else None
    values: dict[str, float | int | None] = {
        "peak_gpu_memory_bytes": found.peak_gpu_memory_bytes,
        "energy_j": energy_j,
        "energy_per_token_j": (
            None if energy_j is None else energy_j / (record["tokens_per_s"] * record["train_s"])
        ),
    }
    for name in ("nvml_process_peak_bytes", "nvml_device_peak_bytes"):
        peaks = [getattr(phases[n], name) for n in HEADLINE_PHASES if n in phases]
        values[name] = max((p for p in peaks if p is not None), default=None)
    why = found.reasons.get("peak_gpu_memory_bytes") or found.note or "NVML gave no reading"
    reasons = dict(found.reasons)
    if phases and "energy_j" in phases["train"].reasons:
        reasons["energy_j"] = reasons["energy_per_token_j"] = phases["train"].reasons["energy_j"]
    for name, value in values.items():
        record[name] = value
        record["null_reasons"].pop(name, None)
        if value is None:
            record["null_reasons"][name] = reasons.get(name, why)
    record["peak_gpu_memory_source"] = found.peak_gpu_memory_source
    record["disturbances"] += found.invalid
    record["gpu"] = found.to_dict()


class ReplayClock:
    """time.perf_counter that can be set forward: so a round that was measured before an interrupt
    tells pytest-benchmark the time that it took then."""

    __name__ = "perf_counter"

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self._ahead_s

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds


def earlier_rounds(folder: Path, run_id: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished rounds of an interrupted run, by case hash and seed.

    Files that are not rounds of this run are left alone, with a warning that names them.
    Raises: UserError if the folder has no round, or was made by another commit or other libraries.
    """
    if not folder.is_dir():
        runs = sorted(f.name for f in folder.parent.glob("*") if f.is_dir())
        raise UserError(
            f"no run {run_id!r} in {without_paths(str(folder.parent))}; there are:"
            f" {', '.join(runs[-5:]) or 'none'}"
        )
    for half_written in folder.glob(".tmp-*"):
        half_written.unlink()
    found: dict[tuple[str, int], dict[str, Any]] = {}
    here = provenance.describe()
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            key = (record["case_hash"], record["seed"])
            theirs, is_ours = record["provenance"], record["run_id"] == run_id
        except (OSError, ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            warnings.warn(f"{file.name} is no round of run {run_id}: left alone", stacklevel=2)
            continue
        if difference := provenance_difference(theirs, here):
            raise UserError(f"cannot resume {run_id}: {difference}; start a new run")
        found[key] = record
    return found


def provenance_difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing that a resumed run would mix: one sentence, or None."""
    for name in ("commit", "commit_dirty", "python", "cpu", "cpu_cores"):
        if then.get(name) != now[name]:
            return f"its {name} was {then.get(name)}, now it is {now[name]}"
    before, after = then.get("libraries", {}), now["libraries"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return f"its {name} was {before.get(name)}, now it is {after.get(name)}"
    return None


class CaseRounds:
    """The rounds of one case, as pytest-benchmark calls them: setup, target, teardown."""

    def __init__(self, session: Session, case: Case) -> None:
        self._session = session
        self._case = case
        self._child: Child | None = None
        self._sampler: Sampler | None = None
        self._earlier: dict[str, Any] | None = None  # the current round's, if it is on disk
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> CaseRounds:
        self._session.progress.case(self._case.id)
        return self

    def __exit__(self, *_: object) -> None:
        # pytest-benchmark calls no teardown when the target raises: the child is reaped here
        self._reap()

    def setup(self) -> None:
        """Start a child and wait until it has warmed up; not for a round that is on disk."""
        session, quantizes = self._session, ADAPTERS[self._case.adapter].quantizes_base
        if "start" not in session.sentinels:
            session.time_machine("start", self._case)
        round_index = len(self.records)
        case = self._case.with_seed(self._case.settings.seed + round_index)
        self._earlier = session.earlier(self._case, case.settings.seed)
        if self._earlier is not None:
            return
        job = {
            "kind": "case",
            "case": case.to_dict(),
            "base": session.base_quality(self._case, quantize=quantizes),
            "unquantized": session.base_quality(self._case, quantize=False) if quantizes else None,
            "peak_flops_per_s": session.peak_flops_per_s(self._case),
        }
        self._sampler = session.sampler(self._case)
        if self._sampler is not None:
            self._sampler.start()  # what the device holds before the child is there
        self._child = session.child(job, self._file_stem(round_index))
        if self._sampler is not None and self._child.process.pid is not None:
            self._sampler.set_pid(self._child.process.pid)
        self._child.receive("ready")

    def train(self) -> None:
        """What pytest-benchmark times: from the go to the end of the last step."""
        if self._earlier is not None:
            self._session.clock.advance(self._earlier["train_s"])
            return
        assert self._child is not None
        self._child.send("go")
        self._child.receive("trained")

    def teardown(self) -> None:
        """Collect the record and write it at once: a run killed later does not lose it."""
        if self._earlier is not None:
            self.records.append(self._earlier)
            return
        assert self._child is not None
        record = self._child.receive("result")
        # the case's identity is that of its first seed; the round's own seed is in `seed`
        record |= {"case": self._case.public().to_dict(), "case_hash": self._case.hash}
        record["provenance"] = provenance.describe()
        record["run_id"] = self._session.run_id
        if self._sampler is not None:
            add_gpu_readings(record, self._sampler.stop())
            self._sampler = None
        name = f"{self._file_stem(len(self.records))}.json"
        write_atomically(self._session.folder / name, dumps(record))
        self.records.append(record)
        self._reap()

    def record(self) -> dict[str, Any]:
        return merge_rounds(self.records)

    def _file_stem(self, round_index: int) -> str:
        return f"{self._case.id}-{self._case.hash}-r{round_index}"

    def _reap(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        if self._child is not None:
            self._child.close()
            self._child = None


def without_paths(text: str) -> str:
    """Records travel: where the user's files lie is not theirs to tell."""
    return text.replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")


def result_line(row: dict[str, Any]) -> str:
    """One line for the screen when a case has ended."""
    if row["status"] != "ok":
        return f"{row['case_id']}  {row['status']} in {row.get('phase', '?')}: {row['reason']}"
    quality = ""
    if row["perplexity"] is not None:
        before, after = row["preference_accuracy_base"], row["preference_accuracy"]
        quality = (
            f"  perplexity {row['perplexity_base']:.4g} -> {row['perplexity']:.4g}"
            f"  preference {before:.1%} -> {after:.1%}"
        )
    return (
        f"{row['case_id']}  train {row['train_s']:.2f} s  {row['tokens_per_s']:,.0f} tokens/s"
        f"{quality}  ok"
    )


def run_case(session: Session, case: Case, benchmark: Any) -> dict[str, Any]:
    """Run a case's rounds under pytest-benchmark's fixture; returns its row.

    A case that stops early has its row too; whether that fails its test is the caller's to say.
    """
    try:
        with CaseRounds(session, case) as rounds:
            benchmark.pedantic(
                rounds.train, setup=rounds.setup, teardown=rounds.teardown,
                rounds=session.rounds, iterations=1, warmup_rounds=0,
            )  # fmt: skip
            row = rounds.record()
        benchmark.extra_info.update(json.loads(dumps(row)))
    except RoundStoppedError as stop:
        row = session.stopped(case, stop.outcome) | {"traceback": stop.outcome.traceback}
    except OSError as error:  # a full disk: the case is lost, the others need not be
        row = session.stopped(case, Outcome("failed", "record", f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        phase = session.progress.current_phase
        row = session.stopped(case, Outcome("interrupted", phase, "stopped by the user"))
        # pytest-benchmark marks errors so, and Ctrl-C not: it would then fail on a row without a
        # time and write no file at all
        benchmark.has_error = True
        session.finish(case, row)
        raise
    session.finish(case, row)
    return row
