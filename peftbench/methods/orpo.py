"""Odds Ratio Preference Optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691)."""

from __future__ import annotations

from typing import Any

import torch

from peftbench.batches import PairBatch, masked_mean


def log1m_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation at either end (Maechler 2012)."""
    x = x.clamp(max=-1e-7)  # a certain token has log-probability 0, whose odds are infinite
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def odds_ratio_loss(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor) -> torch.Tensor:
    """-log sigmoid of the log odds ratio, (B,), from mean log-probabilities a token, each (B,).

    Source: equations 6 and 7; odds(y) = P(y) / (1 - P(y)) with P the mean-token probability.
    """
    log_odds = (chosen_mean - rejected_mean) - (log1m_exp(chosen_mean) - log1m_exp(rejected_mean))
    return -torch.nn.functional.logsigmoid(log_odds)


def orpo_loss(
    nll: torch.Tensor, chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, orpo_lambda: float
) -> torch.Tensor:
    """NLL of the chosen side (a scalar, nats a token) + lambda times the odds-ratio term."""
    return nll + orpo_lambda * odds_ratio_loss(chosen_mean, rejected_mean).mean()


def loss(
    model: Any,
    batch: PairBatch,
    orpo_lambda: float,
    nll_on: str,
    micro_batches: int,
    nll_weight: float = 1.0,
) -> torch.Tensor:
    """This micro-batch's share of the step's loss.

    With `nll_on="all"` the NLL covers the prompt as well, like the authors' code and TRL.
    `nll_weight` is what it counts beside those of other ranks, which have more tokens or fewer.
    """
    scored = batch.pair_logprobs(model, with_prompt=nll_on == "all")
    chosen_mask = batch.completion_mask.chunk(2)[0]
    logprob, tokens = scored.completions.chunk(2)[0].sum(), chosen_mask.sum()
    if scored.prompt is not None and scored.prompt_mask is not None:
        logprob, tokens = logprob + scored.prompt.sum(), tokens + scored.prompt_mask.sum()
    chosen, rejected = masked_mean(scored.completions, batch.completion_mask).chunk(2)
    return orpo_loss(-logprob / tokens * nll_weight, chosen, rejected, orpo_lambda) / micro_batches
