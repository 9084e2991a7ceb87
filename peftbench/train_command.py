"""`peftbench train`: one case trained for use, not for the table.

The steps are the benchmark's own (pipeline.py); what is added is a person: progress, checkpoints,
a stop that keeps what was done, and a folder that PEFT, transformers and `peftbench infer` read.
"""

from __future__ import annotations

import math
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from peftbench import adapters, models, pipeline, provenance, values
from peftbench.case import Case, public_name
from peftbench.checkpoint import ANEW, checkpoint_file, restore, steps_done, write_checkpoint
from peftbench.data.loading import load_task
from peftbench.errors import InvalidTrainingError, UserError
from peftbench.evaluation import Quality
from peftbench.methods import METHODS, stages, uses_ppo
from peftbench.model_card import model_card
from peftbench.progress import clock, say
from peftbench.record import FORMAT, dumps, remove_half_written, write_atomically
from peftbench.result_files import read_json
from peftbench.summary import task_lines
from peftbench.trackers import FOLDERS, LiveRun, configuration, open_tracker, run_name
from peftbench.training import SilentGate, Training, TrainingState

if TYPE_CHECKING:
    from peftbench.data.task import TokenTask

FINISHED = "training.json"  # what was trained, how, and what came of it: written last
BEGUN = "begun.json"  # the case, what the base scored, the trackers' run: from the start
SHOW_EVERY_S = 10.0  # of progress where it does not go to a terminal


class StoppedError(Exception):
    """The user stopped a training; what was done is kept."""


