"""PPO against TRL 1.12, the last with a PPO: time, memory, floors, and the toy reward's curve."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sides import ROOT, Goal, run_side, table
from work import PairsWork, PPOWork, described

from peftbench import models
from peftbench.case import Settings
from peftbench.data import assets
from peftbench.data.loading import load_task
from peftbench.data.task import TokenPair
from peftbench.record import dumps, write_atomically
from peftbench.summary import MIB

OWN = Path(sys.executable)
PACKAGE = Path(models.__file__).parent
REAL, TINY = "smollm2-135m-instruct-q4", "tiny-llama"
HEAD, ADAPTER = "peftbench, value=head", "peftbench, value=adapter"
COMPILED_HEAD, COMPILED_ADAPTER = f"{HEAD}, compiled", f"{ADAPTER}, compiled"
AS_RUN, EQUAL = "TRL 1.12, as its users run it (a)", "TRL 1.12, equal parameters (b)"
DPO = "peftbench's DPO, as many tokens"
KEPT = ROOT / "output" / "peers" / "ppo-sides.json"
TURNS = 2  # all sides once, and again: a machine's speed drifts by more than what is measured


def measure(trl_python: Path, sizes: str) -> tuple[dict[str, Any], str]:
    """Every side on the real model, one after the other; the numbers and their table."""
    work = real_work(sizes)

    def own(**changes: Any) -> dict[str, Any]:
        return run_side(OWN, "own_ppo.py", asdict(replace(work, **changes)))

    def trl(value: str) -> dict[str, Any]:
        return run_side(trl_python, "trl_ppo.py", asdict(replace(work, value=value)))

    run: dict[str, Callable[[], dict[str, Any]]] = {
        COMPILED_HEAD: lambda: own(compile="layers"),
        AS_RUN: lambda: trl("full"),
        HEAD: own,
        COMPILED_ADAPTER: lambda: own(compile="layers", value="adapter"),
        EQUAL: lambda: trl("adapter"),
        ADAPTER: lambda: own(value="adapter"),
    }
    found = {name: together(turns) for name, turns in in_turns(run, TURNS).items()}
    # of which only memory counts: it needs no second turn
    found[DPO] = run_side(OWN, "own_pairs.py", asdict(dpo_work(work)))
    goals = goals_of(found)
    numbers = {
        "work": described(work),
        "sides": found,
        "goals": [goal.to_dict() for goal in goals],
    }
    return numbers, text_of(work, found, goals)


def in_turns(
    run: dict[str, Callable[[], dict[str, Any]]], turns: int
) -> dict[str, list[dict[str, Any]]]:
    """Every side's outcomes: all sides once, then all again, as the machine's speed drifts."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in run}
    for turn in range(turns):
        for name, side in run.items():
            print(f"{name}, turn {turn + 1} of {turns} ...", file=sys.stderr, flush=True)
            found[name].append(side())
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(KEPT, dumps(found))  # of a comparison that is stopped
    return found


