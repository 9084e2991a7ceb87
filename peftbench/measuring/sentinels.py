"""Small fixed pieces of work that use no library under test: how fast is this machine right now?

Each session times them at its start and at its end. If they are slower than last night, the machine
is; if they are not and the cases are, a library is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from peftbench.measuring.phases import synchronize

_MATRIX = {"cpu": 1024, "cuda": 8192}  # rows and columns: some milliseconds a product
_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # far beyond any cache
_LAUNCHES = 1000
_REPEATS = 7


def time_sentinels(device: torch.device) -> dict[str, float]:
    """Median rates of several repeats, about half a second of work in all.

    matmul_float32_flops_per_s, matmul_bfloat16_flops_per_s: a product of two square matrices, 2 n^3
    operations; copy_bytes_per_s: bytes copied a second, each read once and written once; launch_s:
    one addition to a tensor of one element, what a call costs.
    """
    n = _MATRIX[device.type]
    rates = {}
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.ones((n, n), dtype=getattr(torch, dtype), device=device) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _median_s(partial(torch.mm, a, b, out=out), device)
        rates[f"matmul_{dtype}_flops_per_s"] = 2 * n**3 / seconds
        del a, b, out
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device)
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(_LAUNCHES):
            one.add_(1.0)

    return rates | {
        "copy_bytes_per_s": source.nbytes / copy_s,
        "launch_s": _median_s(launch, device) / _LAUNCHES,
    }


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, the device synchronised around it; the first run is not counted."""
    seconds = []
    for _ in range(_REPEATS + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
