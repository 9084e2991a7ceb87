"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290)."""

from __future__ import annotations

from typing import Any

import torch

from peftbench.batches import PairBatch


def dpo_loss(
    policy_logratios: torch.Tensor, reference_logratios: torch.Tensor, beta: float
) -> torch.Tensor:
    """Mean DPO loss over the batch, in nats.

    Both arguments have shape (B,): log p(chosen) - log p(rejected), summed over completion tokens.
    Raises: ValueError if the shapes differ.
    Source: equation 7.
    """
    if policy_logratios.shape != reference_logratios.shape:
        raise ValueError(
            f"policy_logratios has shape {tuple(policy_logratios.shape)},"
            f" reference_logratios {tuple(reference_logratios.shape)}; they must be equal"
        )
    return -torch.nn.functional.logsigmoid(beta * (policy_logratios - reference_logratios)).mean()


def logratios(model: Any, batch: PairBatch) -> torch.Tensor:
    """(B,) log p(chosen) - log p(rejected)."""
    chosen, rejected = batch.pair_logprobs(model).completions.sum(-1).chunk(2)
    return chosen - rejected


def loss(
    model: Any, batch: PairBatch, reference_logratios: torch.Tensor, beta: float, micro_batches: int
) -> torch.Tensor:
    """This micro-batch's share of the step's loss; micro-batches are of equal size."""
    return dpo_loss(logratios(model, batch), reference_logratios, beta) / micro_batches
