"""The METRICS table: what every number of a record is. The README's glossary is made from it.

Classes decide how two runs are compared: exact (equality), tight (a small fixed margin), noisy
(against the run-to-run spread), seeded (paired by seed), derived (follows from others, not compared
again), info (never compared). A metric whose meaning changes gets a new version number, and records
of different versions are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peftbench.methods import INFER

MetricClass = Literal["exact", "tight", "noisy", "seeded", "derived", "info"]
Direction = Literal["lower", "higher", "none"]
Kind = Literal["train", "infer"]


@dataclass(frozen=True)
class Metric:
    """One row; `margin_ratio` is the relative change below which a difference does not matter."""

    unit: str
    direction: Direction
    metric_class: MetricClass
    margin_ratio: float
    definition: str  # one sentence
    version: int = 1
    kinds: tuple[Kind, ...] = ("train",)  # of the cases that measure it


_BOTH: tuple[Kind, ...] = ("train", "infer")
_EVAL = "on the held-out text, each token scored once, the first of the text not"

VARIANTS = ("base", "unmerged", "merged")
"""What an inference case measures beside each other."""

_OF = {
    "base": "of the base without an adapter",
    "unmerged": "of the base with the adapter beside its weights",
    "merged": "of the base with the adapter folded into its weights",
}


def _of_variants(
    ending: str,
    unit: str,
    direction: Direction,
    metric_class: MetricClass,
    margin: float,
    definition: str,
) -> dict[str, Metric]:
    """One metric for each variant of an inference case; `{of}` in the definition names it."""
    return {
        f"{v}_{ending}": Metric(
            unit, direction, metric_class, margin, definition.format(of=_OF[v]), kinds=("infer",)
        )
        for v in VARIANTS
    }


def _ratios(part: str, words: str) -> dict[str, Metric]:
    """Time over the base's, paired turn by turn, with the ends of its interval."""
    found = {}
    for v in VARIANTS[1:]:
        name, of = f"{v}_{part}_ratio", _OF[v].removeprefix("of ")
        text = f"Median over the turns of the ratio of the {words}, {of}, to the base's in the same turn."
        found[name] = Metric("ratio", "lower", "derived", 0.02, text, kinds=("infer",))
        for end, word in (("low", "Lower"), ("high", "Upper")):
            text = f"{word} end of the 95 % interval of {name}, by order statistics of the turns."
            found[f"{name}_{end}"] = Metric("ratio", "none", "info", 0.0, text, kinds=("infer",))
    return found


def _of_memory(source: str, words: str, margin: float = 0.02) -> dict[str, Metric]:
    """A peak for each variant, the others not being in memory."""
    return {
        f"{source}_{v}_bytes": Metric(
            "bytes", "lower", "tight", margin,
            f"{words} while one batch is answered, with nothing else loaded: {_OF[v]}.",
            kinds=("infer",),
        )
        for v in VARIANTS
    }  # fmt: skip


