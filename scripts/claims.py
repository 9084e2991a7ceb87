"""What the README and the design promise of a run, checked on its JSON file.

    python scripts/claims.py quick output/run.json
    python scripts/claims.py cpu-real output/real.json
    python scripts/claims.py ppo-truth output/truth.json

Prints a line a claim with the value measured and exits with 1 if one does not hold. Differences are
paired: the same held-out windows and pairs before and after, on every round (seed) of a case.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftbench.evaluation import mean_per_token
from peftbench.metrics import kind_of

Claim = tuple[bool, str]


def paired_nll(items: dict[str, Any]) -> tuple[float, float]:
    """(gain, standard error) of nll_per_token, nats; windows are the units."""
    gains = [
        b - a for a, b in zip(items["window_nll_nats"], items["window_nll_base_nats"], strict=True)
    ]
    mean, error = mean_per_token(gains, items["window_tokens"])
    assert error is not None
    return mean, error


def paired_accuracy(items: dict[str, Any]) -> tuple[float, float]:
    """(gain, standard error) of preference_accuracy; pairs are the units."""
    after, before = items["preference_correct"], items["preference_correct_base"]
    gains = [int(a) - int(b) for a, b in zip(after, before, strict=True)]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def errors(gain: float, error: float) -> str:
    return f"{gain / error:.1f}" if error > 0 else "no"


def own_target(row: dict[str, Any], item: dict[str, Any]) -> tuple[str, float, float]:
    if row["case"]["method"] == "sft":
        return "nll_per_token falls", *paired_nll(item)
    return "preference_accuracy rises", *paired_accuracy(item)


def quick_claims(row: dict[str, Any], item: dict[str, Any], index: int) -> Iterator[Claim]:
    adapter, method = row["case"]["adapter"], row["case"]["method"]
    if method == "ppo":
        r = row["rounds"][index]
        yield r["total_s"] <= 45, f"{r['total_s']:.0f} s in all phases (45 s promised)"
        rises = r["ppo_history"][-1]["reward_mean"] > 0
        yield rises, f"its reward rises by {r['ppo_history'][-1]['reward_mean']:.2f} deviations"
        return
    if adapter in ("lora", "full") and method == "sft":
        r = row["rounds"][index]
        before, after, floor = (r[k] for k in ("perplexity_base", "perplexity", "perplexity_floor"))
        share = (before - after) / (before - floor)
        yield share >= 0.30, f"perplexity goes {share:.1%} of the way to the floor (30 % promised)"
        return
    name, gain, error = own_target(row, item)
    if adapter in ("lora", "full"):
        n = len(item["preference_correct"])
        yield n >= 400 and gain >= 0.10, f"{name} by {gain:.1%} on {n} pairs (10 points promised)"
    else:
        yield gain > 3 * error, f"{name} by {gain:.4f}, {errors(gain, error)} errors (3 promised)"


def real_claims(row: dict[str, Any], item: dict[str, Any], index: int) -> Iterator[Claim]:
    seconds = row["total_s"]
    yield seconds <= 300, f"{seconds:.0f} s in all phases (300 s promised)"
    name, gain, error = own_target(row, item)
    needed = 2 if row["case"]["adapter"] == "lora" else -math.inf
    text = f"{name} by {gain:.4f}, {errors(gain, error)} errors"
    yield gain > needed * error, text + (" (2 promised)" if needed == 2 else " (nothing promised)")


def truth_claims(row: dict[str, Any], item: dict[str, Any], index: int) -> Iterator[Claim]:
    """The true reward on held-out prompts, in the base's own deviations."""
    r = row["rounds"][index]
    gain, unit = r["true_reward"] - r["true_reward_base"], r["true_reward_std_base"]
    yield (
        gain >= 0.5 * unit,
        f"true reward {r['true_reward_base']:.3f} -> {r['true_reward']:.3f}, by {gain / unit:.2f}"
        f" deviations of the base's (0.5 promised); KL {r['kl_to_base_nats_per_token']:.2f} nats a"
        f" token",
    )
    yield r["method_s"] <= 90, f"{r['method_s']:.0f} s, {r['total_s']:.0f} s in all (90 s promised)"


def infer_claims(row: dict[str, Any], item: dict[str, Any], index: int) -> Iterator[Claim]:
    """A merged LoRA answers as fast as its base, as paired ratios of one run show."""
    r = row["rounds"][index]
    for part in ("prefill", "decode"):
        ratio, low, high = (r[f"merged_{part}_ratio{end}"] for end in ("", "_low", "_high"))
        if ratio is None:
            continue
        promised = row["case"]["adapter"] == "lora"
        interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
        word = "2 % promised" if promised else "nothing promised"
        text = f"{part} of merged takes {ratio:.4f}{interval} times the base's ({word})"
        yield not promised or abs(ratio - 1) <= 0.02, text


CLAIMS = {"quick": quick_claims, "cpu-real": real_claims, "ppo-truth": truth_claims}


def main() -> int:
    check, path = CLAIMS[sys.argv[1]], Path(sys.argv[2])
    run = json.loads(path.read_text())
    held = [case["status"] == "ok" for case in run["peftbench"]["cases"]]
    print(f"{sum(held)} of {len(held)} cases ended ok")
    for benchmark in run["benchmarks"]:
        row = benchmark["extra_info"]
        own = infer_claims if kind_of(row["case_id"]) == "infer" else check
        for index, entry in enumerate(row["rounds"]):
            for holds, text in own(row, entry.get("items", {}), index):
                held.append(holds)
                print(
                    f"{'ok  ' if holds else 'FAIL'} {row['case_id']} seed {entry['seed']}: {text}"
                )
    print(f"{held.count(False)} claims failed of {len(held)}")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
