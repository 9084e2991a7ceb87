"""TRL 1.16's side of the SFT, DPO and ORPO comparison, through the engine that a case runs with
`--engine trl`: the same ids, order, optimiser and precision, TRL's own trainers.
"""

from __future__ import annotations

import importlib
import itertools
import json
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from own_pairs import load, settings_of, task_of
from transformers import TrainerCallback
from work import Meter, PairsWork, read_arguments

from peftbench import adapters, pipeline, trl_engine


class Clock(TrainerCallback):  # type: ignore[misc]
    """A step ends where the next begins: collating its batch is part of it."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())


def main() -> None:
    values, outcome_file = read_arguments()
    work = PairsWork(**values)
    settings = replace(settings_of(work), engine="trl", gradient_checkpointing=work.trl_defaults)
    torch.set_num_threads(work.threads)
    pipeline.import_libraries(settings)
    importlib.import_module("trl.experimental.orpo")
    meter = Meter()
    torch.manual_seed(work.seed)
    model = load(work, settings)
    losses: list[torch.Tensor] = []
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_engine.build_trainer(
            model, task_of(work), settings, work.method, folder, losses
        )
        trainer.add_callback(clock)
        meter.start()
        started_s = time.perf_counter()
        if work.method == "dpo" and work.precomputed_reference:
            trl_engine.add_reference(trainer, settings, adapters.adapter_off(model))
        elif work.method == "dpo":
            trainer.precompute_ref_logps = False  # the adapter off, inside every step
        reference_s = time.perf_counter() - started_s
        trainer.train()
        meter.stop()
    outcome = {
        "step_s": [b - a for a, b in itertools.pairwise(clock.marks)],
        "reference_s": reference_s if work.method == "dpo" else 0.0,
        "losses": [float(loss) for loss in losses],
        **meter.outcome(),
        "trainable_params": adapters.count_params(model)[1],
    }
    outcome_file.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
