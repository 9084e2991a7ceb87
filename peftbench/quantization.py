"""4-bit bases: NF4 with double quantisation through bitsandbytes, its traps, and the way back.

A 4-bit layer is bitsandbytes' `Linear4bit`, whether the model had `nn.Linear` or GPT-2's `Conv1D`
there; `source_cls` on the layer remembers which, so that a merged model can be written back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftbench.errors import UserError

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK_SIZE = 64  # weights that share one scale; bitsandbytes' default, as in the QLoRA paper


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4, double quantisation. Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314"""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def pick_compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, else the run's own dtype."""
    import torch

    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return dtype


def layers_4bit(model: torch.nn.Module) -> dict[str, Linear4bit]:
    """The 4-bit layers by name: what a QLoRA base must have, or it is LoRA by another name."""
    from bitsandbytes.nn import Linear4bit

    return {name: m for name, m in model.named_modules() if type(m) is Linear4bit}


def quantization_of(model: torch.nn.Module) -> dict[str, Any] | None:
    """How the base's 4-bit layers are held, read from the first of them; None without any."""
    layer = next(iter(layers_4bit(model).values()), None)
    if layer is None:
        return None
    state: Any = layer.weight.quant_state
    return {
        "type": state.quant_type,
        "double_quantization": state.nested,
        "block_size": state.blocksize,
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
    }


def names_to_quantize(model: PreTrainedModel) -> frozenset[str]:
    """Linear and Conv1D layers that go to 4 bits: transformers' own rule, which spares the head.

    Raises: UserError where there is none, or where a layer's input is not made of whole blocks:
    bitsandbytes 0.50.2 on a CPU then returns wrong weights without an error (measured for every
    multiple of 16 that is not one of 64).
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    from peftbench.targets import linear_shapes

    spared = get_keys_to_not_convert(model)
    shapes = {
        name: shape
        for name, shape in linear_shapes(model).items()
        if should_convert_module(name, spared)
    }
    if not shapes:
        raise UserError(
            f"{type(model).__name__} has no linear layer to hold in 4 bits; use lora, not qlora"
        )
    for name, (in_features, _) in shapes.items():
        if in_features % BLOCK_SIZE:
            raise UserError(
                f"cannot quantise {name}: it has {in_features} inputs and NF4 needs a multiple of"
                f" {BLOCK_SIZE}; use lora, not qlora, with this model"
            )
    return frozenset(shapes)


def quantize_layer(layer: torch.nn.Module, compute_dtype: torch.dtype) -> Linear4bit:
    """The 4-bit layer of a full-precision Linear or Conv1D, on the same device."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.pytorch_utils import Conv1D

    weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
    if isinstance(layer, Conv1D):
        weight = weight.T  # Conv1D stores (in, out)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        new = Linear4bit(
            in_features, out_features, layer.bias is not None, compute_dtype,
            compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8,
        )  # fmt: skip
    new.weight = Params4bit(
        weight.contiguous(), requires_grad=False, blocksize=BLOCK_SIZE,
        compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8, module=new,
    ).to(weight.device)  # fmt: skip
    new.bias = layer.bias
    new.source_cls = type(layer)
    return new.requires_grad_(False)


def mark_quantized(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Set what `from_pretrained` sets on a 4-bit model: PEFT and trainers look at these."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(nf4_config(compute_dtype), pre_quantized=False)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)


def unmark_quantized(model: PreTrainedModel) -> None:
    """The reverse of `mark_quantized`, for a model whose weights are full again."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for name in ("is_quantized", "is_loaded_in_4bit"):
        setattr(model, name, False)
    model.config._is_quantized = False


def prepare_4bit(model: torch.nn.Module) -> None:
    """Neutralise two traps of bitsandbytes' `Linear4bit`; to be called right after loading.

    On a CPU with AVX512-BF16 the first forward in eval mode without gradients repacks the weights
    for inference, and later training forwards pass no gradient to their input: lower layers stop
    learning after any evaluation. And the first forward casts the bias to the compute dtype in
    place, which would change the base during training: it is cast here, before anything looks.
    """
    layers = layers_4bit(model)
    if not layers:
        raise UserError(f"{type(model).__name__} was loaded in 4 bits but no layer of it is 4-bit")
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)


def dequantize_layer(layer: Linear4bit, dtype: torch.dtype) -> torch.nn.Module:
    """The full-precision layer of a 4-bit one, of the class that it came from."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    with torch.device("meta"):
        new: torch.nn.Module
        if issubclass(layer.source_cls, Conv1D):
            new = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            new = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    new.weight = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        new.bias = torch.nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return new


def logical_size(parameter: torch.nn.Parameter) -> int:
    """Number of weights, whatever their storage: 4-bit storage holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def storage_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter with its quantisation state (block scales, their scales, codebooks)."""
    tensors: list[Any] = [parameter]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.code, state.offset]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