METRICS: dict[str, Metric] = {
    # time
    "train_s": Metric("s", "lower", "noisy", 0.03, "Wall time of the optimiser steps after the warm-up, device synchronised at both ends; loading, evaluation, saving and tokenising excluded."),
    "method_s": Metric("s", "lower", "noisy", 0.03, "Wall time of everything the method needs before the user has the adapter: an SFT stage, the reward model, reference log-probabilities, compiling, warm-up steps and training."),
    "first_step_s": Metric("s", "lower", "noisy", 0.05, "Wall time of the very first optimiser step, where kernels are chosen and memory is taken."),
    "step_p50_s": Metric("s", "lower", "noisy", 0.03, "Median wall time of an optimiser step after the warm-up."),
    "step_p95_s": Metric("s", "lower", "noisy", 0.05, "95th percentile of the wall time of an optimiser step after the warm-up."),
    "step_max_s": Metric("s", "lower", "info", 0.0, "Longest wall time of an optimiser step after the warm-up."),
    "import_s": Metric("s", "lower", "info", 0.0, "Wall time to import what the case needs and the fork server has not loaded yet.", kinds=_BOTH),
    "load_s": Metric("s", "lower", "noisy", 0.05, "Wall time to bring the weights onto the device, quantised where the adapter asks for it.", kinds=_BOTH),
    "attach_s": Metric("s", "lower", "noisy", 0.05, "Wall time to attach the adapter.", kinds=_BOTH),
    "data_s": Metric("s", "lower", "noisy", 0.05, "Wall time to make and tokenise the training and held-out data."),
    "check_s": Metric("s", "none", "info", 0.0, "Wall time to compare the adapted model with its base before any step."),
    "prepare_s": Metric("s", "lower", "info", 0.0, "Wall time to pad the batches and to build the engine, before the reference pass or the first step."),
    "reference_s": Metric("s", "lower", "noisy", 0.03, "Wall time of the reference's log-probabilities on the training pairs; null where the method has no reference."),
    "sft_s": Metric("s", "lower", "noisy", 0.03, "Wall time of the SFT stage of `sft+dpo` and `sft+ppo`."),
    "reward_model_s": Metric("s", "lower", "noisy", 0.03, "Wall time to train PPO's reward model on the same pairs."),
    "compile_s": Metric("s", "lower", "info", 0.0, "Wall time to compile the decoder layers and to run them once (`--compile layers`), all before the warm-up; the record's `compilation` says what was compiled and whether its code came from the cache."),
    "warmup_s": Metric("s", "lower", "noisy", 0.05, "Wall time of the first `warmup_steps` optimiser steps (PPO: of the updates that hold them) and of building the optimiser."),
    "rollout_s": Metric("s", "lower", "noisy", 0.03, "PPO: wall time of sampling completions, within the training window."),
    "score_s": Metric("s", "lower", "noisy", 0.03, "PPO: wall time of old log-probabilities and values, reference and reward, within the training window."),
    "update_s": Metric("s", "lower", "noisy", 0.03, "PPO: wall time of the optimiser steps, within the training window."),
    "collect_s": Metric("s", "none", "info", 0.0, "Wall time to read what the training left: losses, sizes of gradients and optimiser state, whether all weights are finite."),
    "evaluate_s": Metric("s", "lower", "noisy", 0.05, "Wall time of the evaluation after training; the base is scored once per session, outside the cases."),
    "tasks_s": Metric("s", "lower", "info", 0.0, "Wall time of the tasks of `--tasks`, the trained model's; the base's are outside the cases."),
    "compare_s": Metric("s", "none", "info", 0.0, "Wall time to compare the trained model with its base (KL, moved entries); `full` loads the base anew for it."),
    "count_s": Metric("s", "none", "info", 0.0, "Wall time to count the operations of one micro-batch, after everything else is measured."),
    "save_s": Metric("s", "lower", "noisy", 0.05, "Wall time to write the adapter to disk."),
    "merge_s": Metric("s", "none", "info", 0.0, "Wall time of the merged inference check: fold the adapter into a copy of the base and compare; null where the adapter does not merge."),
    "between_phases_s": Metric("s", "none", "info", 0.0, "Wall time between the phases, in which garbage is collected and peaks are reset.", kinds=_BOTH),
    "total_s": Metric("s", "lower", "noisy", 0.05, "Sum of all phases of the round; the wait between warm-up and the go is no phase.", kinds=_BOTH),
    "tokens_per_s": Metric("tokens/s", "higher", "derived", 0.03, "Non-padding tokens that the policy read in the training window, divided by the time of the same window. Of DPO and ORPO a prompt counts with each of its two sides, also where the policy reads it once for both."),
    "padded_tokens_per_s": Metric("tokens/s", "higher", "derived", 0.03, "Tokens that the policy computed, per second of the same window: padding counts, and a prompt that two sides share counts once."),
    "samples_per_s": Metric("pairs/s", "higher", "derived", 0.03, "Pairs of the training window divided by its time."),
    "train_flops": Metric("FLOP", "none", "tight", 0.001, "Operations of matrix products and attention, forward and backward, in the training window: counted on the first micro-batch (of PPO with its rollout and scoring), scaled by the tokens computed, padding included.", version=2),
    "flops_per_s": Metric("FLOP/s", "higher", "derived", 0.03, "train_flops / train_s."),
    "mfu_ratio": Metric("ratio", "higher", "derived", 0.03, "flops_per_s over the device's rate in one large matrix product of the compute dtype, timed at the session's start."),
    "other_cpu_ratio": Metric("ratio", "none", "info", 0.0, "CPU time that other processes took during the training window (of an inference case the measuring window), over its time on all cores.", kinds=_BOTH),
    "energy_j": Metric("J", "lower", "noisy", 0.05, "Energy of the training window: of the GPU (its counter, else integrated power), on a CPU run of the processor packages."),
    "energy_per_token_j": Metric("J", "lower", "derived", 0.05, "energy_j over the non-padding tokens of the training window."),
    # memory
    "peak_gpu_memory_bytes": Metric("bytes", "lower", "tight", 0.02, "Highest GPU memory that NVML reports while training (SFT stage, reward model, reference, compile, warm-up and training phases): the process's own, else the device's growth."),
    "nvml_process_peak_bytes": Metric("bytes", "lower", "tight", 0.02, "Highest memory NVML reports for the training process, over the same phases."),
    "nvml_device_peak_bytes": Metric("bytes", "lower", "tight", 0.02, "Highest memory in use on the device minus the reading before the process started, over the same phases."),
    "torch_peak_allocated_bytes": Metric("bytes", "lower", "tight", 0.005, "Highest bytes in tensors by torch's CUDA allocator, over the same phases."),
    "torch_peak_reserved_bytes": Metric("bytes", "lower", "tight", 0.005, "Highest bytes reserved by torch's CUDA allocator, over the same phases."),
    "host_peak_rss_bytes": Metric("bytes", "lower", "tight", 0.02, "The kernel's high-water mark of the process's resident memory, over the same phases."),
    "host_peak_rss_delta_bytes": Metric("bytes", "lower", "tight", 0.02, "The same minus the resident memory after the imports: the headline on a CPU."),
    "param_bytes": Metric("bytes", "lower", "exact", 0.0, "Bytes of all parameters as held in memory after training, the adapter's included; accounted, not sampled."),
    "grad_bytes": Metric("bytes", "lower", "exact", 0.0, "Bytes of all gradients after a backward pass; accounted."),
    "optimizer_state_bytes": Metric("bytes", "lower", "exact", 0.0, "Bytes of the optimiser's state after the last step; accounted."),
    # parameters and storage
    "total_params": Metric("parameters", "none", "exact", 0.0, "Parameters of the model with its adapter; a 4-bit weight counts its entries, not its bytes.", kinds=_BOTH),
    "trainable_params": Metric("parameters", "lower", "exact", 0.0, "Parameters that require a gradient; checked again after training and evaluation.", kinds=_BOTH),
    "trainable_ratio": Metric("ratio", "none", "derived", 0.0, "trainable_params / total_params.", kinds=_BOTH),
    "adapter_bytes": Metric("bytes", "lower", "exact", 0.0, "Size of the saved adapter's weight files; for `full`, of the model's."),
    "base_bytes": Metric("bytes", "lower", "exact", 0.0, "Bytes of the base model's weights as held in memory, quantisation state included.", kinds=_BOTH),
    "reference_bytes": Metric("bytes", "lower", "exact", 0.0, "PPO: bytes of weights that the reference holds beside the policy's base: none, an SFT adapter's copy, or for `full` a whole frozen model."),
    "reward_model_bytes": Metric("bytes", "lower", "exact", 0.0, "PPO: bytes of the reward model's adapter and head; its base is the policy's (for `full` the reference's)."),
    "quantized_modules": Metric("modules", "none", "exact", 0.0, "Linear layers whose weight is held in 4 or 8 bits.", kinds=_BOTH),
    "moved_ratio": Metric("ratio", "none", "info", 0.0, "Share of trained entries that differ from before training; for `full` without the embedding rows the data never touched."),
    "start_max_logit_difference": Metric("logits", "lower", "info", 0.0, "Largest absolute difference between adapted and base logits on a batch before training: 0 for an adapter that starts as the identity."),
    "merge_max_logit_difference": Metric("logits", "lower", "info", 0.0, "Largest absolute difference between the merged and the adapted model's logits on a held-out batch after training: what the base's dtype rounds away; over 4 bits the base is dequantised first."),
    # budget
    "pairs": Metric("pairs", "none", "exact", 0.0, "Preference pairs seen in training, warm-up included."),
    "episodes": Metric("completions", "none", "exact", 0.0, "PPO: completions sampled and trained on, warm-up included."),
    "steps": Metric("steps", "none", "exact", 0.0, "Optimiser steps, warm-up included."),
    "train_tokens": Metric("tokens", "none", "exact", 0.0, "Non-padding tokens the policy read in all steps, warm-up included."),
    "learning_rate": Metric("1", "none", "exact", 0.0, "Peak learning rate of the schedule."),
    "truncated_prompts": Metric("pairs", "none", "exact", 0.0, "Pairs whose prompt was cut on its left to fit."),
    "truncated_completions": Metric("pairs", "none", "exact", 0.0, "Pairs of which a completion was cut on its right to fit."),
    # quality
    "perplexity": Metric("1", "lower", "seeded", 0.005, f"exp(nll_per_token) {_EVAL}; the window and stride are `eval_context` and `eval_stride`."),
    "perplexity_se": Metric("1", "none", "info", 0.0, "Standard error of perplexity over windows (delta method)."),
    "perplexity_base": Metric("1", "none", "info", 0.0, "Perplexity of the base model the adapter sits on (4-bit for QLoRA)."),
    "perplexity_unquantized_base": Metric("1", "none", "info", 0.0, "Perplexity of the base before it was quantised: the gap to perplexity_base is what quantising costs."),
    "perplexity_floor": Metric("1", "none", "info", 0.0, "Perplexity of the generator that wrote the held-out text: no model can be better on average; null for text of unknown entropy."),
    "nll_per_token": Metric("nats", "lower", "seeded", 0.005, f"Mean negative log-likelihood a token {_EVAL}."),
    "nll_per_token_se": Metric("nats", "none", "info", 0.0, "Standard error of nll_per_token, windows as the units."),
    "nll_per_token_base": Metric("nats", "none", "info", 0.0, "nll_per_token of the base model the adapter sits on."),
    "generalization_gap_nats_per_token": Metric("nats", "lower", "info", 0.0, "Over-fitting: mean negative log-likelihood a token of chosen completions, held out minus trained on; of equally many pairs, after training, prompts not scored."),
    "generalization_gap_nats_per_token_se": Metric("nats", "none", "info", 0.0, "Standard error of generalization_gap_nats_per_token, pairs as the units."),
    "bits_per_byte": Metric("bits", "lower", "seeded", 0.005, "Negative log2-likelihood per UTF-8 byte of the held-out text: comparable between tokenizers."),
    "bits_per_byte_base": Metric("bits", "none", "info", 0.0, "bits_per_byte of the base model."),
    "next_token_accuracy": Metric("ratio", "higher", "seeded", 0.01, "Share of the scored tokens that were the model's most likely one."),
    "next_token_accuracy_base": Metric("ratio", "none", "info", 0.0, "next_token_accuracy of the base model."),
    "preference_accuracy": Metric("ratio", "higher", "seeded", 0.01, "Share of held-out pairs whose chosen completion has the higher mean log-probability a token."),
    "preference_accuracy_se": Metric("ratio", "none", "info", 0.0, "Binomial standard error of preference_accuracy."),
    "preference_accuracy_base": Metric("ratio", "none", "info", 0.0, "preference_accuracy of the base model the adapter sits on."),
    "preference_accuracy_unquantized_base": Metric("ratio", "none", "info", 0.0, "preference_accuracy of the base before it was quantised."),
    "reward_margin": Metric("nats", "higher", "seeded", 0.01, "Mean over held-out pairs of beta x (policy minus base log-ratio of chosen to rejected), log-probabilities summed over the completion."),
    "kl_to_base_nats_per_token": Metric("nats", "none", "info", 0.0, "KL divergence from the base on the policy's own samples, k3 estimator, mean over sampled tokens."),
    "true_reward": Metric("1", "higher", "seeded", 0.01, "Share of a sampled completion's sentences that are facts of its ship, mean over held-out prompts; null for text whose truth is not known."),
    "true_reward_se": Metric("1", "none", "info", 0.0, "Standard error of true_reward over prompts."),
    "true_reward_base": Metric("1", "none", "info", 0.0, "true_reward of the base model the adapter sits on, on the same prompts."),
    "true_reward_std_base": Metric("1", "none", "info", 0.0, "Standard deviation of the base model's true reward between completions: the unit of what a method gains."),
    "win_ratio": Metric("ratio", "higher", "seeded", 0.01, "Share of held-out prompts on which the completion is truer than the base's, a tie counting half: a judge that no training saw."),
    "reward_model_accuracy": Metric("ratio", "higher", "seeded", 0.01, "PPO: share of held-out pairs whose chosen completion the reward model scores higher."),
    "reward_model_score": Metric("1", "none", "info", 0.0, "PPO: mean score of the tuned model's held-out completions by the reward model that it was trained on (unit: standard deviations of the reference's)."),
    "reward_model_score_base": Metric("1", "none", "info", 0.0, "PPO: the same score of the base model's completions."),
    "reward_mean": Metric("1", "none", "info", 0.0, "PPO: mean score of the sampled completions, before what a missing EOS changes; mean of the last tenth of the updates, as all that follow."),
    "reward_std": Metric("1", "none", "info", 0.0, "PPO: standard deviation of the score between the completions of an update."),
    "kl_k1": Metric("nats", "none", "info", 0.0, "PPO: KL to the reference a token on the policy's samples, k1 estimator: the one in the reward."),
    "kl_k3": Metric("nats", "none", "info", 0.0, "PPO: the same by the k3 estimator, which is never negative."),
    "entropy": Metric("nats", "none", "info", 0.0, "PPO: entropy of the policy's next-token distribution, mean over sampled tokens."),
    "response_tokens": Metric("tokens", "none", "info", 0.0, "PPO: mean length of a sampled completion, its EOS included."),
    "eos_ratio": Metric("ratio", "none", "info", 0.0, "PPO: share of sampled completions that ended with EOS."),
    "clip_ratio": Metric("ratio", "none", "info", 0.0, "PPO: share of tokens whose probability ratio is outside the clip range, mean over optimiser steps."),
    "value_loss": Metric("1", "none", "info", 0.0, "PPO: clipped value loss, mean over optimiser steps."),
    "explained_variance": Metric("1", "none", "info", 0.0, "PPO: share of the returns' variance that the values explain, before the update's first step."),
    "first_loss": Metric("nats", "none", "info", 0.0, "The method's own loss at the first optimiser step."),
    "final_loss": Metric("nats", "lower", "info", 0.0, "The method's own loss, mean of the last tenth of the steps (at least one)."),
    "eval_tokens_scored": Metric("tokens", "none", "exact", 0.0, "Held-out tokens scored."),
    "eval_pairs_scored": Metric("pairs", "none", "exact", 0.0, "Held-out pairs scored."),
    # inference
    "measure_s": Metric("s", "none", "info", 0.0, "Wall time of the measuring window: all turns of the base, the adapted and the merged model, what is not timed of them included.", kinds=("infer",)),
    **_of_variants("prefill_s", "s", "lower", "noisy", 0.03, "Median wall time of reading the prompts and choosing the first new token: {of}."),
    **_of_variants("decode_s", "s", "lower", "noisy", 0.03, "Median over the turns of the mean wall time of one decode step, a new token a row, with the KV cache: {of}."),
    **_of_variants("prefill_tokens_per_s", "tokens/s", "higher", "derived", 0.03, "Prompt tokens of the batch over the prefill time: {of}."),
    **_of_variants("decode_tokens_per_s", "tokens/s", "higher", "derived", 0.03, "Rows of the batch over the time of a decode step: {of}."),
    **_ratios("prefill", "prefill time"),
    **_ratios("decode", "time of the decode steps"),
    **_of_variants("weight_bytes", "bytes", "lower", "exact", 0.0, "Bytes of all weights, an adapter's included; accounted, not sampled: {of}."),
    **_of_variants("cache_bytes", "bytes", "lower", "exact", 0.0, "Bytes of keys and values after the last decode step, a prefix's included; accounted: {of}."),
    **_of_memory("peak_gpu", "Highest GPU memory by NVML (the process's own, else the device's growth)"),
    **_of_memory("torch_peak", "Highest bytes in tensors by torch's CUDA allocator"),
    **_of_memory("host_peak", "Highest resident memory beyond that after the imports", margin=0.05),
    "effect_logit_ratio": Metric("ratio", "none", "info", 0.0, "Largest absolute difference of logits that the adapter, given a seeded effect, makes to the base, over the largest absolute logit: what the agreement of merged and unmerged would miss were it 0.", kinds=("infer",)),
    "merge_logit_ratio": Metric("ratio", "none", "info", 0.0, "The same of merged against unmerged with that effect; above the dtype's tolerance the round is invalid.", kinds=("infer",)),
    "zero_merge_logit_ratio": Metric("ratio", "none", "info", 0.0, "The same of the base against merged before the adapter has an effect, as every adapter that merges starts.", kinds=("infer",)),
}  # fmt: skip

