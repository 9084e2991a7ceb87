"""One case, seen from the parent: its rounds as pytest-benchmark calls them. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

from peftbench import provenance
from peftbench.adapters import ADAPTERS
from peftbench.case import Case
from peftbench.measuring.gpu import GpuReadings, gpu_readings
from peftbench.measuring.nvml import find_uuid
from peftbench.measuring.sampler import Sampler, Trace
from peftbench.metrics import HEADLINE_PHASES, VARIANTS, WINDOW, kind_of
from peftbench.record import add_max_and_sum, dumps, merge_rounds, write_atomically
from peftbench.session import Session
from peftbench.worker import Child, Outcome, RoundStoppedError


def windows_of(record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(start, end) of each phase, on the clock that parent and child share."""
    return {
        name: (p["start_monotonic_s"], p["start_monotonic_s"] + p["seconds"])
        for name, p in record["phases"].items()
    }


def add_gpu_readings(record: dict[str, Any], trace: Trace) -> None:
    """Put what NVML saw into a round's record, in the place of the child's "not reported"."""
    windows = windows_of(record)
    found = gpu_readings(trace, windows, HEADLINE_PHASES, record["device_uuid"])
    device = next((d for d in found.devices if d.uuid == found.device_uuid), None)
    phases = {} if device is None else device.phases
    energy_j = phases["train"].energy_j if phases else None
    lost = None
    if record["ranks"] is not None:
        energy_j, lost = add_rank_readings(record["ranks"], trace, found)
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
    if lost is not None:
        reasons["energy_j"] = reasons["energy_per_token_j"] = lost
    for name, value in values.items():
        record[name] = value
        record["null_reasons"].pop(name, None)
        if value is None:
            record["null_reasons"][name] = reasons.get(name, why)
    record["peak_gpu_memory_source"] = found.peak_gpu_memory_source
    record["disturbances"] += found.invalid
    record["gpu"] = found.to_dict()


def add_rank_readings(
    ranks: dict[str, Any], trace: Trace, found: GpuReadings
) -> tuple[float | None, str | None]:
    """Each rank's energy in training and memory, its device's; the sum of the energy, or why not.

    The windows are those of rank 0: the ranks train in step. Memory is the device's growth, as NVML
    is asked for one process only.
    """
    identities = [(d.uuid, d.parent_uuid) for d in trace.devices]
    why = None
    for rank in ranks["each"]:
        at = None if rank["device_uuid"] is None else find_uuid(identities, rank["device_uuid"])
        phases = {} if at is None else found.devices[at].phases
        rank["energy_j"] = phases["train"].energy_j if phases else None
        peaks = [phases[n].nvml_device_peak_bytes for n in HEADLINE_PHASES if n in phases]
        rank["nvml_device_peak_bytes"] = max((p for p in peaks if p is not None), default=None)
        if rank["energy_j"] is None and why is None:
            reason = phases["train"].reasons.get("energy_j") if phases else "was not watched"
            why = f"the GPU of rank {rank['rank']}: {reason}"
    for name in ("energy_j", "nvml_device_peak_bytes"):
        add_max_and_sum(ranks, name)
    return ranks["sum"]["energy_j"], why


def add_infer_gpu_readings(record: dict[str, Any], trace: Trace) -> None:
    """The same of an inference case: the peak of each model in the phase that it has alone."""
    windows = windows_of(record)
    found = gpu_readings(trace, windows, VARIANTS, record["device_uuid"], timed="measure")
    device = next((d for d in found.devices if d.uuid == found.device_uuid), None)
    for variant in VARIANTS:
        name = f"peak_gpu_{variant}_bytes"
        if device is None or variant not in device.phases:
            if variant in windows:
                why = found.reasons.get("peak_gpu_memory_bytes") or found.note
                record["null_reasons"][name] = why or "NVML gave no reading"
            continue
        phase = device.phases[variant]
        sizes = (phase.nvml_process_peak_bytes, phase.nvml_device_peak_bytes)
        record[name] = next((size for size in sizes if size is not None), None)
        if record[name] is not None:
            record["null_reasons"].pop(name, None)
        else:
            record["null_reasons"][name] = "; ".join(phase.reasons.values())
    record["peak_gpu_memory_source"] = found.peak_gpu_memory_source
    record["disturbances"] += found.invalid
    record["gpu"] = found.to_dict()


