"""Every adapter against full fine-tuning: tables in docs/against-full.md, from committed records.

    python scripts/against_full.py docs/against-full.md results/*/*/*.json

Five claims are made for adapters: less computing, less time, less memory, less over-fitting, less
storage. An adapter is compared with the `full` case of its model and method in the same session, as
a machine's speed moves from one session to the next. Of a folder, which holds one machine's runs of
one preset, each model and method counts with the newest session that has both.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pages import write_part

from peftbench.adapters import ADAPTERS
from peftbench.compare.statistics import t_quantile
from peftbench.evaluation import mean_per_token
from peftbench.methods import METHODS
from peftbench.metrics import METRICS
from peftbench.result_files import read_json, session_part
from peftbench.show import counted_rounds, read_rows
from peftbench.summary import MEMORY_SOURCES, memory_of

CONFIDENCE = 0.90
MANY = 10_000  # degrees of freedom of an interval over items: a normal distribution's
GAP = "generalization_gap_nats_per_token"
PEAK = "peak memory"
HEADER = (
    "| model, method | adapter (family) | operations | time | peak memory | stored bytes"
    " | held-out quality | over-fitting |"
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """An adapter against `full`; `low` and `high` are `value` where nothing tells an interval."""

    value: float
    low: float
    high: float
    metric: str
    is_ratio: bool  # value over `full`'s; else value minus `full`'s

    def holds(self) -> bool | None:
        """Whether less than `full`'s, the whole interval beyond the margin; None: not told apart.

        More than `full`'s of a metric of which more is better.
        """
        margin = METRICS[self.metric].margin_ratio if self.is_ratio else 0.0
        least, most = (1 - margin, 1 + margin) if self.is_ratio else (0.0, 0.0)
        below, above = self.high < least, self.low > most
        if METRICS[self.metric].direction == "higher":
            below, above = above, below
        return True if below else False if above else None

    def text(self) -> str:
        low, value, high = (self.number(x) for x in (self.low, self.value, self.high))
        return value if low == high else f"{value} ({low} to {high})"

    def number(self, x: float) -> str:
        if self.is_ratio:
            return f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"
        if METRICS[self.metric].unit == "ratio":
            return f"{100 * x:+.1f} %"
        return f"{x:+.3f}"


@dataclass(frozen=True)
class Against:
    """One case beside the `full` case of its model and method; None where one was not measured."""

    model: str
    method: str
    adapter: str
    rounds: int
    claims: dict[str, Estimate | None]  # by title of CLAIMS
    quality: Estimate | None
    missing: dict[str, str]  # metric and reason


CLAIMS = {
    "Compute": "train_flops", "Time": "train_s", "Memory": PEAK, "Over-fitting": GAP,
    "Storage": "adapter_bytes",
}  # fmt: skip
SAYS = {
    "Compute": "an adapter takes fewer operations",
    "Time": "it trains in less time",
    "Memory": "it needs less memory",
    "Over-fitting": "it over-fits less",
    "Storage": "it takes less storage",
}


def metric_of(record: Record, name: str) -> str:
    """A metric's own name; of the peak memory that of its source."""
    if name != PEAK:
        return name
    return MEMORY_SOURCES.get(memory_of(record)[0], "peak_gpu_memory_bytes")


def by_seed(record: Record) -> dict[int, Record]:
    return {entry["seed"]: entry for entry in counted_rounds(record)}


