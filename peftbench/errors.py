"""The one exception that a user's mistake raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 24  # that are listed in an error


class UserError(ValueError):
    """A mistake in what the user gave: one line with the problem, the value, and what to do next.

    The command line prints it without a traceback and exits with 2; pytest turns it into its own
    usage error, exit code 4.
    """


class InvalidTrainingError(RuntimeError):
    """A loss or a reward that is not finite: the case ran, its numbers mean nothing."""


class InvalidInferenceError(RuntimeError):
    """Two models that must answer alike do not: their times are not of the same work."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that no table has, with the nearest names first; of many not all."""
    names = sorted(allowed)
    shown = names if len(names) <= MOST_NAMES else [*names[:5], f"... ({len(names)} in all)"]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown {kind} {name!r}; {hint}choose from: {', '.join(shown)}")


def check_names(kind: str, names: Iterable[str], table: Iterable[str]) -> None:
    """Raise UserError for the first name that a table has not."""
    allowed = set(table)
    for name in names:
        if name not in allowed:
            raise unknown_name(kind, name, allowed)
