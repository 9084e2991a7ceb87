"""From what a round observed to the values of its record: arithmetic only, no model runs here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from peftbench import evaluation, ppo_values
from peftbench.adapters import ADAPTERS
from peftbench.batches import token_counts
from peftbench.case import Case, Settings
from peftbench.data.task import TokenPair, TokenTask
from peftbench.evaluation import GapScore, Quality
from peftbench.measuring.host import MOST_OTHER_CPU_RATIO
from peftbench.measuring.phases import PhaseReading, Phases
from peftbench.methods import METHODS, uses_ppo
from peftbench.metrics import HEADLINE_PHASES, PHASES
from peftbench.ranks import Ranks
from peftbench.record import add_max_and_sum
from peftbench.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TICKS_S = 0.05  # the kernel rounds each of its counts to a hundredth of a second


def loss_values(training: Training) -> dict[str, float]:
    tail = training.losses[-max(1, len(training.losses) // 10) :]
    return {"first_loss": training.losses[0], "final_loss": math.fsum(tail) / len(tail)}


def time_values(
    phases: Phases, training: Training, case: Case, task: TokenTask
) -> dict[str, float | int | None]:
    """Seconds by phase, step quantiles and rates; counts of what was trained on."""
    settings = case.settings
    seconds: dict[str, float | None] = {n: r.seconds for n, r in phases.readings.items()}
    steps, warmup_steps = len(training.step_s), settings.warmup_steps
    pairs = steps * settings.batch_size * settings.gradient_accumulation
    timed_pairs = pairs - warmup_steps * settings.batch_size * settings.gradient_accumulation
    if training.ppo is not None:  # an episode is read more than once
        pairs = len(training.ppo.rows_read)
        timed_pairs = pairs - training.ppo.warmup_updates * settings.ppo_batch_size
        warmup_steps = steps // len(training.ppo.history) * training.ppo.warmup_updates
    counts, timed = micro_batch_tokens(training, case, task)
    timed_steps = sorted(training.step_s[warmup_steps:])
    train_s = phases.readings["train"].seconds
    method_s = [seconds.get(n) for n in HEADLINE_PHASES]
    return {
        **{f"{name}_s": seconds.get(name) for name in PHASES},
        "between_phases_s": phases.between_s,
        "total_s": math.fsum(r.seconds for r in phases.readings.values()),
        "method_s": math.fsum(s for s in method_s if s is not None),
        "first_step_s": training.step_s[0],
        "step_p50_s": quantile(timed_steps, 0.5),
        "step_p95_s": quantile(timed_steps, 0.95),
        "step_max_s": timed_steps[-1],
        "tokens_per_s": sum(real for real, _ in timed) / train_s,
        # TRL pads in a way of its own
        "padded_tokens_per_s": (
            sum(padded for _, padded in timed) / train_s if settings.engine == "native" else None
        ),
        "samples_per_s": timed_pairs / train_s,
        "pairs": pairs,
        "steps": steps,
        "train_tokens": sum(real for real, _ in counts),
    }


def micro_batch_tokens(
    training: Training, case: Case, task: TokenTask
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(non-padding, computed) tokens of each micro-batch: of all steps, and of the timed ones.

    Of a pipeline its last stage's; of PPO those of its epochs, not of rollout and scoring.
    """
    if training.ppo is not None:
        updates = training.ppo.micro_batch_tokens
        timed = updates[training.ppo.warmup_updates :]
        return [c for update in updates for c in update], [c for update in timed for c in update]
    settings = case.settings
    pairs = len(training.step_s) * settings.batch_size * settings.gradient_accumulation
    counts = [
        shared_counts(task.train[at : at + settings.batch_size], training, case)
        for at in range(0, pairs, settings.batch_size)
    ]
    return counts, counts[settings.warmup_steps * settings.gradient_accumulation :]


def shared_counts(pairs: Sequence[TokenPair], training: Training, case: Case) -> tuple[int, int]:
    """(non-padding, computed) tokens of one micro-batch: each rank pads its own share."""
    sides, count = METHODS[case.method].sides, case.settings.processes
    shares = [Ranks(rank, count).share_of(pairs) for rank in range(count)]
    counts = [token_counts(share, sides, training.shared_prompts) for share in shares]
    return sum(real for real, _ in counts), sum(padded for _, padded in counts)


def step_tokens(training: Training, case: Case, task: TokenTask) -> list[int]:
    """Non-padding tokens that the policy read in each optimiser step of `micro_batch_tokens`."""
    counts, _ = micro_batch_tokens(training, case, task)
    window = len(counts) // len(training.step_s)
    return [sum(n for n, _ in counts[at : at + window]) for at in range(0, len(counts), window)]


