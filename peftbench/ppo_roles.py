"""Who takes part in PPO beside the policy, on one copy of the base, and the passes over them.

Reference, reward and value are trees of modules over the policy's own frozen weights
(`adapters.shared_copy`), each with an adapter of its own or none. `full` has no frozen base: a
frozen copy of the model is its reference, and the reward's adapter stands on that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftbench import adapters
from peftbench.batches import Batch, forward_logits, token_logprobs
from peftbench.data.task import TokenTask
from peftbench.methods.reward import RewardFunction, named_reward
from peftbench.reward_model import ScalarModel, scalars, train_reward_model, trunk_of
from peftbench.training import Gate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftbench.case import Settings


@dataclass(frozen=True)
class Roles:
    """Who takes part beside the policy. All are frozen but the value."""

    reference: Any  # a model
    reward_model: ScalarModel | None  # None: `reward` is a named function
    reward: RewardFunction | None
    value_head: torch.nn.Linear | None  # on the policy's trunk
    value_model: ScalarModel | None  # or with an adapter of its own
    reference_bytes: int  # of weights that only the reference holds


def prepare_roles(
    model: Any,
    plain: Any,
    adapter: str,
    task: TokenTask,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    gate: Gate,
    *,
    after_sft: bool,
) -> Roles:
    """All who take part beside the policy, the reward model trained.

    `plain` is the base on a tree of its own (`adapters.shared_copy`); None for `full`, whose frozen
    reference then carries the reward's adapter.
    """
    reference, reference_bytes = plain, 0
    if after_sft or adapter == "full":
        reference = reference_copy(model, plain, adapter, settings)
        reference_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    tree = reference if adapter == "full" else plain
    reward_model, reward = None, None
    if settings.reward == "model":
        gate.stage("reward_model")
        reward_model = ScalarModel(adapters.shared_copy(tree), settings)
        train_reward_model(reward_model, task, settings)
    else:
        reward = named_reward(settings.reward, tokenizer)
    head, value_model = build_value(model, tree, reward_model, settings)
    return Roles(reference, reward_model, reward, head, value_model, reference_bytes)


def reference_copy(model: Any, plain: Any, adapter: str, settings: Settings) -> Any:
    """A frozen model that answers as `model` does now: a tree over the base with a copy of the
    adapter's weights; for `full` a copy of all weights."""
    if adapter == "full":
        return copy.deepcopy(model).requires_grad_(False).eval()
    frozen = adapters.attach(adapters.shared_copy(plain), adapter, settings)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in frozen.named_parameters():
        if name in trained:
            parameter.data.copy_(trained[name].data)
    return frozen.requires_grad_(False).eval()


def build_value(
    model: Any, tree: Any, reward_model: ScalarModel | None, settings: Settings
) -> tuple[torch.nn.Linear | None, ScalarModel | None]:
    """(head on the policy's trunk, None), or (None, value model) whose adapter is its own.

    A head starts at zero; a value adapter at the reward's, where there is one.
    Source: Ziegler et al. 2019; LLaMA-Factory issue 1563 for an adapter of its own.
    """
    if settings.value == "head":
        parameter = next(model.parameters())
        size = model.config.get_text_config().hidden_size
        head = torch.nn.Linear(size, 1, device=parameter.device)
    else:
        value_model = ScalarModel(adapters.shared_copy(tree), settings)
        if reward_model is not None:
            own = dict(reward_model.named_parameters())
            for name, parameter in value_model.named_parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(own[name].data)
        head = value_model.head
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return (head, None) if settings.value == "head" else (None, value_model)


@contextmanager
def last_hidden(model: Any) -> Iterator[list[torch.Tensor]]:
    """Inside, each forward pass leaves its trunk's last hidden state, (R, P + C, size)."""
    found: list[torch.Tensor] = []
    handle = trunk_of(model).register_forward_hook(lambda *args: found.append(args[2][0]))
    try:
        yield found
    finally:
        handle.remove()


def score_tokens(
    model: Any, batch: Batch, temperature: float, head: torch.nn.Linear | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities (R, C) of the completions, values before each token, and the logits.

    One pass over the model for all three; the one function for old, new and reference. 0 at
    padding. The values are None without a head.
    """
    columns = batch.completion_length
    with last_hidden(model) as hidden:
        logits = forward_logits(model, batch, columns)
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = token_logprobs(logits, batch.completion_ids) * batch.completion_mask
    if head is None:
        return logprobs, None, logits
    return logprobs, scalars(head, hidden[0][:, -columns - 1 : -1]) * batch.completion_mask, logits


def score_values(model: ScalarModel, batch: Batch) -> torch.Tensor:
    """(R, C) of the value model of its own adapter: the state before each token."""
    values: torch.Tensor = model(batch)[:, -batch.completion_length - 1 : -1]
    return values * batch.completion_mask
