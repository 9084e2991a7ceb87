"""Where a number comes from: code, libraries and machine. No secrets, no absolute paths.

Light: it imports none of the libraries that it names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets",
    "tokenizers", "safetensors", "numpy", "pytest", "pytest-benchmark", "nvidia-ml-py",
    "lm-eval",
)  # fmt: skip

# What moves a number and holds nothing private. Never a dump: an environment has tokens in it.
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "KMP_AFFINITY",
    "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM", "MALLOC_ARENA_MAX",
)  # fmt: skip

# A git hook or `git rebase --exec` sets these: git would then look there and not in our folder.
_GIT_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
_REMOTE_SCHEMES = ("https", "http", "ssh", "git")
_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))  # docker's, podman's


@lru_cache(maxsize=1)
def describe() -> dict[str, Any]:
    """What holds for every case of a session.

    `libraries` has versions by name, `library_commits` what `library_commit` says, by name.
    `cpu_cores` and `memory_bytes` are the machine's; `cpu_cores_available` is what this process may
    run on; `cpu_quota_cores` and `memory_limit_bytes` are what its control group allows, null where
    it sets no limit. `environment` has those of VARIABLES that are set, as the user set them: the
    training process gets the number of threads that its record states.
    """
    from peftbench import __version__

    commit, dirty = git_state(Path(__file__).resolve().parent, own_package=True)
    if commit is None and (named := os.environ.get("PEFTBENCH_COMMIT")):
        commit, dirty = named, False  # an image has no repository: what it was built from
    return {
        "peftbench": __version__,
        "commit": commit,
        "commit_dirty": dirty,
        "libraries": library_versions(),
        "library_commits": library_commits(),
        "torch_cuda": torch_cuda_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "in_container": any(mark.exists() for mark in _CONTAINER_MARKS),
        "container_image": os.environ.get("PEFTBENCH_IMAGE") or None,
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_cores_available": available_cores(),
        "cpu_quota_cores": _cpu_quota_cores(_own_group()),
        "memory_bytes": _memory_bytes(),
        "memory_limit_bytes": _memory_limit_bytes(_own_group()),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def library_versions() -> dict[str, str]:
    """Version of each library of the stack that is installed."""
    return {name: found.version for name, found in _distributions().items()}


def library_commits() -> dict[str, dict[str, Any]]:
    """What is known of each library that came from a repository: see `library_commit`."""
    commits = {name: library_commit(found) for name, found in _distributions().items()}
    return {name: commit for name, commit in commits.items() if commit is not None}


def _distributions() -> dict[str, metadata.Distribution]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def library_commit(distribution: metadata.Distribution) -> dict[str, Any] | None:
    """`commit`, `dirty` and `repository` of a library installed from one; None from an index.

    An editable folder has the commit it is at now, and whether tracked files differ from it; both
    are null where git knows nothing of it. A copy made from a commit cannot be dirty: null.
    `repository` is its public address, without credentials, query and local paths.
    Source: PEP 610, https://peps.python.org/pep-0610/
    """
    origin = _direct_url(distribution)
    url, vcs_info, dir_info = (origin.get(key) for key in ("url", "vcs_info", "dir_info"))
    if not isinstance(url, str):
        return None
    if isinstance(vcs_info, dict):
        return {
            "commit": vcs_info.get("commit_id"), "dirty": None, "repository": public_url(url),
        }  # fmt: skip
    # of a copy of a folder nobody can say what the folder's commit was when it was made
    if isinstance(dir_info, dict) and dir_info.get("editable"):
        commit, dirty = git_state(Path(unquote(urlsplit(url).path)))
        return {"commit": commit, "dirty": dirty, "repository": None}
    return None


def _direct_url(distribution: metadata.Distribution) -> dict[str, Any]:
    """Installers write this file beside what did not come from an index; {} without a sound one."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:  # a torn file must not cost a record
        return {}
    return origin if isinstance(origin, dict) else {}


def public_url(url: str) -> str | None:
    """A repository's address without user, password, query and fragment; None for a local one.

    None too where an `@` is left: a password with a slash in it would pass for a path.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme not in _REMOTE_SCHEMES or not host or "@" in parts.path:
        return None
    return f"{parts.scheme}://{host}{parts.path}"


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
        env={name: value for name, value in os.environ.items() if name not in _GIT_ELSEWHERE},
        capture_output=True, text=True, check=True, timeout=10,
    ).stdout.strip()  # fmt: skip


def torch_cuda_version() -> str | None:
    """The CUDA version that torch was built for, from its files; None without torch or CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int | None:
    """Cores that this process may use: fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()  # macOS cannot pin a process to cores


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _own_group() -> Path:
    """The folder of this process's control group (version 2), whether or not it exists."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.exists() else []:
        if line.startswith("0::/"):
            return root / line.removeprefix("0::/")
    return root


def _cpu_quota_cores(group: Path) -> float | None:
    """`cpu.max` holds the microseconds of CPU time that a period allows, and the period."""
    file = group / "cpu.max"
    quota, period = file.read_text().split() if file.exists() else ("max", "")
    return None if quota == "max" else int(quota) / int(period)


def free_memory_bytes() -> int | None:
    """What this process could still take of the machine and its control group; None: unknown."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = _own_group()
    limit = _memory_limit_bytes(group)
    if limit is None:
        return free
    return min(free, max(0, limit - int((group / "memory.current").read_text())))


def _memory_limit_bytes(group: Path) -> int | None:
    file = group / "memory.max"
    limit = file.read_text().strip() if file.exists() else "max"
    return None if limit == "max" else int(limit)
