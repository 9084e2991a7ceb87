"""What the kernel knows of this process and machine: resident memory, CPU time, energy."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_POWERCAP = Path("/sys/class/powercap")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SCHEDULED = Path("/proc/thread-self/schedstat")


def _status_bytes(field: str) -> int | None:
    if not _STATUS.exists():  # macOS: no per-phase high-water mark to be had
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def rss_bytes() -> int | None:
    """Resident memory now; None where the kernel has no /proc."""
    return _status_bytes("VmRSS")


def address_space_bytes() -> int | None:
    """What RLIMIT_AS limits."""
    return _status_bytes("VmSize")


def peak_rss_bytes() -> int | None:
    """High-water mark of the resident memory since the last `reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak() -> str | None:
    """Start a new high-water mark; returns why not where that cannot be done.

    A forked process inherits its parent's mark, so without this a small phase reads the largest.
    """
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        return f"{_CLEAR} cannot be written on {sys.platform}: {error.strerror}"
    return None


# A second busy process makes a small case up to 15 times slower (threads wait for each other at
# every operation); pytest itself and the system's own work stay well below this.
MOST_OTHER_CPU_RATIO = 0.10


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds since some moment in the past: of the whole machine, and of this process.

    A compiler that it has started and waited for is its own work.
    """

    machine_s: float
    own_s: float


def cpu_times() -> CpuTimes | None:
    """Busy time of all processors, time stolen by a hypervisor included; None without /proc/stat.

    The kernel counts in ticks of a hundredth of a second.
    """
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    own = os.times()
    return CpuTimes(ticks / os.sysconf("SC_CLK_TCK"), sum(own[:4]))


def other_cpu_s(start: CpuTimes | None, end: CpuTimes | None) -> float | None:
    """CPU seconds that others took between two readings; ticks round, so never below 0."""
    if start is None or end is None:
        return None
    return max(0.0, (end.machine_s - start.machine_s) - (end.own_s - start.own_s))


def own_cpu_s(start: CpuTimes | None, end: CpuTimes | None) -> float | None:
    """CPU seconds that this process took between two readings."""
    return None if start is None or end is None else end.own_s - start.own_s


def run_delay_s() -> float:
    """Seconds that this thread could have run and had no processor: others had them all.

    0 where the kernel does not count them. Source: Documentation/scheduler/sched-stats.rst
    """
    if not _SCHEDULED.exists():
        return 0.0
    return int(_SCHEDULED.read_text().split()[1]) / 1e9


class PackageEnergy:
    """The processor packages' own energy counters (RAPL), where the kernel lets us read them."""

    def __init__(self, root: Path = _POWERCAP) -> None:
        self._folders = sorted(root.glob("intel-rapl:[0-9]")) if root.exists() else []
        self.unavailable: str | None = None
        if not self._folders:
            self.unavailable = f"{root} lists no processor package (RAPL)"
            return
        try:
            self._ranges_j = [self._joules(f / "max_energy_range_uj") for f in self._folders]
            self.read_j()
        except OSError as error:
            self.unavailable = f"{error.filename} cannot be read ({error.strerror})"

    def read_j(self) -> list[float]:
        """Joules of each package's counter, which starts again at 0 when it is full."""
        return [self._joules(folder / "energy_uj") for folder in self._folders]

    def between_j(self, start: list[float], end: list[float]) -> float:
        """Joules of all packages between two readings that are less than one turn apart."""
        return sum((b - a) % full for a, b, full in zip(start, end, self._ranges_j, strict=True))

    @staticmethod
    def _joules(file: Path) -> float:
        return int(file.read_text()) / 1e6


def return_large_blocks() -> None:
    """Have glibc give every block of a mebibyte and more back when it is freed.

    By itself it keeps them for the next one as large: a process that gathers and frees weights then
    looks as if it held them all. It costs time, as every page of such a block is a new one.
    """
    M_MMAP_THRESHOLD = -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
