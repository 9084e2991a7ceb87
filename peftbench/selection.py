"""Which cases a preset and the options beside it make: for pytest and for `peftbench plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftbench.adapters import ADAPTERS
from peftbench.case import AXES, PRESETS, Case, Preset, check_ppo, check_settings
from peftbench.errors import UserError, check_names
from peftbench.methods import INFER, METHODS, uses_ppo
from peftbench.models import resolved

# By the strings that a test's parameters are: the model's public name, the adapter, the method.
Cases = dict[tuple[str, str, str], Case]


def names_of(axis: str, given: str | None) -> tuple[str, ...]:
    """The names that an axis's option asks for; none where it is not given. Raises: UserError."""
    if given is None:
        return ()
    names = tuple(dict.fromkeys(n.strip() for n in given.split(",") if n.strip()))
    if not names:
        raise UserError(f"--{axis} is empty; give at least one name")
    return names


def is_asked(cell: tuple[str, str, str], asked: list[tuple[str, ...]]) -> bool:
    """Whether a preset's single cell has, on each axis that an option names, one of its names."""
    return all(not names or name in names for name, names in zip(cell, asked, strict=True))


def select(
    name: str,
    axes: Mapping[str, str | None],
    options: Mapping[str, Any],
    rounds: int | None,
) -> tuple[Preset, Cases]:
    """The preset with the options applied, and its cases in order.

    `axes` are the options' texts by AXES, `options` settings in the place of the preset's.
    Raises: UserError for the first value that cannot work.
    """
    check_names("preset", [name], PRESETS)
    preset = PRESETS[name]
    asked = [names_of(axis, axes[axis]) for axis in AXES]
    preset = Preset(
        asked[0] or preset.models,
        asked[1] or preset.adapters,
        asked[2] or preset.methods,
        replace(preset.settings, **options),
        preset.rounds if rounds is None else rounds,
        extra=tuple(cell for cell in preset.extra if is_asked(cell, asked)),
        ppo={**preset.ppo, **options} if preset.ppo else {},
    )
    check_names("adapter", preset.adapters, ADAPTERS)
    check_names("method", preset.methods, (*METHODS, INFER))
    if preset.rounds < 1:
        raise UserError(f"rounds is {preset.rounds}; it must be at least 1")
    check_settings(preset.settings)
    cases: Cases = {}
    for cell in preset.cells():
        settings = preset.settings_of(cell[2])
        if uses_ppo(cell[2]):
            check_settings(settings)
            check_ppo(settings)
        case = resolved(Case(*cell, settings))
        public = case.public()
        key = (public.model, public.adapter, public.method)
        if key in cases:
            raise UserError(
                f"models {cases[key].model!r} and {case.model!r} have one name, {public.model!r}:"
                " their records could not be told apart; rename a folder, or run one at a time"
            )
        cases[key] = case
    return preset, cases
