"""One run of the matrix, seen from the parent: rounds, bases, results on disk. Imports no torch."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, replace
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from peftbench import provenance
from peftbench.adapters import ADAPTERS
from peftbench.case import Case
from peftbench.progress import Progress
from peftbench.record import FORMAT, dumps, merge_rounds, write_atomically
from peftbench.worker import Child, Outcome, RoundStoppedError, process_context


class Session:
    """What all cases of one pytest session share."""

    def __init__(
        self, folder: Path, progress: Progress, rounds: int = 1, time_limit_s: float = 7200.0
    ) -> None:
        self.run_id = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + secrets.token_hex(3)
        self.folder = folder / self.run_id
        self.rounds = rounds
        self.progress = progress
        self.time_limit_s = time_limit_s
        self.rows: list[dict[str, Any]] = []  # every case's record or outcome, in order of ending
        self._bases: dict[str, dict[str, Any] | Outcome] = {}

    @cached_property
    def context(self) -> BaseContext:
        """Started with the first case: collecting must not pay for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return process_context()

    def child(self, job: dict[str, Any], name: str) -> Child:
        return Child(
            self.context, job, self.folder / f"{name}.log", self.progress.phase, self.time_limit_s
        )

    def base_quality(self, case: Case, *, quantize: bool) -> dict[str, Any] | None:
        """What the untrained model scores; one child per session and base, then remembered.

        None where quality is not measured.
        """
        if not case.settings.measures_quality:
            return None
        # only what can move the base's own numbers: cases that share it share one scoring
        settings = case.settings
        key = dumps(
            {"model": case.model, "quantize": quantize, "weights_dtype": case.weights_dtype}
            | {n: v for n, v in asdict(settings).items() if n.startswith("eval_")}
            | {n: getattr(settings, n) for n in ("data", "dtype", "device", "threads", "weights",
                                                 "prompt_length", "completion_length", "pairs")}
        )  # fmt: skip
        if key not in self._bases:
            self.progress.phase("score the 4-bit base" if quantize else "score the base")
            job = {"kind": "base", "case": case.to_dict(), "quantize": quantize}
            try:
                with self.child(job, f"base-{len(self._bases)}") as child:
                    self._bases[key] = child.receive("result")
            except RoundStoppedError as stop:  # remembered: the next case would fail the same way
                self._bases[key] = replace(stop.outcome, phase=f"base: {stop.outcome.phase}")
        found = self._bases[key]
        if isinstance(found, Outcome):
            raise RoundStoppedError(found)
        return found

    def finish(self, case: Case, row: dict[str, Any]) -> None:
        """Keep a case's row and show it."""
        self.rows.append(row)
        self.progress.finished(result_line(row))

    def skip(self, case: Case, sentence: str) -> None:
        """A combination that cannot work: a row, but no child."""
        self.progress.case(case.id)
        self.finish(case, self.stopped(case, Outcome("skipped", "collect", sentence)))

    def stopped(self, case: Case, outcome: Outcome) -> dict[str, Any]:
        """The row of a case that has no record."""
        return {
            "format": FORMAT,
            "status": outcome.status,
            "phase": outcome.phase,
            "reason": without_paths(outcome.reason),
            "case_id": case.id,
            "case_hash": case.hash,
            "case": case.public().to_dict(),
        }


class CaseRounds:
    """The rounds of one case, as pytest-benchmark calls them: setup, target, teardown."""

    def __init__(self, session: Session, case: Case) -> None:
        self._session = session
        self._case = case
        self._child: Child | None = None
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> CaseRounds:
        self._session.progress.case(self._case.id)
        return self

    def __exit__(self, *_: object) -> None:
        # pytest-benchmark calls no teardown when the target raises: the child is reaped here
        self._reap()

    def setup(self) -> None:
        """Start a child and wait until it has warmed up."""
        session, quantizes = self._session, ADAPTERS[self._case.adapter].quantizes_base
        round_index = len(self.records)
        case = self._case.with_seed(self._case.settings.seed + round_index)
        job = {
            "kind": "case",
            "case": case.to_dict(),
            "base": session.base_quality(self._case, quantize=quantizes),
            "unquantized": session.base_quality(self._case, quantize=False) if quantizes else None,
        }
        self._child = session.child(job, self._file_stem(round_index))
        self._child.receive("ready")

    def train(self) -> None:
        """What pytest-benchmark times: from the go to the end of the last step."""
        assert self._child is not None
        self._child.send("go")
        self._child.receive("trained")

    def teardown(self) -> None:
        """Collect the record and write it at once: a run killed later does not lose it."""
        assert self._child is not None
        record = self._child.receive("result")
        # the case's identity is that of its first seed; the round's own seed is in `seed`
        record |= {"case": self._case.public().to_dict(), "case_hash": self._case.hash}
        record["provenance"] = provenance.describe()
        record["run_id"] = self._session.run_id
        name = f"{self._file_stem(len(self.records))}.json"
        write_atomically(self._session.folder / name, dumps(record))
        self.records.append(record)
        self._reap()

    def record(self) -> dict[str, Any]:
        return merge_rounds(self.records)

    def _file_stem(self, round_index: int) -> str:
        return f"{self._case.id}-{self._case.hash}-r{round_index}"

    def _reap(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def without_paths(text: str) -> str:
    """Records travel: where the user's files lie is not theirs to tell."""
    return text.replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")


def result_line(row: dict[str, Any]) -> str:
    """One line for the screen when a case has ended."""
    if row["status"] != "ok":
        return f"{row['case_id']}  {row['status']} in {row.get('phase', '?')}: {row['reason']}"
    quality = ""
    if row["perplexity"] is not None:
        before, after = row["preference_accuracy_base"], row["preference_accuracy"]
        quality = (
            f"  perplexity {row['perplexity_base']:.4g} -> {row['perplexity']:.4g}"
            f"  preference {before:.1%} -> {after:.1%}"
        )
    return (
        f"{row['case_id']}  train {row['train_s']:.2f} s  {row['tokens_per_s']:,.0f} tokens/s"
        f"{quality}  ok"
    )


def run_case(session: Session, case: Case, benchmark: Any) -> dict[str, Any]:
    """Run a case's rounds under pytest-benchmark's fixture; returns its row.

    A case that stops early has its row too; whether that fails its test is the caller's to say.
    """
    try:
        with CaseRounds(session, case) as rounds:
            benchmark.pedantic(
                rounds.train, setup=rounds.setup, teardown=rounds.teardown,
                rounds=session.rounds, iterations=1, warmup_rounds=0,
            )  # fmt: skip
            row = rounds.record()
        benchmark.extra_info.update(json.loads(dumps(row)))
    except RoundStoppedError as stop:
        row = session.stopped(case, stop.outcome) | {"traceback": stop.outcome.traceback}
    except OSError as error:  # a full disk: the case is lost, the others need not be
        row = session.stopped(case, Outcome("failed", "record", f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        row = session.stopped(case, Outcome("interrupted", "", "stopped by the user"))
        session.finish(case, row)
        raise
    session.finish(case, row)
    return row
