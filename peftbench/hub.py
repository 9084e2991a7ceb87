"""Looks at models on the Hugging Face Hub before anything is loaded. Imports no torch.

`huggingface_hub` is imported only when a Hub model is asked for, and the network only used when
the local cache does not have it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT_S = 5.0  # of one question to the Hub in the pre-flight check
OFFLINE_CHOICES = (
    "without the Hub there are tiny-gpt2 and tiny-llama, local folders,"
    " and gpt-2 / llama-7b with --weights random"
)


def hub_token() -> str | None:
    """HUGGINGFACE_TOKEN or HF_TOKEN, else the one that a login stored."""
    from huggingface_hub import get_token

    for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"):
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    token: str | None = get_token()
    return token


def cached_file(repo: str, filename: str, revision: str | None) -> Path | None:
    """The file in the local Hub cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None


def cached_weights(repo: str, revision: str | None) -> list[Path]:
    """The model's safetensors files in the local Hub cache; empty unless all are there."""
    single = cached_file(repo, "model.safetensors", revision)
    if single is not None:
        return [single]
    index = cached_file(repo, "model.safetensors.index.json", revision)
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [cached_file(repo, name, revision) for name in names]
    found = [file for file in files if file is not None]
    return found if len(found) == len(files) else []


def check_repo(repo: str, revision: str | None, *, gated: bool, weights: str) -> None:
    """Raise UserError if this Hub model cannot be had. Asks the Hub only if it is not cached."""
    if cached_file(repo, "config.json", revision) is not None and (
        weights == "random" or cached_weights(repo, revision)
    ):
        return
    if gated and hub_token() is None:
        raise _no_token(repo)
    info = _ask(repo, revision)
    if info.gated and hub_token() is None:
        raise _no_token(repo)
    files = {file.rfilename for file in info.siblings or []}
    if "config.json" not in files:
        raise UserError(f"{repo} on the Hub has no config.json; it is not a transformers model")
    if weights == "pretrained" and not any(name.endswith(".safetensors") for name in files):
        raise UserError(
            f"{repo} has no safetensors weights; pickle checkpoints are refused because loading"
            f" one can run any code: convert it with save_pretrained and give the folder"
        )


def read_config(repo: str, revision: str | None) -> dict[str, Any]:
    """The model's config.json, from the cache or fetched into it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    path = cached_file(repo, "config.json", revision)
    if path is None:
        try:
            path = Path(
                hf_hub_download(
                    repo, "config.json", revision=revision, token=hub_token(),
                    etag_timeout=TIMEOUT_S,
                )
            )  # fmt: skip
        except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError) as error:
            raise unreachable(repo, revision, error) from error
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def unreachable(repo: str, revision: str | None, error: Exception) -> UserError:
    """The error for a Hub that did not give a model, with what can be done without it."""
    from huggingface_hub import constants

    at = f" at revision {revision}" if revision else ""
    reason = " ".join(str(error).split("\n")[0].split())[:160] or type(error).__name__
    return UserError(
        f"could not get {repo}{at} from {constants.ENDPOINT} ({reason}); {OFFLINE_CHOICES}"
    )


def _ask(repo: str, revision: str | None) -> ModelInfo:
    """One question to the Hub, and a second one for access where the model is gated."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.is_offline_mode():
        raise UserError(
            f"{repo} is not in the local cache and HF_HUB_OFFLINE is set; {OFFLINE_CHOICES}"
        )
    api = HfApi(token=hub_token())
    try:
        info = api.model_info(repo, revision=revision, timeout=TIMEOUT_S)
        if info.gated and hub_token() is not None:
            api.auth_check(repo)
    except GatedRepoError as error:
        raise UserError(
            f"your token has no access to {repo}; ask for it at {constants.ENDPOINT}/{repo}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} on the Hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no model {repo!r} on {constants.ENDPOINT}, or it is private and HUGGINGFACE_TOKEN"
            f" does not open it; check the id"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise unreachable(repo, revision, error) from error
    return info


def _no_token(repo: str) -> UserError:
    return UserError(
        f"{repo} is gated and there is no token; accept its licence on the Hub and set"
        f" HUGGINGFACE_TOKEN or HF_TOKEN, or use --weights random"
    )
