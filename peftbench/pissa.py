"""PiSSA over a base that stays as it is: LoRA from principal components, less its start.

PiSSA starts LoRA's B A at the largest singular values of each weight W and leaves W - s B0 A0 in
the base (s = alpha / r). PEFT writes that into the base's own weights, and then there is no model
left that answers as the base: no reference for DPO and PPO, no base for the reward. So the base
keeps W, and a layer answers W x + s (B A x - B0 A0 x), which is the same function of A and B. It
costs two small products and the frozen A0 and B0 a layer beyond PiSSA's own cost. Before the first
step the difference is exactly 0.

Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 to 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors import safe_open
from safetensors.torch import save_file

ADAPTER = "default"  # PEFT's name of a model's one adapter
WEIGHTS_FILE = "adapter_model.safetensors"
MARK = {"format": "pt", "peftbench": "pissa"}  # in the weights' metadata: what the halves are


class Start(torch.nn.Module):
    """A0 (r, inputs) and B0 (outputs, r), frozen. Parameters, so that they are counted."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(a, requires_grad=False)
        self.b = torch.nn.Parameter(b, requires_grad=False)


class LessItsStart(LoraVariant):  # type: ignore[misc]
    """What PEFT's LoRA layer asks for in the place of its own sum."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """(..., outputs) of the base, with the adapter's difference added."""
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        linear = torch.nn.functional.linear
        start = linear(linear(x, module.start.a), module.start.b)
        # the difference first: two sums would round the start's away
        total: torch.Tensor = result + (now - start) * module.scaling[active_adapter]
        return total

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the difference to a weight, which is transposed in a Conv1D."""
        start = module.scaling[active_adapter] * (module.start.b @ module.start.a)
        start = start.T if module.fan_in_fan_out else start
        orig_weight.data += module.get_delta_weight(active_adapter) - start


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's LoRA layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def is_pissa(model: PeftModel) -> bool:
    return any(isinstance(layer.lora_variant.get(ADAPTER), LessItsStart)
               for layer in lora_layers(model).values())  # fmt: skip


def start_at_principal_components(model: PeftModel) -> None:
    """Set A and B of each LoRA layer from its base's weight, and keep them as the start.

    A0 = S^(1/2) V^T and B0 = U S^(1/2) / s of the r largest singular values S. On the meta device
    there are only shapes to keep.
    """
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if a.device.type != "meta":
            a.data, b.data = principal_components(
                layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight,
                layer.r[ADAPTER], layer.scaling[ADAPTER],
            )  # fmt: skip
        subtract_start(layer, a.detach().clone(), b.detach().clone())


def principal_components(
    weight: torch.Tensor, rank: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, inputs) and B (outputs, rank) float32 of a weight (outputs, inputs): s B A is its
    nearest matrix of that rank."""
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    # in rows, as a file's weights are: LAPACK's columns take another kernel, which rounds otherwise
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def subtract_start(layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    layer.start = Start(a, b)
    layer.lora_variant[ADAPTER] = LessItsStart()


def save_as_lora(model: PeftModel, folder: Path) -> None:
    """Write a plain LoRA of twice the rank, [B, -B0] [A; A0], which plain PEFT loads on the base.

    Source: PEFT's own conversion of PiSSA (`subtract_mutated_init`)
    """
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: value for name, value in found.items() if ".start." not in name}
    for name, layer in lora_layers(model).items():
        for key, start, dim in (("lora_A", layer.start.a, 0), ("lora_B", -layer.start.b, 1)):
            state[f"{name}.{key}.weight"] = torch.cat(
                [state[f"{name}.{key}.weight"], start.detach()], dim
            ).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu() for k, v in state.items()}, folder / WEIGHTS_FILE, metadata=MARK)
    config = model.peft_config[ADAPTER]
    kept = (config.r, config.lora_alpha, config.inference_mode, config.base_model_name_or_path)
    config.r, config.lora_alpha, config.inference_mode = 2 * config.r, 2 * config.lora_alpha, True
    config.base_model_name_or_path = model.get_base_model().name_or_path
    try:
        config.save_pretrained(folder)
    finally:
        config.r, config.lora_alpha, config.inference_mode, config.base_model_name_or_path = kept


def was_saved(folder: Path) -> bool:
    """Whether `save_as_lora` wrote the folder: else a LoRA of any rank is only that."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return (file.metadata() or {}).get("peftbench") == MARK["peftbench"]


def wrapped(
    base: Any, config: Any, state: dict[str, torch.Tensor]
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The base with PiSSA on it, its start set, and what is trained, for PEFT to load.

    Loaded as the LoRA that the files are, the start would train too.
    """
    config.r, config.lora_alpha = config.r // 2, config.lora_alpha // 2
    model = get_peft_model(base, config)
    for name, layer in lora_layers(model).items():
        a, b = (state[f"{name}.{key}.weight"] for key in ("lora_A", "lora_B"))
        device = layer.lora_A[ADAPTER].weight.device
        a, b = a.to(device), b.to(device)
        subtract_start(layer, a[config.r :].clone(), -b[:, config.r :].contiguous())
        state[f"{name}.lora_A.weight"] = a[: config.r].clone()
        state[f"{name}.lora_B.weight"] = b[:, : config.r].contiguous()
    return model, state
