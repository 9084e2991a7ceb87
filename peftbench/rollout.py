"""Completions sampled from exactly the distribution that is scored.

A loop of its own instead of `generate`: nothing of a model's generation_config (top_k 50 and the
like), no logits processor but the temperature, explicit position ids, and the log-probabilities of
what was drawn. A token step goes through a tree of modules made for few rows. Letters as in
batches.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftbench import ranks
from peftbench.adapters import inner_model
from peftbench.batches import last_columns
from peftbench.compiling import compile_layers
from peftbench.data.task import TokenPair
from peftbench.ranks import ALONE, Ranks
from peftbench.sharding import is_sharded, outside_layers_whole

# With so few rows on a CPU a product is as long as the reading of its weight, and which side of it
# the weight is on matters: at 8 rows (W x^T)^T reads 1.2 to 1.6 times faster than x W^T.
FEW_ROWS = 16
LARGE_WEIGHT = 2**16  # entries; below, a product costs its call
# Of copies that live while sampling: LoRA on q and v of a 135 M model in float32 needs 53 MiB.
FOLDED_BYTES = 64 * 2**20
NO_EOS = -1  # an id that is never drawn: every completion has its full length
# Share of a CPU's rows that have ended before they are left out of the next steps: leaving them out
# copies the cache, as each step does.
ENDED_RATIO = 0.25


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
    compiled_width: int = 0,
    own: Ranks = ALONE,
) -> Rollout:
    """One completion a prompt, of at most `length` tokens, each drawn from softmax(logits / t).

    The caller has the model in eval mode without gradients. A GPU is waited for once, at the end.
    `compiled_width`: compile the layers of a token step, whose cache then holds so many tokens from
    the start, at least the longest prompt's and `length`; 0: eager, with a cache that grows.
    `own`: these prompts are this rank's share, whose draws are those that one process would make.
    On a CPU rows that have ended are soon no longer computed. What the others draw is the same.
    """
    device = next(model.parameters()).device
    ids, mask = pad_left(prompts, device)
    prefix = virtual_tokens(model)
    # the adapter's layers are inside the base; a prefix is in the cache after the first pass
    inner = inner_model(model)
    together = is_sharded(inner)  # then every pass is one that all ranks make
    if not together:
        inner = few_rows_tree(inner, len(prompts))
    padded = any(len(p) < ids.shape[1] for p in prompts)
    present = torch.ones((len(prompts), prefix + ids.shape[1] + length), device=device).long()
    present[:, prefix : prefix + ids.shape[1]] = mask
    positions = mask.sum(-1, keepdim=True) + prefix
    out = model(
        input_ids=ids, attention_mask=mask if padded else None,
        position_ids=(mask.cumsum(-1) - mask).clamp(min=0),
        logits_to_keep=last_columns(ids, 1), use_cache=True,
    )  # fmt: skip
    cache, fixed = out.past_key_values, None
    if compiled_width:
        cache = fixed = FixedCache(inner, cache, prefix + compiled_width, present)
        compile_layers(inner, dynamic=False)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    running = torch.arange(len(prompts), device=device)  # which rows are computed
    leaves_out = device.type == "cpu" and fixed is None and not together
    # read without waiting: on a GPU it holds the answer of some step before
    all_finished = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")
    tokens = torch.full((len(prompts), length), -1, device=device)
    logprobs = torch.zeros((len(prompts), length), device=device)
    with outside_layers_whole(model):
        for t in range(length):
            row = torch.log_softmax(out.logits[:, -1].float() / temperature, -1)
            drawn = draw(row, uniforms(len(prompts), generator, own)[running])
            ended = finished[running].unsqueeze(-1)
            tokens[running, t] = drawn.masked_fill(ended, -1).squeeze(-1)
            logprobs[running, t] = row.gather(-1, drawn).masked_fill(ended, 0.0).squeeze(-1)
            finished[running] = (ended | (drawn == eos_id)).squeeze(-1)
            if together:
                all_finished = ranks.largest((~finished).any().int()) == 0
            else:
                all_finished.copy_(finished.all(), non_blocking=True)
            if t + 1 == length or bool(all_finished):
                break
            if leaves_out:
                kept = (~finished[running]).nonzero().squeeze(-1)
                if len(kept) <= (1 - ENDED_RATIO) * len(running):
                    cache.batch_select_indices(kept)
                    running, drawn = running[kept], drawn[kept]
                    present, positions = present[kept], positions[kept]
            at = prefix + ids.shape[1] + t
            seen = present[:, : at + 1] if padded else None
            out = inner(
                input_ids=drawn, attention_mask=seen if fixed is None else fixed.go_to(at),
                position_ids=positions + t, past_key_values=cache, use_cache=True,
            )  # fmt: skip
    rows = tokens.tolist()  # waits for the device
    completions = [tuple(token for token in row if token >= 0) for row in rows]
    longest = max(map(len, completions))
    return Rollout(list(prompts), completions, finished, logprobs[:, :longest].contiguous())


def joined(shares: Sequence[Rollout], device: torch.device) -> Rollout:
    """What the ranks have sampled, in their order, as one process would have it."""
    width = max(share.logprobs.shape[1] for share in shares)
    return Rollout(
        [prompt for share in shares for prompt in share.prompts],
        [completion for share in shares for completion in share.completions],
        torch.cat([share.ended for share in shares]).to(device),
        torch.cat([
            torch.nn.functional.pad(share.logprobs, (0, width - share.logprobs.shape[1]))
            for share in shares
        ]).to(device),
    )  # fmt: skip


def uniforms(rows: int, generator: torch.Generator, own: Ranks = ALONE) -> torch.Tensor:
    """(rows, 1) float64 random numbers in [0, 1), on the generator's device.

    A rank makes those of all and takes its own.
    """
    random = torch.rand(
        (rows * own.count, 1), dtype=torch.float64, device=generator.device, generator=generator
    )
    return random[own.rank * rows : (own.rank + 1) * rows]


def draw(logprobs: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """(B, 1) indices drawn from (B, V) log-probabilities, by the inverse of their sum at `random`.

    In float64, where no token is too unlikely to be drawn. `torch.multinomial` makes a random
    number for each of the V: at 8 x 49,152 it takes 15 ms on a CPU, this 1.
    """
    sums = logprobs.double().exp().cumsum(-1)
    # the first index whose sum is above: never one of probability 0
    at = torch.searchsorted(sums, random * sums[:, -1:], right=True)
    return at.clamp(max=sums.shape[1] - 1)


class FewRowsLinear(torch.nn.Module):
    """A linear layer over a weight (O, I) and bias (O,) of another: y = (W x^T)^T + b."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        out = (self.weight @ x.flatten(0, -2).T).T.contiguous().view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


