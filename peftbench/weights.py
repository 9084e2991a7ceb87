"""A base model's weights, from files or random, in full precision or quantised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftbench import provenance
from peftbench.errors import UserError
from peftbench.quantization import (
    BITS,
    Quantization,
    mark_quantized,
    names_to_quantize,
    pick_compute_dtype,
    prepare_quantized,
    quantization_config,
    quantize_layer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_pretrained(
    source: str, config: PreTrainedConfig, arguments: dict[str, Any], gguf: str | None, *,
    dtype: torch.dtype, device: torch.device, quantize: Quantization | None,
) -> PreTrainedModel:  # fmt: skip
    """The model of a folder or a Hub id. transformers quantises while it reads, layer by layer."""
    from transformers import AutoModelForCausalLM, GgufConfig

    _check_causal(config)
    if gguf is not None:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, **arguments, gguf_file=gguf, dtype=dtype, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        _check_complete(source, info)
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        # A GGUF file cannot be quantised while it is read: its full weights stay on the host.
        full: PreTrainedModel = model.to(device) if not quantize else model
        return quantize_in_place(full, quantize, device, dtype) if quantize else full
    if device.type == "cuda":
        # accelerate refuses to train a 4-bit model whose device is "cuda" and not "cuda:0"
        device = torch.device("cuda", device.index or 0)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    _check_room(_skeleton(config, dtype), quantize, device)
    if quantize:
        compute_dtype = pick_compute_dtype(dtype, device)
        options["quantization_config"] = quantization_config(quantize, compute_dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        source, config=config, **arguments, **options, use_safetensors=True,
        output_loading_info=True,
    )  # fmt: skip
    _check_complete(source, info)
    if quantize:
        prepare_quantized(model, quantize)
    return model


def build_random(
    config: PreTrainedConfig, *,
    dtype: torch.dtype, device: torch.device, quantize: Quantization | None, seed: int,
) -> PreTrainedModel:  # fmt: skip
    """The model with random weights, made on the device one block at a time.

    With `quantize` each block is quantised as soon as it exists, so the full-precision model is
    never there at once, and its weights are the quantised ones of the same seed's full model. On
    the meta device the model has shapes only.
    """
    _check_causal(config)
    model = _skeleton(config, dtype)
    if device.type == "meta":
        return model
    wanted = _check_room(model, quantize, device)
    compute_dtype = pick_compute_dtype(dtype, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for prefix, module, whole in list(_units(model)):
            module.to_empty(device=device, recurse=whole)
            # Children first: GPT-2's attention rescales a layer of its own after it was set.
            parts = list(module.named_modules(prefix=prefix)) if whole else [(prefix, module)]
            for _, part in reversed(parts):
                model._init_weights(part)
            for name, part in parts:
                if quantize and name in wanted:
                    model.set_submodule(name, quantize_layer(part, quantize, compute_dtype))
    model.tie_weights()
    if quantize:
        mark_quantized(model, quantize, compute_dtype)
        prepare_quantized(model, quantize)
    return model


def quantize_in_place(
    model: PreTrainedModel, kind: Quantization, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Move a full-precision model to the device, its linear layers quantised one at a time."""
    compute_dtype = pick_compute_dtype(dtype, device)
    for name in sorted(names_to_quantize(model, kind)):
        layer = model.get_submodule(name).to(device)
        model.set_submodule(name, quantize_layer(layer, kind, compute_dtype))
    model.to(device)
    mark_quantized(model, kind, compute_dtype)
    prepare_quantized(model, kind)
    return model


def _check_complete(source: str, info: dict[str, Any]) -> None:
    """transformers only warns of weights that a checkpoint lacks, and makes them up."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the checkpoint {source} lacks {len(missing)} of the model's weights, among them"
            f" {missing[0]}; give a checkpoint of a causal language model"
        )


def _check_room(
    skeleton: PreTrainedModel, quantize: Quantization | None, device: torch.device
) -> frozenset[str]:
    """The layers to quantise, whose sizes are checked as well.

    Raises: MemoryError where a CPU's free memory is less than the weights alone. Linux promises
    more than it has and ends whoever uses it; UserError for sizes that cannot be quantised.
    """
    wanted = names_to_quantize(skeleton, quantize) if quantize else frozenset()
    free = provenance.free_memory_bytes() if device.type == "cpu" else None
    if free is None:
        return wanted
    size = 0.0
    for name, parameter in skeleton.named_parameters():
        if quantize and name.removesuffix(".weight") in wanted:
            size += parameter.numel() * BITS[quantize] / 8
        else:
            size += parameter.nbytes
    if size > free:
        raise MemoryError(
            f"the weights take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of this machine's"
            " memory are free; take a smaller model, or --dtype bfloat16 or a quantised adapter"
        )
    return wanted


def _check_causal(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"a {config.model_type} model does not generate text; give a causal language model"
        )


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules on the meta device: shapes, no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """(path, module, whole) in an order that sets every tensor once.

    Blocks of a ModuleList come whole; every other module with its own tensors only.
    """
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            for number, block in child.named_children():
                yield f"{path}.{number}", block, True
        else:
            yield from _units(child, path)
    yield prefix, module, False