def compared(full: Record, own: Record, name: str, *, is_ratio: bool) -> Estimate | None:
    """The adapter's metric against `full`'s, paired by seed; None where one is not measured.

    The interval is Student's over the seeds, of ratios over their logarithms. One seed alone has
    one over its items, where it has items.
    """
    metric = metric_of(own, name)
    ours, theirs = by_seed(own), by_seed(full)
    pairs = [(ours[s], theirs[s]) for s in sorted(ours.keys() & theirs.keys())]
    if own[metric] is None or full[metric] is None or not pairs:
        return None
    changes = [
        math.log(a[metric] / b[metric]) if is_ratio else a[metric] - b[metric] for a, b in pairs
    ]
    mean, error, df = statistics.fmean(changes), 0.0, MANY
    if len(changes) > 1:
        error, df = statistics.stdev(changes) / math.sqrt(len(changes)), len(changes) - 1
    elif not is_ratio:
        error = item_error(*pairs[0], metric)
    reach = float(t_quantile(np.array(df), (1 + CONFIDENCE) / 2)) * error
    ends = (mean, mean - reach, mean + reach)
    value, low, high = (math.exp(x) for x in ends) if is_ratio else ends
    return Estimate(value, low, high, metric, is_ratio)


def item_error(own: Record, full: Record, metric: str) -> float:
    """Standard error of a difference within one round, over the items that both have scored."""
    ours, theirs = own.get("items") or {}, full.get("items") or {}

    def summed(kind: str, tokens: str) -> float:
        changes = [a - b for a, b in zip(ours[kind], theirs[kind], strict=True)]
        return mean_per_token(changes, ours[tokens])[1] or 0.0

    if metric == GAP:
        kinds = ("trained", "held_out")
        return math.hypot(*(summed(f"{k}_pair_nll_nats", f"{k}_pair_tokens") for k in kinds))
    if metric == "nll_per_token":
        return summed("window_nll_nats", "window_tokens")
    if metric == "preference_accuracy":
        both = zip(ours["preference_correct"], theirs["preference_correct"], strict=True)
        changes = [int(a) - int(b) for a, b in both]
        return statistics.stdev(changes) / math.sqrt(len(changes))
    return math.hypot(*(entry[f"{metric}_se"] for entry in (own, full)))


def against(full: Record, own: Record) -> Against:
    case = own["case"]
    claims = {
        title: compared(full, own, name, is_ratio=name != GAP) for title, name in CLAIMS.items()
    }
    quality = compared(full, own, METHODS[case["method"]].target, is_ratio=False)
    missing = {
        name: str(own["null_reasons"].get(metric_of(own, name), "not measured with `full`"))
        for title, name in CLAIMS.items()
        if claims[title] is None
    }
    rounds = len(by_seed(own).keys() & by_seed(full).keys())
    return Against(case["model"], case["method"], case["adapter"], rounds, claims, quality, missing)


def read_comparable(file: Path) -> list[Record]:
    """The file's trainings that ended ok; a metric of another definition than today's is null."""
    versions = session_part(read_json(file)).get("metric_versions") or {}
    other = [n for n, m in METRICS.items() if versions.get(n, m.version) != m.version]
    reasons = {n: f"the file has it by definition {versions[n]}" for n in other}
    return [
        row | dict.fromkeys(other) | {"file": file, "null_reasons": row["null_reasons"] | reasons}
        for row in read_rows(file)
        if row["status"] == "ok" and row["case"]["method"] in METHODS  # inference trains nothing
    ]


def comparisons(sessions: list[list[Record]]) -> list[tuple[Path, Against]]:
    """Of one folder's sessions, oldest first: each model and method from the newest that has it."""
    newest: dict[tuple[str, str], list[tuple[Path, Against]]] = {}
    for records in sessions:
        cells = {
            (r["case"]["model"], r["case"]["method"], r["case"]["adapter"]): r for r in records
        }
        found: dict[tuple[str, str], list[tuple[Path, Against]]] = {}
        for (model, method, adapter), own in cells.items():
            full = cells.get((model, method, "full"))
            if adapter != "full" and full is not None:
                found.setdefault((model, method), []).append((own["file"], against(full, own)))
        newest |= found
    return [pair for group in newest.values() for pair in group]


