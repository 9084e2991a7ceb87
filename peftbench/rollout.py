"""Completions sampled from exactly the distribution that is scored.

A loop of its own instead of `generate`: nothing of a model's generation_config (top_k 50 and the
like), no logits processor but the temperature, explicit position ids, and the log-probabilities of
what was drawn. Letters as in batches.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftbench.batches import last_columns
from peftbench.data.task import TokenPair


@dataclass(frozen=True)
class Rollout:
    """Prompts with what was sampled after them. After a completion's EOS nothing counts."""

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]  # EOS included where one was drawn
    ended: torch.Tensor  # (B,) bool, whether EOS was drawn
    logprobs: torch.Tensor  # (B, C) float32 of the drawn tokens, at sampling; 0 at padding

    @property
    def pairs(self) -> list[TokenPair]:
        """As rows that `collate` takes, the completion on both sides."""
        return [TokenPair(p, c, c) for p, c in zip(self.prompts, self.completions, strict=True)]


def sample(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    length: int,
    temperature: float,
    eos_id: int,
    generator: torch.Generator,
) -> Rollout:
    """One completion a prompt, of at most `length` tokens, each drawn from softmax(logits / t).

    The caller has the model in eval mode without gradients. A GPU is waited for once, at the end.
    """
    device = next(model.parameters()).device
    ids, mask = pad_left(prompts, device)
    prefix = virtual_tokens(model)
    # the adapter's layers are inside the base; a prefix is in the cache after the first pass
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    present = torch.ones((len(prompts), prefix + ids.shape[1] + length), device=device).long()
    present[:, prefix : prefix + ids.shape[1]] = mask
    positions = mask.sum(-1, keepdim=True) + prefix
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - mask).clamp(min=0),
        logits_to_keep=last_columns(ids, 1), use_cache=True,
    )  # fmt: skip
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    # read without waiting: on a GPU it holds the answer of some step before
    all_finished = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")
    tokens, logprobs = [], []
    for t in range(length):
        row = torch.log_softmax(out.logits[:, -1].float() / temperature, -1)
        drawn = torch.multinomial(row.exp(), 1, generator=generator)
        tokens.append(drawn.masked_fill(finished.unsqueeze(-1), -1))
        logprobs.append(row.gather(-1, drawn).masked_fill(finished.unsqueeze(-1), 0.0))
        finished = finished | (drawn.squeeze(-1) == eos_id)
        all_finished.copy_(finished.all(), non_blocking=True)
        if t + 1 == length or bool(all_finished):
            break
        out = inner(
            input_ids=drawn, attention_mask=present[:, : prefix + ids.shape[1] + t + 1],
            position_ids=positions + t, past_key_values=out.past_key_values, use_cache=True,
        )  # fmt: skip
    rows = torch.cat(tokens, -1).tolist()  # waits for the device
    completions = [tuple(token for token in row if token >= 0) for row in rows]
    longest = max(map(len, completions))
    return Rollout(
        list(prompts), completions, finished, torch.cat(logprobs, -1)[:, :longest].contiguous()
    )


def pad_left(
    prompts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P) ids and mask of prompts, each ending in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def virtual_tokens(model: Any) -> int:
    """How many positions a prefix adapter puts before the first token; 0 without one."""
    configs = getattr(model, "peft_config", {})
    return max((getattr(c, "num_virtual_tokens", 0) or 0 for c in configs.values()), default=0)