TASK_METRICS: dict[str, Metric] = {
    "task_accuracy": Metric("ratio", "higher", "seeded", 0.01, "Of each task of `--tasks`: share of its items whose right answer has the highest log-likelihood; of a cloze, is the most likely at every token (lm-evaluation-harness's `acc`)."),
    "task_accuracy_se": Metric("ratio", "none", "info", 0.0, "Standard error of task_accuracy over the items, with n - 1 as the harness has it."),
    "task_accuracy_base": Metric("ratio", "none", "info", 0.0, "task_accuracy of the base model the adapter sits on, on the same items."),
    "task_accuracy_norm": Metric("ratio", "higher", "info", 0.0, "The same share by log-likelihood over the answer's length (`acc_norm`); null for a cloze."),
    "task_accuracy_norm_se": Metric("ratio", "none", "info", 0.0, "Standard error of task_accuracy_norm."),
    "task_accuracy_norm_base": Metric("ratio", "none", "info", 0.0, "task_accuracy_norm of the base model."),
    "task_items": Metric("items", "none", "info", 0.0, "Items of the task that were scored."),
}  # fmt: skip
"""What a record's `tasks` has of each task, by its name. A comparison names it with the task:
`task_accuracy:hellaswag`."""


def metric_of(name: str) -> Metric:
    """The row of a metric, also of a single task's. Raises: KeyError for a name that has none."""
    family, colon, task = name.partition(":")
    return TASK_METRICS[family] if colon and task else METRICS[name]


