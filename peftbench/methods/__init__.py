"""The methods: one file each, one row each. Imports no torch: the files are imported when used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MethodRow:
    """What the matrix must know of a method before anything heavy is loaded."""

    name: str  # in full, as its paper calls it
    sides: Literal["chosen", "both"]  # which completions of a pair a training batch holds
    needs_reference: bool  # log-probabilities of the starting model on the training pairs
    target: str  # the metric that the method itself optimises, the first to look at


METHODS: dict[str, MethodRow] = {
    "sft": MethodRow("supervised fine-tuning", "chosen", False, "nll_per_token"),
    "dpo": MethodRow("Direct Preference Optimization", "both", True, "preference_accuracy"),
    "orpo": MethodRow("Odds Ratio Preference Optimization", "both", False, "preference_accuracy"),
    "ppo": MethodRow("Proximal Policy Optimization", "both", False, "true_reward"),
    "sft+dpo": MethodRow(
        "DPO that starts at, and refers to, an SFT model", "both", True, "preference_accuracy"
    ),
    "sft+ppo": MethodRow(
        "PPO that starts at, and refers to, an SFT model", "both", False, "true_reward"
    ),
}


INFER = "infer"
"""In the place of a method: the case trains nothing and measures what the adapter costs in use."""


def stages(method: str) -> tuple[str, ...]:
    """What is trained after one another: `sft+dpo` is sft, then dpo."""
    return tuple(method.split("+"))


def uses_ppo(method: str) -> bool:
    return stages(method)[-1] == "ppo"


def samples_completions(method: str, data: str) -> bool:
    """Whether held-out prompts are completed: where truth is known, or PPO's reward judges them."""
    return data == "tinywiki" or uses_ppo(method)
