"""The comparison on real runs: `make verify PARTS=nights`.

1. Eleven runs of the quick preset on the same code: each compared with the one before it must pass.
2. One change at a time, put in by tests/injected: each must be reported as what it is. The time of
   one case of two seconds has the machine's noise, which the report states as what it "detects":
   where that is more than 10 %, a step that is 10 % slower is shown and proves nothing, and one
   that is slower by half more than what it detects must be found instead. So with the suite's line,
   where the nights' own means differ by more.

Runs lie in output/nights/<preset>-<commit>; one that is there is not repeated, so an interrupted
proof goes on, and with --runs FOLDER a later comparison judges the runs of an earlier commit.
Prints what the comparison printed and exits with 1 if one of them was not as expected.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from peftbench import provenance
from peftbench.compare.statistics import MEDIAN_VARIANCE, POWER, SUITE_P, t_quantile
from peftbench.result_files import case_records, read_json

ROOT = Path(__file__).resolve().parent.parent
NIGHTS = 11
ONE, BESIDE = "tiny-gpt2-lora-dpo", "tiny-gpt2-lora and not ppo"
ADAPTERS = "*-lora-*,*-qlora-*,*-ia3-*,*-prefix-*"


@dataclass(frozen=True)
class Change:
    """What is put in, and what the comparison must answer."""

    name: str
    inject: dict[str, str]
    select: str  # of `pytest -k`; "" runs every case
    exit_code: int
    expected: tuple[str, ...]  # words of the report


SLOWER_RATIO = 0.10
SLOWER = Change("a 10 % slower step in one case", {"slow": ONE}, BESIDE, 1,
                ("REGRESSED", ONE, "train_s"))  # fmt: skip
SUITE = Change(
    "a 10 % slower step with every adapter", {"slow": ADAPTERS}, "", 1, ("suite regressed",)
)
WITH_PEFT = replace(
    SUITE, name="a 10 % slower step with every adapter, under another peft",
    inject=SUITE.inject | {"peft": "9.9.9"}, expected=("suite regressed", "peft", "9.9.9"),
)  # fmt: skip
CHANGES = (
    SLOWER,
    Change(
        "128 MiB held",
        {"hold": "*"},
        "tiny-gpt2 and sft and not qlora",
        1,
        ("REGRESSED", "host_peak_rss_delta"),
    ),
    Change("a doubled LoRA rank", {"rank": ONE}, BESIDE, 1, ("CHANGED", "trainable_params")),
    Change("a learning rate of 0", {"still": ONE}, BESIDE, 1, ("REGRESSED", "preference_accuracy")),
    Change("a crashed case", {"crash": ONE}, BESIDE, 1, ("FAILED", ONE, "signal 11")),
    Change("a dropped case", {}, f"not {ONE}", 3, ("MISSING", ONE)),
    SUITE,
    WITH_PEFT,
)


def run(file: Path, preset: str, select: str, inject: dict[str, str]) -> None:
    """A session into `file`, unless it is there. A case may fail, the session may not."""
    if file.exists():
        return
    started_s = time.monotonic()
    unfinished = file.with_suffix(".unfinished")
    command = [
        sys.executable, "-m", "pytest", "bench", "--preset", preset, "-p", "no:cacheprovider",
        f"--benchmark-json={unfinished}", "--results-dir", str(file.parent.parent / "runs"),
        *(["-k", select] if select else []),
    ]  # fmt: skip
    environment = os.environ | {"COLUMNS": "160"}
    if inject:
        environment |= {
            "PYTHONPATH": str(ROOT / "tests" / "injected"), "PEFTBENCH_INJECT": json.dumps(inject),
        }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode not in (0, 1) or not unfinished.exists():
        sys.exit(f"{file.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    unfinished.rename(file)
    print(f"{file.name}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)


def compare(base: Path, new: Path, form: str = "text") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "peftbench", "compare", str(base), str(new), "--format", form],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def detected_ratio(base: Path, new: Path) -> float:
    """What the comparison says it would have found of a change in the one case's training time."""
    rows = json.loads(compare(base, new, "json")[1])["rows"]
    (row,) = (r for r in rows if (r["case_id"], r["metric"]) == (ONE, "train_s"))
    return float(row["minimum_detectable"])


