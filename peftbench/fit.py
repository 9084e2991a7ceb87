"""`peftbench fit`: which adapter and method fit into so much memory. Imports no torch.

Each try is a round of the benchmark on synthetic ids of one length, in a fresh process under the
memory limit; the batch doubles until it no longer fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftbench.case import Case, Settings, check_ppo, check_settings
from peftbench.errors import UserError
from peftbench.export import rows
from peftbench.methods import METHODS, uses_ppo
from peftbench.metrics import METRICS
from peftbench.models import model_context, resolved
from peftbench.preflight import impossible
from peftbench.progress import Progress
from peftbench.rounds import CaseRounds
from peftbench.session import Session
from peftbench.summary import MIB, memory_of, table
from peftbench.worker import RoundStoppedError

STEPS = 3  # of a probe, its first being the warm-up
MOST_BATCH = 256


@dataclass(frozen=True)
class Choice:
    """What a user can choose, beside the batch. `length` is prompt and completion, in tokens."""

    adapter: str
    method: str
    length: int
    checkpointing: bool


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch of a choice, and what it did; a batch of 0: not even 1 fits."""

    choice: Choice
    batch: int
    tokens_per_s: float | None
    peak_bytes: int | None
    beyond: str  # what the next batch met; "" where the search ended first


def choices(
    adapters: Sequence[str], methods: Sequence[str], lengths: Sequence[int]
) -> list[Choice]:
    """Every combination, the shortest length first: it bounds the batch of the longer ones."""
    product = itertools.product(adapters, methods, (False, True), sorted(lengths))
    return [Choice(a, m, length, checkpointing) for a, m, checkpointing, length in product]


def probe_case(model: str, choice: Choice, batch: int, settings: Settings) -> Case:
    """A case of STEPS steps of this batch; of PPO so many updates of one minibatch.

    Raises: UserError for settings that cannot work.
    """
    half = choice.length // 2
    given = replace(
        settings, data="synthetic", prompt_length=choice.length - half, completion_length=half,
        batch_size=batch, gradient_accumulation=1, pairs=STEPS * batch, warmup_steps=1,
        gradient_checkpointing=choice.checkpointing, ppo_batch_size=batch,
        ppo_minibatch_size=batch, ppo_epochs=1,
    )  # fmt: skip
    check_settings(given)
    if uses_ppo(choice.method):
        check_ppo(given)
    return resolved(Case(model, choice.adapter, choice.method, given))


def try_case(session: Session, case: Case) -> dict[str, Any]:
    """One round: its record, or the row that says how it ended."""
    try:
        with CaseRounds(session, case) as rounds:
            rounds.setup()
            rounds.train()
            rounds.teardown()
            return rounds.record()
    except RoundStoppedError as stop:
        return session.stopped(case, stop.outcome)


