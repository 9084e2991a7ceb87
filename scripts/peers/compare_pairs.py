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
    goals: list[Goal] = []
    lines: list[list[str]] = []
    model, dtype, batch, prompt, completion, methods = GROUPS[group]
    base = work_of(model, dtype, batch, prompt, completion)
    for method in methods:
        print(f"{method} in {dtype}, batch {batch} ...", file=sys.stderr, flush=True)
        found = sides_of(replace(base, method=method), sizes)
        rows.append({"work": described(replace(base, method=method)), "sides": found})
        goals += goals_of(method, base, prompt, found)
        lines.append(line_of(method, base, prompt, completion, found))
    header = [
        "", "peftbench s/step", "TRL 1.16", "ratio", "TRL, its defaults", "method s",
        "TRL's", "floor", "of floor", "peak MiB", "TRL's", "largest loss difference",
    ]  # fmt: skip
    title = f"LoRA r=8 on q and v, 2 threads; median of {STEPS - 1} steps after the first"
    text = "\n".join([title, "", table(header, lines), "", *(goal.line() for goal in goals)])
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
    """Ours, TRL's on equal work, TRL's with its own defaults; of DPO also a precomputed one."""
    asked = {"peftbench": ("own_pairs.py", work), "trl": ("trl_pairs.py", work)}
    if work.batch_size > 1 and work.weights == "pretrained" and sizes == "full":
        asked["trl defaults"] = ("trl_pairs.py", replace(work, trl_defaults=True))
    if work.method == "dpo":
        precomputed = replace(work, precomputed_reference=True)
        asked["trl precomputed"] = ("trl_pairs.py", precomputed)
    return {name: run_side(OWN, script, asdict(given)) for name, (script, given) in asked.items()}


def own_step_s(found: dict[str, Any]) -> float:
    """A step with its share of the reference, which is made before the first step."""
    own = found["peftbench"]
    return float(steady(own["step_s"]) + own["reference_s"] / len(own["step_s"]))


def floor_s(found: dict[str, Any]) -> float:
    own = found["peftbench"]
    return float(own["step_floor_s"] + own["reference_floor_s"])


def method_s(side: dict[str, Any]) -> float:
    return float(side["reference_s"] + sum(side["step_s"]))


def loss_difference(found: dict[str, Any]) -> float:
    own, peer = found["peftbench"]["losses"], found["trl"]["losses"]
    return float(max(abs(a - b) for a, b in zip(own, peer, strict=True)))


def goals_of(method: str, work: PairsWork, prompt: int, found: dict[str, Any]) -> list[Goal]:
    where = f"{method}, {work.model}, {work.dtype}, batch {work.batch_size}, {prompt}-token prompts"
    limit = LONG_GOAL if prompt == 256 else GOALS[method]
    memory = found["peftbench"]["peak_growth_bytes"] / found["trl"]["peak_growth_bytes"]
    own_s = own_step_s(found)
    goals = [
        Goal(f"times faster than TRL 1.16: {where}", steady(found["trl"]["step_s"]) / own_s, limit),
        Goal(f"of TRL's peak memory: {where}", memory, 0.85, at_most=True),
        Goal(f"largest loss difference: {where}", loss_difference(found),
             LOSS_LIMITS[work.dtype], at_most=True),
    ]  # fmt: skip
    if work.dtype == "float32" and method in ("sft", "dpo"):
        goals.append(Goal(f"of the matmul rate: {where}", floor_s(found) / own_s, 0.75))
    return goals


def line_of(
    method: str, work: PairsWork, prompt: int, completion: int, found: dict[str, Any]
) -> list[str]:
    own_s, trl_s = own_step_s(found), steady(found["trl"]["step_s"])
    defaults = found.get("trl defaults")
    precomputed = found.get("trl precomputed")
    floor = floor_s(found)
    return [
        f"{work.model} {method} {work.dtype} {work.batch_size} x ({prompt} + {completion})",
        f"{own_s:.2f}", f"{trl_s:.2f}", f"{trl_s / own_s:.2f}",
        "-" if defaults is None else f"{steady(defaults['step_s']):.2f}",
        "-" if precomputed is None else f"{method_s(found['peftbench']):.1f}",
        "-" if precomputed is None else f"{method_s(precomputed):.1f}",
        f"{floor:.2f}", f"{floor / own_s:.2f}",
        f"{found['peftbench']['peak_growth_bytes'] / MIB:,.0f}",
        f"{found['trl']['peak_growth_bytes'] / MIB:,.0f}",
        f"{loss_difference(found):.1e}",
    ]  # fmt: skip