def suite_detected_ratio(nights: list[Path]) -> float:
    """How much slower the adapters' cases must be for nearly every suite's line to appear, by how
    much the nights' own means over all cases differ."""
    times = []
    for night in nights:
        records = case_records(read_json(night))
        times.append({r["case_id"]: math.log(r["train_s"]) for r in records if r.get("train_s")})
    shared = set.intersection(*(set(t) for t in times))
    means = [statistics.fmean(t[case] for case in shared) for t in times]
    spread = statistics.stdev(means) * math.sqrt(1 + MEDIAN_VARIANCE / len(means))
    df = np.array(float(len(means) - 1))
    meant = [c for c in shared if any(fnmatch.fnmatch(c, p) for p in ADAPTERS.split(","))]
    found = (t_quantile(df, 1 - SUITE_P) + t_quantile(df, POWER)) * spread
    return float(found) * len(shared) / len(meant)


def reduced(nights: list[Path], file: Path) -> Path:
    """The nights with the cases of a file alone: what a run of some cases is compared with."""
    ids = {case["case_id"] for case in json.loads(file.read_text())["peftbench"]["cases"]}
    place = file.parent / "history"
    place.mkdir(exist_ok=True)
    for night in nights:
        data = json.loads(night.read_text())
        data["benchmarks"] = [b for b in data["benchmarks"] if b["extra_info"]["case_id"] in ids]
        data["peftbench"]["cases"] = [
            case for case in data["peftbench"]["cases"] if case["case_id"] in ids
        ]
        (place / night.name).write_text(json.dumps(data))
    return place


def main() -> int:
    parser = argparse.ArgumentParser(description="The comparison on real runs.")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--nights", type=int, default=NIGHTS)
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    preset, count = options.preset, options.nights
    where = provenance.describe()
    folder = options.runs or ROOT / "output" / "nights" / f"{preset}-{str(where['commit'])[:12]}"
    nights = [folder / "nights" / f"night-{number:02d}.json" for number in range(1, count + 1)]
    (folder / "nights").mkdir(parents=True, exist_ok=True)
    held = []
    for night in nights:
        run(night, preset, "", {})
    for base, new in itertools.pairwise(nights):
        code, text = compare(base, new)
        held.append(code == 0)
        result = next((line for line in text.splitlines() if line.startswith("result")), text)
        print(f"{'ok  ' if code == 0 else 'FAIL'} {base.name} -> {new.name}: exit code {code};"
              f" {' '.join(result.split()[1:])}", flush=True)  # fmt: skip
        if code:
            print(text)
    changes = list(CHANGES)
    while changes:
        change = changes.pop(0)
        file = folder / change.name.replace(" ", "-") / "selected.json"
        file.parent.mkdir(exist_ok=True)
        run(file, preset, change.select, change.inject)
        whole = not change.select or change.select.startswith("not ")
        history = folder / "nights" if whole else reduced(nights, file)
        code, text = compare(history, file)
        as_expected = code == change.exit_code and all(word in text for word in change.expected)
        outcome = "ok  " if as_expected else "FAIL"
        if change == SLOWER and not as_expected:
            detects = detected_ratio(history, file)
            if detects > SLOWER_RATIO:
                outcome = f"told (it says that it detects {100 * detects:.0f} %)"
                much = 1.5 * detects
                changes.insert(0, replace(
                    SLOWER, name=f"a {100 * much:.0f} % slower step in one case",
                    inject=SLOWER.inject | {"by": f"{much:.3f}"},
                ))  # fmt: skip
        if change == SUITE and not as_expected:
            detects = suite_detected_ratio(nights)
            if detects > SLOWER_RATIO:
                outcome = f"told (by the nights' own means it detects {100 * detects:.0f} %)"
                much = 1.5 * detects
                changes[:] = [replace(
                    WITH_PEFT, inject=WITH_PEFT.inject | {"by": f"{much:.3f}"},
                    name=f"a {100 * much:.0f} % slower step with every adapter, under another peft",
                )]  # fmt: skip
        held.append(outcome != "FAIL")
        print(f"\n{outcome} {change.name}: exit code {code}; expected {change.exit_code},"
              f" {', '.join(change.expected)}\n{text}", flush=True)  # fmt: skip
    print(f"{held.count(False)} of {len(held)} comparisons were not as expected")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
