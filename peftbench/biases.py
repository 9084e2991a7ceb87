"""Biases that train beside the base's own, so that the base stays and can be switched back to.

For BitFit, in PEFT's LN tuning: that gives each layer a copy that trains, and switches between the
two. The copy here is a bias and a way to call the frozen layer with it. What is saved is the
biases by the names that LN tuning gives them, so that plain PEFT loads them into its own copies.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from torch.func import functional_call

ADAPTER = "default"  # PEFT's name of a model's one adapter


class WithOwnBias(torch.nn.Module):
    """A frozen layer called with a float32 bias of its own, in the layer's dtype."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        bias: torch.Tensor = layer.bias  # type: ignore[assignment]
        self.bias = torch.nn.Parameter(bias.detach().float().clone())
        self._layer = (layer,)  # a tuple hides it: no second name for the base's weights

    def forward(self, *inputs: Any) -> torch.Tensor:
        """As the layer's."""
        (layer,) = self._layer
        bias = self.bias.to(layer.weight.dtype)  # type: ignore[arg-type]
        out: torch.Tensor = functional_call(layer, {"bias": bias}, inputs)
        return out

    def plain(self) -> torch.nn.Module:
        """A layer as the frozen one, over its weight, with this bias."""
        (layer,) = self._layer
        new = copy.copy(layer)
        bias = self.bias.detach().to(layer.weight.dtype)  # type: ignore[arg-type]
        new._parameters = {**layer._parameters, "bias": torch.nn.Parameter(bias)}
        return new


def train_biases_alone(model: PeftModel) -> None:
    """Put a bias in the place of each layer's copy."""
    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            trains = any(p.requires_grad for p in module.ln_tuning_layers.parameters())
            own = WithOwnBias(module.base_layer).requires_grad_(trains)
            module.ln_tuning_layers[ADAPTER] = own


def make_plain_layers(model: PeftModel) -> None:
    """The reverse, for merging: copies again, as PEFT swaps them in."""
    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            own = module.ln_tuning_layers[ADAPTER]
            if isinstance(own, WithOwnBias):
                module.ln_tuning_layers[ADAPTER] = own.plain()


def drop_biases_that_the_base_lacks(model: PeftModel) -> None:
    """`lora_bias` gives a bias to every layer; one that the base lacks could not be merged."""
    for module in model.modules():
        biased = isinstance(module, LoraLayer) and module.lora_bias.get(ADAPTER)
        if biased and getattr(module.base_layer, "bias", None) is None:
            module.lora_B[ADAPTER].bias = None
            module.lora_bias[ADAPTER] = False
