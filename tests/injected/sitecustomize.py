"""Faults on purpose, for `scripts/nights.py`. Python runs this file in every process that has its
folder on PYTHONPATH; nothing in peftbench knows of it.

PEFTBENCH_INJECT holds a JSON object: what (slow, hold, rank, still, crash) -> patterns of case
ids, by commas; by -> how much slower, as a ratio; peft -> a version. A case's child is known by its
log, its standard output.
"""

import fnmatch
import importlib.metadata
import json
import os
import sys
import time
from functools import cache

WANTED = json.loads(os.environ.get("PEFTBENCH_INJECT", "{}"))
SLOWER_RATIO = float(WANTED.get("by", "0.10"))
HELD_BYTES = 128 * 2**20


@cache
def is_meant(patterns: str) -> bool:
    log = os.path.basename(os.readlink("/proc/self/fd/1"))  # <case id>-<hash>-r<round>.log
    case = log.rsplit("-", 2)[0]
    return any(fnmatch.fnmatch(case, pattern) for pattern in patterns.split(","))


def in_children() -> None:
    """Run in the fork server: what it changes, every child has."""
    import ctypes

    import peft

    from peftbench import training

    mark, build, config = training.StepClock.mark, training.build_optimizer, peft.LoraConfig
    marks, held = [], []

    def mark_with_faults(clock):
        marks.append(time.perf_counter())
        is_end = len(marks) % 2 == 0
        if is_end and "slow" in WANTED and is_meant(WANTED["slow"]):
            until = marks[-1] + SLOWER_RATIO * (marks[-1] - marks[-2])
            while time.perf_counter() < until:
                pass
        if is_end and not held and "hold" in WANTED and is_meant(WANTED["hold"]):
            held.append(b"x" * HELD_BYTES)
        if len(marks) == 8 and "crash" in WANTED and is_meant(WANTED["crash"]):
            ctypes.string_at(0)
        mark(clock)

    def build_with_faults(trained, settings, learning_rate, *rest):
        still = "still" in WANTED and is_meant(WANTED["still"])
        return build(trained, settings, 0.0 if still else learning_rate, *rest)

    def config_with_faults(*, r, **others):
        double = "rank" in WANTED and is_meant(WANTED["rank"])
        return config(r=2 * r if double else r, **others)

    training.StepClock.mark = mark_with_faults
    training.build_optimizer = build_with_faults
    peft.LoraConfig = config_with_faults


if "peft" in WANTED:
    DISTRIBUTION = importlib.metadata.distribution

    class OtherVersion(importlib.metadata.PathDistribution):
        version = WANTED["peft"]

    def distribution(name):
        found = DISTRIBUTION(name)
        if name == "peft":
            found.__class__ = OtherVersion
        return found

    importlib.metadata.distribution = distribution  # `version` asks it as well

if WANTED and "multiprocessing.forkserver" in " ".join(sys.orig_argv):
    in_children()
