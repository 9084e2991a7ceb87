"""`peftbench export`: result files as one table, a row for each round."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftbench.compare.order import files_below
from peftbench.errors import UserError
from peftbench.metrics import METRICS
from peftbench.record import replacing, write_atomically
from peftbench.result_files import case_records, read_json, reading

FORMATS = (".csv", ".parquet")
FACTS = ("file", "run_id", "case_id", "case_hash", "model", "adapter", "method", "status", "reason",
         "seed", "start_unix_s", "disturbed", "device", "cpu", "commit", "peftbench", "data",
         "data_digest", "weights_hash")  # fmt: skip
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
COLUMNS = (*FACTS, *(f"{name}_version" for name in LIBRARIES), *METRICS)


def rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every round of every case, with COLUMNS as keys; a case without a record is one row.

    What was not measured is None. `pandas.DataFrame(rows(paths))` is the table.
    Raises: UserError for a path that is no result file, and no folder of them.
    """
    found = []
    for path in paths:
        for file in files_below(path) if path.is_dir() else [path]:
            data = read_json(file)
            with reading(file):
                for record in case_records(data):
                    found += [
                        row_of(file.name, record, entry)
                        for entry in record.get("rounds") or [record]
                    ]
    return found


def row_of(file: str, record: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """One round. What all rounds of a case share is in its record."""
    case, where = record.get("case") or {}, record.get("provenance") or {}
    both = record | entry
    facts = {name: both.get(name) for name in FACTS}
    facts |= {axis: case.get(axis) for axis in ("model", "adapter", "method")}
    facts |= {
        "file": file, "status": record["status"], "disturbed": bool(entry.get("disturbances")),
        "cpu": where.get("cpu"), "commit": where.get("commit"),
        "peftbench": where.get("peftbench"),
    }  # fmt: skip
    versions = where.get("libraries") or {}
    facts |= {f"{name}_version": versions.get(name) for name in LIBRARIES}
    return facts | {name: entry.get(name) for name in METRICS}


def export(paths: Sequence[Path], output: Path) -> int:
    """Write the table; how many rows it has. Raises: UserError for an ending that is no format."""
    if output.suffix not in FORMATS:
        raise UserError(
            f"--output {output.name!r} must end in {' or '.join(FORMATS)}, which is its format"
        )
    table = rows(paths)
    try:
        if output.suffix == ".csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
            write_atomically(output, text.getvalue())
        else:
            write_parquet(table, output)
    except OSError as error:
        raise UserError(
            f"--output {str(output)!r} cannot be written ({error.strerror or error})"
        ) from None
    return len(table)


def write_parquet(table: list[dict[str, Any]], output: Path) -> None:
    """Metrics as float64, the rest by what they hold."""
    import pyarrow
    import pyarrow.parquet

    numbers = {"start_unix_s", *METRICS}
    kinds = {"seed": pyarrow.int64(), "disturbed": pyarrow.bool_()}
    schema = pyarrow.schema([
        (name, kinds.get(name, pyarrow.float64() if name in numbers else pyarrow.string()))
        for name in COLUMNS
    ])  # fmt: skip
    floats = [
        {k: float(v) if k in numbers and v is not None else v for k, v in row.items()}
        for row in table
    ]
    with replacing(output) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(floats, schema), unfinished)
