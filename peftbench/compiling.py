"""`--compile layers`: the decoder layers of a training's models, compiled by torch.compile.

A model's decoder layers have one code, so what is compiled for the first serves all (PyTorch's
"regional compilation", as accelerate's `compile_regions`): the rest of the model stays eager. All
compiling belongs to a phase of its own before the warm-up, and what the compiler did is counted:
a graph that is compiled again while the training clock runs makes the round's time not the case's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from peftbench.errors import UserError

# torch's own is 8 of one code, which all layers of all models share; beyond it, it stops compiling
# without a word.
MOST_GRAPHS = 64
BACKEND = "inductor"


@dataclass(frozen=True)
class Counts:
    """What the compiler has done in this process so far."""

    frames: int  # pieces of Python that were traced, each time that one was
    graphs: int  # made of them; a graph break makes two of one
    graph_breaks: int
    cache_hits: int  # look-ups in the compile cache that found their code
    cache_misses: int

    @classmethod
    def now(cls) -> Counts:
        from torch._dynamo.utils import counters

        inductor, autograd = counters["inductor"], counters["aot_autograd"]
        return cls(
            frames=counters["frames"]["total"],
            graphs=counters["stats"]["unique_graphs"],
            graph_breaks=sum(counters["graph_break"].values()),
            cache_hits=inductor["fxgraph_cache_hit"] + autograd["autograd_cache_hit"],
            cache_misses=inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
        )

    def since(self, start: Counts) -> Counts:
        return Counts(*(getattr(self, n) - getattr(start, n) for n in Counts.__annotations__))


@dataclass
class Compilation:
    """What is compiled for one training; nothing where the settings say `none`."""

    layers: dict[str, int] = field(default_factory=dict)  # of each model or pass, by its name
    modules: list[torch.nn.Module] = field(default_factory=list)
    start: Counts | None = None  # None: nothing is compiled
    before_clock: Counts | None = None
    in_clock: Counts | None = None

    @property
    def compiles(self) -> bool:
        return self.start is not None

    def add(self, name: str, model: torch.nn.Module, *, dynamic: bool) -> None:
        """Compile a model's decoder layers, at their first call.

        `dynamic`: one graph for all shapes; else one for each, the faster one.
        """
        if self.start is None:
            return
        found = compile_layers(model, dynamic=dynamic)
        self.layers[name] = len(found)
        self.modules += found

    def clock_starts(self) -> None:
        """Everything should be compiled: from here on nothing may be."""
        if self.start is not None:
            self.before_clock = Counts.now().since(self.start)

    def clock_stops(self) -> None:
        if self.start is not None and self.before_clock is not None:
            self.in_clock = Counts.now().since(self.start).since(self.before_clock)

    def described(self) -> dict[str, Any] | None:
        """For a record; None where nothing is compiled."""
        if self.before_clock is None or self.in_clock is None:
            return None
        before = self.before_clock
        return {
            "layers": self.layers,
            "frames": before.frames,
            "graphs": before.graphs,
            "graph_breaks": before.graph_breaks + self.in_clock.graph_breaks,
            "recompilations_in_training": self.in_clock.frames,
            "cache": cache_state(before.cache_hits, before.cache_misses),
            "cache_hits": before.cache_hits,
            "cache_misses": before.cache_misses,
        }


def cache_state(hits: int, misses: int) -> str:
    """cold: all was compiled here; warm: all came from the cache; partly warm: some of it."""
    if misses == 0 and hits > 0:
        return "warm"
    return "partly warm" if hits > 0 else "cold"


def compile_layers(model: torch.nn.Module, *, dynamic: bool) -> list[torch.nn.Module]:
    """The layers, which are compiled at their first call; a copy of one is eager."""
    found = decoder_layers(model)
    for layer in found:
        layer.compile(backend=BACKEND, dynamic=dynamic)
    return found


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that a transformer repeats. Raises: UserError where it has none to be found."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no decoder layers that transformers marks as such:"
            " leave out --compile and --sharding"
        )
    return found


@contextmanager
def compiling(how: str) -> Iterator[Compilation]:
    """Inside, models that are added to it are compiled; at the end all are eager again.

    What comes after a training (evaluation of all lengths, generation, counting of operations) has
    other shapes, each of which would be compiled.
    """
    if how == "none":
        yield Compilation()
        return
    import torch._dynamo
    import torch._inductor.config

    compilation = Compilation(start=Counts.now())
    with (
        torch._dynamo.config.patch(
            recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True
        ),
        # C++ compilers as children of this process, so that their CPU time is its own
        torch._inductor.config.patch(compile_threads=1),
    ):  # fmt: skip
        try:
            yield compilation
        finally:
            for module in compilation.modules:
                module._compiled_call_impl = None
