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
from peftbench.batches import Batch, forward_logits
from peftbench.data.task import TokenTask
from peftbench.head import token_logprobs
from peftbench.methods.reward import RewardFunction, named_reward
from peftbench.reward_model import ScalarModel, scalars, train_reward_model, trunk_of
from peftbench.sharding import own_slice
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

    def trees(self) -> list[Any]:
        """The models, each on a tree of modules of its own."""
        scalar_models = [m for m in (self.reward_model, self.value_model) if m is not None]
        return [self.reference, *(m.adapted for m in scalar_models)]

    def heads(self) -> list[torch.nn.Linear]:
        """What stands on them."""
        scalar_models = [m for m in (self.reward_model, self.value_model) if m is not None]
        heads = [m.head for m in scalar_models]
        return heads if self.value_head is None else [self.value_head, *heads]


def build_roles(
    model: Any,
    plain: Any,
    adapter: str,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    gate: Gate,
    *,
    after_sft: bool,
) -> Roles:
    """All who take part beside the policy; `train_roles` brings them to where PPO starts.

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
    else:
        reward = named_reward(settings.reward, tokenizer)
    head, value_model = build_value(model, tree, settings)
    return Roles(reference, reward_model, reward, head, value_model, reference_bytes)


def train_roles(roles: Roles, task: TokenTask, settings: Settings) -> None:
    """Train the reward model, if there is one, and let a value adapter start at the reward's."""
    if roles.reward_model is not None:
        train_reward_model(roles.reward_model, task, settings)
        if roles.value_model is not None:
            copy_adapter(roles.reward_model, roles.value_model)


def reference_copy(model: Any, plain: Any, adapter: str, settings: Settings) -> Any:
    """A frozen model that answers as `model` does now: a tree over the base with a copy of the
    adapter's weights; for `full` a copy of all weights."""
    if adapter == "full":
        return copy.deepcopy(model).requires_grad_(False).eval()
    frozen = adapters.attach(adapters.shared_copy(plain), adapter, settings)
    copy_trained(model, frozen)
    return frozen.requires_grad_(False).eval()


def copy_trained(model: Any, reference: Any) -> None:
    """Let a reference that was made before answer as the model does now."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in reference.named_parameters():
        if name in trained:
            own_slice(parameter.data).copy_(own_slice(trained[name].data))


def build_value(
    model: Any, tree: Any, settings: Settings
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
        head = value_model.head
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return (head, None) if settings.value == "head" else (None, value_model)


def copy_adapter(reward_model: ScalarModel, value_model: ScalarModel) -> None:
    """Let the value's adapter start at the reward's; its head keeps its own start."""
    own = dict(reward_model.adapted.named_parameters())
    for name, parameter in value_model.adapted.named_parameters():
        if parameter.requires_grad:
            own_slice(parameter.data).copy_(own_slice(own[name].data))


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
