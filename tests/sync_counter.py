"""A gate that counts what would make the host wait for a GPU inside the training window."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SyncCounter(TorchDispatchMode):
    """Counts, while its window is open, what would make the host wait for a GPU.

    That is reading a value (`.item()`, `float()`, `bool()`) and everything whose result's shape
    depends on values. It also counts `synchronize`, of which a window has one at each end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = False
        self.waits: list[str] = []
        self.synchronized = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for argument in args
            if isinstance(argument, (list, tuple))
            for i in argument
        )
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
        if self.open and (name in waits or by_mask):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))

    def synchronize(self, device: torch.device) -> None:
        self.synchronized += 1

    # the gate of a training
    def stage(self, name: str) -> None: ...

    def prepared(self) -> None: ...

    def reference_done(self) -> None: ...

    def warmed_up(self) -> None:
        assert self.synchronized == 2  # before the warm-up and, just now, after it
        self.open = True

    def trained(self) -> None:
        assert self.synchronized == 3
        self.open = False
