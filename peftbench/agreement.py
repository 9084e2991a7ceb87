"""Whether two models answer alike: merged and unmerged differ by rounding, or they do not agree."""

from __future__ import annotations

from typing import Any

import torch

PROBE_TOKENS = 32
# Largest |logit| difference of merged and unmerged, in shares of the largest logit.
AGREEMENT_RATIO = {"float32": 1e-4, "bfloat16": 5e-2}


def probe_logits(model: Any) -> torch.Tensor:
    """(1, PROBE_TOKENS, V) float32 logits on a fixed text."""
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=device) * 7919 % vocabulary)[None, :]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def largest_difference(first: Any, second: Any) -> float:
    """Largest |logit difference| on a fixed text, in shares of the first's largest |logit|."""
    return logit_difference(probe_logits(first), probe_logits(second))


def logit_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest |difference| in shares of the first's largest |logit|."""
    return float((first - second).abs().max() / first.abs().max())
