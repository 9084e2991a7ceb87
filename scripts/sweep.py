"""Learning rates of some adapters and methods, swept: a table for results/sweeps.

    python scripts/sweep.py --adapters dora,ln --rates 1e-3,3e-3,1e-2 --output results/sweeps/x.md

Runs the preset once for each rate, every chosen case with that rate, and writes what each method
itself optimises on held-out data, the best rate in bold. A best rate at an end of the grid says
that the grid is too short. Sessions that are in output/sweeps already are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from peftbench.methods import METHODS, stages
from peftbench.metrics import METRICS
from peftbench.result_files import case_records, read_json

ROOT = Path(__file__).resolve().parent.parent
# what is read for each last stage: nothing that another one optimises
JUDGED = {"sft": "nll_per_token", "dpo": "preference_accuracy", "orpo": "preference_accuracy",
          "ppo": "true_reward"}  # fmt: skip


def session(options: argparse.Namespace, rate: str) -> list[dict[str, Any]]:
    """The records of one rate, out of output/sweeps or run now."""
    name = "-".join([options.preset, options.models, options.adapters, options.methods, rate])
    file = ROOT / "output" / "sweeps" / f"{name.replace(',', '_')}-{options.seeds}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        command = [
            sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "--preset",
            options.preset, "--models", options.models, "--adapters", options.adapters, "--methods",
            options.methods, "--learning-rate", rate, "--rounds", str(options.seeds),
            f"--benchmark-json={unfinished}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT)
        # a rate that diverges fails its case, and the table says so
        if done.returncode not in (0, 1) or not unfinished.exists():
            sys.exit(f"pytest ended with {done.returncode} at a rate of {rate}")
        unfinished.rename(file)
    return case_records(read_json(file))


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown: a row for each case, a column for each rate; `found` is by rate, in order."""
    rates = list(found)
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for rate, records in found.items():
        for record in records:
            by_case.setdefault(record["case_id"], {})[rate] = record
    lines = [
        f"| case | metric | base | {' | '.join(rates)} |",
        f"|---|---|--:|{'--:|' * len(rates)}",
    ]
    for case_id, records_of in by_case.items():
        method = next(r["case"]["method"] for r in records_of.values())
        metric = JUDGED[stages(method)[-1]]
        values = {rate: r[metric] for rate, r in records_of.items() if r["status"] == "ok"}
        lower = METRICS[metric].direction == "lower"
        best = min(values, key=lambda r: values[r] if lower else -values[r]) if values else None
        base = next((r[f"{metric}_base"] for r in records_of.values() if r["status"] == "ok"), None)
        cells = [
            records_of[rate]["status"] if rate not in values
            else f"**{values[rate]:.4g}**" if rate == best else f"{values[rate]:.4g}"
            for rate in rates
        ]  # fmt: skip
        shown = "" if base is None else f"{base:.4g}"
        lines.append(f"| {case_id} | {metric} | {shown} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--models", default="tiny-gpt2,tiny-llama")
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--methods", default="sft,dpo,orpo")
    parser.add_argument("--rates", required=True, help="comma-separated, ascending")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    for method in options.methods.split(","):
        if method not in METHODS:
            parser.error(f"unknown method {method!r}; choose from: {', '.join(METHODS)}")
    found = {rate: session(options, rate) for rate in options.rates.split(",")}
    first = next(r for records in found.values() for r in records if r["status"] == "ok")
    where = first["provenance"]
    head = [
        f"Rates of {options.adapters} with {options.methods}, preset {options.preset},"
        f" {options.seeds} seed(s); medians on held-out data. Commit {str(where['commit'])[:12]},"
        f" {json.dumps(where['libraries'])}.",
        "",
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join([*head, *table(found)]) + "\n")
    print(options.output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
