"""Token pairs to padded tensors, and completion log-probabilities from them.

Letters: B pairs of a batch, R rows of a forward pass (B for one side, 2B for chosen then rejected),
P prompt columns, C completion columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from peftbench.head import label_logprobs

if TYPE_CHECKING:
    from peftbench.data.task import TokenPair

IGNORE_INDEX = -100

Sides = Literal["chosen", "rejected", "both"]


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probabilities of pairs under a model, float32 nats; 0 where nothing is scored."""

    completions: torch.Tensor  # (2B, C), chosen then rejected
    prompt: torch.Tensor | None = None  # (B, P - 1), of the prompts' tokens but their first
    prompt_mask: torch.Tensor | None = None  # (B, P - 1) bool, True where one is scored


class PairBatch(Protocol):
    """Both sides of B pairs, however they lie: a Batch of `both` sides, or a SharedBatch."""

    @property
    def completion_mask(self) -> torch.Tensor:
        """(2B, C) bool, True where a completion token is; chosen, then rejected."""

    def pair_logprobs(self, model: Any, with_prompt: bool = False) -> PairLogprobs:
        """One forward pass; the prompts, once a pair, only where they are asked for."""


@dataclass(frozen=True)
class Batch:
    """Prompts left-padded to P columns, completions right-padded to C: the cut is one column."""

    input_ids: torch.Tensor  # (R, P + C) int64
    attention_mask: torch.Tensor  # (R, P + C) int64, 1 where a token is
    position_ids: torch.Tensor  # (R, P + C) int64, 0 at a row's first token
    completion_mask: torch.Tensor  # (R, C) bool, True where a completion token is
    prompt_mask: torch.Tensor  # (R, P) bool, True where a prompt token is
    padded: bool  # whether any row has padding: known from the lengths, without asking the device

    @property
    def completion_length(self) -> int:
        return self.completion_mask.shape[1]

    @property
    def completion_ids(self) -> torch.Tensor:
        """(R, C), padding included."""
        return self.input_ids[:, -self.completion_length :]

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """What a model is called with. Without padding there is nothing to mask beyond causality,
        and positions count from 0."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask if self.padded else None,
            "position_ids": self.position_ids if self.padded else None,
        }

    def pair_logprobs(self, model: Any, with_prompt: bool = False) -> PairLogprobs:
        """Of a batch of `both` sides."""
        if not with_prompt:
            return PairLogprobs(completion_logprobs(model, self))
        B, C = self.input_ids.shape[0] // 2, self.completion_length
        scored = sequence_logprobs(model, self)
        mask = self.prompt_mask[:B, :-1]  # where a prompt's token has one before it
        return PairLogprobs(scored[:, -C:], scored[:B, :-C], mask)


def collate(pairs: Sequence[TokenPair], sides: Sides, device: torch.device | str = "cpu") -> Batch:
    """One padded batch; with `both`, the first B rows are chosen and the last B rejected.

    Masks come from lengths, never from comparing ids, so any id may pad (here 0) and a model whose
    pad token is its eos token still learns eos.
    """
    prompts = [p.prompt for p in pairs]
    if sides == "both":
        prompts, completions = prompts * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs]
    else:
        completions = [p.chosen if sides == "chosen" else p.rejected for p in pairs]
    P = max(len(p) for p in prompts)
    C = max(len(c) for c in completions)
    ids = torch.zeros((len(prompts), P + C), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.tensor(prompt + completion, dtype=torch.long)
        start = P - len(prompt)
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    # Exclusive cumulative sum: without it a left-padded GPT-2 row is off by 0.3 nats a token.
    positions = (mask.cumsum(-1) - mask).clamp(min=0)
    on_device = [t.to(device, non_blocking=True) for t in (ids, mask, positions)]
    present = on_device[1].bool()
    return Batch(
        on_device[0], on_device[1], on_device[2], present[:, P:].clone(), present[:, :P].clone(),
        padded=any(len(p) < P or len(c) < C for p, c in zip(prompts, completions, strict=True)),
    )  # fmt: skip


def token_counts(
    pairs: Sequence[TokenPair], sides: Sides, shared_prompts: bool = False
) -> tuple[int, int]:
    """(non-padding, computed) tokens of the batch that is made of these pairs.

    Non-padding are those of the data, a prompt counted with each of its sides, however the batch
    lies: so rates compare. Computed are those of `input_ids`: padding too, a shared prompt once.
    """
    taken = [
        side
        for p in pairs
        for side in ([p.chosen] if sides != "rejected" else [])
        + ([p.rejected] if sides != "chosen" else [])
    ]
    prompt, rows = max(len(p.prompt) for p in pairs), len(taken) // len(pairs)
    completion = max(len(side) for side in taken)
    real = sum(len(side) for side in taken) + rows * sum(len(p.prompt) for p in pairs)
    prompts = 1 if shared_prompts else rows
    return real, len(pairs) * (prompts * prompt + rows * completion)


def forward_logits(model: Any, batch: Batch, tokens: int) -> torch.Tensor:
    """Logits (R, tokens, V) by which the last `tokens` columns are predicted.

    Those at column t predict column t + 1; the head runs on these columns only.
    """
    kept = last_columns(batch.input_ids, tokens + 1)[:-1]
    logits: torch.Tensor = model(**batch.inputs(), logits_to_keep=kept, use_cache=False).logits
    # A model that ignores `logits_to_keep` answers for every column. Where it does not, no slice
    # is taken: the backward pass of one fills a tensor of the logits' size with zeros.
    return logits if logits.shape[1] == tokens else logits[:, -tokens - 1 : -1]


def last_columns(ids: torch.Tensor, columns: int) -> torch.Tensor:
    """(columns,) indices of the last columns of (R, N) ids, for `logits_to_keep`.

    As a number, the model takes a slice of its hidden states, which is not contiguous: on a CPU
    the head then runs as one small product a row, and in bfloat16 with a copy of its whole weight
    for each (measured: 60 % of the scoring of a 135 M model). Indices give a contiguous copy.
    """
    return torch.arange(ids.shape[1] - columns, ids.shape[1], device=ids.device)


def last_logprobs(model: Any, batch: Batch, tokens: int) -> torch.Tensor:
    """log p of the last `tokens` columns, (R, tokens) float32 nats, padding included."""
    kept = last_columns(batch.input_ids, tokens + 1)[:-1]
    return label_logprobs(model, batch.input_ids[:, -tokens:], kept, **batch.inputs())


def completion_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """log p(completion token | all before it), (R, C) float32; 0 at padding."""
    return last_logprobs(model, batch, batch.completion_length) * batch.completion_mask


def sequence_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """log p of every token but a row's first, (R, P + C - 1) float32; 0 where nothing is scored."""
    scored = batch.attention_mask[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
    return last_logprobs(model, batch, batch.input_ids.shape[1] - 1) * scored


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the columns of each row, (R, C) -> (R,); every row has at least one True."""
    return (values * mask).sum(-1) / mask.sum(-1)
