"""Every field of Settings as an option: of `pytest bench` and of `peftbench train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from peftbench.case import CHOICES, Settings, parse_bytes

HELP = {
    "engine": "native: one loop for all methods; trl: the same cases through TRL's trainers",
    "data": "tinywiki, wikipedia-sample, wikitext-2, wikitext-103, a Hub data set, or a local path",
    "weights": "random: build the model from its config; quality is then not measured",
    "gpu_memory_limit_bytes": "for example 24GiB: train as if on such a card (emulated)",
    "host_memory_limit_bytes": "for example 8GiB: what a round may take beyond its imports",
    "pairs": "preference pairs that every method trains on",
    "time_budget_s": "stop training after so many seconds (0: the pairs are the budget)",
    "infer_turns": "turns of each model in an inference case; more narrow the interval",
    "infer_merge_4bit": "inference: merge qlora as well, over its base dequantised",
    "tasks": "comma-separated: local tasks, lm-evaluation-harness's, or YAML files of its format",
    "task_items": "the first so many items of each task (0: all)",
    "compile": "layers: torch.compile of every decoder layer; its time is compile_s",
    "learning_rate": "one value for all cases (0: the table's, by adapter and method)",
}
KINDS: dict[str, type] = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class SettingOption:
    """One option. `kind` turns its text into a value; None: it is a switch."""

    setting: str
    flag: str
    dest: str
    kind: Callable[[str], Any] | None
    help: str


def size(text: str) -> int:
    """Of a memory option; argparse shows the sentence of an ArgumentTypeError only."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(name: str, annotation: str) -> SettingOption:
    choices = f" ({' | '.join(CHOICES[name])})" if name in CHOICES else ""
    kind = size if name.endswith("_bytes") else KINDS.get(annotation)
    return SettingOption(
        name,
        "--" + name.removesuffix("_s").removesuffix("_bytes").replace("_", "-"),
        f"peftbench_{name}",
        kind,
        HELP.get(name, name.replace("_", " ")) + choices,
    )


SETTING_OPTIONS = tuple(_option(f.name, str(f.type)) for f in fields(Settings))


TRAIN_OPTIONS = tuple(o for o in SETTING_OPTIONS if not o.setting.startswith("infer_"))


def add_setting_options(
    add: Callable[..., Any], options: tuple[SettingOption, ...] = SETTING_OPTIONS
) -> None:
    """Every option, None where it is not given; `add` is argparse's or pytest's own."""
    for option in options:
        if option.kind is None:
            add(option.flag, action="store_true", default=None, dest=option.dest, help=option.help)
        else:
            add(option.flag, type=option.kind, default=None, dest=option.dest, help=option.help)