def table_lines(rows: list[Against]) -> list[str]:
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        names = ("Compute", "Time", "Memory", "Storage")
        cells = [f"{row.model}, {row.method}", f"{row.adapter} ({ADAPTERS[row.adapter].family})"]
        found = [*(row.claims[n] for n in names), row.quality, row.claims["Over-fitting"]]
        cells += ["-" if e is None else e.text() for e in found]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def claim_line(title: str, rows: list[Against]) -> str:
    """Whether a claim holds, for each adapter over its models and methods."""
    known: dict[str, list[Estimate]] = {}
    for row in rows:
        if (found := row.claims[title]) is not None:
            known.setdefault(row.adapter, []).append(found)
    head = f"- **{title}** ({SAYS[title]}): "
    if not known:
        return head + "not measured in these records."
    always = {a: e for a, e in known.items() if all(x.holds() for x in e)}
    text = head + f"holds for {len(always)} of {len(known)} adapters"
    text += f": {listed(always)}." if always else "."
    rest = {a: e for a, e in known.items() if a not in always}
    if rest:
        text += " Not for " + "; ".join(f"{listed({a: e})}, {counts(e)}" for a, e in rest.items())
        text += "."
    return text


def listed(by_adapter: dict[str, list[Estimate]]) -> str:
    """Adapters with the range of their values; a ratio is `full`'s times that."""
    texts = []
    for adapter, found in by_adapter.items():
        values = sorted(found, key=lambda e: e.value)
        least, most = (e.number(e.value) for e in (values[0], values[-1]))
        span = least if least == most else f"{least} to {most}"
        texts.append(f"`{adapter}` ({span}{'' if found[0].is_ratio else ' nats a token'})")
    return ", ".join(texts)


def counts(found: list[Estimate]) -> str:
    """In how many cases it holds, and what the others are."""
    told = Counter(e.holds() for e in found)
    cases = f"holds in {told[True]} of {len(found)} {'case' if len(found) == 1 else 'cases'}"
    return cases + (f", not told apart in {told[None]}" if told[None] else "")


def quality_line(rows: list[Against]) -> str:
    """How held-out quality stands beside `full`'s: no claim of its own, but what it is worth."""
    known: dict[str, list[Estimate]] = {}
    for row in rows:
        if row.quality is not None:
            known.setdefault(row.adapter, []).append(row.quality)
    texts = []
    for adapter, found in known.items():
        told = Counter(e.holds() for e in found)
        texts.append(f"`{adapter}` {told[True]}, {told[None]}, {told[False]}")
    return "- Held-out quality (cases better, not told apart, worse): " + "; ".join(texts) + "."


def missing_lines(rows: list[Against]) -> list[str]:
    """Why a number is missing, each reason once."""
    reasons = Counter((name, why) for row in rows for name, why in row.missing.items())
    return [
        f"- `{name}` is missing in {count} of {len(rows)} cases: {why}."
        for (name, why), count in reasons.items()
    ]


def section_lines(folder: Path, found: list[tuple[Path, Against]]) -> list[str]:
    rows = [row for _, row in found]
    rounds = sorted({row.rounds for row in rows})
    many = " to ".join(str(n) for n in dict.fromkeys((rounds[0], rounds[-1])))
    files = ", ".join(f"`{file}`" for file in dict.fromkeys(file for file, _ in found))
    return [
        f"### {folder.name} on {folder.parent.name}", "",
        f"{many} round{'' if many == '1' else 's'} a case, from {files}.", "",
        *(claim_line(title, rows) for title in CLAIMS), quality_line(rows), *missing_lines(rows),
        "", *table_lines(rows), "",
    ]  # fmt: skip


def page_lines(files: list[Path]) -> list[str]:
    by_folder: dict[Path, list[list[Record]]] = {}
    for file in files:
        if records := read_comparable(file):
            by_folder.setdefault(file.parent, []).append(records)
    lines = []
    for folder, sessions in by_folder.items():
        sessions.sort(key=lambda records: records[0]["rounds"][0]["start_unix_s"])
        if found := comparisons(sessions):
            lines += section_lines(folder, found)
    return lines


def main(arguments: list[str]) -> int:
    page, *files = (Path(a) for a in arguments)
    write_part(page, "against-full", "\n".join(page_lines(files)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
