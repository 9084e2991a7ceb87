"""What handing out a matrix costs, and how far one driver reaches: docs/scaling.md, `make scale`.

    python scripts/scale.py

1. A real Ray on this machine runs tasks that return a real record at once, through the driver's own
   code, disk included: seconds of wall time a round, for ever more rounds.
2. With that much a round, ten thousand cases over a thousand GPUs are simulated (peftbench plan's
   simulation), some of which fail.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from pages import write_part

from peftbench import provenance
from peftbench.case import PRESETS, Case
from peftbench.cluster import Cluster, RayOptions
from peftbench.models import resolved
from peftbench.plan import EXACT, Costs, Expected, Failures, simulate
from peftbench.progress import Progress, clock
from peftbench.session import Session

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
RECORDS = ROOT / "results" / "xeon-amx-2c" / "quick"
ROUNDS = (250, 500, 1000, 2000)
CASES, GPUS = 10_000, 1_000
MEDIAN_S, SIGMA = 600.0, 0.8  # of a round: half take from six to seventeen minutes
START_UP_S, BETWEEN_S = 30.0, 1.0
MEAN_HOURS = (float("inf"), 1000.0, 100.0, 10.0)  # of a GPU between two failures


def answering(record: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A task that answers as a node does, without the training."""

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        return {"node": "n", "sentinels": None, "bases": [], "record": record}

    return answer


def dispatched_s(rounds: int, record: dict[str, Any], folder: Path) -> float:
    """Wall seconds from the first hand-out to the last record on disk."""
    case = resolved(Case("tiny-gpt2", "lora", "dpo", PRESETS["quick"].settings))
    session = Session(folder, Progress(rounds), rounds)
    session.folder.mkdir(parents=True)
    driver = Cluster(session, RayOptions("local", cpus=1), answering(record))
    try:
        driver.submit([(case, [0])])
        driver.record(case, 0)  # Ray starts its first worker
        started_s = time.perf_counter()
        driver.submit([(case, range(1, rounds + 1))])
        for index in range(1, rounds + 1):
            driver.record(case, index)
        return time.perf_counter() - started_s
    finally:
        driver.close()
        session.progress.close()


def largest_record() -> dict[str, Any]:
    found = [
        b["extra_info"]
        for file in sorted(RECORDS.glob("*.json"))
        for b in json.loads(file.read_text())["benchmarks"]
    ]
    largest: dict[str, Any] = max(found, key=lambda r: len(json.dumps(r)))
    return largest


def lengths() -> list[Expected]:
    """Rounds of a made-up matrix, seeded."""
    dice = random.Random(0)
    case = resolved(Case("tiny-gpt2", "lora", "dpo", PRESETS["quick"].settings))
    return [
        Expected(case, MEDIAN_S * dice.lognormvariate(0.0, SIGMA), None, None, EXACT, ())
        for _ in range(CASES)
    ]


def scale_lines(dispatch: list[tuple[int, float]]) -> list[str]:
    """Both tables in Markdown."""
    most_s = max(seconds / rounds for rounds, seconds in dispatch)
    lines = ["| rounds | seconds | ms a round |", "|---|---|---|"]
    lines += [f"| {n} | {s:.1f} | {1000 * s / n:.1f} |" for n, s in dispatch]
    tasks = lengths()
    costs = Costs(START_UP_S, BETWEEN_S, {}, most_s)
    least_s = sum(t.seconds + BETWEEN_S for t in tasks) / GPUS
    lines += [
        "",
        f"{CASES:,} cases over {GPUS:,} GPUs, {1000 * most_s:.1f} ms of the driver a round; rounds"
        f" of {clock(MEDIAN_S)} (median, log-normal, sigma {SIGMA}), the longest"
        f" {clock(max(t.seconds for t in tasks))}; a lost GPU is away for ten minutes:",
        "",
        "| handed out | a GPU fails every | wall time | all rounds / all GPUs | lost rounds"
        " | lost GPU time | driver at work |",
        "|---|---|---|---|---|---|---|",
    ]
    orders = {
        "as they come": tasks,
        "longest first": sorted(tasks, key=lambda t: -t.seconds),
    }
    for order, handed in orders.items():
        for hours in MEAN_HOURS:
            found = simulate(handed, 1, GPUS, costs, Failures(hours))
            often = "never" if hours == float("inf") else f"{hours:g} h"
            lost = found.lost_s / (found.lost_s + found.busy_s)
            lines.append(
                f"| {order} | {often} | {clock(found.makespan_s)} | {clock(least_s)}"
                f" | {found.lost_rounds:,} | {lost:.1%} | {clock(found.dispatch_s)} |"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    record = largest_record()
    dispatch = []
    for rounds in ROUNDS:
        with tempfile.TemporaryDirectory() as folder:
            dispatch.append((rounds, dispatched_s(rounds, record, Path(folder))))
        print(f"{rounds} rounds: {dispatch[-1][1]:.1f} s", flush=True)
    where = provenance.describe()
    title = (
        f"Ray {metadata.version('ray')}, a record of {len(json.dumps(record)) / 1000:.0f} kB,"
        f" driver and tasks on {where['cpu_cores']} cores of {where['cpu']}; commit"
        f" {str(where['commit'])[:12]}."
    )
    lines = [title, "", *scale_lines(dispatch)]
    print("\n".join(lines))
    write_part(options.output, "scale", "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
