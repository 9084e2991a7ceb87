"""The phases of a round: wall time and peaks of each, and nothing between them unaccounted for."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peftbench.measuring import host


@dataclass(frozen=True)
class PhaseReading:
    """What one phase took. Peaks are None where they cannot be read."""

    seconds: float
    host_peak_rss_bytes: int | None
    torch_peak_allocated_bytes: int | None
    torch_peak_reserved_bytes: int | None


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

    def enter(self, name: str, hold: Callable[[], None] | None = None) -> None:
        """End the phase before and start this one; `hold` may block before the clock starts."""
        self.leave()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        host.reset_peak()
        self._announce(name)
        if hold is not None:
            hold()
        self._name = name
        self._started = time.perf_counter()

    def imported(self) -> None:
        """The imports are done: the resident memory from which growth is counted is read here."""
        self.leave()
        self.start_rss_bytes = host.rss_bytes()

    def leave(self) -> float:
        """End the current phase, if any; returns its seconds."""
        if self._name is None:
            return 0.0
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        cuda = self._device.type == "cuda"
        self.readings[self._name] = PhaseReading(
            seconds,
            None if self.peak_unavailable else host.peak_rss_bytes(),
            torch.cuda.max_memory_allocated(self._device) if cuda else None,
            torch.cuda.max_memory_reserved(self._device) if cuda else None,
        )
        self._name = None
        return seconds
