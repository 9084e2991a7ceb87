"""Both sides of a pair in one row, behind their prompt: the model reads the prompt once.

A row is [prompt | chosen | rejected]. The rejected side does not see the chosen one, and its
positions go on after the prompt, so each side's log-probabilities are those of a row of its own, up
to the order in which a sum is rounded. Letters: B pairs, P prompt columns, C columns of a side.

Source: Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing",
https://arxiv.org/abs/2410.20305
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftbench.batches import PairLogprobs, collate
from peftbench.head import label_logprobs
from peftbench.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from peftbench.data.task import TokenPair

# Largest difference of a token's log-probability, nats, between both forms. Both round alike; a
# mask or positions that a model does not follow are off by far more on trained weights.
AGREEMENT_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class SharedBatch:
    """Prompts left-padded to P columns; each side right-padded to C."""

    input_ids: torch.Tensor  # (B, P + 2C) int64
    position_ids: torch.Tensor  # (B, P + 2C) int64, 0 at a row's first token
    present: torch.Tensor  # (B, P + 2C) bool, True where a token is
    completion_mask: torch.Tensor  # (2B, C) bool, chosen then rejected, as in a Batch
    padded: bool  # whether any row has padding: known from the lengths, without asking the device

    @property
    def completion_length(self) -> int:
        return self.completion_mask.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.input_ids.shape[1] - 2 * self.completion_length

    def attention_mask(self) -> torch.Tensor:
        """(B or 1, 1, P + 2C, P + 2C) bool, True where the row's token sees the column's.

        Padding sees itself, as a softmax over nothing is NaN. Made anew for each pass: those of a
        whole budget would fill a GPU.
        """
        P, C = self.prompt_length, self.completion_length
        at = torch.arange(P + 2 * C, device=self.input_ids.device)
        earlier, chosen, rejected = at[:, None] >= at, at < P + C, at >= P + C
        seen = earlier & ~(rejected[:, None] & (chosen & (at >= P)))
        if not self.padded:
            return seen[None, None]
        itself = at[:, None] == at
        return ((seen & self.present[:, None, :]) | itself)[:, None]

    def predictors(self, with_prompt: bool) -> torch.Tensor:
        """Columns whose logits predict the tokens of both sides, before them those of the prompt
        but its first. The prompt's last column stands twice: it predicts the first of each side.
        """
        P, C = self.prompt_length, self.completion_length
        at = torch.arange(P + 2 * C, device=self.input_ids.device)
        first = at[P - 1 : P]
        prompt = [at[: P - 1]] if with_prompt else []
        return torch.cat([*prompt, first, at[P : P + C - 1], first, at[P + C : P + 2 * C - 1]])

    def pair_logprobs(self, model: Any, with_prompt: bool = False) -> PairLogprobs:
        """As of a Batch of the same pairs."""
        P, C = self.prompt_length, self.completion_length
        columns = self.predictors(with_prompt)
        logprobs = label_logprobs(
            model, self.input_ids[:, -len(columns) :], columns, input_ids=self.input_ids,
            attention_mask=self.attention_mask(), position_ids=self.position_ids,
        )  # fmt: skip
        sides = torch.cat(logprobs[:, -2 * C :].chunk(2, dim=1)) * self.completion_mask
        if not with_prompt:
            return PairLogprobs(sides)
        scored = self.present[:, : P - 1]
        return PairLogprobs(sides, logprobs[:, : P - 1] * scored, scored)


def collate_shared(pairs: Sequence[TokenPair], device: torch.device | str = "cpu") -> SharedBatch:
    """One padded batch of both sides; as `collate`, no mask comes from comparing ids."""
    P = max(len(p.prompt) for p in pairs)
    C = max(len(side) for p in pairs for side in (p.chosen, p.rejected))
    ids = torch.zeros((len(pairs), P + 2 * C), dtype=torch.long)
    positions, present = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        length = len(pair.prompt)
        for start, first, tokens in (
            (P - length, 0, pair.prompt),
            (P, length, pair.chosen),
            (P + C, length, pair.rejected),
        ):
            columns = slice(start, start + len(tokens))
            ids[row, columns] = torch.tensor(tokens, dtype=torch.long)
            positions[row, columns] = torch.arange(first, first + len(tokens))
            present[row, columns] = True
    completion_mask = torch.cat([present[:, P : P + C], present[:, P + C :]])
    on_device = [
        t.to(device, non_blocking=True) for t in (ids, positions, present, completion_mask)
    ]
    return SharedBatch(
        on_device[0], on_device[1], on_device[2], on_device[3],
        padded=any(len(p.prompt) < P or min(len(p.chosen), len(p.rejected)) < C for p in pairs),
    )  # fmt: skip


def can_share_prompts(model: Any, pairs: Sequence[TokenPair], device: torch.device | str) -> bool:
    """Whether the model follows a mask and positions of ours: asked of it, on these pairs.

    Not asked: prefix and prompt tuning, whose columns PEFT puts before a mask of two dimensions;
    attention other than `sdpa`; layers with a window; models that take no positions. A model that
    raises over such a mask (Falcon, where positions are biases) cannot.
    """
    if not _takes_any_mask(model):
        return False
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = collate(pairs, "both", device).pair_logprobs(model).completions
        try:
            found = collate_shared(pairs, device).pair_logprobs(model).completions
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            found = torch.full_like(expected, torch.inf)
    model.train(was_training)
    computed = torch.float32
    if torch.is_autocast_enabled(expected.device.type) or any(
        p.dtype == torch.bfloat16 for p in model.parameters()
    ):
        computed = torch.bfloat16
    return bool((expected - found).abs().max() <= AGREEMENT_NATS[computed])


def _takes_any_mask(model: Any) -> bool:
    from peft import PeftModel

    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return False
        model = model.get_base_model()
    config = model.config
    windowed = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [windowed])
    return (
        config._attn_implementation == "sdpa"
        and kinds == {"full_attention"}
        and "position_ids" in inspect.signature(model.forward).parameters
    )
