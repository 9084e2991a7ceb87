"""The phases of a round: wall time and peaks of each, and nothing between them unaccounted for."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peftbench.measuring import host


@dataclass(frozen=True)
class PhaseReading:
    """What one phase took. Peaks are None where they cannot be read."""

    seconds: float
    start_monotonic_s: float  # of a clock that all processes of the machine share
    host_peak_rss_bytes: int | None
    torch_peak_allocated_bytes: int | None
    torch_peak_reserved_bytes: int | None
    own_cpu_s: float | None  # CPU time that this process took
    other_cpu_s: float | None  # that others took meanwhile; other ranks of the case are none
    package_energy_j: float | None  # of the processors (RAPL)


class UnaccountedTimeError(RuntimeError):
    """The phases do not add up to the round: work was done that is in none of them."""


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Phases:
    """A clock that is always in exactly one phase: `enter` ends the phase before.

    Collection and peak resets happen between two phases, outside both clocks. `announce` is called
    with each phase's name before its clock starts.
    """

    def __init__(self, device: torch.device, announce: Callable[[str], None]) -> None:
        self.readings: dict[str, PhaseReading] = {}
        self.peak_unavailable = host.reset_peak()
        self.start_rss_bytes: int | None = None
        self._device = device
        self._announce = announce
        self._name: str | None = None
        self._started = 0.0
        self._first_started = time.monotonic()
        self._last_ended = self._first_started
        self._held_s = 0.0
        self.between_s = 0.0  # collecting garbage and resetting peaks, which is no phase's work
        self._delayed_s = 0.0  # between two phases: waiting for a processor that others had
        self._worked_s = 0.0  # between two phases: processor time of this thread, in no clock
        self.stalled_s = 0.0  # between two phases: neither; `check_sum` tells
        self._mark = (host.run_delay_s(), time.thread_time())
        self.energy = host.PackageEnergy()
        self._cpu_start: host.CpuTimes | None = None
        self._energy_start: list[float] = []

    def enter(self, name: str, hold: Callable[[], None] | None = None) -> None:
        """End the phase before and start this one; `hold` may block before the clock starts."""
        self.leave()
        self._count_outside()
        began = time.monotonic()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        host.reset_peak()
        self.between_s += time.monotonic() - began
        self._mark_outside()
        self._announce(name)
        if hold is not None:
            self._count_outside()
            began = time.monotonic()
            hold()
            self._held_s += time.monotonic() - began
            self._mark_outside()
        self._name = name
        self._cpu_start = host.cpu_times()
        self._energy_start = [] if self.energy.unavailable else self.energy.read_j()
        self._count_outside()
        self._started = time.monotonic()

    def _mark_outside(self) -> None:
        """From here on time is in none of the clocks."""
        self._mark = (host.run_delay_s(), time.thread_time())

    def _count_outside(self) -> None:
        """What this thread did and waited since the mark, in none of the clocks."""
        delay_s, worked_s = self._mark
        self._mark_outside()
        self._delayed_s += self._mark[0] - delay_s
        self._worked_s += self._mark[1] - worked_s

    def imported(self) -> None:
        """The imports are done: the resident memory from which growth is counted is read here."""
        self.leave()
        self.start_rss_bytes = host.rss_bytes()

    def leave(self, stopped: Callable[[float], None] | None = None) -> None:
        """End the current phase, if any.

        `stopped` is told its seconds as soon as the clock stands, before the peaks are read.
        """
        if self._name is None:
            return
        synchronize(self._device)
        self._last_ended = time.monotonic()
        seconds = self._last_ended - self._started
        if stopped is not None:
            stopped(seconds)
        cpu_end = host.cpu_times()
        self._mark_outside()
        cuda = self._device.type == "cuda"
        energy_j = (
            None
            if self.energy.unavailable
            else self.energy.between_j(self._energy_start, self.energy.read_j())
        )
        self.readings[self._name] = PhaseReading(
            seconds,
            self._started,
            None if self.peak_unavailable else host.peak_rss_bytes(),
            torch.cuda.max_memory_allocated(self._device) if cuda else None,
            torch.cuda.max_memory_reserved(self._device) if cuda else None,
            host.own_cpu_s(self._cpu_start, cpu_end),
            host.other_cpu_s(self._cpu_start, cpu_end),
            energy_j,
        )
        self._name = None

    def check_sum(self) -> None:
        """Raise UnaccountedTimeError if more than 50 ms or 2 % of the round are work in no phase.

        The round lasts from this clock's making to the last phase's end, without the wait for the
        go, what `between_s` has, and what this thread waited for a processor between two phases.
        Time above that in which this thread did nothing (a virtual machine is paused, its memory is
        read back from a disk) is nobody's work and no phase's: it becomes `stalled_s`.
        """
        outside_s = self._held_s + self.between_s + self._delayed_s
        total_s = self._last_ended - self._first_started - outside_s
        phases_s = math.fsum(reading.seconds for reading in self.readings.values())
        allowed_s = max(0.02 * total_s, 0.05)
        if self._worked_s > allowed_s or phases_s > total_s + allowed_s:
            raise UnaccountedTimeError(
                f"the phases sum to {phases_s:.3f} s of a round of {total_s:.3f} s, and"
                f" {self._worked_s:.3f} s of work are in none of them"
            )
        if total_s > phases_s + allowed_s:
            self.stalled_s = total_s - phases_s
