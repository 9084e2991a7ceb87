"""How fast this machine reads and multiplies at best, right now: what floors are computed from."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

_REPEATS = 6


def time_machine(dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The fastest of several repeats, after one that is not counted.

    read_bytes_per_s: a sum over 1 GiB, far beyond any cache, or a matrix-vector product with it,
    whichever reads faster; matmul_flops_per_s: products of square matrices of 1024 and 2048 rows.
    """
    big = torch.ones(2**28)
    matrix, vector = big.view(2**14, 2**14), torch.ones(2**14)
    read_s = min(fastest_s(big.sum), fastest_s(lambda: torch.mv(matrix, vector)))
    rates = []
    for n in (1024, 2048):
        a, out = torch.ones(n, n, dtype=dtype), torch.empty(n, n, dtype=dtype)
        rates.append(2 * n**3 / fastest_s(partial(torch.mm, a, a, out=out)))
    return {"read_bytes_per_s": big.nbytes / read_s, "matmul_flops_per_s": max(rates)}


def fastest_s(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])
