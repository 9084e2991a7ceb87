"""A data set of the Hugging Face Hub: fetched once through `datasets`, kept as parquet files.

The light parent process fetches; training processes read the files, so they need no network, do not
import `datasets`, and never disagree about what `main` is. An entry appears by one rename.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.data.assets import cache_dir, cached_path
from peftbench.data.files import TEXT_COLUMN, role_of
from peftbench.data.preference import COLUMNS
from peftbench.errors import UserError
from peftbench.hub import hub_token

if TYPE_CHECKING:
    from datasets import DatasetDict

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_TIMEOUT_S = 10.0  # of the one request that tells whether the Hub is there


@dataclass(frozen=True)
class HubData:
    """Where a data set is on the Hub. Without a revision it is what `main` was when fetched."""

    id: str
    config: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """Of all its revisions."""
        return cache_dir() / "hub" / self.id.replace("/", "--") / (self.config or "default")


def cached(data: HubData) -> Path | None:
    """The folder of parquet files: of the pinned revision, else of the one fetched last."""
    if data.revision:
        folder = data.folder / data.revision
        return folder if folder.is_dir() else None
    entries = [f for f in data.folder.glob("*") if f.is_dir() and not f.name.startswith(".")]
    return max(entries, key=lambda f: f.stat().st_mtime_ns, default=None)


def fetch(data: HubData) -> Path:
    """The folder of parquet files, fetched if the cache lacks this revision.

    An unpinned data set whose Hub cannot be reached is taken as it was fetched last.
    Raises: UserError if it cannot be had, with what can be had without a network.
    """
    found = cached(data)
    if found and data.revision:
        return found
    try:
        revision = _current_revision(data)
    except UserError:
        if not found:
            raise
        print(
            f"the Hub does not answer for {data.id}; using revision {found.name}, fetched before",
            file=sys.stderr,
        )
        return found
    folder = data.folder / revision
    try:
        if folder.is_dir():
            os.utime(folder)  # the one fetched last, see `cached`
        else:
            download(HubData(data.id, data.config, revision), folder)
    except OSError as error:
        raise UserError(f"cannot keep {data.id} in {folder}: {error.strerror or error}") from error
    return folder


def _current_revision(data: HubData) -> str:
    """The commit on the Hub. One request without retries: `datasets` would retry for 23 seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    try:
        info = api.dataset_info(
            data.id, revision=data.revision, timeout=_TIMEOUT_S, token=hub_token()
        )
    except RepositoryNotFoundError as error:
        token = "with the token of the environment" if hub_token() else "without a token"
        raise UserError(
            f"no data set {data.id!r} on {api.endpoint} (asked {token}), and no local path of that"
            f" name; {_offline_choices()}"
        ) from error
    except network_errors() as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot get data set {data.id!r}: {api.endpoint} is out of reach ({reason}), it was"
            f" not fetched before, and no local path has that name; {_offline_choices()}"
        ) from error
    return str(info.sha)


def network_errors() -> tuple[type[Exception], ...]:
    """The HTTP client's error, whichever client this huggingface_hub has, and OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    bases: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    return (*bases, OSError)


def _offline_choices() -> str:
    names = ["tinywiki"] + (["wikipedia-sample"] if cached_path("wikipedia-sample") else [])
    return f"without the Hub there are {', '.join(names)} and local files (--data PATH)"


def download(data: HubData, folder: Path) -> None:
    """Write the columns we use of its splits to `folder`, as `train.parquet` and so on."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        splits = load_dataset(data.id, data.config, revision=data.revision, token=hub_token())
    except (DatasetsError, ValueError, RuntimeError, *network_errors()) as error:
        # Their messages name the configs to choose from, on several lines.
        raise UserError(
            f"datasets cannot load {data.id!r}: {' '.join(str(error).split())[:400]};"
            " a config is chosen by owner/name:config"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        for role, name in _roles(splits).items():
            columns = splits[name].column_names
            wanted = [c for c in (*COLUMNS, TEXT_COLUMN) if c in columns] or columns
            splits[name].select_columns(wanted).to_parquet(work / f"{role}.parquet")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _roles(splits: DatasetDict) -> dict[str, str]:
    """train, validation and test -> name of the split: the plain name, else one for preferences.

    Sets have `train_sft` beside `train_prefs`; the first split stands for training if none is named
    so.
    """
    roles: dict[str, str] = {}
    for name in sorted(splits, key=lambda n: (role_of(n) != n, "pref" not in n)):
        roles.setdefault(role_of(name) or "train", name)
    return roles
