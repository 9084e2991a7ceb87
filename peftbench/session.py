"""One run of the matrix, seen from the parent: rounds, bases, results on disk. Imports no torch."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol

from peftbench import provenance
from peftbench.case import Case
from peftbench.errors import UserError
from peftbench.measuring.host import MOST_OTHER_CPU_RATIO
from peftbench.measuring.nvml import Device, open_devices
from peftbench.measuring.sampler import Sampler
from peftbench.methods import samples_completions
from peftbench.metrics import kind_of
from peftbench.privacy import without_paths
from peftbench.progress import Progress
from peftbench.quantization import BITS, Quantization
from peftbench.record import FORMAT, dumps
from peftbench.resume import ReplayClock, earlier_rounds
from peftbench.summary import infer_words
from peftbench.worker import COMPILE_CACHE, Child, Outcome, RoundStoppedError, process_context


class Elsewhere(Protocol):
    """Where rounds run that do not run on this machine: cluster.py."""

    def record(self, case: Case, round_index: int) -> dict[str, Any]:
        """Wait for a round; its record, which is on disk. Raises: RoundStoppedError."""

    def close(self) -> None:
        """End what still runs."""


class Session:
    """What all cases of one pytest session share."""

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        rounds: int = 1,
        time_limit_s: float = 7200.0,
        resume: str | None = None,
        cases: Iterable[Case] = (),
        shard: dict[str, Any] | None = None,
        run_id: str | None = None,
    ) -> None:
        fresh = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + secrets.token_hex(3)
        self.run_id = resume or run_id or fresh
        self.folder = folder / self.run_id
        self.clock = ReplayClock()
        self.sentinels: dict[str, dict[str, Any] | None] = {}  # by moment: start, end
        self._earlier = {} if resume is None else earlier_rounds(self.folder, self.run_id, cases)
        self.shard = shard  # which part of the matrix this is; None: all of it
        self.elsewhere: Elsewhere | None = None
        self.rounds = rounds
        self.progress = progress
        self.time_limit_s = time_limit_s
        self.rows: list[dict[str, Any]] = []  # every case's record or outcome, in order of ending
        self._bases: dict[str, dict[str, Any] | Outcome] = {}
        self.not_written: str | None = None  # why the run's JSON file is missing
        self.base_phases: list[dict[str, Any]] = []  # of the children that scored bases

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
        """The device's rate in a large matrix product of the case's compute dtype.

        None where it was not timed, or beside other processes: a utilisation must not profit.
        """
        start = self.sentinels.get("start")
        if start is None or (start["other_cpu_ratio"] or 0.0) > MOST_OTHER_CPU_RATIO:
            return None
        rate: float = start[f"matmul_{case.settings.dtype}_flops_per_s"]
        return rate

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

    def base_quality(self, case: Case, *, quantize: Quantization | None) -> dict[str, Any] | None:
        """What the untrained model scores; one child per session and base, then remembered.

        None where quality is not measured.
        """
        if not case.settings.measures_quality:
            return None
        # only what can move the base's own numbers: cases that share it share one scoring
        settings = case.settings
        key = dumps(
            {"model": case.model, "quantize": quantize, "weights_dtype": case.weights_dtype}
            | {"completes": samples_completions(case.method, settings.data)}
            | {n: v for n, v in asdict(settings).items() if n.startswith("eval_")}
            | {n: getattr(settings, n) for n in ("data", "dtype", "device", "threads", "weights",
                                                 "prompt_length", "completion_length", "pairs",
                                                 "tasks", "task_items")}
        )  # fmt: skip
        if key not in self._bases:
            self.progress.phase(
                f"score the {BITS[quantize]}-bit base" if quantize else "score the base"
            )
            job = {"kind": "base", "case": case.to_dict(), "quantize": quantize}
            try:
                with self.child(job, f"base-{len(self._bases)}") as child:
                    scored = child.receive("result")
                self._bases[key] = scored["quality"]
                self.base_phases.append(
                    {"model": case.public().model, "dtype": case.weights_dtype,
                     "quantized": quantize is not None, "phases": scored["phases"]}
                )  # fmt: skip
            except RoundStoppedError as stop:  # remembered: the next case would fail the same way
                self._bases[key] = replace(stop.outcome, phase=f"base: {stop.outcome.phase}")
        found = self._bases[key]
        if isinstance(found, Outcome):
            raise RoundStoppedError(found)
        return found

    def finish(self, row: dict[str, Any], note: str = "") -> None:
        """Keep a case's row and show it."""
        self.rows.append(row)
        self.progress.finished(result_line(row) + note)

    def close(self) -> None:
        """Remove what only the session's own rounds need, and end what runs elsewhere."""
        if self.elsewhere is not None:
            self.elsewhere.close()
        shutil.rmtree(self.folder / COMPILE_CACHE, ignore_errors=True)

    def skip(self, case: Case, sentence: str) -> None:
        """A combination that cannot work: a row, but no child."""
        self.progress.case(case.id)
        self.finish(self.stopped(case, Outcome("skipped", "collect", sentence)))

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


def result_line(row: dict[str, Any]) -> str:
    """One line for the screen when a case has ended."""
    if row["status"] != "ok":
        return f"{row['case_id']}  {row['status']} in {row.get('phase', '?')}: {row['reason']}"
    if kind_of(row["case_id"]) == "infer":
        return f"{row['case_id']}  {infer_words(row)}  ok"
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