def capacity_s(reading: PhaseReading) -> float:
    """CPU seconds that the machine's cores had in a phase."""
    return reading.seconds * (os.cpu_count() or 1)


def other_cpu_ratio(reading: PhaseReading) -> float | None:
    """Share of the machine's CPU time in a phase that went to other processes."""
    return None if reading.other_cpu_s is None else reading.other_cpu_s / capacity_s(reading)


def work_values(
    phases: Phases,
    training: Training,
    case: Case,
    task: TokenTask,
    flops_per_token: float | None,
    peak_flops_per_s: float | None,
) -> dict[str, float | int | None]:
    """Operations, utilisation and energy of the training window."""
    _, timed = micro_batch_tokens(training, case, task)
    train = phases.readings["train"]
    # a GPU's energy is the parent's to read: the processors' is then not the training's
    energy_j = train.package_energy_j if train.torch_peak_allocated_bytes is None else None
    rates: dict[str, float | int | None] = {}
    if flops_per_token is not None:
        flops = round(flops_per_token * sum(padded for _, padded in timed))
        rates = {"train_flops": flops, "flops_per_s": flops / train.seconds}
        if peak_flops_per_s is not None:
            # a CPU's rate is that of all its cores, which the ranks share
            devices = 1 if train.torch_peak_allocated_bytes is None else case.settings.processes
            rates["mfu_ratio"] = flops / train.seconds / (devices * peak_flops_per_s)
    return {
        **rates,
        "other_cpu_ratio": other_cpu_ratio(train),
        "energy_j": energy_j,
        "energy_per_token_j": (
            None if energy_j is None else energy_j / sum(real for real, _ in timed)
        ),
    }


def disturbances(
    phases: Phases, device: torch.device, compilation: dict[str, Any] | None = None
) -> list[str]:
    """Why this round's times are not the case's own: one sentence each, in most rounds none."""
    headline = [phases.readings[n] for n in HEADLINE_PHASES if n in phases.readings]
    found = taken_by_others(device, {
        "during training": [phases.readings["train"]],
        "in what `method_s` is made of": headline,
    })  # fmt: skip
    if compilation is not None and (times := compilation["recompilations_in_training"]):
        found.append(f"torch.compile compiled {times} times while the training clock ran")
    return found + stood_still(phases)


def stood_still(phases: Phases) -> list[str]:
    """A sentence where time passed between two phases in which this process did nothing."""
    if phases.stalled_s == 0:
        return []
    return [f"this machine stood still for {phases.stalled_s:.2f} s between two phases"]


def taken_by_others(device: torch.device, windows: dict[str, list[PhaseReading]]) -> list[str]:
    """A sentence on the first window, named in words, in which others took too much of the CPU."""
    if device.type != "cpu":
        return []
    for words, readings in windows.items():
        others_s = [r.other_cpu_s for r in readings]
        known_s = sum(s for s in others_s if s is not None)
        all_s = sum(capacity_s(r) for r in readings)
        if None not in others_s and known_s > MOST_OTHER_CPU_RATIO * all_s + _TICKS_S:
            return [
                f"other processes took {known_s / all_s:.0%} of this machine's CPU time {words}"
                f" (above {MOST_OTHER_CPU_RATIO:.0%} a round does not count)"
            ]
    return []


def quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between the closest ranks of an ascending list."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def memory_values(phases: Phases) -> dict[str, int | None]:
    """Peaks over the headline phases; None where a source does not exist."""
    readings = [phases.readings[n] for n in HEADLINE_PHASES if n in phases.readings]
    values: dict[str, int | None] = {}
    for name in ("host_peak_rss_bytes", "torch_peak_allocated_bytes", "torch_peak_reserved_bytes"):
        peaks = [getattr(r, name) for r in readings]
        values[name] = None if None in peaks else max(peaks)
    peak, start = values["host_peak_rss_bytes"], phases.start_rss_bytes
    values["host_peak_rss_delta_bytes"] = None if peak is None or start is None else peak - start
    return values


@dataclass(frozen=True)
class RankReading:
    """What one of a case's processes took, in the phases that its method is made of."""

    rank: int
    device_uuid: str | None  # of its GPU
    train_s: float
    host_peak_rss_bytes: int | None
    host_peak_rss_delta_bytes: int | None  # beyond what it had after its imports
    torch_peak_allocated_bytes: int | None
    torch_peak_reserved_bytes: int | None
    own_cpu_s: dict[str, float | None]  # by phase


def rank_reading(rank: int, phases: Phases, device_uuid: str | None) -> RankReading:
    """Of this process, right after its training."""
    headline = {n: r for n, r in phases.readings.items() if n in HEADLINE_PHASES}
    return RankReading(
        rank, device_uuid, headline["train"].seconds,
        own_cpu_s={name: reading.own_cpu_s for name, reading in headline.items()},
        **memory_values(phases),
    )  # fmt: skip


