"""Quantised bases through bitsandbytes, its traps, and the way back: 4 bits (NF4 with double
quantisation) and 8 bits (LLM.int8()).

A quantised layer is bitsandbytes' `Linear4bit` or `Linear8bitLt`, whether the model had `nn.Linear`
or GPT-2's `Conv1D` there; `source_cls` on the layer remembers which, so that a merged model can be
written back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from peftbench.errors import UserError

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig, PreTrainedModel

Quantization = Literal["nf4", "int8"]
BITS: dict[str, int] = {"nf4": 4, "int8": 8}

BLOCK_SIZE = 64  # weights that share one scale; bitsandbytes' default, as in the QLoRA paper
OUTLIER_THRESHOLD = 6.0  # of an activation, above which its column stays in 16 bits; the paper's
INT8_LEVELS = 127.0  # a row's largest weight; its scale is that weight


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


def quantization_config(kind: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes. Source of int8: Dettmers et al. 2022, arXiv 2208.07339"""
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return nf4_config(compute_dtype)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD)


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


def layers_8bit(model: torch.nn.Module) -> dict[str, Linear8bitLt]:
    """The 8-bit layers by name."""
    from bitsandbytes.nn import Linear8bitLt

    return {name: m for name, m in model.named_modules() if type(m) is Linear8bitLt}


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The 4-bit or 8-bit layers by name."""
    return {**layers_4bit(model), **layers_8bit(model)}


def quantization_of(model: torch.nn.Module) -> dict[str, Any] | None:
    """How the base's quantised layers are held, read from the first of them; None without any."""
    if eight_bit := next(iter(layers_8bit(model).values()), None):
        # bitsandbytes on a CPU does not quantise activations where it trains: see prepare_8bit
        on_cpu = eight_bit.weight.device.type == "cpu"
        return {
            "type": "int8",
            "activations": "full" if on_cpu else "int8",
            "outlier_threshold": None if on_cpu else eight_bit.state.threshold,
        }
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


def names_to_quantize(model: PreTrainedModel, kind: Quantization) -> frozenset[str]:
    """Linear and Conv1D layers to quantise: transformers' own rule, which spares the head.

    Raises: UserError where there is none, or, for NF4, where a layer's input is not made of whole
    blocks: bitsandbytes 0.50.2 on a CPU then returns wrong weights without an error (measured for
    every multiple of 16 that is not one of 64).
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
            f"{type(model).__name__} has no linear layer to hold in {BITS[kind]} bits; use lora"
        )
    for name, (in_features, _) in shapes.items():
        if kind == "nf4" and in_features % BLOCK_SIZE:
            raise UserError(
                f"cannot quantise {name}: it has {in_features} inputs and NF4 needs a multiple of"
                f" {BLOCK_SIZE}; use lora, not qlora, with this model"
            )
    return frozenset(shapes)


def quantize_layer(
    layer: torch.nn.Module, kind: Quantization, compute_dtype: torch.dtype
) -> Linear4bit | Linear8bitLt:
    """The quantised layer of a full-precision Linear or Conv1D, on the same device."""
    from transformers.pytorch_utils import Conv1D

    weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
    if isinstance(layer, Conv1D):
        weight = weight.T  # Conv1D stores (in, out)
    new = _layer_4bit(layer, weight, compute_dtype) if kind == "nf4" else _layer_8bit(layer, weight)
    new.bias = layer.bias
    new.source_cls = type(layer)
    return new.requires_grad_(False)


def _layer_8bit(layer: torch.nn.Module, weight: torch.Tensor) -> Linear8bitLt:
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    out_features, in_features = weight.shape
    with torch.device("meta"):
        new = Linear8bitLt(
            in_features, out_features, layer.bias is not None, has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
        )  # fmt: skip
    codes, scales, _ = int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    new.weight = Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    return new


def _layer_4bit(
    layer: torch.nn.Module, weight: torch.Tensor, compute_dtype: torch.dtype
) -> Linear4bit:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

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
    return new


def mark_quantized(model: PreTrainedModel, kind: Quantization, compute_dtype: torch.dtype) -> None:
    """Set what `from_pretrained` sets on a quantised model: PEFT and trainers look at these."""
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(kind, compute_dtype)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)


def unmark_quantized(model: PreTrainedModel) -> None:
    """The reverse of `mark_quantized`, for a model whose weights are full again."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, name, False)
    model.config._is_quantized = False


def prepare_quantized(model: torch.nn.Module, kind: Quantization) -> None:
    """Neutralise the traps of the model's quantised layers; to be called right after loading."""
    if kind == "nf4":
        prepare_4bit(model)
    else:
        prepare_8bit(model)


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


def prepare_8bit(model: torch.nn.Module) -> None:
    """Neutralise three traps of bitsandbytes' `Linear8bitLt`; to be called right after loading.

    Its first forward moves codes and scales from the weight to the layer, and a second tree of
    modules over the same weight (`adapters.shared_copy`) would then quantise the codes again: they
    are moved here. On a CPU it multiplies dequantised weights in training mode, exactly, and 8-bit
    activations in eval mode: two models, whose log-probabilities differ before any step. It is kept
    to the first there. On a GPU both modes are LLM.int8(). And it warns at every kind of input.
    """
    from bitsandbytes.autograd._functions import MatmulLtState

    layers = layers_8bit(model)
    if not layers:
        raise UserError(f"{type(model).__name__} was loaded in 8 bits but no layer of it is 8-bit")

    class AlwaysTraining(MatmulLtState):  # type: ignore[misc]
        """A state whose `is_training` cannot be switched off."""

        @property
        def is_training(self) -> bool:
            return True

        @is_training.setter
        def is_training(self, value: bool) -> None:
            """The layer sets it at each forward, to its own mode."""

    for layer in layers.values():
        layer.init_8bit_state()
        layer.weight.SCB = layer.state.SCB  # whose bytes `storage_bytes` counts
        if layer.weight.device.type == "cpu":
            layer.state.__class__ = AlwaysTraining
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def dequantize_layer(layer: Linear4bit | Linear8bitLt, dtype: torch.dtype) -> torch.nn.Module:
    """The full-precision layer of a quantised one, of the class that it came from."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear8bitLt
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Linear8bitLt):
        weight = layer.weight.data.float() * (layer.weight.SCB[:, None] / INT8_LEVELS)
    else:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = weight.to(dtype)
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
    """Bytes of a parameter with its quantisation state: 4-bit block scales, their scales and
    codebooks, or 8-bit row scales."""
    tensors: list[Any] = [parameter, getattr(parameter, "SCB", None)]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.code, state.offset]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
