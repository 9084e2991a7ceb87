"""peftbench's side of the SFT, DPO and ORPO comparison: `training.train`, every case's loop."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import Any

import torch
from machine import time_machine
from work import Meter, PairsWork, read_arguments

from peftbench import adapters, models, pipeline, training
from peftbench.case import Settings
from peftbench.compiling import compiling
from peftbench.data.task import TokenPair, TokenTask
from peftbench.measuring.flops import count_flops
from peftbench.methods import METHODS

CPU = torch.device("cpu")


class Clock:
    """How long the reference and the compiling take; the steps time themselves."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.taken_s = {"reference": 0.0, "compile": 0.0}
        self._now: str | None = None
        self._started_s = 0.0

    def _go_on_with(self, name: str | None) -> None:
        at_s = time.perf_counter()
        if self._now is not None:
            self.taken_s[self._now] += at_s - self._started_s
        self._now, self._started_s = name, at_s

    def prepared(self) -> None:
        self._go_on_with("reference")

    def stage(self, name: str) -> None:
        assert name == "compile"
        self._go_on_with(name)

    def reference_done(self) -> None:
        self._go_on_with(None)

    def warmed_up(self) -> None:
        pass

    def trained(self) -> None:
        self.meter.stop()


def settings_of(work: PairsWork) -> Settings:
    return Settings(
        device="cpu", threads=work.threads, dtype=work.dtype, targets="qv", rank=work.rank,
        alpha=work.alpha, pairs=len(work.pairs), batch_size=work.batch_size, warmup_steps=1,
        learning_rate=work.learning_rate, weights=work.weights, seed=work.seed,
        compile=work.compile,
    )  # fmt: skip


def task_of(work: PairsWork) -> TokenTask:
    rows = tuple(TokenPair(*map(tuple, pair)) for pair in work.pairs)
    return TokenTask("peers", "", rows, (), (), (), 0, None, 0, 0)


def load(work: PairsWork, settings: Settings) -> Any:
    model = models.load_model(
        work.model, weights=work.weights, dtype=getattr(torch, work.dtype),
        device=torch.device("cpu"), quantize=None, seed=work.seed,
    )  # fmt: skip
    models.disable_dropout(model)
    return adapters.attach(model, "lora", settings)


def main() -> None:
    values, outcome_file = read_arguments()
    work = PairsWork(**values)
    settings = settings_of(work)
    torch.set_num_threads(work.threads)
    pipeline.import_libraries(settings)
    meter = Meter()
    torch.manual_seed(work.seed)
    model = load(work, settings)
    reference = adapters.adapter_off(model) if work.method == "dpo" else nullcontext()
    clock = Clock(meter)
    meter.start()
    with compiling(settings.compile) as compilation:
        found = training.train(
            model, task_of(work), settings, work.method, clock, reference, compilation=compilation
        )
    compiled = compilation.described()
    if compiled is not None and compiled["recompilations_in_training"]:
        raise RuntimeError(f"compiled while the steps were timed: {compiled}")
    outcome = {
        "step_s": found.step_s,
        "reference_s": clock.taken_s["reference"],
        "compile_s": clock.taken_s["compile"],
        "compilation": compiled,
        "losses": found.losses,
        **meter.outcome(),
        "trainable_params": adapters.count_params(model)[1],
        "shared_prompts": found.shared_prompts,
        **floor(model, work, settings, found.shared_prompts),
    }
    outcome_file.write_text(json.dumps(outcome))


def floor(
    model: Any, work: PairsWork, settings: Settings, shared_prompts: bool
) -> dict[str, float]:
    """Seconds that the operations of a step and of its reference take at the matmul rate."""
    sides = METHODS[work.method].sides
    window = training.build_windows(task_of(work), settings, sides, CPU, shared_prompts)[0]
    one, batch = task_of(work).train[: work.batch_size], window.batches[0]
    zeros = torch.zeros(work.batch_size)

    def step() -> torch.Tensor:
        return training.batch_loss(
            model, batch, work.method, settings,
            window_tokens=sum(len(pair.chosen) for pair in one), reference=zeros,
        )  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"):
        forward = count_flops(step)
        both = count_flops(lambda: torch.autograd.backward(step()))
    machine = time_machine(getattr(torch, work.dtype))
    rate = machine["matmul_flops_per_s"]
    reference = forward if work.method == "dpo" else 0
    return machine | {"step_floor_s": both / rate, "reference_floor_s": reference / rate}


if __name__ == "__main__":
    main()
