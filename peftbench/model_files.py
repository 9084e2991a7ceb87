"""A model's files in a local folder: what must be there, their config, their hashes. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftbench.data import assets
from peftbench.errors import UserError

_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "*.gguf")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BIG_FILE_BYTES = 2**27  # smaller ones are hashed again each time, in a fraction of a second


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, else its only GGUF file."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))[:1]


def read_config(folder: Path) -> Mapping[str, Any]:
    """The text model's values in config.json; empty without one: a GGUF file keeps its own."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a model's config: it holds no JSON object")
    nested = values.get("text_config")
    return nested if isinstance(nested, dict) else values


def check_folder(folder: Path, weights: str, model: str, *, in_package: bool) -> None:
    """Raise UserError, one line, if the folder is not a base model that can be loaded.

    `model` is what the user gave. Random weights need only the config.
    """
    if not folder.is_dir():
        if folder.is_file():
            raise UserError(f"{model} is a file; give the folder that holds the model")
        if in_package:
            raise UserError(f"{model} is missing from the installation; install peftbench again")
        raise UserError(f"there is no folder {model}; give a Hub id or a model's folder")
    files = weight_files(folder)
    is_gguf = bool(files) and files[0].suffix == ".gguf"
    if not (folder / "config.json").is_file() and not is_gguf:
        what = "an adapter" if (folder / "adapter_config.json").is_file() else "not a model"
        raise UserError(f"{model} has no config.json: it is {what}; give a base model's folder")
    if weights == "random":
        return
    if len(sorted(folder.glob("*.gguf"))) > 1 and is_gguf:
        raise UserError(f"{model} has several GGUF files; keep one in the folder")
    if not files:
        if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
            raise UserError(
                f"{model} has only pickle checkpoints, which are refused because loading one can"
                f" run any code; convert them with save_pretrained"
            )
        raise UserError(f"{model} has no safetensors weights; add them or use --weights random")
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise UserError(f"{model} has no tokenizer files; add its tokenizer to the folder")


def file_hash(path: Path) -> str:
    """sha256 of a file; a Hub cache already names its files by it, others are remembered."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    stat = blob.stat()
    key = f"{blob}:{stat.st_size}:{stat.st_mtime_ns}"
    memory = assets.cache_dir() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    if memory.is_file():
        return memory.read_text().strip()
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > _BIG_FILE_BYTES:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs only time
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(digest)
    return digest