@dataclass
class LayerBuffers:
    """One layer's keys and values, (B, heads, width, size)."""

    keys: torch.Tensor
    values: torch.Tensor


class FixedCache:
    """A cache of one width from the first token step to the last, for layers that are compiled.

    It stands in for a transformers cache. An attention layer calls `update` with its `layer_idx`:
    in the tree that this cache is made for, that is the layer's buffers themselves, as a number
    would be compiled anew for each layer.
    """

    def __init__(self, tree: Any, filled: Any, width: int, present: torch.Tensor) -> None:
        """`filled` is the cache of the prompts' pass; `present` (B, ...) is 0 at its padding."""
        attentions = [m for m in tree.modules() if hasattr(m, "layer_idx")]
        for module in attentions:
            layer = filled.layers[module.layer_idx]
            module.layer_idx = LayerBuffers(
                widened(layer.keys, width), widened(layer.values, width)
            )
        seen = filled.get_seq_length()
        self.position = torch.zeros(1, dtype=torch.long, device=present.device)
        self.mask = torch.zeros((len(present), 1, 1, width), dtype=torch.bool,
                                device=present.device)  # fmt: skip
        self.mask[:, 0, 0, :seen] = present[:, :seen].bool()

    def go_to(self, position: int) -> torch.Tensor:
        """The mask of a token that stands here; what is given of it goes here too."""
        self.position.fill_(position)
        self.mask[..., position] = True
        return self.mask

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: LayerBuffers, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the layer, those of this token put in their place."""
        layer.keys.index_copy_(2, self.position, keys)
        layer.values.index_copy_(2, self.position, values)
        return layer.keys, layer.values

    def get_seq_length(self, *_: Any) -> int:
        """Asked by models that count positions themselves; ours are given."""
        return 0


def has_plain_cache(model: Any) -> bool:
    """Whether all layers keep all they have seen, which is what a FixedCache does: no windows."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def widened(filled: torch.Tensor, width: int) -> torch.Tensor:
    """(B, heads, width, size), zeros after what is filled."""
    out = filled.new_zeros((*filled.shape[:2], width, filled.shape[3]))
    out[:, :, : filled.shape[2]] = filled
    return out


def few_rows_tree(base: Any, rows: int) -> Any:
    """`base`, adapter layers inside, on a tree of its own for passes over one token a row.

    The weights are shared. In float32, a LoRA whose copies fit into FOLDED_BYTES is folded into
    copies of its layers' weights, which saves two small products and three passes a layer; and on a
    CPU large products of few rows are turned round. It answers as `base` does but for rounding.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from transformers.pytorch_utils import Conv1D

    device = next(base.parameters()).device
    tree = same_modules(base).eval()
    if torch.is_autocast_enabled(device.type):
        return tree  # a folded weight would be rounded where the adapter is not
    adapted = {
        name: module
        for name, module in tree.named_modules()
        if type(module) is LoraLinear
        and type(module.base_layer) in (torch.nn.Linear, Conv1D)
        and module.base_layer.weight.dtype == torch.float32
        and not module.lora_variant
    }
    if sum(module.base_layer.weight.nbytes for module in adapted.values()) <= FOLDED_BYTES:
        for name, module in adapted.items():
            tree.set_submodule(name, folded(module))
    if device.type == "cpu" and rows <= FEW_ROWS:
        for name, module in list(tree.named_modules()):
            if type(module) is torch.nn.Linear and module.weight.numel() >= LARGE_WEIGHT:
                tree.set_submodule(name, FewRowsLinear(module.weight, module.bias))
    return tree


def same_modules(module: torch.nn.Module) -> Any:
    """A tree whose modules hold what `module`'s hold: replacing one leaves the other tree alone.

    A hundredth of what `adapters.shared_copy` takes, which also separates all that is no weight.
    """
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else same_modules(child)
        for name, child in module._modules.items()
    }
    return twin


def folded(layer: Any) -> torch.nn.Module:
    """A LoRA layer as one plain layer; an adapter that is switched off is left out."""
    plain: torch.nn.Module = layer.base_layer
    if not layer.disable_adapters:
        weight: torch.Tensor = layer.base_layer.weight.detach().clone()
        changed = {"weight": torch.nn.Parameter(weight, False)}
        for adapter in layer.active_adapters:
            weight += layer.get_delta_weight(adapter).detach()
            if layer.lora_bias[adapter]:  # only where the base has one
                bias = plain.bias + layer.scaling[adapter] * layer.lora_B[adapter].bias
                changed["bias"] = torch.nn.Parameter(bias.detach(), False)
        plain = copy.copy(plain)
        plain._parameters = {**plain._parameters, **changed}
    return plain


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
