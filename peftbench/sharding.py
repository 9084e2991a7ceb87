"""A model whose parameters are spread over the ranks: `--sharding full`, FSDP as torch has it.

Each rank keeps a slice of every parameter, gradient and optimiser moment, and gathers a layer's
weights for as long as it computes that layer. So a model may be larger than a device; every
forward pass is then one that all ranks make together, evaluation included.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from peftbench.compiling import decoder_layers


def shard(model: Any, device: torch.device) -> None:
    """Spread a model over the ranks, layer by layer, in place; each moves its slices to `device`.

    The model whole must fit the host's memory, and of the device's only a layer's share at a time.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    # By default what is in no layer stays whole after a forward pass, also after one without
    # gradients; those of the next pass are then lost (torch 2.13: an embedding's, the last norm's).
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def own_slice(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter: all, where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Raise RuntimeError where a parameter has no gradient after a backward pass."""
    lost = sum(p.grad is None for p in parameters)
    if lost:
        raise RuntimeError(f"{lost} trained parameters of a sharded model have no gradient")


@contextmanager
def outside_layers_whole(model: Any) -> Iterator[None]:
    """Inside, what is in no layer is gathered, so that parts of the model can be called."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def on_host(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a sharded model's parameters are whole and on the host of every rank, so that they
    can be read and saved: not for forward passes. Does nothing to a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in places:
        if parameter not in whole:  # tied weights stay tied
            gathered = parameter.full_tensor().detach().cpu()
            whole[parameter] = torch.nn.Parameter(gathered, parameter.requires_grad)
        module.register_parameter(name, whole[parameter])
    try:
        yield
    finally:
        for module, name, parameter in places:
            module.register_parameter(name, parameter)
