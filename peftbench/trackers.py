"""`--report-to`: a training's losses and metrics in TensorBoard, Weights & Biases or Trackio.

Each goes through accelerate's own class for it; here is what they are given: names, configuration,
rows by step, the final metrics. `train` reports while it runs, `pytest bench` when all is measured
(round_reports.py). Where an account's key is needed, the library finds it as it always does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.errors import UserError, unknown_name
from peftbench.methods import stages
from peftbench.metrics import METRICS
from peftbench.privacy import without_paths, without_secrets

if TYPE_CHECKING:
    from peftbench.training import TrainingState

TRACKERS = ("tensorboard", "trackio", "wandb")  # by the names of their packages
HELP = f"{', '.join(TRACKERS)}: comma-separated trackers of losses and metrics (default: none)"
PROJECT = "peftbench"
FOLDERS = ("tensorboard", "wandb")  # what they write beside our files, JSON among it
# Weights & Biases would collect where the program lies, the host's name and the repository's
# address, and take over the terminal: what a record says of the machine is in the configuration.
WANDB_SETTINGS = {
    "console": "off", "host": "", "disable_git": True, "x_disable_meta": True,
    "x_save_requirements": False,
}  # fmt: skip


def tracker_names(text: str) -> tuple[str, ...]:
    """The trackers of a `--report-to`, each installed; () for `none`. Raises: UserError."""
    names = tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    if names == ("none",):
        return ()
    if not names:
        raise UserError(f"--report-to is empty; choose from: none, {', '.join(TRACKERS)}")
    for name in names:
        if name == "none" and len(names) > 1:
            raise UserError("--report-to names 'none' beside others; leave it out")
        if name not in TRACKERS:
            raise unknown_name("tracker", name, ("none", *TRACKERS))
        if find_spec(name) is None:
            raise UserError(f"--report-to {name} needs a package: pip install {name}")
    return names


def run_name(case_id: str, provenance: dict[str, Any]) -> str:
    """`tiny-gpt2-lora-dpo-5641034a1b2c`: the case and the commit, else the version."""
    commit = provenance["commit"]
    return f"{case_id}-{commit[:12] if commit else provenance['peftbench']}"


def configuration(
    case: dict[str, Any], case_hash: str, provenance: dict[str, Any], **more: str | int
) -> dict[str, str | int | float | bool]:
    """Axes, settings, code and libraries in one flat dictionary without nulls.

    `case` and `provenance` are as records hold them: without paths of this machine.
    """
    axes = {k: v for k, v in case.items() if k != "settings"}
    found = {**axes, **case["settings"], "case_hash": case_hash, **more}
    found |= {n: provenance[n] for n in ("peftbench", "commit", "commit_dirty", "cpu", "python")}
    found |= {f"version/{name}": version for name, version in provenance["libraries"].items()}
    return {name: value for name, value in found.items() if value is not None}


def final_values(
    metrics: dict[str, Any], null_reasons: dict[str, str] | None = None
) -> dict[str, float | int | str]:
    """What stands at the end: `final/<metric>` for each that was measured, and all of them in one
    Markdown table with their units, a null with its reason."""
    found: dict[str, float | int | str] = {}
    lines = ["| metric | value | unit |", "|---|---|---|"]
    for name, metric in METRICS.items():
        value = metrics.get(name)
        if value is not None:
            found[f"final/{name}"] = value
            lines.append(f"| {name} | {value} | {metric.unit} |")
        # what its kind of case does not measure is in neither
        elif null_reasons is not None and name in null_reasons:
            lines.append(f"| {name} | ({null_reasons[name]}) | {metric.unit} |")
    return found | {"metric_table": "\n".join(lines)}


def step_rows(record: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """(optimiser step from 1, its values) of a round's record.

    Tokens per second are a step's own. Of PPO they are an update's, with its rollout and scoring,
    and stand at its last step beside what the update says of itself.
    """
    history = record["ppo_history"] or []
    steps_an_update = len(record["losses"]) // len(history) if history else 0
    rows = []
    for index, loss in enumerate(record["losses"]):
        values = {"train/loss": loss, "train/learning_rate": record["step_learning_rates"][index]}
        if not history:
            values["train/tokens_per_s"] = record["step_tokens"][index] / record["step_s"][index]
        elif (index + 1) % steps_an_update == 0:
            update = history[index // steps_an_update]
            tokens = sum(record["step_tokens"][index + 1 - steps_an_update : index + 1])
            values["train/tokens_per_s"] = tokens / update_s(update)
            values |= update_values(update)
        rows.append((index + 1, values))
    return rows


def update_s(update: dict[str, Any]) -> float:
    """Wall time of one of PPO's updates, all of its parts."""
    return float(update["rollout_s"] + update["score_s"] + update["update_s"])


