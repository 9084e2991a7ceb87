"""Where a number comes from: code, libraries and machine. No secrets, no absolute paths."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes",
    "tokenizers", "safetensors", "pytest", "pytest-benchmark", "numpy",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Version of each library; `+<commit>` follows where it was installed from a repository."""
    versions = {}
    for name in LIBRARIES:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = distribution.version + _commit_suffix(distribution)
    return versions


def _commit_suffix(distribution: metadata.Distribution) -> str:
    """PEP 610 writes `direct_url.json` beside what was not installed from an index."""
    text = distribution.read_text("direct_url.json")
    if text is None:
        return ""
    origin = json.loads(text)
    commit = origin.get("vcs_info", {}).get("commit_id")
    if commit is None and origin.get("dir_info", {}).get("editable"):
        folder = Path(unquote(origin["url"].removeprefix("file://")))
        commit, _ = git_state(folder)
    return f" ({commit[:12]})" if commit else ""


def git_state(folder: Path, *, own_package: bool = False) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) outside a repository."""
    try:
        # a package installed into another project's folder is not of that project's commit
        _git(folder, "ls-files", "--error-unmatch", "__init__.py" if own_package else ".")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True, text=True, check=True, timeout=10,
    ).stdout.strip()  # fmt: skip


@lru_cache(maxsize=1)
def describe() -> dict[str, Any]:
    """What holds for every case of a session; light: it imports no library that it names."""
    from peftbench import __version__

    commit, dirty = git_state(Path(__file__).resolve().parent, own_package=True)
    return {
        "peftbench": __version__,
        "commit": commit,
        "commit_dirty": dirty,
        "libraries": library_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
