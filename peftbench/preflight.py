"""What can be known not to work before anything is loaded, each with one sentence."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from peftbench.case import Case, Settings
from peftbench.data import assets
from peftbench.data.loading import check_data, check_lengths
from peftbench.errors import UserError
from peftbench.harness import check_tasks
from peftbench.models import check_model, find_model, has_biases, model_context
from peftbench.provenance import torch_cuda_version
from peftbench.trl_engine import check_trl


def preflight(models: Sequence[str], adapters: set[str], settings: Settings) -> None:
    """Platform, models, data and lengths, in the order in which a user would fix them.

    Fetches what has to be fetched. Raises: UserError.
    """
    if sys.platform == "win32":
        raise UserError("peftbench does not run on Windows itself; run it inside WSL2")
    if settings.device == "cuda" and torch_cuda_version() is None:
        raise UserError("--device cuda needs a CUDA build of torch, this one is for CPUs only")
    check_compiler(settings)
    for model in models:
        check_model(model, settings.weights)
        row = find_model(model)
        if row.kind == "asset" and settings.weights == "pretrained":
            assets.fetch(row.location)
    check_data(settings)
    check_tasks(settings)
    for model in models:
        context = model_context(model, settings.weights)
        if context is not None and adapters & {"prefix", "prompt"}:
            context -= settings.prefix_tokens  # learned positions count these tokens too
        check_lengths(settings, context)


def preflight_inference(cases: Sequence[Case]) -> None:
    """Prompt and answer must fit into the model. Raises: UserError."""
    for case in cases:
        settings = case.settings
        context = model_context(case.model, settings.weights)
        prefix = settings.prefix_tokens if case.adapter in ("prefix", "prompt") else 0
        wanted = prefix + settings.infer_prompt_tokens + settings.infer_new_tokens
        if context is not None and wanted > context:
            raise UserError(
                f"{case.id} needs {wanted} positions ({settings.infer_prompt_tokens} of the prompt,"
                f" {settings.infer_new_tokens} new, {prefix} of a prefix), the model has {context};"
                " lower --infer-prompt-tokens or --infer-new-tokens"
            )


def check_compiler(settings: Settings) -> None:
    """Raise UserError where torch.compile would find no compiler for what it writes."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if settings.compile != "none" and shutil.which(compiler) is None:
        raise UserError(
            f"--compile {settings.compile} needs a C++ compiler, and there is no {compiler!r}:"
            " install one (Debian: apt-get install g++), name yours in CXX, or leave the option out"
        )


def cannot_be_sharded(case: Case) -> str | None:
    """Why a case cannot have its model spread over its processes, or None."""
    settings = case.settings
    if settings.compile != "none":
        return "compiled layers are not sharded here"
    if settings.optimizer == "paged-adamw-8bit":
        return "paged-adamw-8bit takes whole parameters"
    if case.adapter == "lora-8bit":
        return "8-bit layers keep their weights outside the parameters"
    if settings.tasks:
        return "--tasks asks one process"
    return None


def impossible(case: Case) -> str | None:
    """The sentence a user needs for a combination that cannot work, or None."""
    settings = case.settings
    if case.adapter == "prefix" and settings.gradient_checkpointing:
        return "prefix tuning feeds its prefix as a cache, which gradient checkpointing turns off"
    if case.adapter == "bitfit" and not has_biases(case.model):
        return f"{case.model} has no biases, and bitfit trains nothing else; use ln or lora-bias"
    if settings.sharding != "none" and (why := cannot_be_sharded(case)) is not None:
        return f"{why}: leave out --sharding"
    if settings.compile != "none":
        if settings.engine == "trl":
            return "--compile is the native engine's: TRL's trainers have settings of their own"
        if case.adapter == "prefix":
            return "a prefix is a cache with a place for each layer: every layer would be compiled"
    if settings.optimizer == "paged-adamw-8bit" and (
        settings.device == "cpu" or torch_cuda_version() is None
    ):
        return "paged-adamw-8bit pages between a GPU and its host: on a CPU use adamw"
    if settings.engine == "trl":
        try:
            check_trl(case.method, settings)
        except UserError as error:
            return str(error)
    return None
