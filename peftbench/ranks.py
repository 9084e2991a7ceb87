"""A case over several processes: which rank this one is, what it reads, and what all know together.

`--processes N` starts N training children, the ranks. Each reads its share of every micro-batch.
Each holds the whole model, and DistributedDataParallel, through accelerate, averages their
gradients (PPO and its reward model add theirs up here); or each holds a slice of it (`sharding`).
The round's record is rank 0's. Everything but the training is its alone, where the model is not
sharded. Outside such a case there is one rank, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

T = TypeVar("T")

# what the backends say when another rank has ended or does not answer
_LOST = ("connection closed by peer", "connection reset by peer", "timed out", "timeout", "nccl")


@dataclass(frozen=True)
class Ranks:
    """The place of a process among those that train a case together."""

    rank: int = 0
    count: int = 1
    store: str = ""  # the file through which they meet
    patience_s: float = 0.0  # how long one waits for the others

    def share_of(self, rows: Sequence[T]) -> list[T]:
        """The rows of this rank: equally many for each, in their order."""
        size = len(rows) // self.count
        if size * self.count != len(rows):
            raise ValueError(f"{len(rows)} rows cannot be shared among {self.count} ranks")
        return list(rows[self.rank * size : (self.rank + 1) * size])


def current() -> Ranks:
    """Those of this process; one where it has joined none."""
    if not distributed.is_initialized():
        return ALONE
    return Ranks(distributed.get_rank(), distributed.get_world_size())


ALONE = Ranks()


class LostRankError(RuntimeError):
    """Another rank has ended, or not answered in time."""


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Meet the other ranks; inside, they wait for each other in collectives.

    Raises: LostRankError where one has ended, or has not answered in time.
    """
    if ranks.count == 1:
        yield
        return
    from accelerate.state import AcceleratorState

    # accelerate looks here whether there are others
    told = {
        "RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.count),
        "LOCAL_RANK": str(ranks.rank), "LOCAL_WORLD_SIZE": str(ranks.count),
    }  # fmt: skip
    os.environ |= told
    try:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{ranks.store}",
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=timedelta(seconds=ranks.patience_s),
        )
        yield
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in _LOST):
            raise LostRankError(str(error)) from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for name in told:
            os.environ.pop(name, None)
        # whose objects all share one state: what comes after must not believe in other ranks
        AcceleratorState._reset_state(reset_partial_state=True)


def meet() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, of each element."""
    return total(values) / current().count


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, of each element."""
    if distributed.is_initialized():
        values = values.contiguous()
        distributed.all_reduce(values)
    return values


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest of the ranks', of each element."""
    if distributed.is_initialized():
        values = values.contiguous()
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def add_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make every gradient the sum of the ranks'. For losses whose mean is over all ranks' tokens,
    and models with more passes a step than DistributedDataParallel follows."""
    if not distributed.is_initialized():
        return
    found = [p.grad for p in parameters if p.grad is not None]
    for gradient in found:
        if isinstance(gradient, DTensor):  # of a sharded model, which has taken the mean already
            gradient.to_local().mul_(distributed.get_world_size())
    gradients = [g for g in found if not isinstance(g, DTensor)]
    if not gradients:
        return
    summed = total(torch.cat([g.flatten() for g in gradients]))
    parts = torch.split(summed, [g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def check_alike(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Raise RuntimeError unless all ranks have left the same trained weights.

    They start from the same ones and step by the same gradients: to the last bit.
    """
    sums = torch.stack([p.detach().double().sum() for p in parameters]).cpu()
    for rank, others in enumerate(gathered(sums)):
        if not torch.equal(others.nan_to_num(), sums.nan_to_num()):
            apart = (others - sums).abs().max()
            raise RuntimeError(
                f"the ranks have trained different weights: a sum of rank {rank}'s is {apart:.2g}"
                f" from rank {current().rank}'s"
            )


def gathered(value: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
