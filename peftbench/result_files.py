"""What peftbench wrote, read again: a session's file, or one round's of `--results-dir`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from peftbench import __version__
from peftbench.errors import UserError
from peftbench.metrics import METRICS
from peftbench.record import FORMAT

GIVE_FILE = "give a file that `pytest bench --benchmark-json=FILE` wrote"
GIVE = f"{GIVE_FILE}, or a folder of them"


def read_json(path: Path, give: str = GIVE) -> Any:
    """Raises: UserError for what cannot be read or is no JSON; it ends with what to `give` instead.

    NaN and infinities, which are no JSON, are read: who compares says where they stand.
    """
    try:
        content = path.read_bytes()
        try:
            return orjson.loads(content)  # four times as fast as the standard library's
        except orjson.JSONDecodeError:
            return json.loads(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}); {give}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}); {give}") from None


@contextmanager
def reading(*paths: Path, give: str = GIVE) -> Iterator[None]:
    """What goes wrong inside is a UserError that names the files and says what to give instead."""
    names = ", ".join(repr(str(path)) for path in paths)
    try:
        yield
    except UserError as error:
        raise UserError(f"{names} {error}; {give}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise UserError(f"{names} is damaged ({detail}); {give}") from None


def session_part(data: Any) -> dict[str, Any]:
    """What the session says of itself; {} for one round's file."""
    found: dict[str, Any] = data.get("peftbench") or {}
    return found


def case_records(data: Any) -> list[dict[str, Any]]:
    """The record of every case, in the file's order; what did not end ok has its short row.

    Raises: UserError, without the file's name, for JSON that is not ours, newer, without a case, or
    with one that is ok and has no numbers; KeyError, TypeError or AttributeError for ours that is
    damaged otherwise.
    """
    ours = data.get("peftbench") if isinstance(data, dict) else None
    if isinstance(ours, dict) and "format" in ours:
        check_format(ours["format"])
        full = [b.get("extra_info", {}) for b in data["benchmarks"]]
        by_key = {(r["case_id"], r["case_hash"]): r for r in full if "case_id" in r}
        records = [by_key.get((c["case_id"], c["case_hash"]), c) for c in ours.get("cases", [])]
        listed = {(r["case_id"], r["case_hash"]) for r in records}
        records += [r for key, r in by_key.items() if key not in listed]
    elif isinstance(data, dict) and {"format", "case_id", "status"} <= set(data):
        check_format(data["format"])
        records = [data]
    else:
        raise UserError("is JSON, but not of peftbench")
    if not records:
        raise UserError("holds no case: the run ended before its first one")
    for record in records:
        measured = record.get("rounds") or [record]
        if record["status"] == "ok" and not any(name in r for r in measured for name in METRICS):
            raise UserError(f"is damaged: {record['case_id']} is ok but has no record in it")
    return records


def check_format(found: Any) -> None:
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise UserError(
            f"has format {found!r}; peftbench {__version__} reads 1 to {FORMAT}: upgrade peftbench"
        )
