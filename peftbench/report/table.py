"""The table of cases: units in the header, and a dash with its reason for what is missing."""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.compare.verdicts import VERDICTS, Comparison
from peftbench.metrics import METRICS
from peftbench.report.cases import MEMORY, Case
from peftbench.summary import MIB

PEAK = "peak"  # the column of the memory metric that a case has
BEFORE = {"perplexity": "perplexity_base", "preference_accuracy": "preference_accuracy_base"}
GATING = VERDICTS[: VERDICTS.index("improved")]


@dataclass(frozen=True)
class Column:
    """`factor` turns the stored value into the unit of the title."""

    metric: str
    title: str
    unit: str
    factor: float
    form: str


COLUMNS = (
    Column("method_s", "time", "s", 1, ",.2f"),
    Column("train_s", "training", "s", 1, ",.2f"),
    Column("tokens_per_s", "speed", "tokens/s", 1, ",.0f"),
    Column(PEAK, "peak memory", "MiB", 1 / MIB, ",.1f"),
    Column("energy_j", "energy", "J", 1, ",.1f"),
    Column("trainable_params", "trainable", "parameters", 1, ",.0f"),
    Column("adapter_bytes", "on disk", "MiB", 1 / MIB, ",.2f"),
    Column("perplexity", "perplexity", "", 1, ".4g"),
    Column("bits_per_byte", "bits per byte", "bits", 1, ".3f"),
    Column("preference_accuracy", "pref. accuracy", "%", 100, ".1f"),
)


@dataclass(frozen=True)
class Cell:
    """`sort` is None for what is not there, which then comes last; `tip` is shown on hover."""

    text: str
    sort: float | None
    tip: str


def cells(case: Case) -> list[Cell]:
    return [cell(case, column) for column in COLUMNS]


def cell(case: Case, column: Column) -> Cell:
    metric = column.metric if column.metric != PEAK else case.memory
    value = None if metric is None else case.values[metric]
    if metric is None or value is None:
        name = metric or next(iter(MEMORY))
        return Cell("–", None, f"not measured: {case.reasons[name]}")
    text = format(value * column.factor, column.form)
    tip = MEMORY[metric] if column.metric == PEAK else ""
    share = case.values["trainable_ratio"]
    if metric == "trainable_params" and share is not None:
        tip = f"{share:.2%} of all parameters"
    if metric in BEFORE:
        before = case.values[BEFORE[metric]]
        start = "–" if before is None else format(before * column.factor, column.form)
        text, error = f"{start} → {text}", case.values[f"{metric}_se"]
        tip = "before → after training"
        if error is not None:
            tip += f"; standard error {format(error * column.factor, '.2g')} {column.unit}".rstrip()
    return Cell(text, value, tip)


def definition(column: Column) -> str:
    """What the header says on hover."""
    if column.metric == PEAK:
        return METRICS["peak_gpu_memory_bytes"].definition + " Without a GPU: the growth of the" \
            " process's resident memory over the same phases."  # fmt: skip
    found = METRICS[column.metric]
    better = "" if found.direction == "none" else f" {found.direction.capitalize()} is better."
    return found.definition + better


@dataclass(frozen=True)
class Change:
    """The gravest verdict of a case; `rank` orders by gravity, "" is a case without a verdict."""

    verdict: str
    rank: int
    tip: str


def change_of(case: Case, comparison: Comparison | None) -> Change:
    """What the comparison says of a case in one word, with the metrics that say it."""
    if comparison is None:
        return Change("", len(VERDICTS), "no earlier session was given")
    key = (case.case_id, case.case_hash)
    rows = [r for r in comparison.rows if (r.case_id, r.case_hash) == key]
    if not rows:
        return Change("", len(VERDICTS), "not compared")
    worst = min((r.verdict for r in rows if r.acknowledged is None), key=VERDICTS.index,
                default="unchanged")  # fmt: skip
    if VERDICTS.index(worst) >= VERDICTS.index("inconclusive"):
        return Change("no change seen", VERDICTS.index(worst), "nothing beyond margin and chance")
    metrics = ", ".join(r.metric for r in rows if r.verdict == worst)
    return Change(worst, VERDICTS.index(worst), metrics)
