"""The quick preset against the same cases as plain TRL scripts, one process after the other.

Wall time from each command's start to its end: imports, models, training and scoring. What the
scripts leave out is in peftbench's time all the same: the base scored beside each model, the merge,
the text known by heart, memory, FLOPs. It scores text in batches, the scripts one window after the
other, as the page that they follow does. Inference cases have no script and run on neither side.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare_ppo import PACKAGE
from sides import ROOT, Goal, run_side, table

from peftbench.case import PRESETS, Case
from peftbench.data import tinywiki
from peftbench.data.loading import TINYWIKI_DOMAIN
from peftbench.methods import INFER
from peftbench.models import resolved

OWN = Path(sys.executable)
GOAL = 3.0
ARTICLES = 400  # more than `eval_tokens` ids in any tokeniser of these models


def measure(trl_python: Path, sizes: str) -> tuple[dict[str, Any], str]:
    """Ours, the scripts, and ours again: the machine's speed drifts in these minutes."""
    preset = "quick" if sizes == "full" else "smoke"
    own = [own_run(preset)]
    scripts = []
    for case in cases_of(preset):
        print(f"{case.id} ...", file=sys.stderr, flush=True)
        scripts.append(script_run(case, trl_python))
    own.append(own_run(preset))
    check_equal_work(own[0]["cases"], scripts)
    own_s, scripts_s = statistics.fmean(run["wall_s"] for run in own), total_s(scripts)
    goals = [
        Goal(f"times faster than plain TRL scripts: {preset}, {len(scripts)} trainings",
             scripts_s / own_s, GOAL),
    ]  # fmt: skip
    numbers = {"own": own, "scripts": scripts, "goals": [goal.to_dict() for goal in goals]}
    return numbers, text_of(preset, own_s, scripts, goals)


def cases_of(preset: str) -> list[Case]:
    """The trainings, with the table's learning rates."""
    found = PRESETS[preset]
    return [
        resolved(Case(model, adapter, method, found.settings_of(method)))
        for model, adapter, method in found.cells()
        if method != INFER
    ]


def own_run(preset: str) -> dict[str, Any]:
    """Seconds of the whole command, and by case what both sides measure."""
    with tempfile.TemporaryDirectory(prefix="peftbench-peers-") as folder:
        result = Path(folder) / "run.json"
        started_s = time.perf_counter()
        done = subprocess.run(
            [OWN, "-m", "pytest", "bench", "--preset", preset, "-k", f"not {INFER}", "-q",
             "--device", "cpu", "-p", "no:cacheprovider", f"--benchmark-json={result}",
             f"--results-dir={folder}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wall_s = time.perf_counter() - started_s
        if done.returncode:
            sys.exit(f"peftbench's side ended with {done.returncode}:\n{done.stdout[-3000:]}")
        records = [b["extra_info"] for b in json.loads(result.read_text())["benchmarks"]]
    wanted = ("steps", "perplexity", "preference_accuracy")
    cases = {r["case_id"]: {name: r[name] for name in wanted} for r in records}
    return {"wall_s": wall_s, "cases": cases}


def script_run(case: Case, trl_python: Path) -> dict[str, Any]:
    """One case's script, timed from outside, and what it found."""
    settings = case.settings
    train = tinywiki.pairs(TINYWIKI_DOMAIN, "train", settings.pairs, settings.seed)
    test = tinywiki.pairs(TINYWIKI_DOMAIN, "test", settings.eval_pairs, 0)
    articles = tinywiki.articles(TINYWIKI_DOMAIN, "test", ARTICLES, 0)
    work = asdict(settings) | {
        "adapter": case.adapter,
        "method": case.method,
        "folder": str(PACKAGE / "tiny" / case.model),
        "train": [[p.prompt, p.chosen, p.rejected] for p in train],
        "test": [[p.prompt, p.chosen, p.rejected] for p in test],
        "text": "".join(article.text for article in articles),
    }
    python = trl_python if case.method == "ppo" else OWN
    started_s = time.perf_counter()
    found = run_side(python, "plain_trl.py", work)
    found["wall_s"] = time.perf_counter() - started_s
    pairs = zip(test, found.pop("completions"), strict=False)
    rewards = [tinywiki.true_statement_ratio(pair.prompt, text) for pair, text in pairs]
    return {"case_id": case.id, "method": case.method} | found | {
        "true_reward": statistics.fmean(rewards), "completions": len(rewards),
    }  # fmt: skip


def check_equal_work(own: dict[str, dict[str, Any]], scripts: list[dict[str, Any]]) -> None:
    """Raises: SystemExit if a side has cases or optimiser steps that the other has not."""
    if own.keys() != {run["case_id"] for run in scripts}:
        sys.exit(f"only one side has: {own.keys() ^ {run['case_id'] for run in scripts}}")
    for run in scripts:
        steps = own[run["case_id"]]["steps"]
        if run["method"] != "ppo" and run["steps"] != steps:
            sys.exit(f"{run['case_id']} has {steps} steps, its script {run['steps']}")


def total_s(scripts: list[dict[str, Any]]) -> float:
    return float(sum(run["wall_s"] for run in scripts))


def text_of(preset: str, own_s: float, scripts: list[dict[str, Any]], goals: list[Goal]) -> str:
    parts = ("start_s", "train_s", "score_s")
    methods = list(dict.fromkeys(run["method"] for run in scripts))
    rows = []
    for method in methods:
        runs = [run for run in scripts if run["method"] == method]
        medians = [statistics.median(run[part] for run in runs) for part in parts]
        rows.append([method, str(len(runs)), f"{total_s(runs):.0f}",
                     *(f"{seconds:.1f}" for seconds in medians)])  # fmt: skip
    header = ["scripts of", "cases", "seconds", "to start", "train", "score (medians)"]
    title = (
        f"{preset}: {len(scripts)} trainings as plain TRL scripts {total_s(scripts):.0f} s,"
        f" by peftbench {own_s:.0f} s"
    )
    return "\n".join([title, "", table(header, rows), "", *(goal.line() for goal in goals)])
