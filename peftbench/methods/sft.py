"""Supervised fine-tuning: the negative log-likelihood of the chosen completions."""

from __future__ import annotations

from typing import Any

import torch

from peftbench.batches import Batch, completion_logprobs


def sft_loss(logprobs: torch.Tensor, mask: torch.Tensor, window_tokens: float) -> torch.Tensor:
    """Summed NLL over the completion tokens, divided by those of the accumulation window, in nats.

    `logprobs` and `mask` are (B, C); `window_tokens` counts the completion tokens of all
    micro-batches of the optimiser step, so that accumulated and whole batches give one gradient.
    """
    return -(logprobs * mask).sum() / window_tokens


def loss(model: Any, batch: Batch, window_tokens: float) -> torch.Tensor:
    """This micro-batch's share of the step's loss; the batch holds the chosen side only."""
    return sft_loss(completion_logprobs(model, batch), batch.completion_mask, window_tokens)