def together(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's turns as one: every run, the largest peak, means of the machine's rates."""
    first = outcomes[0]
    return first | {
        "runs": [run for outcome in outcomes for run in outcome["runs"]],
        "peak_growth_bytes": max(outcome["peak_growth_bytes"] for outcome in outcomes),
        "other_cpu_ratio": statistics.fmean(outcome["other_cpu_ratio"] for outcome in outcomes),
        "machine": {
            name: statistics.fmean(outcome["machine"][name] for outcome in outcomes)
            for name in first["machine"]
        },
    }


def of_runs(side: dict[str, Any], part: str) -> float:
    """Median of a part's seconds over all runs, without the first update of each."""
    seconds: list[float] = [second for run in side["runs"] for second in run[part][1:]]
    return statistics.median(seconds)


def of_floor(side: dict[str, Any], name: str) -> float:
    """Mean of the runs' floors, each computed from the rates that its own turn had."""
    return statistics.fmean(run["floor"][name] for run in side["runs"])


def real_work(sizes: str) -> PPOWork:
    model, updates = (REAL, 3) if sizes == "full" else (TINY, 2)
    return PPOWork(
        model=model, folder=folder_of(model), prompts=token_prompts(model, updates * 8, 24),
        batch_size=8, micro_batch_size=8, response_length=32, updates=updates, epochs=4,
        threads=2, rank=8, alpha=16, learning_rate=1e-4, kl_coef=0.05, value="head",
        counted_token=None, seeds=[0],
    )  # fmt: skip


def dpo_work(work: PPOWork) -> PairsWork:
    """DPO whose rows are as many and as long as PPO's: half as many pairs."""
    pairs = token_pairs(work.model, 16, len(work.prompts[0]), work.response_length)
    return PairsWork(
        model=work.model, folder=work.folder, pairs=as_lists(pairs), method="dpo",
        batch_size=work.micro_batch_size // 2, threads=work.threads, rank=work.rank,
        alpha=work.alpha, learning_rate=work.learning_rate, dtype="float32", weights="pretrained",
        precomputed_reference=True, trl_defaults=False, seed=0,
    )  # fmt: skip


def as_lists(pairs: list[TokenPair]) -> list[list[list[int]]]:
    return [[list(p.prompt), list(p.chosen), list(p.rejected)] for p in pairs]


def folder_of(model: str) -> str:
    """The local folder of a model that is in the package or in the cache."""
    row = models.find_model(model)
    folder = assets.fetch(row.location) if row.kind == "asset" else PACKAGE / row.location
    return str(folder)


def token_prompts(model: str, count: int, length: int) -> list[list[int]]:
    """Windows of held-out text, one after the other: no padding, no two alike."""
    settings = Settings(
        data=corpus_of(model), pairs=4, eval_pairs=4, eval_tokens=4 * count * length
    )
    task = load_task(settings, models.load_tokenizer(model, "pretrained"), 0)
    ids = list(task.test_tokens[: count * length])
    if len(ids) < count * length:
        raise RuntimeError(f"{task.name} has {len(ids)} held-out tokens of {count * length}")
    return [ids[at : at + length] for at in range(0, count * length, length)]


def token_pairs(model: str, count: int, prompt: int, completion: int) -> list[TokenPair]:
    """Training pairs of the model's corpus; of the real model all sides have their full length."""
    settings = Settings(data=corpus_of(model), pairs=count, prompt_length=prompt, eval_pairs=4,
                        completion_length=completion, eval_tokens=256)  # fmt: skip
    task = load_task(settings, models.load_tokenizer(model, "pretrained"), 0)
    return list(task.train)


def corpus_of(model: str) -> str:
    return "tinywiki" if model == TINY else "wikipedia-sample"


def goals_of(found: dict[str, Any]) -> list[Goal]:
    """What the issue asks, of our sides as they are best: compiled."""
    head, own, a, b = (
        of_runs(found[name], "update_s")
        for name in (COMPILED_HEAD, COMPILED_ADAPTER, AS_RUN, EQUAL)
    )
    peak = {name: side["peak_growth_bytes"] for name, side in found.items()}
    head_peak, own_peak = peak[COMPILED_HEAD], peak[COMPILED_ADAPTER]
    rollouts, learnt = (
        of_runs(found[COMPILED_HEAD], part) / of_floor(found[COMPILED_HEAD], part)
        for part in ("rollout_s", "learn_s")
    )
    return [
        Goal("times faster than (a), value=head", a / head, 2.8),
        Goal("times faster than (b), value=head", b / head, 2.0),
        Goal("times faster than (b), value=adapter", b / own, 1.2),
        Goal("of (a)'s peak memory, value=head", head_peak / peak[AS_RUN], 0.4, at_most=True),
        Goal("of (b)'s peak memory, value=head", head_peak / peak[EQUAL], 0.6, at_most=True),
        Goal("of (b)'s peak memory, value=adapter", own_peak / peak[EQUAL], 0.6, at_most=True),
        Goal("of DPO's peak memory, value=head", head_peak / peak[DPO], 1.25, at_most=True),
        Goal("times the rollout's floor", rollouts, 2.5, at_most=True),
        Goal("times the update's FLOP floor", learnt, 1.35, at_most=True),
    ]  # fmt: skip


def text_of(work: PPOWork, found: dict[str, Any], goals: list[Goal]) -> str:
    rows = []
    for name in (COMPILED_HEAD, HEAD, COMPILED_ADAPTER, ADAPTER, AS_RUN, EQUAL):
        side = found[name]
        parts = [of_runs(side, k) for k in ("update_s", "rollout_s", "score_s", "learn_s")]
        slowest = max(second for run in side["runs"] for second in run["update_s"][1:])
        rows.append([
            name, *(f"{part:.2f}" for part in parts), f"{slowest:.2f}",
            f"{side['peak_growth_bytes'] / MIB:,.0f}", f"{side['runs'][0]['trainable_params']:,}",
            f"{side['other_cpu_ratio']:.0%}",
            f"{side['machine']['matmul_flops_per_s'] / 1e9:.0f}",
            f"{side['machine']['read_bytes_per_s'] / 1e9:.0f}",
        ])  # fmt: skip
    floor = {k: of_floor(found[COMPILED_HEAD], k) for k in found[COMPILED_HEAD]["runs"][0]["floor"]}
    rows.append(["floor, value=head", "", *(f"{floor[k]:.2f}" for k in
                ("rollout_s", "score_s", "learn_s")), *[""] * 6])  # fmt: skip
    rows.append([DPO, "", "", "", "", "", f"{found[DPO]['peak_growth_bytes'] / MIB:,.0f}",
                 f"{found[DPO]['trainable_params']:,}", *[""] * 3])  # fmt: skip
    header = ["", "update s", "rollout", "score", "learn", "slowest", "peak MiB", "trainable",
              "others' CPU", "GFLOP/s", "GB/s"]  # fmt: skip
    lines = [
        f"PPO on {work.model}: {work.batch_size} prompts x ({len(work.prompts[0])} +"
        f" {work.response_length}) tokens, LoRA r={work.rank} on q and v, {work.epochs} epochs,"
        f" micro-batch {work.micro_batch_size}, float32, {work.threads} threads; median over"
        f" {TURNS} turns of {work.updates - 1} updates after the first",
        "",
        table(header, rows),
        "",
        *(compile_line(name, found[name]["runs"]) for name in (COMPILED_HEAD, COMPILED_ADAPTER)),
        f"measured: {floor['read_bytes_per_s'] / 1e9:.1f} GB/s read,"
        f" {floor['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; a token step reads"
        f" {floor['read_bytes_per_step'] / 1e6:.0f} MB: floor {1e3 * floor['token_step_s']:.1f} ms",
        *(goal.line() for goal in goals),
    ]
    return "\n".join(lines)


def compile_line(name: str, runs: list[dict[str, Any]]) -> str:
    """What compiling took before each turn's first update: no part of any other number."""
    took = (f"{run['compile_s']:.1f} s ({run['compilation']['cache']} cache)" for run in runs)
    layers = ", ".join(f"{n} {count}" for n, count in runs[0]["compilation"]["layers"].items())
    breaks = runs[0]["compilation"]["graph_breaks"]
    return (
        f"{name}: layers ({layers}) in {', '.join(took)} before the first update;"
        f" {breaks} graph breaks"
    )


def curve(trl_python: Path, sizes: str) -> tuple[dict[str, Any], str]:
    """The toy reward (share of one token) on a tiny model, both sides of value=adapter."""
    work = curve_work(sizes)
    found = {
        ADAPTER: run_side(OWN, "own_ppo.py", asdict(work)),
        EQUAL: run_side(trl_python, "trl_ppo.py", asdict(work)),
    }
    lines = [
        f"The toy reward on {work.model}: share of token {work.counted_token} in"
        f" {work.response_length} sampled, {work.batch_size} episodes an update,"
        f" {len(work.seeds)} seeds; mean of five updates, +- a standard error over seeds",
        "",
        curve_table(work, found),
        "",
        agreement(work, found),
    ]
    numbers = {
        "work": described(work),
        "sides": found,
    }
    return numbers, "\n".join(lines)


def curve_work(sizes: str) -> PPOWork:
    updates, seeds = (30, [0, 1, 2]) if sizes == "full" else (10, [0, 1])
    prompts = token_prompts(TINY, updates * 16, 16)
    return PPOWork(
        model=TINY, folder=folder_of(TINY), prompts=prompts,
        batch_size=16, micro_batch_size=16, response_length=16, updates=updates, epochs=4,
        threads=2, rank=8, alpha=16, learning_rate=5e-3, kl_coef=0.01, value="adapter",
        counted_token=statistics.mode(token for row in prompts for token in row), seeds=seeds,
    )  # fmt: skip


def blocks(run: dict[str, Any]) -> list[float]:
    """Mean reward of each five updates."""
    rewards = run["reward_mean"]
    return [statistics.fmean(rewards[at : at + 5]) for at in range(0, len(rewards), 5)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def curve_table(work: PPOWork, found: dict[str, Any]) -> str:
    rows = []
    for name, side in found.items():
        columns = zip(*(blocks(run) for run in side["runs"]), strict=True)
        cells = ["{:.2f} +- {:.2f}".format(*mean_and_error(list(column))) for column in columns]
        rows.append([name, *cells])
    ends = [str(min(at + 5, work.updates)) for at in range(0, work.updates, 5)]
    return table(["updates to", *ends], rows)


def agreement(work: PPOWork, found: dict[str, Any]) -> str:
    """The two curves' means over all updates, and their difference in standard errors."""
    own, peer = (
        mean_and_error([statistics.fmean(run["reward_mean"]) for run in found[name]["runs"]])
        for name in (ADAPTER, EQUAL)
    )
    error = math.hypot(own[1], peer[1])
    return (
        f"mean over all updates: {own[0]:.3f} +- {own[1]:.3f} and {peer[0]:.3f} +- {peer[1]:.3f},"
        f" a difference of {abs(own[0] - peer[0]) / error:.1f} standard errors"
    )