def without_ranks(phases: Phases, ranks: list[RankReading]) -> None:
    """Take what the case's other ranks used out of what others did, phase by phase."""
    for name, reading in phases.readings.items():
        taken = [rank.own_cpu_s.get(name) for rank in ranks[1:]]
        if reading.other_cpu_s is not None and taken:
            others_s = max(0.0, reading.other_cpu_s - math.fsum(s for s in taken if s is not None))
            phases.readings[name] = replace(reading, other_cpu_s=others_s)


RANK_QUANTITIES = (
    "host_peak_rss_bytes", "host_peak_rss_delta_bytes", "torch_peak_allocated_bytes",
    "torch_peak_reserved_bytes",
)  # fmt: skip


def rank_values(
    ranks: list[RankReading], scaling: tuple[list[float], list[float]] | None
) -> dict[str, Any] | None:
    """Memory of each rank, the largest and the sum; None of a case that one process trains.

    `scaling` is seconds of the timed steps: of all ranks, and of one alone for the first of them;
    None where the model is sharded. `scaling_efficiency_ratio` is what one takes alone over what
    all take, times their number: the median over the steps that both made. 1 is perfect.
    """
    if len(ranks) == 1:
        return None
    efficiency = None
    if scaling is not None:
        pairs = zip(*scaling, strict=False)
        efficiencies = sorted(alone / (len(ranks) * together) for together, alone in pairs)
        efficiency = quantile(efficiencies, 0.5)
    found: dict[str, Any] = {"each": [asdict(rank) for rank in ranks], "max": {}, "sum": {},
                             "scaling_efficiency_ratio": efficiency}  # fmt: skip
    for name in RANK_QUANTITIES:
        add_max_and_sum(found, name)
    return found


def quality_values(
    quality: Quality | None,
    base: Quality | None,
    unquantized: Quality | None,
    task: TokenTask,
    settings: Settings,
) -> dict[str, float | int | None]:
    """Quality after training with the base's beside it; empty when quality is not measured."""
    if quality is None:
        return {}
    values: dict[str, float | int | None] = {
        **evaluation.text_metrics(quality.text, task.test_bytes),
        **evaluation.pair_metrics(quality.pairs),
        "eval_tokens_scored": sum(quality.text.window_tokens),
        "eval_pairs_scored": len(quality.pairs.chosen),
    }
    if task.floor_nats is not None:
        values["perplexity_floor"] = math.exp(task.floor_nats / sum(quality.text.window_tokens))
    if base is not None:
        text = evaluation.text_metrics(base.text, task.test_bytes)
        for name in ("perplexity", "nll_per_token", "bits_per_byte", "next_token_accuracy"):
            values[f"{name}_base"] = text[name]
        pairs = evaluation.pair_metrics(base.pairs)
        values["preference_accuracy_base"] = pairs["preference_accuracy"]
        values["reward_margin"] = evaluation.reward_margin(quality.pairs, base.pairs, settings.beta)
    if unquantized is not None:
        text = evaluation.text_metrics(unquantized.text, task.test_bytes)
        pairs = evaluation.pair_metrics(unquantized.pairs)
        values["perplexity_unquantized_base"] = text["perplexity"]
        values["preference_accuracy_unquantized_base"] = pairs["preference_accuracy"]
    return values