class Keeping:
    """A `Keeper` with a person before it: shows every step, writes a checkpoint now and then."""

    def __init__(self, folder: Path, every_s: float, run: LiveRun) -> None:
        self.stopping = False
        self._run = run
        self._folder = folder
        self._every_s = every_s
        self._live = sys.stdout.isatty()
        self._written_s = self._shown_s = self._began_s = time.monotonic()
        self._began_step = self._began_tokens = 0

    def begin(self, state: TrainingState) -> None:
        file = checkpoint_file(self._folder, state.stage)
        if file.is_file():
            restore(file, state)
            say(f"{state.stage}: going on after step {state.step} of {state.steps}")
        self._written_s = self._shown_s = self._began_s = time.monotonic()
        self._began_step, self._began_tokens = state.step, state.tokens
        self._run.begin(state)

    def step_done(self, state: TrainingState) -> None:
        self._run.step_done(state)
        now_s, is_last = time.monotonic(), state.step == state.steps
        if is_last or self.stopping or now_s - self._written_s >= self._every_s:
            write_checkpoint(checkpoint_file(self._folder, state.stage), state)
            self._written_s = time.monotonic()
        if is_last or now_s - self._shown_s >= (0.2 if self._live else SHOW_EVERY_S):
            self._shown_s = now_s
            self._show(self._line(state, now_s), stays=is_last)
        if self.stopping:
            self._show("", stays=False)
            raise StoppedError(f"{state.stage}, step {state.step} of {state.steps}")
        self._run.resume_clock()

    def _line(self, state: TrainingState, now_s: float) -> str:
        """`dpo  step 12/48  loss 0.6712  8,211 tokens/s  about 0:31 left`"""
        elapsed_s = max(now_s - self._began_s, 1e-9)
        done = state.step - self._began_step
        rate = (state.tokens - self._began_tokens) / elapsed_s
        parts = [
            state.stage,
            f"{'update' if state.stage == 'ppo' else 'step'} {state.step}/{state.steps}",
            f"loss {float(state.losses[-1]):.4g}",
        ]
        if state.history:
            parts.append(f"reward {state.history[-1]['reward_mean']:.3g}")
        parts.append(f"{rate:,.0f} tokens/s")
        left = elapsed_s / done * (state.steps - state.step)
        parts.append(f"about {clock(left)} left" if state.step < state.steps else clock(elapsed_s))
        return "  ".join(parts)

    def _show(self, line: str, *, stays: bool) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r\x1b[K" + line[:width] + ("\n" if stays else ""))
        elif line:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Inside, the first Ctrl-C or SIGTERM lets the step end and keeps it; a second does not."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            say("\nstopping after this step (Ctrl-C again: at once)")

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_case(
    case: Case, folder: Path, *, resume: bool, overwrite: bool, checkpoint_every_s: float,
    report_to: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Train a case into a folder; prints what happens, and tells the trackers of `report_to`.

    The folder has the adapter in PEFT's format (for `full` the model in transformers'), the
    tokenizer, a model card and `training.json`.
    Raises: UserError; StoppedError with a checkpoint on disk; InvalidTrainingError.
    """
    if case.settings.processes > 1:
        raise UserError(
            f"--processes is {case.settings.processes}; peftbench train runs one process"
            " (pytest bench runs several)"
        )
    case = models.resolved(case)
    prepare_folder(folder, case, resume=resume, overwrite=overwrite)
    settings = case.settings
    device = pipeline.prepare_process(settings)
    data = case.public().settings.data
    say(f"{case.id} on {pipeline.device_name(device)}, {settings.dtype}, data {data}")
    row = adapters.find_adapter(case.adapter)
    model = pipeline.load(case, device, quantize=row.quantization)
    tokenizer = models.load_tokenizer(case.model, settings.weights)
    task = load_task(settings, tokenizer, model.config.vocab_size)
    base = base_quality(folder, model, case, task, tokenizer)
    plain = adapters.shared_copy(model) if uses_ppo(case.method) else None
    model = adapters.attach(model, case.adapter, settings)
    total, trainable = adapters.count_params(model)
    say(f"{trainable:,} of {total:,} parameters train; {describe_stages(case)}")
    with tracked(case, folder, report_to, device.type) as run:
        keeping, started_s = Keeping(folder, checkpoint_every_s, run), time.monotonic()
        with keeping.until_stopped():
            training = pipeline.train(model, plain, case, task, tokenizer, SilentGate(), keeping)
        seconds = time.monotonic() - started_s
        if not all(math.isfinite(loss) for loss in training.losses):
            step = next(i for i, loss in enumerate(training.losses) if not math.isfinite(loss))
            raise InvalidTrainingError(
                f"the loss is {training.losses[step]} at step {step + 1}: lower --learning-rate"
            )
        metrics: dict[str, float | int | None] = {
            "total_params": total, "trainable_params": trainable,
            **values.loss_values(training),
        }  # fmt: skip
        tasks: dict[str, dict[str, Any]] = {}
        if settings.measures_quality:
            say("evaluating ...")
            quality = quality_of(model, case, task, tokenizer)
            tasks = values.task_values(quality, base)
            metrics |= values.quality_values(quality, base, None, task, settings)
            metrics |= pipeline.judge(case, task, tokenizer, quality, base, training)
        run.finished(metrics)
    finish(folder, model, tokenizer, case, task, training, metrics, tasks, seconds)


@contextmanager
def tracked(
    case: Case, folder: Path, names: tuple[str, ...], device_type: str
) -> Iterator[LiveRun]:
    """The training's run in each tracker; closed however the training ends.

    A resumed training goes on in the runs of the interrupted one.
    Raises: UserError where a tracker cannot start.
    """
    begun, where = read_json(folder / BEGUN, ANEW), provenance.describe()
    resumed = any(checkpoint_file(folder, stage).is_file() for stage in stages(case.method))
    config = configuration(begun["case"], case.hash, where, device=device_type)
    opened = LiveRun(case.method, say)
    try:
        for name in names:
            opened.add(name, open_tracker(
                name, run_name(case.id, where), folder, config, live=True,
                cpu=device_type == "cpu", identity=begun.get("run"), resumed=resumed,
            ))  # fmt: skip
        yield opened
    finally:
        opened.close()


def prepare_folder(folder: Path, case: Case, *, resume: bool, overwrite: bool) -> None:
    """The folder, ready to be trained into. Raises: UserError for one that must not be touched."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {str(folder)!r} is a file; give a folder")
    files = sorted(f.name for f in folder.iterdir()) if folder.exists() else []
    ours = {BEGUN, FINISHED} & set(files)
    if files and not ours:
        raise UserError(
            f"--output {str(folder)!r} holds {files[0]!r} and no training of peftbench;"
            " give another folder"
        )
    if overwrite and files:
        shutil.rmtree(folder)
        files = []
    if FINISHED in files:
        raise UserError(
            f"{str(folder)!r} holds a finished training; give another --output, or --overwrite"
        )
    if files and not resume:
        raise UserError(
            f"{str(folder)!r} holds an interrupted training ({standing(folder, case)});"
            f" go on with --resume, or {ANEW}"
        )
    identity = case.public().to_dict()
    if files:
        before, now = read_json(folder / BEGUN, ANEW)["case"], identity
        if changed := differences(before, now):
            raise UserError(
                f"{str(folder)!r} was begun with {'; '.join(changed)}: give the same,"
                " or --overwrite"
            )
        remove_half_written(folder)
        standing(folder, case)  # raises for a damaged checkpoint now, not after the base's scores
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = {"format": FORMAT, "case": identity, "base": None, "run": secrets.token_hex(8)}
        write_atomically(folder / BEGUN, dumps(begun))
    except OSError as error:
        raise UserError(
            f"--output {str(folder)!r} cannot be written ({error.strerror}); give another"
        ) from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`rank 8, now 16` for each axis and setting that is not as it was."""
    old = {**before, **before["settings"]}
    new = {**now, **now["settings"]}
    return [
        f"{name} {old.get(name)}, now {new[name]}"
        for name in new
        if name != "settings" and old.get(name) != new[name]
    ]


def standing(folder: Path, case: Case) -> str:
    """How far an interrupted training has come, in words."""
    parts = []
    for stage in stages(case.method):
        file = checkpoint_file(folder, stage)
        if file.is_file():
            done, steps = steps_done(file)
            parts.append(f"{stage} step {done} of {steps}")
    return ", ".join(parts) or "before its first checkpoint"


def describe_stages(case: Case) -> str:
    """`384 pairs: sft, 48 steps, then dpo, 48 steps`."""
    settings = case.settings
    words = [
        f"{METHODS[stage].name}, "
        + (f"{settings.ppo_updates} updates" if stage == "ppo" else f"{settings.steps} steps")
        for stage in stages(case.method)
    ]
    return f"{settings.pairs} pairs: {', then '.join(words)}"


def base_quality(
    folder: Path, model: Any, case: Case, task: TokenTask, tokenizer: Any
) -> Quality | None:
    """What the model scores before any training; kept, so that a resumed run need not ask again."""
    if not case.settings.measures_quality:
        return None
    begun = read_json(folder / BEGUN, ANEW)
    if begun["base"] is not None:
        return Quality.from_dict(begun["base"])
    say("evaluating the base ...")
    quality = quality_of(model, case, task, tokenizer, is_base=True)
    write_atomically(folder / BEGUN, dumps(begun | {"base": asdict(quality)}))
    return quality


def quality_of(
    model: Any, case: Case, task: TokenTask, tokenizer: Any, *, is_base: bool = False
) -> Quality:
    """Quality with the tasks of `--tasks`."""
    quality = pipeline.quality_of(model, case, task, tokenizer)
    if not case.settings.tasks:
        return quality
    say(f"tasks: {case.public().settings.tasks} ...")
    return replace(quality, tasks=pipeline.task_scores(model, case, tokenizer, is_base=is_base))


def finish(
    folder: Path,
    model: Any,
    tokenizer: Any,
    case: Case,
    task: TokenTask,
    training: Training,
    metrics: dict[str, float | int | None],
    tasks: dict[str, dict[str, Any]],
    seconds: float,
) -> None:
    """Write what is kept, then remove what only a resumed run needs."""
    model.config.use_cache = True  # training had it off: who loads this generates
    base_name = (
        models.find_model(case.model).location if is_on_hub(case) else public_name(case.model)
    )
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = base_name  # never a path of this machine
    metrics["adapter_bytes"] = adapters.save_adapter(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    found = {
        "format": FORMAT, "case": case.public().to_dict(), "case_hash": case.hash,
        "data": task.name, "data_digest": task.digest, "seconds": seconds, "metrics": metrics,
        "tasks": tasks,
        "losses": training.losses,
        "ppo_history": None if training.ppo is None else training.ppo.history,
        "provenance": provenance.describe(),
    }  # fmt: skip
    write_atomically(folder / "README.md", model_card(found, base_name, is_on_hub=is_on_hub(case)))
    write_atomically(folder / FINISHED, dumps(found))
    for file in [*folder.glob("checkpoint-*.safetensors"), folder / BEGUN]:
        file.unlink(missing_ok=True)
    for line in [*task_lines(tasks), *closing_lines(case, metrics, folder)]:
        say(line)


def is_on_hub(case: Case) -> bool:
    return models.find_model(case.model).kind == "hub"


def closing_lines(case: Case, metrics: dict[str, float | int | None], folder: Path) -> list[str]:
    """What came of it, and what to do with it."""
    lines = []
    for name, label, form in (
        ("perplexity", "perplexity", "{:.4g}"),
        ("preference_accuracy", "preference accuracy", "{:.1%}"),
        ("true_reward", "true statements", "{:.1%}"),
    ):
        after, before = metrics.get(name), metrics.get(f"{name}_base")
        if after is not None and before is not None:
            lines.append(f"{label} {form.format(before)} -> {form.format(after)} (held-out)")
    return [
        *lines,
        f"kept in {folder}",
        f"talk to it: peftbench infer --model {case.model} --adapter {folder}",
    ]


def push_to_hub(folder: Path, repo: str, token: str | None) -> str:
    """Upload a finished folder; its address. Raises: UserError where the Hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if token is None:
        raise UserError("--push-to-hub needs a token that may write: set HF_TOKEN")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="peftbench train",
            ignore_patterns=[f"{name}/*" for name in FOLDERS],  # their names hold this machine's
        )
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot push to {repo!r}: {reason}; {str(folder)!r} is kept: push it with"
            f" `hf upload {repo} {folder}`"
        ) from None
    return f"{api.endpoint}/{repo}"


def memory_advice(case: Case) -> str:
    """What to lower where the memory was not enough."""
    settings = case.settings
    options = []
    if settings.batch_size > 1:
        options.append(
            f"--batch-size {settings.batch_size // 2} --gradient-accumulation"
            f" {settings.gradient_accumulation * 2}"
        )
    if not settings.gradient_checkpointing and case.adapter != "prefix":
        options.append("--gradient-checkpointing")
    if case.adapter in ("full", "lora", "lora-8bit"):
        options.append("--adapter qlora")
    return "; or ".join(options) or "take a smaller model"
