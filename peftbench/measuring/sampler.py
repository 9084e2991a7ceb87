"""A thread that reads the GPUs every few milliseconds while a child process trains."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peftbench.measuring.nvml import Device


@dataclass(frozen=True)
class Baseline:
    """The device before the child was started."""

    used_bytes: int | None
    pids: tuple[int, ...] | None  # None: the driver does not list them


@dataclass(frozen=True)
class MemorySamples:
    """One reading in each place; its time is `time.monotonic()` just before the driver is asked."""

    times_s: tuple[float, ...]
    used_bytes: tuple[int | None, ...]
    process_bytes: tuple[int | None, ...]  # the child's


@dataclass(frozen=True)
class SlowSamples:
    """The readings that change slowly or cost more, on the same clock."""

    times_s: tuple[float, ...]
    energy_j: tuple[float | None, ...]  # the driver's counter
    power_w: tuple[float | None, ...]
    sm_clock_mhz: tuple[int | None, ...]
    memory_clock_mhz: tuple[int | None, ...]
    temperature_c: tuple[int | None, ...]
    throttle_reasons: tuple[tuple[str, ...] | None, ...]


@dataclass(frozen=True)
class ProcessSeen:
    """A pid that the driver listed while the sampler ran, and its largest reading."""

    pid: int
    first_s: float
    last_s: float
    peak_bytes: int | None


@dataclass(frozen=True)
class DeviceTrace:
    """Everything read from one device. `reasons` says why readings are None or end early."""

    uuid: str
    parent_uuid: str | None
    info: dict[str, str | int | float | None]
    baseline: Baseline
    memory: MemorySamples
    slow: SlowSamples
    processes: tuple[ProcessSeen, ...]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Trace:
    """What the sampler read. `pass_s` is the mean time that one pass over all devices took."""

    pid: int | None
    interval_asked_s: float
    interval_s: float | None
    pass_s: float | None
    devices: tuple[DeviceTrace, ...]
    note: str | None  # why devices are missing, or more are here than the child can use

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


@dataclass
class _Log:
    device: Device
    info: dict[str, str | int | float | None]
    baseline: Baseline
    memory: list[tuple[float, int | None, int | None]] = field(default_factory=list)
    slow: list[tuple[Any, ...]] = field(default_factory=list)
    processes: dict[int, ProcessSeen] = field(default_factory=dict)

    def trace(self) -> DeviceTrace:
        memory = tuple(zip(*self.memory, strict=True)) or ((),) * 3
        slow = tuple(zip(*self.slow, strict=True)) or ((),) * 7
        return DeviceTrace(
            self.device.uuid,
            self.device.parent_uuid,
            self.info,
            self.baseline,
            MemorySamples(*memory),
            SlowSamples(*slow),
            tuple(self.processes.values()),
            dict(self.device.reasons),
        )


class Sampler:
    """Reads the devices from `start`, which takes the baseline, until `stop`, which returns it all.

    Memory and processes are read every `interval_s`; energy, power, clocks, temperature and
    throttling every `slow_interval_s` and at both ends. Start it before the child exists.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        interval_s: float = 0.01,
        slow_interval_s: float = 0.1,
        note: str | None = None,
    ) -> None:
        self._devices = devices
        self._interval_s = interval_s
        self._slow_interval_s = slow_interval_s
        self._note = note
        self._pid: int | None = None
        self._logs: list[_Log] = []
        self._passes_s: list[float] = []
        self._ended = threading.Event()
        self._done = False
        # a daemon: a parent that fails on its way must not wait for it
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)

    def start(self) -> None:
        """Take the baseline and begin; the child must not be on the device yet."""
        for device in self._devices:
            info = device.info()
            memory, listed = device.memory(), device.processes()
            baseline = Baseline(
                None if memory is None else memory.used_bytes,
                None if listed is None else tuple(sorted(listed)),
            )
            self._logs.append(_Log(device, info, baseline))
        self._thread.start()

    def set_pid(self, pid: int) -> None:
        """The process whose memory is looked for from now on."""
        self._pid = pid

    def stop(self) -> Trace:
        """End the thread after one last pass and return what it read."""
        self._ended.set()
        self._thread.join()
        assert self._done, "the sampler's thread died: its traceback is on stderr"
        times = max(
            ([reading[0] for reading in log.memory] for log in self._logs), key=len, default=[]
        )
        return Trace(
            self._pid,
            self._interval_s,
            (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            sum(self._passes_s) / len(self._passes_s) if self._passes_s else None,
            tuple(log.trace() for log in self._logs),
            self._note,
        )

    def _run(self) -> None:
        due = slow_due = time.monotonic()
        while self._logs and not self._ended.is_set():
            now = time.monotonic()
            self._pass(now >= slow_due)
            if now >= slow_due:
                slow_due = now + self._slow_interval_s
            # what a slow pass missed is left out: two readings in a row would be the same one
            late = (time.monotonic() - due) / self._interval_s
            due += self._interval_s * max(1, math.ceil(late))
            self._ended.wait(max(0.0, due - time.monotonic()))
        self._pass(slow=True)
        self._done = True

    def _pass(self, slow: bool) -> None:
        begun = time.monotonic()
        for log in self._logs:
            self._read_memory(log)
            if slow:
                self._read_slow(log)
        if any(log.device.lost is None for log in self._logs):
            self._passes_s.append(time.monotonic() - begun)

    def _read_memory(self, log: _Log) -> None:
        # The stamp comes first: a reading on the border of two phases then falls into the earlier
        # one, and the emptied memory of a new phase's start cannot raise the peak of the old one.
        now = time.monotonic()
        memory, listed = log.device.memory(), log.device.processes()
        if log.device.lost is not None:
            return
        process = None if listed is None or self._pid is None else listed.get(self._pid)
        log.memory.append((now, None if memory is None else memory.used_bytes, process))
        for pid, used in (listed or {}).items():
            seen = log.processes.get(pid, ProcessSeen(pid, now, now, None))
            peak = max((b for b in (seen.peak_bytes, used) if b is not None), default=None)
            log.processes[pid] = ProcessSeen(pid, seen.first_s, now, peak)

    def _read_slow(self, log: _Log) -> None:
        device, now = log.device, time.monotonic()
        readings = (
            device.energy_j(),
            device.power_w(),
            device.sm_clock_mhz(),
            device.memory_clock_mhz(),
            device.temperature_c(),
            device.throttle_reasons(),
        )
        if device.lost is None:
            log.slow.append((now, *readings))
