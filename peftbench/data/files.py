"""Local files to preference pairs or documents: .txt and .tokens, .jsonl, .parquet.

Everything a user's file can have wrong ends here, in one line that names the file and the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from peftbench.data.corpus import documents_by_size, documents_by_title, has_titles
from peftbench.data.preference import COLUMNS, Pair, parse_row
from peftbench.errors import UserError

SUFFIXES = (".txt", ".tokens", ".jsonl", ".parquet")
TEXT_COLUMN = "text"

_ROLES = {
    "train": "train", "training": "train", "valid": "validation", "validation": "validation",
    "val": "validation", "dev": "validation", "test": "test", "eval": "validation",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """How much of one split is read: a huge set is not read whole for a few hundred pairs."""

    rows: int  # of a preference set; they are spread evenly over it
    characters: int  # of a corpus, from its start
    document_characters: int  # of a document made of a text file's paragraphs


@dataclass(frozen=True)
class Split:
    """One split of a data set: pairs, or documents."""

    pairs: list[Pair] | None
    documents: list[str] | None


def read_folder_or_file(path: Path, limits: Limits) -> dict[str, Split]:
    """`train` and `test` where files are named so, else all of it as `train`.

    A validation split stands in where there is no test split.
    Raises: UserError for what cannot be read.
    """
    files = _find_files(path)
    roles: dict[str, list[Path]] = {}
    for file in files:
        roles.setdefault(role_of(file.stem) or "train", []).append(file)
    held_out = roles.get("test") or roles.get("validation")
    if not held_out or "train" not in roles:
        return {"train": _read_split(files, limits)}
    splits = {
        "train": _read_split(roles["train"], limits),
        "test": _read_split(held_out, limits),
    }
    if (splits["train"].pairs is None) != (splits["test"].pairs is None):
        raise UserError(f"{path}: one of its training and test files has pairs, the other text")
    return splits


def role_of(name: str) -> str | None:
    """train, validation or test, by a word of the name (`wiki.test`, `train-00000-of-00001`)."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_ROLES[word] for word in words if word in _ROLES), None)


def _find_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        hidden = {f for f in files if any(p.startswith(".") for p in f.relative_to(path).parts)}
        files = [f for f in files if f not in hidden]
        if not files:
            raise UserError(f"folder {path} has no {', '.join(SUFFIXES)} file")
    elif path.suffix in SUFFIXES:
        files = [path]
    else:
        raise UserError(
            f"{path} is of an unknown kind {path.suffix!r}; choose from: {', '.join(SUFFIXES)}"
        )
    kinds = {".txt" if f.suffix == ".tokens" else f.suffix for f in files}
    if len(kinds) > 1:
        raise UserError(f"folder {path} has files of several kinds: {', '.join(sorted(kinds))};"
                        " name the one to use")  # fmt: skip
    return files


def _read_split(files: Sequence[Path], limits: Limits) -> Split:
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
    if files[0].suffix in (".txt", ".tokens"):
        return _checked(files[0], Split(None, _read_text_files(files, limits)))
    lines: list[str] = []
    pairs: list[Pair] = []
    for file in files:
        reader = _read_jsonl if file.suffix == ".jsonl" else _read_parquet
        for where, row in reader(file, limits):
            if "chosen" in row:
                pairs.append(parse_row(row, where))
            else:
                lines.append(_text_of(row, where))
    if pairs and lines:
        raise UserError(f"{files[0].parent}: some of its rows are pairs, others are text")
    if pairs:
        return Split(pairs, None)
    # The Hub's WikiText has a row per line, most corpora a row per document.
    lines = [line.removesuffix("\n") for line in lines]
    documents = (
        documents_by_title(lines)
        if has_titles(lines)
        else [line.strip() for line in lines if line.strip()]
    )
    return _checked(files[0], Split(None, documents))


def _checked(file: Path, split: Split) -> Split:
    if not split.documents:
        raise UserError(f"{file} holds no text")
    return split


def _read_text_files(files: Sequence[Path], limits: Limits) -> list[str]:
    documents: list[str] = []
    room = limits.characters
    for file in files:
        lines = _read_text(file, room).split("\n")
        documents += (
            documents_by_title(lines)
            if has_titles(lines)
            else documents_by_size(lines, limits.document_characters)
        )
        room = limits.characters - sum(map(len, documents))
        if room <= 0:
            break
    return documents


def _read_text(file: Path, characters: int = -1) -> str:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return opened.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}); convert it first,"
            " for example with iconv"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


Row = Mapping[str, object]
T = TypeVar("T")


def _read_jsonl(file: Path, limits: Limits) -> Iterator[tuple[str, Row]]:
    lines = [(n, line) for n, line in enumerate(_read_text(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty")
    is_pairs = _has_pairs(_parse_line(file, *lines[0]), f"{file}, line {lines[0][0]}")
    room = limits.characters
    for n, line in _spread(lines, limits.rows) if is_pairs else lines:
        row = _parse_line(file, n, line)
        where = f"{file}, line {n}"
        if _has_pairs(row, where) != is_pairs:
            raise UserError(f"{file}: line {lines[0][0]} and line {n} have different columns")
        yield where, row
        room -= 0 if is_pairs else len(line)
        if room <= 0:
            return


def _parse_line(file: Path, n: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {n} is not JSON ({error.msg}); .jsonl holds one object per line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {n} is not a JSON object; .jsonl holds one per line")
    if "\\ud" in line.lower() and not _is_text(row):
        raise UserError(
            f"{file}, line {n} has half a surrogate pair (\\ud800 to \\udfff), which is no"
            " character; write the character itself, or leave the row out"
        )
    return row


def _is_text(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: Path, limits: Limits) -> Iterator[tuple[str, Row]]:
    from pyarrow import ArrowException

    try:
        yield from _parquet_rows(file, limits)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"{file} is not a parquet file, or is damaged: {str(error).splitlines()[0]}"
        ) from error


def _parquet_rows(file: Path, limits: Limits) -> Iterator[tuple[str, Row]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    names: list[str] = table.schema_arrow.names
    is_pairs = _has_pairs(dict.fromkeys(names), str(file))
    wanted = [c for c in COLUMNS if c in names] if is_pairs else [TEXT_COLUMN]
    rows = range(table.metadata.num_rows)
    if not rows:
        raise UserError(f"{file} has no rows")
    if is_pairs:
        picked = _spread(rows, limits.rows)
        for n, row in zip(picked, table.read(wanted).take(picked).to_pylist(), strict=True):
            yield f"{file}, row {n + 1}", row
        return
    n, room = 0, limits.characters
    for batch in table.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            n += 1
            yield f"{file}, row {n}", row
            room -= len(row[TEXT_COLUMN] or "")
            if room <= 0:
                return


def _has_pairs(row: Row, where: str) -> bool:
    """Whether these columns are a preference set's; else they are a corpus's."""
    if "chosen" in row and "rejected" in row:
        return True
    if TEXT_COLUMN in row and "chosen" not in row and "rejected" not in row:
        return False
    raise UserError(
        f"{where} has the columns {', '.join(sorted(row)) or '(none)'}; wanted are chosen and"
        f" rejected (with or without prompt), or {TEXT_COLUMN}"
    )


def _text_of(row: Row, where: str) -> str:
    text = row[TEXT_COLUMN]
    if not isinstance(text, str):
        raise UserError(f"{where}: {TEXT_COLUMN!r} is {type(text).__name__}; it must be text")
    return text


def _spread(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly over all."""
    if len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
