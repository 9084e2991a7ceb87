"""Every field of Settings as an option: of `pytest bench` and of `peftbench train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from peftbench.case import CHOICES, Settings, parse_bytes

HELP = {
    "engine": "native: one loop for all methods; trl: the same cases through TRL's trainers",
    "data": "tinywiki, wikipedia-sample, wikitext-2, wikitext-103, a Hub data set, or a local path",
    "weights": "random: build the model from its config; quality is then not measured",
    "gpu_memory_limit_bytes": "for example 24GiB: train as if on such a card (emulated)",
    "host_memory_limit_bytes": "for example 8GiB: what a round may take beyond its imports",
    "pairs": "preference pairs that every method trains on",
    "time_budget_s": "stop training after so many seconds (0: the pairs are the budget)",
    "infer_turns": "turns of each model in an inference case; more narrow the interval",
    "infer_merge_4bit": "inference: merge qlora as well, over its base dequantised",
    "tasks": "comma-separated: local tasks, lm-evaluation-harness's, or YAML files of its format",
    "task_items": "the first so many items of each task (0: all)",
    "compile": "layers: torch.compile of every decoder layer; its time is compile_s",
    "learning_rate": "one value for all cases (0: the table's, by adapter and method)",
    "device": "auto: a GPU where there is one",
    "dtype": "of frozen weights and of the compute; what trains is always float32",
    "threads": "CPU threads of the training process (0: all cores)",
    "targets": "which linear layers LoRA and its relatives adapt",
    "rank": "r of LoRA and its relatives",
    "alpha": "LoRA's scale: its update counts alpha / rank times",
    "prefix_tokens": "virtual tokens of prefix and prompt tuning",
    "vera_rank": "r of VeRA, whose matrices are random and shared",
    "prompt_length": "longest prompt, tokens",
    "completion_length": "longest completion, tokens",
    "batch_size": "pairs of one forward pass",
    "gradient_accumulation": "forward passes of one optimiser step",
    "warmup_steps": "first steps of the budget, outside the training clock",
    "schedule": "of the learning rate: linear goes to zero over the budget",
    "optimizer": "of what trains",
    "weight_decay": "AdamW's",
    "max_grad_norm": "gradients are clipped to this norm",
    "gradient_checkpointing": "less memory, more time: activations are computed twice",
    "sharding": "full: spread the model over the --processes, for one larger than a GPU (FSDP)",
    "processes": "that train a case together, each on a GPU of its own, sharing every batch (DDP)",
    "pair_prompts": "how often DPO and ORPO read the prompt of a pair; once where the model can",
    "beta": "DPO's temperature",
    "orpo_lambda": "weight of ORPO's odds-ratio term",
    "orpo_nll_on": "what ORPO's likelihood term reads: prompt and chosen side, or the chosen alone",
    "ppo_batch_size": "prompts of one PPO update",
    "ppo_minibatch_size": "completions of one of its optimiser steps (0: as many as other methods)",
    "ppo_epochs": "passes over the completions of an update",
    "ppo_kl_coef": "weight of the KL to the reference in the reward",
    "ppo_clip_range": "of the probability ratio, and of the value",
    "ppo_value_coef": "weight of the value loss",
    "ppo_gamma": "discount of rewards, by token",
    "ppo_gae_lambda": "of generalised advantage estimation",
    "ppo_temperature": "of sampling, and of every log-probability",
    "value": "head: on the policy's trunk; adapter: LoRA and a head of its own",
    "reward": "model: trained on the pairs; true: tinywiki's; or module:function",
    "reward_learning_rate": "of the reward model (0: the table's)",
    "reward_start": "sft: its first epoch is SFT on the chosen sides",
    "reward_sft_learning_rate": "of that epoch (0: the table's)",
    "missing_eos": "of a completion without EOS: replace its score, add to it, or keep it",
    "missing_eos_score": "the score for that",
    "sft_learning_rate": "of the first stage of sft+dpo and sft+ppo (0: the table's)",
    "eval_tokens": "held-out tokens scored",
    "eval_context": "tokens of a window of them",
    "eval_stride": "tokens from one window's start to the next's",
    "eval_pairs": "held-out pairs scored",
    "eval_batch_size": "rows of a forward pass when scoring",
    "eval_samples": "prompts for generated samples",
    "eval_sample_length": "tokens of a sample",
    "eval_completions": "held-out prompts completed for the true reward and the judges",
    "infer_batch_size": "prompts answered together",
    "infer_prompt_tokens": "tokens of each",
    "infer_new_tokens": "tokens of each answer",
    "seed": "round r of a case runs with seed + r",
}
KINDS: dict[str, type] = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class SettingOption:
    """One option. `kind` turns its text into a value; None: it is a switch."""

    setting: str
    flag: str
    dest: str
    kind: Callable[[str], Any] | None
    help: str


def size(text: str) -> int:
    """Of a memory option; argparse shows the sentence of an ArgumentTypeError only."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(name: str, annotation: str) -> SettingOption:
    choices = f" ({' | '.join(CHOICES[name])})" if name in CHOICES else ""
    kind = size if name.endswith("_bytes") else KINDS.get(annotation)
    return SettingOption(
        name,
        "--" + name.removesuffix("_s").removesuffix("_bytes").replace("_", "-"),
        f"peftbench_{name}",
        kind,
        HELP[name] + choices,
    )


SETTING_OPTIONS = tuple(_option(f.name, str(f.type)) for f in fields(Settings))


TRAIN_OPTIONS = tuple(o for o in SETTING_OPTIONS if not o.setting.startswith("infer_"))


def add_setting_options(
    add: Callable[..., Any], options: tuple[SettingOption, ...] = SETTING_OPTIONS
) -> None:
    """Every option, None where it is not given; `add` is argparse's or pytest's own."""
    for option in options:
        if option.kind is None:
            add(option.flag, action="store_true", default=None, dest=option.dest, help=option.help)
        else:
            metavar = option.flag[2:].replace("-", "_").upper()
            add(
                option.flag, type=option.kind, default=None, dest=option.dest, metavar=metavar,
                help=option.help,
            )  # fmt: skip
