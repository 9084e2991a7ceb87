"""Floating-point operations, counted by torch as they are dispatched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

Shape = tuple[int, ...]


def _attention(
    query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any, **_options: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _product_4bit(
    inputs: Shape, weight: Shape, shape: list[int], *_: Any, out_shape: Any, **_options: Any
) -> int:
    """A product with a weight of `shape` (outputs, inputs) that is held in 4 bits."""
    return 2 * math.prod(inputs) * shape[0]


def _attention_backward(
    grad_out: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    *_: Any,
    out_shape: Any,
    **_options: Any,
) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, key, value))  # type: ignore[no-untyped-call]


# torch's table lacks the CPU's attention kernels: without them a CPU's count would be lower than a
# GPU's for the same step.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _tables() -> dict[Any, Callable[..., int]]:
    """What torch's own table lacks; bitsandbytes' product exists once that is imported."""
    found = dict(_CPU_ATTENTION)
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        found[torch.ops.bitsandbytes.gemm_4bit] = _product_4bit
    return found


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products and attentions that `work` runs; a multiply-add counts 2.

    Attention counts the whole square, masked half included. Elementwise work is not counted.
    """
    with FlopCounterMode(display=False, custom_mapping=_tables()) as counter:
        work()
    return int(counter.get_total_flops())
