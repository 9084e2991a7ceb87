"""Resident memory of this process, from the kernel."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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
