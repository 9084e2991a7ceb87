"""One stage of a training on disk, so that an interrupted one goes on as if nothing had happened.

One safetensors file a stage: trained parameters, the optimiser's moments, the losses; what is no
tensor is JSON in its header. No pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peftbench.errors import UserError
from peftbench.record import replacing
from peftbench.training import TrainingState

HEADER = "peftbench"  # the key of the JSON in the file's metadata
ANEW = "begin anew with --overwrite"
VERSION = 1


def checkpoint_file(folder: Path, stage: str) -> Path:
    return folder / f"checkpoint-{stage}.safetensors"


def write_checkpoint(file: Path, state: TrainingState) -> None:
    """Replace the file by the state as it is: either the old content or all of the new is there."""
    tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(state.parameters)}
    tensors |= {f"other.{i}": t.detach() for i, t in enumerate(state.others)}
    if state.losses:
        tensors["losses"] = torch.stack(state.losses)
    numbers: dict[str, dict[str, Any]] = {}
    for i, parameter in enumerate(state.parameters):
        for name, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{i}.{name}"] = value.detach()
            else:
                numbers.setdefault(str(i), {})[name] = value
    header = {
        "version": VERSION, "stage": state.stage, "step": state.step, "steps": state.steps,
        "tokens": state.tokens, "schedule": state.schedule.state_dict(), "optimizer": numbers,
        "history": state.history,
    }  # fmt: skip
    held = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    with replacing(file) as unfinished:
        save_file(held, unfinished, metadata={HEADER: json.dumps(header)})


def steps_done(file: Path) -> tuple[int, int]:
    """(steps that the checkpoint holds, steps of the whole stage)."""
    header, _ = _read(file, header_only=True)
    return int(header["step"]), int(header["steps"])


def restore(file: Path, state: TrainingState) -> None:
    """Put the file's content into parameters, optimiser, schedule and the rest, in place.

    Raises: UserError for a file that is damaged or of another training.
    """
    header, tensors = _read(file)
    shapes = {f"parameter.{i}": p.shape for i, p in enumerate(state.parameters)}
    found = {n: t.shape for n, t in tensors.items() if n.startswith("parameter.")}
    if (header["stage"], header["steps"], found) != (state.stage, state.steps, shapes):
        raise UserError(
            f"{file.name} is of another training: {header['stage']}, {header['steps']} steps,"
            f" {len(found)} tensors; remove it, or give the settings that it was begun with"
        )
    with torch.no_grad():
        for i, parameter in enumerate(state.parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
        for i, other in enumerate(state.others):
            other.copy_(tensors[f"other.{i}"])
    moments: dict[int, dict[str, Any]] = {
        int(i): dict(numbers) for i, numbers in header["optimizer"].items()
    }
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            moments.setdefault(int(number), {})[key] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.schedule.load_state_dict(header["schedule"])
    for group, rate in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    device = state.parameters[0].device
    state.step, state.tokens = header["step"], header["tokens"]
    state.history = header["history"]
    state.losses = list(tensors["losses"].to(device)) if "losses" in tensors else []


def _read(
    file: Path, *, header_only: bool = False
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors, {} where only the header is asked for."""
    # for torch it opens the file a second time by its name, and a training may have replaced it
    framework = "numpy" if header_only else "pt"
    try:
        with safe_open(file, framework=framework) as opened:
            header = json.loads((opened.metadata() or {})[HEADER])
            names = [] if header_only else opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{str(file)!r} is damaged ({error}); {ANEW}") from None
    if header["version"] != VERSION:
        raise UserError(
            f"{str(file)!r} has version {header['version']}, this peftbench reads {VERSION}: {ANEW}"
        )
    return header, tensors
