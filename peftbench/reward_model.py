"""A scalar for every position of a text: the reward model, and the value model of its own adapter.

Both are a LoRA adapter with a linear head on a tree of modules that shares the policy's base
(`adapters.shared_copy`), so that they cost the adapter and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from peftbench import adapters, ranks
from peftbench.batches import Batch, collate
from peftbench.data.task import TokenPair, TokenTask
from peftbench.methods.reward import bradley_terry_loss, normalisation
from peftbench.sharding import clip_gradients, outside_layers_whole
from peftbench.training import SilentGate, build_optimizer, build_schedule, train

if TYPE_CHECKING:
    from peftbench.case import Settings

ADAPTER = "lora"  # whatever the policy's is: one reward for all adapters of a model


class ScalarModel(torch.nn.Module):
    """A LoRA adapter on `tree` and a linear head on the last hidden state of its trunk."""

    def __init__(self, tree: Any, settings: Settings) -> None:
        super().__init__()
        self.adapted = adapters.attach(tree, ADAPTER, settings)
        size = self.adapted.config.get_text_config().hidden_size
        self.head = torch.nn.Linear(size, 1, device=next(tree.parameters()).device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            # Source: Ziegler et al. 2019, as N implementation details of RLHF with PPO has it
            start = torch.randn(1, size) / (size + 1) ** 0.5
        self.head.weight.data.copy_(start)
        self.head.bias.data.zero_()
        self.own_bytes = sum(p.nbytes for p in self.own_parameters())  # before it may be frozen

    def forward(self, batch: Batch) -> torch.Tensor:
        """(R, P + C) float32: the scalar after each token; meaningless at padding."""
        with outside_layers_whole(self.adapted):
            hidden = trunk_of(self.adapted)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                position_ids=batch.position_ids, use_cache=False,
            ).last_hidden_state  # fmt: skip
        return scalars(self.head, hidden)

    def scores(self, batch: Batch) -> torch.Tensor:
        """(R,) the scalar after each row's last token."""
        last = batch.prompt_mask.shape[1] + batch.completion_mask.sum(-1, keepdim=True) - 1
        found: torch.Tensor = self(batch).gather(-1, last).squeeze(-1)
        return found

    def normalise(self, scores: torch.Tensor) -> torch.Tensor:
        """Change the head so that these scores, which it gave, have mean 0 and deviation 1.

        Returns them as the head gives them now.
        """
        gain, bias = normalisation(scores)
        self.head.weight.data.mul_(gain)
        self.head.bias.data.mul_(gain).add_(bias)
        return gain * scores + bias

    def own_parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's and the head's, without the base's."""
        return [p for p in self.parameters() if p.requires_grad]


def scalars(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """(...) of (..., size) hidden states, in float32 whatever they are in."""
    with torch.autocast(hidden.device.type, enabled=False):
        out: torch.Tensor = head(hidden.float()).squeeze(-1)
    return out


def trunk_of(model: Any) -> Any:
    """The transformer below the language-model head, adapter layers included."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    return causal.base_model


def train_reward_model(model: ScalarModel, task: TokenTask, settings: Settings) -> list[float]:
    """One epoch over the training pairs; the loss of every step. The model is left frozen.

    Before it, where `reward_start` says so, an epoch of SFT on their chosen sides: who can write
    the answers judges them better. Learning rates linear to zero.
    Source: Stiennon et al. 2020, section 3.4 and appendix, https://arxiv.org/abs/2009.01325
    """
    if settings.reward_start == "sft":
        sft = replace(
            settings, learning_rate=settings.reward_sft_learning_rate, gradient_accumulation=1,
            time_budget_s=0.0,
        )  # fmt: skip
        train(model.adapted, task, sft, "sft", SilentGate(), nullcontext())
    device = model.head.weight.device
    parameters = model.own_parameters()
    steps = settings.pairs // settings.batch_size
    optimizer = build_optimizer(parameters, settings, settings.reward_learning_rate)
    schedule = build_schedule(optimizer, settings, steps)
    bf16 = settings.dtype == "bfloat16"
    losses: list[torch.Tensor] = []
    own = ranks.current()
    model.train()
    for step in range(steps):
        pairs = own.share_of(task.train[step * settings.batch_size :][: settings.batch_size])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            chosen, rejected = model.scores(collate(pairs, "both", device)).chunk(2)
        loss = bradley_terry_loss(chosen, rejected) / own.count  # the mean over all pairs
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        ranks.add_gradients(parameters)
        if settings.max_grad_norm > 0:
            clip_gradients(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    optimizer.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    model.eval()
    return ranks.total(torch.stack(losses)).tolist()


def pair_accuracy(model: ScalarModel, pairs: Sequence[TokenPair], batch_size: int) -> float:
    """Share of pairs whose chosen completion has the higher score; eval mode, no gradients."""
    device = model.head.weight.device
    right = 0
    for at in range(0, len(pairs), batch_size):
        batch = collate(pairs[at : at + batch_size], "both", device)
        chosen, rejected = model.scores(batch).chunk(2)
        right += int((chosen > rejected).sum())
    return right / len(pairs)