def file_stem(case: Case, round_index: int) -> str:
    """How a round's record and log are named in the run's folder."""
    return f"{case.id}-{case.hash}-r{round_index}"


class CaseRounds:
    """The rounds of one case, as pytest-benchmark calls them: setup, target, teardown."""

    def __init__(self, session: Session, case: Case, first: int = 0) -> None:
        self._session = session
        self._case = case
        self._first = first  # the index of the first round here, others being elsewhere
        self._kind = kind_of(case.id)
        self._child: Child | None = None
        self._sampler: Sampler | None = None
        self._earlier: dict[str, Any] | None = None  # the current round's, if it is on disk
        self.records: list[dict[str, Any]] = []
        self.replayed = 0  # of the rounds, those that an interrupted run had finished

    def __enter__(self) -> CaseRounds:
        self._session.progress.case(self._case.id)
        return self

    def __exit__(self, *_: object) -> None:
        # pytest-benchmark calls no teardown when the target raises: the child is reaped here
        self._reap()

    def setup(self) -> None:
        """Start a child and wait until it has warmed up; not for a round that is on disk.

        A round that runs elsewhere is waited for until it is.
        """
        session = self._session
        if session.elsewhere is None and "start" not in session.sentinels:
            session.time_machine("start", self._case)
        round_index = self._first + len(self.records)
        case = self._case.with_seed(self._case.settings.seed + round_index)
        self._earlier = session.earlier(self._case, case.settings.seed)
        if self._earlier is not None:
            self.replayed += 1
            return
        if session.elsewhere is not None:
            self._earlier = session.elsewhere.record(self._case, round_index)
            return
        job = self._job(case)
        self._sampler = session.sampler(self._case)
        if self._sampler is not None:
            self._sampler.start()  # what the device holds before the child is there
        self._child = session.child(job, file_stem(self._case, round_index))
        if self._sampler is not None and self._child.pid is not None:
            self._sampler.set_pid(self._child.pid)
        self._child.receive("ready")

    def _job(self, case: Case) -> dict[str, Any]:
        """What the child is told, bases scored before."""
        if self._kind == "infer":
            return {"kind": "infer", "case": case.to_dict()}
        session, quantization = self._session, ADAPTERS[case.adapter].quantization
        base = session.base_quality(self._case, quantize=quantization)
        full = session.base_quality(self._case, quantize=None) if quantization else None
        return {
            "kind": "case",
            "case": case.to_dict(),
            "base": base,
            "unquantized": full,
            "peak_flops_per_s": session.peak_flops_per_s(self._case),
        }

    def train(self) -> None:
        """What pytest-benchmark times: from the go to the end of the last step, or turn."""
        if self._earlier is not None:
            self._session.clock.advance(self._earlier[WINDOW[self._kind]])
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
            add = add_infer_gpu_readings if self._kind == "infer" else add_gpu_readings
            add(record, self._sampler.stop())
            self._sampler = None
        name = f"{file_stem(self._case, self._first + len(self.records))}.json"
        write_atomically(self._session.folder / name, dumps(record))
        self.records.append(record)
        self._reap()

    def record(self) -> dict[str, Any]:
        return merge_rounds(self.records)

    def _reap(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        if self._child is not None:
            self._child.close()
            self._child = None


def run_case(session: Session, case: Case, benchmark: Any) -> dict[str, Any]:
    """Run a case's rounds under pytest-benchmark's fixture; returns its row.

    A case that stops early has its row too; whether that fails its test is the caller's to say.
    """
    note = ""
    try:
        with CaseRounds(session, case) as rounds:
            benchmark.pedantic(
                rounds.train, setup=rounds.setup, teardown=rounds.teardown,
                rounds=session.rounds, iterations=1, warmup_rounds=0,
            )  # fmt: skip
            row = rounds.record()
            if rounds.replayed:
                note = f"  ({rounds.replayed} of {session.rounds} rounds from before the interrupt)"
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
        session.finish(row)
        raise
    session.finish(row, note)
    return row
