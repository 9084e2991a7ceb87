"""How running out of memory looks: torch's GPU allocator has a type for it, a CPU has words."""

from __future__ import annotations

import re

import torch

_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_WORDS = {
    "bytes_asked": rf"[Tt]ried to allocate {_SIZE}",
    "bytes_total": rf"total capacity of {_SIZE}",
    "bytes_free": rf"of which {_SIZE} is free",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was asked for which was not there."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # numpy's is a MemoryError
        return True
    # torch's CPU allocator raises a plain RuntimeError, so its words are all there is to go by; so
    # does Python where there is no memory for a thread's stack
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("can't allocate memory", "std::bad_alloc", "can't start new thread")
    )


def oom_bytes(message: str) -> dict[str, int]:
    """What torch's allocators say in words, CUDA's or the CPU's; only what is said."""
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    found = {name: re.search(pattern, message) for name, pattern in _WORDS.items()}
    return {n: round(float(m[1]) * units[m[2]]) for n, m in found.items() if m is not None}
