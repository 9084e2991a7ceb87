"""Learning rates of adapters and methods, swept: a table for results/sweeps, `make sweep`.

    python scripts/sweep.py
    python scripts/sweep.py --adapters pissa,prompt --methods ppo --factors 0.3,1,3
    python scripts/sweep.py --preset cpu-real --methods sft --factors 0.25,1,4 --minutes 60 \
        --pairs 64 --eval-tokens 4096 --eval-pairs 16 --output results/sweeps/real

Every case of the preset at its own rate of the tables times each factor. What each method itself
optimises, on held-out data, is written as Markdown and JSON, the best rate in bold: a best rate at
an end of the grid says that the grid is too short. The factors nearest to 1 come first, so that a
sweep that runs out of `--minutes` has whole columns. A sweep that was interrupted goes on with
`--resume` and the name of its folder in output/sweeps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftbench import provenance
from peftbench.adapters import ADAPTERS
from peftbench.case import PRESETS, Case, check_settings
from peftbench.errors import UserError, unknown_name
from peftbench.fit import try_case
from peftbench.methods import METHODS, stages
from peftbench.metrics import METRICS
from peftbench.models import resolved
from peftbench.preflight import impossible, preflight
from peftbench.progress import Progress
from peftbench.record import dumps, write_atomically
from peftbench.session import Session, result_line
from peftbench.setting_options import TRAIN_OPTIONS, add_setting_options

ROOT = Path(__file__).resolve().parent.parent
# the adapters whose rates were set by analogy
UNTUNED = "dora,rslora,vera,ln,pissa,lora-8bit,lora-bias,bitfit,prompt"
# what is read for each last stage: nothing that another one optimises
JUDGED = {"sft": "nll_per_token", "dpo": "preference_accuracy", "orpo": "preference_accuracy",
          "ppo": "true_reward"}  # fmt: skip


# what a sweep may change of them all; its rates are its own, and so are its seeds
SETTINGS = tuple(o for o in TRAIN_OPTIONS if o.setting not in ("learning_rate", "seed"))


def plan(options: argparse.Namespace) -> list[tuple[float, Case]]:
    """(factor, case) of every round, in the order in which they run."""
    preset, changed = PRESETS[options.preset], changes(options)
    models = options.models.split(",") if options.models else preset.models
    rounds = []
    for factor in sorted(options.factors, key=lambda f: (abs(math.log(f)), f)):
        for model in models:
            for adapter in options.adapters:
                for method in options.methods:
                    settings = replace(preset.settings_of(method), **changed)
                    check_settings(settings)
                    case = resolved(Case(model, adapter, method, settings))
                    rate = float(f"{case.settings.learning_rate * factor:.3g}")
                    scaled = replace(case, settings=replace(case.settings, learning_rate=rate))
                    rounds += [(factor, scaled.with_seed(seed)) for seed in range(options.seeds)]
    return rounds


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that are given, in place of the preset's."""
    given = {o.setting: getattr(options, o.dest) for o in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def row_of(factor: float, case: Case, record: dict[str, Any]) -> dict[str, Any]:
    """One round as the JSON file has it; `value` is None where it did not end as ok."""
    metric = JUDGED[stages(case.method)[-1]]
    return {
        "model": case.model, "adapter": case.adapter, "method": case.method, "metric": metric,
        "factor": factor, "learning_rate": case.settings.learning_rate,
        "seed": case.settings.seed, "status": record["status"], "reason": record.get("reason"),
        "value": record.get(metric), "base": record.get(f"{metric}_base"),
        "train_s": record.get("train_s"),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a row for each case, a column for each factor of its rate; medians over seeds."""
    factors = sorted({row["factor"] for row in rows})
    names = " | ".join(f"x {factor:g}" for factor in factors)
    lines = [
        f"| case | metric | base | {names} | rate of x 1 | best rate |",
        f"|---|---|--:|{'--:|' * len(factors)}--:|--:|",
    ]
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["adapter"], row["method"]), []).append(row)
    for (model, adapter, method), found in sorted(cases.items()):
        lower = METRICS[found[0]["metric"]].direction == "lower"
        by_factor = {f: [r for r in found if r["factor"] == f] for f in factors}
        values = {
            f: statistics.median(r["value"] for r in some)
            for f, some in by_factor.items()
            if some and all(r["value"] is not None for r in some)
        }
        best = min(values, key=lambda f: values[f] if lower else -values[f]) if values else None
        cells = [
            (f"**{values[f]:.4g}**" if f == best else f"{values[f]:.4g}") if f in values
            else ", ".join(sorted({r["status"] for r in by_factor[f]})) or "not run"
            for f in factors
        ]  # fmt: skip
        base = next((r["base"] for r in found if r["base"] is not None), None)
        first = found[0]["learning_rate"] / found[0]["factor"]
        lines.append(
            f"| {model}-{adapter}-{method} | {found[0]['metric']} |"
            f" {'' if base is None else f'{base:.4g}'} | {' | '.join(cells)} | {first:.3g} |"
            f" {'' if best is None else f'{first * best:.3g}'} |"
        )
    return lines


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what fits into the minutes; the rows so far are written after each round."""
    rounds = plan(options)
    cases = [case for _, case in rounds]
    preflight(
        sorted({c.model for c in cases}), set(options.adapters), PRESETS[options.preset].settings
    )
    progress = Progress(len(rounds))
    session = Session(
        ROOT / "output" / "sweeps", progress, time_limit_s=1800.0, resume=options.resume
    )
    print(f"run {session.run_id}; to go on after an interrupt: --resume {session.run_id}")
    rows: list[dict[str, Any]] = []
    ends = time.monotonic() + 60 * options.minutes
    try:
        for factor, case in rounds:
            if time.monotonic() > ends:
                print(f"the {options.minutes:g} minutes are over; {len(rounds) - len(rows)} left")
                break
            if sentence := impossible(case):
                session.skip(case, sentence)
                record = session.rows[-1]
            else:
                record = try_case(session, case)
                progress.finished(f"{result_line(record)}, rate {case.settings.learning_rate:g}")
            rows.append(row_of(factor, case, record))
            write(rows, options)
    finally:
        progress.close()
    return rows


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """The two files, as far as the sweep is."""
    where = provenance.describe()
    facts = {
        "schema": "peftbench-sweep",  # first: it lies among results
        "preset": options.preset, "changes": changes(options), "seeds": options.seeds,
        "commit": where["commit"], "cpu": where["cpu"], "libraries": where["libraries"],
    }  # fmt: skip
    changed = "".join(f", {name} {value}" for name, value in changes(options).items())
    head = (
        f"Preset {options.preset}{changed}, {options.seeds} seed(s), held-out data; commit"
        f" {str(where['commit'])[:12]}, {where['cpu']}. A rate is the tables' times the factor."
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output.with_suffix(".json"), dumps(facts | {"rounds": list(rows)}))
    text = "\n".join([head, "", *table(rows)])
    write_atomically(options.output.with_suffix(".md"), text + "\n")


def names_of(kind: str, text: str, allowed: Sequence[str]) -> list[str]:
    """Raises: UserError for a name that the table lacks."""
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise unknown_name(kind, name, allowed)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="quick", choices=[*PRESETS])
    parser.add_argument("--models", help="comma-separated; the preset's where left out")
    parser.add_argument("--adapters", default=UNTUNED)
    parser.add_argument("--methods", default="sft,dpo")
    parser.add_argument("--factors", default="0.25,0.5,1,2,4", help="of the tables' rates")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=25.0, help="no round starts after them")
    parser.add_argument("--resume", metavar="RUN_ID")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweeps" / "tiny",
                        help="without its ending: .md and .json are written")  # fmt: skip
    add_setting_options(
        parser.add_argument_group("settings, each in place of the preset's").add_argument, SETTINGS
    )
    options = parser.parse_args()
    try:
        options.adapters = names_of("adapter", options.adapters, list(ADAPTERS))
        options.methods = names_of("method", options.methods, list(METHODS))
        options.factors = [float(factor) for factor in options.factors.split(",")]
        if min(options.factors) <= 0:
            raise UserError(f"--factors has {min(options.factors):g}; a factor is above 0")
        rows = sweep(options)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
