"""Prompt tuning read as this package reads everything: padding on the left, positions, few logits.

PEFT puts the learned embeddings before the first column, so a row's padding stands between them and
its text; it drops the positions that say so, and does not move `logits_to_keep`. Here the positions
come from the mask again, the columns to keep move along, and logits of the prompt itself are left
out, as with a prefix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel


def read_in_front(model: PeftModel) -> None:
    """Hooks on the wrapped model and on its base; both do nothing while the adapter is off."""
    tokens = model.active_peft_config.num_virtual_tokens
    model.register_forward_pre_hook(_without_positions, with_kwargs=True)
    model.register_forward_hook(partial(_without_prompt, tokens), with_kwargs=True)
    model.get_base_model().register_forward_pre_hook(
        partial(_behind_prompt, tokens), with_kwargs=True
    )


def _without_positions(
    model: Any, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """PEFT would drop them too, with a warning at each pass."""
    if model._adapters_disabled:
        return inputs, options
    return inputs, {name: v for name, v in options.items() if name != "position_ids"}


def _behind_prompt(
    tokens: int, base: Any, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the base is called with: (B, tokens + T) embeddings and mask, and columns of T.

    A pass over ids is the base's own, or a token step whose prompt is in the cache already.
    """
    if options.get("inputs_embeds") is None:
        return inputs, options
    changed = dict(options)
    mask, kept = options.get("attention_mask"), options.get("logits_to_keep")
    if mask is not None and mask.shape[1] == options["inputs_embeds"].shape[1]:
        mask = mask.long()
        changed |= {
            "attention_mask": mask, "position_ids": (mask.cumsum(-1) - mask).clamp(min=0),
        }  # fmt: skip
    if isinstance(kept, torch.Tensor):
        changed["logits_to_keep"] = kept + tokens
    return inputs, changed


def _without_prompt(
    tokens: int, model: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any
) -> Any:
    """Logits (B, T, V) of the text alone, where all were asked for."""
    ids = options.get("input_ids", inputs[0] if inputs else None)
    logits = getattr(output, "logits", None)  # TRL's fused head gives none
    if ids is not None and logits is not None and logits.shape[1] == tokens + ids.shape[1]:
        output.logits = logits[:, tokens:]
    return output
