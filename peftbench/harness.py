"""Tasks of `--tasks` through lm-evaluation-harness, an optional extra: which there are, and scores.

A name is a local task (`peftbench/tasks/*.yaml`), a YAML file of the user's in the harness's own
format, or else a task of the harness, whose data are on the Hub. The parent checks names and
fetches data before anything starts; the children score.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.case import Settings, expanded, is_local, task_names
from peftbench.data.hub import network_errors
from peftbench.data.task_items import LOCAL_TASKS, items_file, write_items
from peftbench.errors import UserError
from peftbench.hub import hub_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTALL = "pip install 'peftbench[tasks]'"
SCORED = ("multiple_choice", "loglikelihood")  # kinds of task whose items are right or wrong
_ALWAYS_THERE = "Salesforce/wikitext"  # a public data set, to ask whether the Hub answers
_TIMEOUT_S = 10.0
_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskScore:
    """One task: which items came out right, in the task's order, as "1" and "0"."""

    version: str  # of the task, as its YAML file says
    digest: str  # sha256 over the items: two runs with equal digests answered equal questions
    correct: str  # by log-likelihood: the harness's `acc`
    correct_norm: str | None  # by log-likelihood over length: its `acc_norm`; None without choices


def check_tasks(settings: Settings) -> None:
    """Everything about `--tasks` that can fail without a model; makes and fetches what is needed.

    Raises: UserError, one line.
    """
    names = task_names(settings.tasks)
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs lm-evaluation-harness; install it with {INSTALL}")
    for name in names:
        if name in LOCAL_TASKS:
            write_items(name)
    on_hub = [name for name in names if _yaml_file(name) is None]
    _check_hub(on_hub)
    quiet = contextlib.redirect_stderr(io.StringIO())  # a download shows its progress
    with tempfile.TemporaryDirectory() as cache, contextlib.nullcontext() if on_hub else quiet:
        load_tasks(names, Path(cache))


def load_tasks(names: Sequence[str], cache: Path) -> dict[str, Any]:
    """The harness's own task objects by name, their data loaded; a group gives its members.

    `cache` is a folder for what `datasets` writes of local files; the Hub's it keeps in its own.
    Raises: UserError for a task that does not exist, cannot be had, or has no right and wrong.
    """
    from lm_eval.tasks import TaskManager

    files = [_yaml_file(name) for name in names]
    manager = TaskManager(include_defaults=None in files)
    found: dict[str, Any] = {}
    for name, file in zip(names, files, strict=True):
        if file is None and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=2)  # of 14,000 names
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"unknown task {name!r}; {hint}local are: {_local_names()}; all others:"
                " `lm-eval ls tasks`"
            )
        try:
            loaded = manager.load([name if file is None else _local_config(file, cache)])["tasks"]
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"cannot load task {name!r}: {reason}") from error
        found |= loaded
    for name, task in found.items():
        if task.OUTPUT_TYPE not in SCORED:
            raise UserError(
                f"task {name!r} is of the kind {task.OUTPUT_TYPE!r}; scored are:"
                f" {', '.join(SCORED)}"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return found


def score_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    context: int | None,
) -> dict[str, TaskScore]:
    """What a model answers, adapter or not, by task name; {} where no task is asked for.

    `context` is how many tokens the model reads at most; longer items lose their start. Raises:
    UserError for a task whose items are neither right nor wrong.
    """
    names = task_names(settings.tasks)
    if not names:
        return {}
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    # the harness's progress bars and its advice on models it has not loaded itself
    with (
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as cache,
    ):
        tasks = load_tasks(names, Path(cache))
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it chooses a padding token of its own
            batch_size=settings.eval_batch_size,
            max_length=context,
            mixed_precision_dtype="bfloat16" if settings.dtype == "bfloat16" else None,
            softmax_dtype="float32",
            trust_remote_code=False,
        )
        found = evaluate(
            lm, {"tasks": tasks}, limit=settings.task_items or None, bootstrap_iters=0
        )  # fmt: skip
    assert found is not None
    return {
        name: _score(name, str(found["versions"][name]), samples)
        for name, samples in found["samples"].items()
    }


def _score(name: str, version: str, samples: Sequence[dict[str, Any]]) -> TaskScore:
    """The outcomes of one task's items, under the first of its filters."""
    items = sorted(
        (s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda s: s["doc_id"]
    )
    if not items or "acc" not in items[0]:
        raise UserError(f"task {name!r} has no accuracy (acc); its items are not right or wrong")
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item["doc_hash"], item["target_hash"]]).encode())
        digest.update(json.dumps(item["arguments"]).encode())
    has_norm = "acc_norm" in items[0]
    return TaskScore(
        version,
        digest.hexdigest(),
        "".join("01"[bool(item["acc"])] for item in items),
        "".join("01"[bool(item["acc_norm"])] for item in items) if has_norm else None,
    )


def _yaml_file(name: str) -> Path | None:
    """The definition of a local task or of the user's own; None for a name of the harness.

    Raises: UserError for a path where there is no file.
    """
    if name in LOCAL_TASKS:
        return _FOLDER / f"{name}.yaml"
    path = expanded(name)
    if not is_local(name) and path.suffix not in (".yaml", ".yml"):
        return None
    if not path.is_file():
        raise UserError(f"no task file {name!r}; give a YAML file or one of: {_local_names()}")
    return path


def _local_config(file: Path, cache: Path) -> dict[str, Any]:
    """A task file as the harness reads it, with its data files: beside it, or made here.

    Raises: ValueError for a file that is no task.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(file, resolve_func=True)
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise ValueError(f"{file.name} has no `task: name`")
    arguments = config.get("dataset_kwargs") or {}
    files = arguments.get("data_files")
    if files is None:
        return config
    by_split = files if isinstance(files, dict) else {"train": files}
    config["dataset_kwargs"] = arguments | {
        "data_files": {split: _data_files(file, given) for split, given in by_split.items()},
        "cache_dir": str(cache),
    }
    return config


def _data_files(yaml: Path, given: str | list[str]) -> list[str]:
    names = [given] if isinstance(given, str) else given
    made = {items_file(name).name: items_file(name) for name in LOCAL_TASKS}
    return [str(made[n] if yaml.parent == _FOLDER else (yaml.parent / n).resolve()) for n in names]


def _check_hub(names: Sequence[str]) -> None:
    """Ask the Hub once, without retries, whether it is there: `datasets` would for half a minute.

    With HF_HUB_OFFLINE it is not asked: what was fetched before is then taken from the cache.
    """
    if not names or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.dataset_info(_ALWAYS_THERE, timeout=_TIMEOUT_S, token=hub_token())
    except network_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot fetch task {names[0]!r}: {api.endpoint} is out of reach ({reason}); if it was"
            f" fetched before set HF_HUB_OFFLINE=1; without the Hub there are {_local_names()}"
        ) from error


def _local_names() -> str:
    return ", ".join(LOCAL_TASKS)