PHASES: tuple[str, ...] = (
    "import", "load", "attach", "data", "check", "prepare", "sft", "reward_model", "reference",
    "compile", "warmup", "train", "collect", "evaluate", "tasks", "compare", "save", "merge",
    "count",
)  # fmt: skip
"""The phases of a round, in order. `sft`, `reward_model`, `reference`, `compile`, `tasks` and `merge`
have no time where there is none of it."""

HEADLINE_PHASES: tuple[str, ...] = (
    "sft",
    "reward_model",
    "reference",
    "compile",
    "warmup",
    "train",
)
"""Peaks are the maximum over these: never load, evaluate or save (evaluation's full logits would win)."""


INFER_PHASES: tuple[str, ...] = (
    "import", "load", "base", "attach", "unmerged", "merge", "check", "warmup", "measure", "free",
    "merged",
)  # fmt: skip
"""Those of an inference case; in `base`, `unmerged` and `merged` memory is read, one model each."""

WINDOW: dict[Kind, str] = {"train": "train_s", "infer": "measure_s"}
"""What pytest-benchmark times of a case."""


def kind_of(case_id: str) -> Kind:
    """By the id's last part, which is the method: files of every age have it."""
    return "infer" if case_id.rpartition("-")[2] == INFER else "train"


def metrics_of(kind: Kind) -> Mapping[str, Metric]:
    """The rows of METRICS that such a case measures, in their order."""
    return _BY_KIND[kind]


def phase_names(kind: Kind) -> tuple[str, ...]:
    return INFER_PHASES if kind == "infer" else PHASES


_BY_KIND: dict[Kind, dict[str, Metric]] = {
    kind: {name: metric for name, metric in METRICS.items() if kind in metric.kinds}
    for kind in WINDOW
}


def glossary() -> str:
    """METRICS and TASK_METRICS as Markdown, for the README."""
    rows = ["| name | unit | better | compared | meaning |", "|---|---|---|---|---|"]
    better = {"lower": "lower", "higher": "higher", "none": "-"}
    rows += [
        f"| `{name}` | {m.unit} | {better[m.direction]} | {m.metric_class} | {m.definition} |"
        for name, m in (METRICS | TASK_METRICS).items()
    ]
    return "\n".join(rows)
