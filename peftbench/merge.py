"""`peftbench merge`: the files of a run's shards as the one file that an undivided run writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftbench.errors import UserError
from peftbench.record import dumps, write_atomically
from peftbench.result_files import GIVE_FILE, case_records, read_json, reading, session_part
from peftbench.resume import provenance_difference


def merge(paths: Sequence[Path], output: Path, *, partial: bool = False) -> int:
    """Write `output`, the shards' benchmarks and statuses in one; how many cases it has.

    Nothing is computed anew: a case's record is the shard's, byte for byte.
    Raises: UserError for files that are not the shards of one run, or not all of them (unless
    `partial`), or that were made by different code.
    """
    files = sorted(((path, _read(path)) for path in paths), key=lambda item: _index(*item))
    _check_shards(files, partial=partial)
    _check_code(files)
    first = files[0][1]
    ours = [session_part(data) for _, data in files]
    merged = first | {
        "benchmarks": [b for _, data in files for b in data["benchmarks"]],
        "peftbench": {
            **{k: v for k, v in ours[0].items() if k not in ("shard", "run_id")},
            "run_id": " ".join(part["run_id"] for part in ours),
            "sentinels": {
                f"{moment} of shard {part['shard']['index']}": found
                for part in ours
                for moment, found in part["sentinels"].items()
            },
            "bases": [base for part in ours for base in part["bases"]],
            "cases": [case for part in ours for case in part["cases"]],
        },
    }
    try:
        write_atomically(output, dumps(merged))
    except OSError as error:
        raise UserError(f"--output {str(output)!r} cannot be written ({error.strerror})") from None
    return len(merged["peftbench"]["cases"])


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path, GIVE_FILE)
    with reading(path, give=GIVE_FILE):
        case_records(data)
        if not isinstance(session_part(data).get("shard"), dict):
            raise UserError("is no shard: it was not run with --shard")
        found: dict[str, Any] = data
        return found


def _index(path: Path, data: dict[str, Any]) -> int:
    with reading(path):
        return int(session_part(data)["shard"]["index"])


def _check_shards(files: Sequence[tuple[Path, dict[str, Any]]], *, partial: bool) -> None:
    """Each shard once, all of one division of one list of cases."""
    (first, whole), *others = [(path, session_part(data)["shard"]) for path, data in files]
    seen = {whole["index"]: first}
    for path, shard in others:
        for name, what in (("count", "shards"), ("all_cases_digest", "cases")):
            if shard[name] != whole[name]:
                raise UserError(
                    f"{str(first)!r} and {str(path)!r} are not of one run: their {what} differ;"
                    " give every shard the same preset, options and --expected-times"
                )
        if shard["index"] in seen:
            raise UserError(
                f"{str(seen[shard['index']])!r} and {str(path)!r} are both shard"
                f" {shard['index']}/{shard['count']}; give one of them"
            )
        seen[shard["index"]] = path
    missing = [str(i) for i in range(1, whole["count"] + 1) if i not in seen]
    if missing and not partial:
        raise UserError(
            f"of {whole['count']} shards there is no {', '.join(missing)}; give their files too,"
            " or --partial to go without"
        )


def _check_code(files: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """The same commit, libraries and definitions of the metrics in all."""
    known = [(path, data, _provenance(data)) for path, data in files]
    first, first_data, then = known[0]
    for path, data, now in known[1:]:
        difference = None
        if session_part(data)["metric_versions"] != session_part(first_data)["metric_versions"]:
            difference = "their metrics have different definitions"
        elif then is not None and now is not None:
            # shards may run on different machines: compare tells those apart by case
            difference = provenance_difference(then, now, other_machine=True)
        if difference is not None:
            raise UserError(f"{str(first)!r} and {str(path)!r} cannot be one session: {difference}")


def _provenance(data: dict[str, Any]) -> dict[str, Any] | None:
    """That of the first case that has one; a shard whose cases all failed has none."""
    records = case_records(data)
    return next((r["provenance"] for r in records if r.get("provenance")), None)