def update_values(update: dict[str, Any]) -> dict[str, float]:
    return {f"ppo/{k}": v for k, v in update.items() if v is not None and k != "update"}


def open_tracker(
    name: str, run: str, folder: Path, config: dict[str, Any], *, live: bool,
    cpu: bool = True, identity: str | None = None, resumed: bool = False,
) -> Any:  # fmt: skip
    """A started tracker of accelerate, given the run's configuration.

    TensorBoard and Weights & Biases write under `folder`, Trackio where it always does. `live` lets
    them watch this machine meanwhile: a run that is told afterwards has nothing to watch.
    `identity` is the run's own, so that a `resumed` training goes on in it.
    Raises: UserError where the tracker cannot start.
    """
    from accelerate import PartialState, tracking

    PartialState(cpu=cpu)  # the classes ask it which process they are in
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker(run, folder / "tensorboard")
    elif name == "wandb":
        tracker = tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT), name=run, id=identity,
            resume="allow" if resumed else None, dir=os.environ.get("WANDB_DIR", str(folder)),
            settings=WANDB_SETTINGS | {"x_disable_stats": not live, "silent": not live},
        )  # fmt: skip
    else:
        watch = None if live else False  # None: where it can
        tracker = tracking.TrackioTracker(
            PROJECT, name=run, resume="allow" if resumed else "never", auto_log_gpu=watch,
            auto_log_cpu=watch,
        )  # fmt: skip
    with failures_of(name):
        tracker.start()
        tracker.store_init_configuration(config)
    return tracker


@contextmanager
def failures_of(name: str) -> Iterator[None]:
    """What a tracker cannot do (no key, no network, a full disk) is one line."""
    kinds: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError)
    if name == "wandb":
        from wandb.errors import Error

        kinds = (*kinds, Error)
    elif name == "trackio":
        from huggingface_hub.errors import HTTPError

        kinds = (*kinds, HTTPError)
    try:
        yield
    except kinds as error:
        reason = " ".join(without_paths(without_secrets(str(error))).split())[:200]
        raise UserError(f"--report-to {name}: {reason or type(error).__name__}") from None


class LiveRun:
    """A training's run in each of its trackers, while it goes on: a `Keeper`'s companion.

    A tracker that fails on the way is left out with a line: the training is worth more.
    """

    def __init__(self, method: str, say: Callable[[str], None]) -> None:
        self._trackers: dict[str, Any] = {}
        self._last_stage = stages(method)[-1]
        self._say = say
        self._before = 0  # optimiser steps of earlier stages
        self._logged = 0  # of this stage
        self._tokens = 0
        self._since_s = time.monotonic()

    def add(self, name: str, tracker: Any) -> None:
        """A tracker that `open_tracker` has started."""
        self._trackers[name] = tracker

    def begin(self, state: TrainingState) -> None:
        """A stage begins, or goes on where it was."""
        self._before += self._logged
        self._logged, self._tokens = len(state.losses), state.tokens
        self._since_s = time.monotonic()

    def step_done(self, state: TrainingState) -> None:
        """Log what the step has added: one loss, or those of an update of PPO."""
        if not self._trackers:
            return
        from peftbench.training import rates_of

        prefix = "train" if state.stage == self._last_stage else state.stage
        rates = rates_of(state.schedule, len(state.losses))
        first, losses = self._logged, [float(x) for x in state.losses[self._logged :]]
        seconds = time.monotonic() - self._since_s  # those losses have waited for the device
        for index, loss in enumerate(losses, start=first):
            rate = rates[index]
            values = {f"{prefix}/loss": loss, f"{prefix}/learning_rate": rate}
            if index == first + len(losses) - 1:
                values[f"{prefix}/tokens_per_s"] = (state.tokens - self._tokens) / seconds
                values |= update_values(state.history[-1]) if state.history else {}
            self.log(values, self._before + index + 1)
        self._logged, self._tokens = len(state.losses), state.tokens

    def resume_clock(self) -> None:
        """The next step begins: what was done after the last one is not its time."""
        self._since_s = time.monotonic()

    def finished(self, metrics: dict[str, Any]) -> None:
        self.log(final_values(metrics), self._before + self._logged)

    def log(self, values: dict[str, Any], step: int) -> None:
        for name in list(self._trackers):
            self._guarded(name, lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        for name in list(self._trackers):
            self._guarded(name, lambda tracker: tracker.finish())

    def _guarded(self, name: str, call: Callable[[Any], None]) -> None:
        try:
            with failures_of(name):
                call(self._trackers[name])
        except UserError as error:
            del self._trackers[name]
            self._say(f"{error}; it is told no more, the training goes on")
