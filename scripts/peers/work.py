"""What the sides of a comparison are given and give back, as JSON files. Standard library only.

Each side is a process of its own: `python <side>.py <work.json> <outcome.json>`. TRL 1.12 needs an
environment of its own, so nothing but these files is shared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftbench.measuring import host


@dataclass(frozen=True)
class PPOWork:
    """PPO on these prompts, one update after the other. Lengths are in tokens."""

    model: str  # a name of peftbench's MODELS
    folder: str  # where its files lie
    prompts: list[list[int]]  # `updates` x `batch_size` rows of equal length: nothing is padded
    batch_size: int  # episodes of an update, and of an optimiser step
    micro_batch_size: int
    response_length: int  # of every response: nothing stops it
    updates: int
    epochs: int
    threads: int
    rank: int
    alpha: int
    learning_rate: float
    kl_coef: float
    value: str  # head, adapter; of TRL full, adapter
    counted_token: int | None  # the reward is its share of the response; None: a model's
    seeds: list[int]
    compile: str = "none"  # peftbench's setting of this name


@dataclass(frozen=True)
class PairsWork:
    """SFT, DPO or ORPO on these pairs of token ids, in this order."""

    model: str
    folder: str
    pairs: list[list[list[int]]]  # [prompt, chosen, rejected]
    method: str
    batch_size: int
    threads: int
    rank: int
    alpha: int
    learning_rate: float
    dtype: str
    weights: str  # pretrained; random
    precomputed_reference: bool
    trl_defaults: bool  # of what costs time: gradient checkpointing
    seed: int
    compile: str = "none"  # peftbench's setting of this name


def described(work: PPOWork | PairsWork) -> dict[str, Any]:
    """The work as a record says it: without its ids and places of this machine."""
    left_out = ("prompts", "pairs", "folder")
    return {k: v for k, v in asdict(work).items() if k not in left_out}


def read_arguments() -> tuple[dict[str, Any], Path]:
    """(the work's values, where the outcome goes) of a side's command line."""
    return json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])


class Meter:
    """Resident memory of this process, and the CPU time that others took while it worked.

    Made after the imports, whose memory is not the work's.
    """

    def __init__(self) -> None:
        self.imported_bytes = host.rss_bytes()
        self.readings: list[dict[str, float | None]] = []

    def start(self) -> None:
        """The work's clock starts: peaks of loading and building are not its."""
        self.unavailable = host.reset_peak()
        self.cpu, self.started_s = host.cpu_times(), time.perf_counter()

    def stop(self) -> None:
        """The work has ended. The ratio is over the time of all cores."""
        peak, growth = host.peak_rss_bytes(), None
        if self.unavailable is None and peak is not None and self.imported_bytes is not None:
            growth = peak - self.imported_bytes
        seconds = (time.perf_counter() - self.started_s) * (os.cpu_count() or 1)
        cpu = host.cpu_times()
        other_s = host.other_cpu_s(self.cpu, cpu)
        self.readings.append({
            "peak_growth_bytes": growth,
            "other_cpu_ratio": None if other_s is None else other_s / seconds,
            "own_cpu_s": None if cpu is None or self.cpu is None else cpu.own_s - self.cpu.own_s,
        })  # fmt: skip

    def outcome(self) -> dict[str, float | None]:
        """Of the first training: what later ones in the process take is not theirs alone."""
        return self.readings[0]
