"""What one sees while the matrix runs: which case of how many, its phase, elapsed and expected."""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import IO


def clock(seconds: float) -> str:
    """`0:07`, `2:40`, `1:02:05`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def say(text: str) -> None:
    """A line of `train` or `infer`, there at once where the output is a file."""
    print(text, flush=True)


class Progress:
    """A live line on a terminal, a line a case elsewhere. Written past pytest's capture."""

    def __init__(self, total: int, descriptor: int = 1) -> None:
        self._out: IO[str] = os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
        self._live = self._out.isatty()
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._label, self._phase, self._phase_started = "", "", time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)
        if self._live:
            self._thread.start()

    def case(self, label: str) -> None:
        """The next case, or something done between two cases."""
        with self._lock:
            self._label = label
            self._set_phase("start")
            if not self._live:
                self._print(f"[{self._done + 1}/{self._total}] {label} ... {self._times()}")

    @property
    def current_phase(self) -> str:
        return self._phase

    def phase(self, name: str) -> None:
        with self._lock:
            self._set_phase(name)

    def finished(self, line: str) -> None:
        """A case has ended: `line` stays on the screen."""
        with self._lock:
            self._done += 1
            self._print(f"[{self._done}/{self._total}] {line}")

    def close(self) -> None:
        self._stop.set()
        if self._live:
            self._thread.join()
        with self._lock:
            if self._live:
                self._out.write("\r\x1b[K")
            self._out.close()

    def _set_phase(self, name: str) -> None:
        self._phase, self._phase_started = name, time.monotonic()

    def _times(self) -> str:
        elapsed = time.monotonic() - self._started
        if self._done == 0:
            return f"{clock(elapsed)} elapsed"
        left = elapsed / self._done * (self._total - self._done)
        return f"{clock(elapsed)} elapsed, about {clock(left)} left"

    def _print(self, line: str) -> None:
        self._out.write(("\r\x1b[K" if self._live else "") + line + "\n")
        self._out.flush()

    def _redraw(self) -> None:
        while not self._stop.wait(0.2):
            with self._lock:
                seconds = time.monotonic() - self._phase_started
                line = (
                    f"[{self._done + 1}/{self._total}] {self._label}  {self._phase}"
                    f" {seconds:.0f} s  ({self._times()})"
                )
                width = shutil.get_terminal_size().columns - 1
                self._out.write("\r\x1b[K" + line[:width])
                self._out.flush()
