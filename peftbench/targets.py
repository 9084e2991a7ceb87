"""Which layers an adapter touches, found from the modules: no table of architectures to outgrow.

PEFT's own tables lack newer architectures (OLMo2, Phi-3, ...). Names returned are full module
paths, so that nothing matches by accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftbench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Leaf names of attention projections. A fused layer makes query, key and value at once.
FUSED = frozenset({"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "W_pack", "in_proj"})
QUERIES = frozenset({"q", "q_proj", "q_lin", "query", "wq", "Wq"})
KEYS = frozenset({"k", "k_proj", "k_lin", "key", "wk", "Wk"})
VALUES = frozenset({"v", "v_proj", "v_lin", "value", "wv", "Wv"})


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every Linear, Conv1D or 4-bit layer by path; the head is left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
    return shapes


def lora_targets(model: PreTrainedModel, targets: str) -> list[str]:
    """The layers that LoRA and QLoRA adapt: `all-linear`, or query and value only (`qv`).

    Where one layer makes query, key and value together, `qv` adapts that layer.
    """
    shapes = linear_shapes(model)
    if targets == "all-linear":
        return _found(list(shapes), model, "linear layers")
    if targets == "qv":
        wanted = QUERIES | VALUES | FUSED
        return _found(
            [name for name in shapes if _in_block(name) and _leaf(name) in wanted],
            model, "query and value layers; --targets all-linear needs none",
        )  # fmt: skip
    raise UserError(f"unknown targets {targets!r}; choose from: all-linear, qv")


def ia3_targets(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """(all layers that IA3 scales, those of them where it scales the input: the feed-forward's).

    Keys and values are found by leaf name; the feed-forward's second layer is the one that leads
    back to the hidden size from another one, outside attention.
    Source: Liu et al. 2022, https://arxiv.org/abs/2205.05638
    """
    hidden_size = model.config.get_text_config().hidden_size
    shapes = {name: shape for name, shape in linear_shapes(model).items() if _in_block(name)}
    attention = [name for name in shapes if _leaf(name) in KEYS | VALUES | FUSED]
    feedforward = [
        name
        for name, (inputs, outputs) in shapes.items()
        if outputs == hidden_size and inputs != hidden_size and not _in_attention(name)
    ]
    _found(attention, model, "key and value layers")
    _found(feedforward, model, "feed-forward layers that lead back to the hidden size")
    return attention + feedforward, feedforward


def norm_targets(model: PreTrainedModel) -> list[str]:
    """Every LayerNorm and RMSNorm with weights of its own."""
    from torch import nn

    return _found(
        [
            name
            for name, module in model.named_modules()
            if (isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"))
            and any(True for _ in module.parameters(recurse=False))
        ],
        model, "norms with weights",
    )  # fmt: skip


def bias_targets(model: PreTrainedModel) -> list[str]:
    """Every layer with a bias of its own: linear layers and LayerNorms."""
    return _found(
        [
            name
            for name, module in model.named_modules()
            if any(n == "bias" for n, _ in module.named_parameters(recurse=False))
        ],
        model, "biases; use ln or lora-bias",
    )  # fmt: skip


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _in_block(name: str) -> bool:
    """True inside a numbered block; projections around the stack (OPT's) are outside."""
    return any(part.isdigit() for part in name.split("."))


def _in_attention(name: str) -> bool:
    return any("attn" in part.lower() or "attention" in part.lower() for part in name.split("."))


def _found(names: list[str], model: PreTrainedModel, what: str) -> list[str]:
    if not names:
        raise UserError(f"{type(model).__name__} has no {what}")
    return names
