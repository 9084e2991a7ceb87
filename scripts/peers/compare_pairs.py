"""SFT, DPO and ORPO against TRL 1.16 on the same ids: seconds a step, memory, losses, the floor.

In DPO the reference's log-probabilities are part of every step on both sides (ours makes them in
one go before the first: its share of that time is added to the step).
"""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compare_ppo import REAL, as_lists, folder_of, token_pairs
from sides import Goal, run_side, steady, table
from work import PairsWork, described

from peftbench.summary import MIB

OWN = Path(sys.executable)
EAGER, COMPILED = "peftbench", "peftbench, compiled"  # our sides
GOALS = {"sft": 1.5, "dpo": 2.2, "orpo": 1.4}
LONG_GOAL = 2.5  # prompts of 256 tokens, which chosen and rejected share
LOSS_LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}
STEPS = 4  # the first is not timed

METHODS = ("sft", "dpo", "orpo")

# (model, dtype, batch size, prompt, completion, methods) of each part: some three minutes each
Shape = tuple[str, str, int, int, int, tuple[str, ...]]
GROUPS: dict[str, Shape] = {
    f"pairs-{method}-{dtype}": (REAL, dtype, 4, 64, 64, (method,))
    for dtype in LOSS_LIMITS
    for method in METHODS
}
GROUPS |= {f"pairs-batch1-{dtype}": (REAL, dtype, 1, 64, 64, METHODS) for dtype in LOSS_LIMITS}
GROUPS |= {f"pairs-long-{m}": (REAL, "float32", 4, 256, 64, (m,)) for m in ("dpo", "orpo")}
GROUPS |= {f"pairs-gpt2-{m}": ("gpt-2", "float32", 4, 64, 64, (m,)) for m in METHODS}


def measure(group: str, sizes: str) -> tuple[dict[str, Any], str]:
    """All methods of a group, ours and TRL's one after the other."""
    rows: list[dict[str, Any]] = []
    compiling: list[str] = []
    goals: list[Goal] = []
    lines: list[list[str]] = []
    model, dtype, batch, prompt, completion, methods = GROUPS[group]
    base = work_of(model, dtype, batch, prompt, completion)
    for method in methods:
        print(f"{method} in {dtype}, batch {batch} ...", file=sys.stderr, flush=True)
        found = sides_of(replace(base, method=method), sizes)
        rows.append({"work": described(replace(base, method=method)), "sides": found})
        for side in (EAGER, COMPILED):
            goals += goals_of(method, base, prompt, found, side)
            lines.append(line_of(method, base, prompt, completion, found, side))
        compiling.append(compile_line(method, found[COMPILED]))
    header = [
        "", "peftbench s/step", "TRL 1.16", "ratio", "TRL, its defaults", "method s",
        "TRL's", "floor", "of floor", "peak MiB", "TRL's", "largest loss difference",
    ]  # fmt: skip
    title = f"LoRA r=8 on q and v, 2 threads; median of {STEPS - 1} steps after the first"
    told = (goal.line() for goal in goals)
    text = "\n".join([title, "", table(header, lines), "", *compiling, "", *told])
    return {"rows": rows, "goals": [goal.to_dict() for goal in goals]}, text


def work_of(model: str, dtype: str, batch: int, prompt: int, completion: int) -> PairsWork:
    shapes_only = model != REAL
    pairs = (
        random_pairs(STEPS * batch, prompt, completion)
        if shapes_only
        else as_lists(token_pairs(model, STEPS * batch, prompt, completion))
    )
    return PairsWork(
        model=model, folder="" if shapes_only else folder_of(model), pairs=pairs, method="",
        batch_size=batch, threads=2, rank=8, alpha=16, learning_rate=1e-4, dtype=dtype,
        weights="random" if shapes_only else "pretrained", precomputed_reference=False,
        trl_defaults=False, seed=0,
    )  # fmt: skip


def random_pairs(count: int, prompt: int, completion: int) -> list[list[list[int]]]:
    dice = random.Random(0)
    return [
        [[dice.randrange(50_257) for _ in range(n)] for n in (prompt, completion, completion)]
        for _ in range(count)
    ]


