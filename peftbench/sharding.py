"""A model whose parameters are spread over the ranks: `--sharding full`, FSDP as torch has it.

Each rank keeps a slice of every parameter, gradient and optimiser moment, and gathers a layer's
weights for as long as it computes that layer. So a model may be larger than a device; every
forward pass is then one that all ranks make together, evaluation included.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from peftbench.compiling import decoder_layers


def shard_all(models: Sequence[Any], device: torch.device) -> None:
    """`shard` for trees of modules over the same weights: what they share they share as slices."""
    sliced: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # by the whole one
    for model in models:
        places = parameter_places(model)
        shard(model, device)
        for module, name, whole in places:
            own = module.get_parameter(name)
            known = sliced.setdefault(whole, own)
            if known is not own:  # taken over when the tree is first used, as a loaded state is
                module.register_parameter(name, known)


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


def parameter_places(
    model: torch.nn.Module,
) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """(module, name in it, parameter) of all; tied ones once for each place."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def own_slice(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter: all, where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on each rank: as it is, where it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> None:
    """Clip the norm of all gradients, of which some may be sharded and others whole."""
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if not sharded or not whole:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    norms = [gathered(torch.nn.utils.get_total_norm(sharded)),
             torch.nn.utils.get_total_norm(whole)]  # fmt: skip
    scale = (max_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)  # as torch has it
    for gradient in (*sharded, *whole):
        own_slice(gradient).mul_(scale)


def check_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Raise RuntimeError where a parameter has no gradient after a backward pass."""
    lost = sum(p.grad is None for p in parameters)
    if lost:
        raise RuntimeError(f"{lost} trained parameters of a sharded model have no gradient")


@contextmanager
def outside_layers_whole(model: Any) -> Iterator[None]:
    """Inside, what is in no layer is gathered, so that parts of the model can be called.

    With gradients it stays so until they are made, at whose end torch lets go of it.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            model.reshard()


@contextmanager
def on_host(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a sharded model's parameters are whole and on the host of every rank, so that they
    can be read and saved: not for forward passes. Does nothing to a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    places = [place for place in parameter_places(model) if isinstance(place[2], DTensor)]
    for module, name, parameter in places:
        if parameter not in whole:  # tied weights stay tied
            on_cpu = gathered(parameter).detach().cpu()
            whole[parameter] = torch.nn.Parameter(on_cpu, parameter.requires_grad)
        module.register_parameter(name, whole[parameter])
    try:
        yield
    finally:
        for module, name, parameter in places:
            module.register_parameter(name, parameter)