def null_reasons(
    case: Case, device: torch.device, phases: Phases, peak_flops_per_s: float | None
) -> dict[str, str]:
    """Why each metric that has no value has none."""
    on_cpu = f"the run used {device.type}, no GPU"
    reasons = dict.fromkeys(
        ("peak_gpu_memory_bytes", "nvml_process_peak_bytes", "nvml_device_peak_bytes",
         "torch_peak_allocated_bytes", "torch_peak_reserved_bytes"),
        on_cpu if device.type == "cpu" else "not reported by the parent process",
    )  # fmt: skip
    reasons["reference_s"] = f"{case.method} has no reference"
    if uses_ppo(case.method):
        reasons["reference_s"] = "PPO asks its reference in each update: it is in score_s"
    reasons["compile_s"] = "nothing is compiled (--compile none)"
    reasons["sft_s"] = f"{case.method} has no SFT stage before it"
    reasons["tasks_s"] = "no tasks were asked for (--tasks)"
    reasons |= ppo_values.null_reasons(case)
    reasons["padded_tokens_per_s"] = "TRL's collators pad, and do not say how much"
    reasons["perplexity_floor"] = "the entropy of this text is not known"
    for name in ("host_peak_rss_bytes", "host_peak_rss_delta_bytes"):
        reasons[name] = phases.peak_unavailable or "no /proc on this system"
    row = ADAPTERS[case.adapter]
    if case.settings.sharding != "none":
        merge = "a sharded model is not merged"
    elif row.merges:
        merge = "the memory left after training did not hold a merged copy"
    else:
        merge = f"{case.adapter} does not merge: {row.about}"
    reasons["merge_s"] = reasons["merge_max_logit_difference"] = merge
    not_quantized = f"{case.adapter} does not quantise its base"
    for name in ("perplexity_unquantized_base", "preference_accuracy_unquantized_base"):
        reasons[name] = not_quantized
    if not case.settings.measures_quality:
        random = "weights" if case.settings.weights == "random" else "ids"
        for name in QUALITY:
            reasons[name] = f"random {random} (seed {case.settings.seed}): quality means nothing"
    for name in ("energy_j", "energy_per_token_j"):
        reasons[name] = (
            phases.energy.unavailable or "not read"
            if device.type == "cpu"
            else "not reported by the parent process"
        )
    for name in ("train_flops", "flops_per_s", "mfu_ratio"):
        reasons[name] = "the memory left after training did not hold one more step to count"
    if peak_flops_per_s is None:
        reasons["mfu_ratio"] = "the session's matrix product was not timed, or beside other work"
    reasons["other_cpu_ratio"] = "no /proc on this system"
    for name in ("perplexity_se", "nll_per_token_se"):
        reasons.setdefault(name, "one window only")
    for name in ("generalization_gap_nats_per_token", "generalization_gap_nats_per_token_se"):
        own = "ppo trains on completions of its own, none of the data's"
        reasons.setdefault(name, own if case.method == "ppo" else "one pair only")
    return reasons


QUALITY = (
    "perplexity", "perplexity_se", "perplexity_base", "perplexity_unquantized_base",
    "perplexity_floor", "nll_per_token", "nll_per_token_se", "nll_per_token_base", "bits_per_byte",
    "bits_per_byte_base", "next_token_accuracy", "next_token_accuracy_base", "preference_accuracy",
    "generalization_gap_nats_per_token", "generalization_gap_nats_per_token_se",
    "preference_accuracy_se", "preference_accuracy_base", "preference_accuracy_unquantized_base",
    "reward_margin", "kl_to_base_nats_per_token", "eval_tokens_scored", "eval_pairs_scored",
)  # fmt: skip


def item_outcomes(
    quality: Quality | None, base: Quality | None, gap: GapScore | None
) -> dict[str, Any]:
    """Outcomes of single items, so that two runs, or before and after, can be paired by item."""
    if quality is None or base is None:
        return {}
    gap_items: dict[str, Any] = {}
    if gap is not None:
        for kind, losses in (("trained", gap.trained), ("held_out", gap.held_out)):
            gap_items[f"{kind}_pair_nll_nats"] = [round(x, 4) for x in losses.nll]
            gap_items[f"{kind}_pair_tokens"] = losses.tokens
    return gap_items | {
        "preference_correct": "".join("01"[c] for c in quality.pairs.correct()),
        "preference_correct_base": "".join("01"[c] for c in base.pairs.correct()),
        "window_nll_nats": [round(x, 4) for x in quality.text.window_nll],
        "window_nll_base_nats": [round(x, 4) for x in base.text.window_nll],
        "window_tokens": quality.text.window_tokens,
    }


def task_values(quality: Quality | None, base: Quality | None) -> dict[str, dict[str, Any]]:
    """Each task of `--tasks` by name: its TASK_METRICS, which items came out right, and which of
    the base's. `digest` is that of the items.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, score in ({} if quality is None else quality.tasks).items():
        before = None if base is None else base.tasks.get(name)
        of_base = {} if before is None else evaluation.task_metrics(before)
        found[name] = {
            **evaluation.task_metrics(score),
            "task_accuracy_base": of_base.get("task_accuracy"),
            "task_accuracy_norm_base": of_base.get("task_accuracy_norm"),
            "version": score.version,
            "digest": score.digest,
            "correct": score.correct,
            "correct_norm": score.correct_norm,
            "correct_base": None if before is None else before.correct,
            "correct_norm_base": None if before is None else before.correct_norm,
        }
    return found


def samples_text(
    task: TokenTask,
    base: Quality | None,
    quality: Quality | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[dict[str, str]]:
    """Prompts with what the model wrote before and after, for people to look at."""
    if quality is None or base is None or tokenizer is None:
        return []
    return [
        {
            "prompt": tokenizer.decode(pair.prompt),
            "before": tokenizer.decode(before),
            "after": tokenizer.decode(after),
        }
        for pair, before, after in zip(task.test, base.samples, quality.samples, strict=False)
    ]
