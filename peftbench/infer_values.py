"""From the turns of an inference case to the values of its record: arithmetic alone, no torch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peftbench.adapters import ADAPTERS
from peftbench.case import Case, Settings
from peftbench.metrics import METRICS, VARIANTS

CONFIDENCE = 0.95
PARTS = ("prefill", "decode")


@dataclass(frozen=True)
class Turn:
    """One model's answer to the batch: seconds of the prefill, and of all decode steps together."""

    prefill_s: float
    decode_s: float


Cycle = dict[str, Turn]
"""A turn of each variant, one right after the other."""


def order(cycle: int, variants: Sequence[str]) -> tuple[str, ...]:
    """Who goes when: every permutation in turn, so that each model comes equally often at each
    place and after each other model, and what drifts within a cycle cancels."""
    permutations = list(itertools.permutations(variants))
    return permutations[cycle % len(permutations)]


def speed_values(cycles: Sequence[Cycle], settings: Settings) -> dict[str, float | int | None]:
    """Times, rates, and times over the base's, of the variants that took part."""
    rows, steps = settings.infer_batch_size, settings.infer_new_tokens - 1
    values: dict[str, float | int | None] = {}
    for variant in cycles[0]:
        prefill_s = statistics.median(cycle[variant].prefill_s for cycle in cycles)
        decode_s = statistics.median(cycle[variant].decode_s for cycle in cycles) / steps
        values |= {
            f"{variant}_prefill_s": prefill_s,
            f"{variant}_decode_s": decode_s,
            f"{variant}_prefill_tokens_per_s": rows * settings.infer_prompt_tokens / prefill_s,
            f"{variant}_decode_tokens_per_s": rows / decode_s,
        }
        if variant != "base":
            for part in PARTS:
                values |= _ratio_values(cycles, variant, part)
    return values


def _ratio_values(cycles: Sequence[Cycle], variant: str, part: str) -> dict[str, float | None]:
    own, base = (
        [getattr(cycle[name], f"{part}_s") for cycle in cycles] for name in (variant, "base")
    )
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    interval = median_interval(ratios)
    name = f"{variant}_{part}_ratio"
    return {
        name: statistics.median(ratios),
        f"{name}_low": None if interval is None else interval[0],
        f"{name}_high": None if interval is None else interval[1],
    }


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Two of the values between which the median lies with at least this confidence.

    Whatever the distribution: each value is below the median with probability 1/2, so their number
    is binomial. None where even the extremes are too near: below 6 values at 95 %.
    """
    n = len(values)
    tail, below = 0.0, 0  # P(X <= below - 1) for X ~ Binomial(n, 1/2)
    while below < n // 2:
        more = tail + math.comb(n, below) / 2**n
        if 2 * more > 1 - confidence:
            break
        tail, below = more, below + 1
    if below == 0:
        return None
    ordered = sorted(values)
    return ordered[below - 1], ordered[n - below]


def merges(case: Case) -> bool:
    """Whether the case has a merged model."""
    row = ADAPTERS[case.adapter]
    return row.merges and (case.settings.infer_merge_4bit or not row.quantization)


def variants_of(case: Case) -> tuple[str, ...]:
    return VARIANTS if merges(case) else VARIANTS[:2]


def null_reasons(case: Case, device_type: str, peak_unavailable: str | None) -> dict[str, str]:
    """Why each metric that has no value has none."""
    reasons = {"other_cpu_ratio": "no /proc on this system"}
    on_gpu = "not reported by the parent process"
    for variant in VARIANTS:
        on_cpu = f"the run used {device_type}, no GPU"
        reasons[f"peak_gpu_{variant}_bytes"] = on_cpu if device_type == "cpu" else on_gpu
        reasons[f"torch_peak_{variant}_bytes"] = on_cpu
        reasons[f"host_peak_{variant}_bytes"] = peak_unavailable or "no /proc on this system"
    for name in METRICS:
        if name.endswith(("_ratio_low", "_ratio_high")):
            reasons[name] = f"{case.settings.infer_turns} turns are too few for an interval"
    if case.adapter == "full":
        for source in ("peak_gpu", "torch_peak", "host_peak"):
            reasons[f"{source}_unmerged_bytes"] = "a tuned model has the shapes of its base"
        reasons["effect_logit_ratio"] = "full is measured on a copy of the base, as a control"
    if not merges(case):
        why = not_merged(case)
        names = [n for n in METRICS if n.startswith("merged_") or n.endswith("_merged_bytes")]
        reasons |= dict.fromkeys([*names, "merge_logit_ratio", "zero_merge_logit_ratio"], why)
    return reasons


def not_merged(case: Case) -> str:
    row = ADAPTERS[case.adapter]
    if row.merges:
        return (
            "merging into 4 bits rounds the adapter away; --infer-merge-4bit merges it into the"
            " base dequantised"
        )
    return f"{case.adapter} does not merge: {row.about}"