def sides_of(work: PairsWork, sizes: str) -> dict[str, Any]:
    """Ours, eager and compiled; TRL's on equal work, with its own defaults, precomputed (DPO)."""
    asked = {
        EAGER: ("own_pairs.py", work),
        COMPILED: ("own_pairs.py", replace(work, compile="layers")),
        "trl": ("trl_pairs.py", work),
    }
    if work.batch_size > 1 and work.weights == "pretrained" and sizes == "full":
        asked["trl defaults"] = ("trl_pairs.py", replace(work, trl_defaults=True))
    if work.method == "dpo":
        precomputed = replace(work, precomputed_reference=True)
        asked["trl precomputed"] = ("trl_pairs.py", precomputed)
    return {name: run_side(OWN, script, asdict(given)) for name, (script, given) in asked.items()}


def own_step_s(own: dict[str, Any]) -> float:
    """A step with its share of the reference, which is made before the first step."""
    return float(steady(own["step_s"]) + own["reference_s"] / len(own["step_s"]))


def floor_s(own: dict[str, Any]) -> float:
    return float(own["step_floor_s"] + own["reference_floor_s"])


def method_s(side: dict[str, Any]) -> float:
    return float(side["reference_s"] + sum(side["step_s"]))


def loss_difference(own: dict[str, Any], peer: dict[str, Any]) -> float:
    return float(max(abs(a - b) for a, b in zip(own["losses"], peer["losses"], strict=True)))


def goals_of(
    method: str, work: PairsWork, prompt: int, found: dict[str, Any], side: str
) -> list[Goal]:
    where = f"{method}, {work.model}, {work.dtype}, batch {work.batch_size}, {prompt}-token prompts"
    where += ", compiled" if side == COMPILED else ""
    own, peer = found[side], found["trl"]
    limit = LONG_GOAL if prompt == 256 else GOALS[method]
    memory = own["peak_growth_bytes"] / peer["peak_growth_bytes"]
    own_s = own_step_s(own)
    goals = [
        Goal(f"times faster than TRL 1.16: {where}", steady(peer["step_s"]) / own_s, limit),
        Goal(f"of TRL's peak memory: {where}", memory, 0.85, at_most=True),
        Goal(f"largest loss difference: {where}", loss_difference(own, peer),
             LOSS_LIMITS[work.dtype], at_most=True),
    ]  # fmt: skip
    if work.dtype == "float32" and method in ("sft", "dpo"):
        goals.append(Goal(f"of the matmul rate: {where}", floor_s(own) / own_s, 0.75))
    return goals


def line_of(
    method: str, work: PairsWork, prompt: int, completion: int, found: dict[str, Any], side: str
) -> list[str]:
    own, peer = found[side], found["trl"]
    own_s, trl_s, floor = own_step_s(own), steady(peer["step_s"]), floor_s(own)
    defaults = found.get("trl defaults")
    precomputed = found.get("trl precomputed")
    name = f"{work.model} {method} {work.dtype} {work.batch_size} x ({prompt} + {completion})"
    return [
        name + (", compiled" if side == COMPILED else ""),
        f"{own_s:.2f}", f"{trl_s:.2f}", f"{trl_s / own_s:.2f}",
        "-" if defaults is None else f"{steady(defaults['step_s']):.2f}",
        "-" if precomputed is None else f"{method_s(own):.1f}",
        "-" if precomputed is None else f"{method_s(precomputed):.1f}",
        f"{floor:.2f}", f"{floor / own_s:.2f}",
        f"{own['peak_growth_bytes'] / MIB:,.0f}",
        f"{peer['peak_growth_bytes'] / MIB:,.0f}",
        f"{loss_difference(own, peer):.1e}",
    ]  # fmt: skip


def compile_line(method: str, own: dict[str, Any]) -> str:
    """What compiling took before the first step: no part of any other number."""
    took = f"{own['compile_s']:.1f} s ({own['compilation']['cache']} cache)"
    return f"{method}: compiling took {took}, {own['compilation']['graph_breaks']} graph breaks"