def largest(session: Session, model: str, choice: Choice, settings: Settings, most: int) -> Fit:
    """Double the batch until it does not fit, or is beyond `most`."""
    best: dict[str, Any] | None = None
    beyond, batch = "", 1
    while batch <= most:
        case = probe_case(model, choice, batch, settings)
        if sentence := impossible(case):
            return Fit(choice, 0, None, None, sentence)
        row = try_case(session, case)
        if row["status"] == "invalid":  # the machine's doing, as a rule: once more
            row = try_case(session, case)
        if row["status"] != "ok":
            reason = "" if row["status"] == "oom" else f": {row['reason']}"
            beyond = f"{row['status']} at {batch}{reason}"
            break
        best, batch = row, 2 * batch
    if best is None:
        return Fit(choice, 0, None, None, beyond)
    return Fit(choice, batch // 2, best["tokens_per_s"], memory_of(best)[1], beyond)


def search(
    model: str,
    memory_bytes: int,
    asked: list[Choice],
    settings: Settings,
    folder: Path,
    time_limit_s: float,
) -> Iterator[Fit]:
    """The answer for each choice as it is found. The limit is the GPU's, on a CPU the process's.

    Raises: UserError where not even the machine could be timed.
    """
    progress = Progress(len(asked))
    session = Session(folder, progress, time_limit_s=time_limit_s)
    reached: dict[tuple[str, str, bool], int] = {}
    try:
        session.time_machine("start", probe_case(model, asked[0], 1, settings))
        start = session.sentinels["start"]
        if start is None:
            raise UserError(f"no process could be started; its log is in {str(session.folder)!r}")
        limited = (
            replace(settings, host_memory_limit_bytes=memory_bytes)
            if start["device"] == "cpu"
            else replace(settings, gpu_memory_limit_bytes=memory_bytes)
        )
        for choice in asked:
            key = (choice.adapter, choice.method, choice.checkpointing)
            found = largest(session, model, choice, limited, reached.get(key, MOST_BATCH))
            reached[key] = max(found.batch, 1)
            progress.finished(words(found))
            yield found
    finally:
        progress.close()


def words(found: Fit) -> str:
    choice = found.choice
    name = f"{choice.adapter} {choice.method}, {choice.length} tokens"
    name += ", checkpointing" if choice.checkpointing else ""
    if found.batch == 0:
        told = "does not fit" if found.beyond.startswith("oom") else "not measured"
        return f"{name}: {told} ({found.beyond})"
    return f"{name}: batch {found.batch}, {found.tokens_per_s:,.0f} tokens/s"


def check_asked(model: str, weights: str, asked: list[Choice]) -> None:
    """Raises: UserError for a length that no probe can have."""
    context = model_context(model, weights)
    for choice in asked:
        if choice.length < 2:
            raise UserError(f"--lengths has {choice.length}; a length is at least 2 tokens")
        if context is not None and choice.length > context:
            raise UserError(
                f"--lengths has {choice.length}, but the context of {model} is {context} tokens"
            )


def answer_lines(found: list[Fit], memory_bytes: int, records: Sequence[Path]) -> list[str]:
    """The table, and in words the fastest choice and the best one that fits.

    `records` are result files in which the qualities of this model's cases stand.
    """
    cells = [
        [
            f.choice.adapter, f.choice.method, str(f.choice.length),
            "yes" if f.choice.checkpointing else "no",
            str(f.batch) if f.batch else "-",
            "-" if f.tokens_per_s is None else f"{f.tokens_per_s:,.0f}",
            "-" if f.peak_bytes is None else f"{f.peak_bytes / MIB:,.0f}",
            f.beyond or "search ended",
        ]
        for f in found
    ]  # fmt: skip
    header = ["adapter", "method", "tokens", "checkpointing", "largest batch", "tokens/s",
              "peak MiB", "beyond it"]  # fmt: skip
    lines = [*table(header, cells), ""]
    if any(f.peak_bytes is not None and f.peak_bytes > memory_bytes for f in found):
        lines += [
            "a peak above the limit: a round may also fill what its imports had reserved and not"
            " used, which the limit does not see",
            "",
        ]
    fitting = [f for f in found if f.batch]
    if not fitting:
        return [*lines, f"nothing fits into {memory_bytes / MIB:,.0f} MiB"]
    fastest = max(fitting, key=lambda f: f.tokens_per_s or 0.0)
    lines.append(f"fastest that fits: {words(fastest)}")
    return [*lines, *best_lines(fitting, records)]


def best_lines(fitting: list[Fit], records: Sequence[Path]) -> list[str]:
    """For each method the adapter that fits with the best quality in the records."""
    known = rows(records) if records else []
    lines = []
    for method in dict.fromkeys(f.choice.method for f in fitting):
        metric = METHODS[method].target
        higher = METRICS[metric].direction == "higher"
        adapters = {f.choice.adapter for f in fitting if f.choice.method == method}
        scored = [
            r for r in known
            if r["method"] == method and r["adapter"] in adapters and r[metric] is not None
        ]  # fmt: skip
        if scored:
            best = max(scored, key=lambda r: r[metric] if higher else -r[metric])
            lines.append(
                f"best {metric} that fits, {method}: {best['adapter']} ({best[metric]:.4g}, of"
                f" {best['model']}, {best['file']})"
            )
    return lines or ["best quality: give --results FILE with this model's records"]
