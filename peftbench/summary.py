"""The table at the end of a run, as plain text."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from peftbench.metrics import VARIANTS, kind_of

MIB = 2**20


def table(header: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Aligned lines; the first `left` columns and the last are flush left, the others right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    last = len(header) - 1

    def line(cells: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < left or i == last else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [line(header), line(["-" * w for w in widths]), *(line(r) for r in rows)]


def fitted(
    header: list[str], rows: list[list[str]], spare: Sequence[str], left: int = 1
) -> list[str]:
    """The table without as many columns of `spare`, from its first on, as the terminal is too
    narrow for, and a line that names them; whole where nothing says how wide the output is.

    A last cell may be a sentence, which a terminal wraps: what counts of it is its header.
    """
    width = shutil.get_terminal_size((0, 0)).columns
    cut: list[str] = []
    while width and len(cut) < len(spare) and _cells_width(header, rows) > width:
        cut.append(spare[len(cut)])
        at = header.index(cut[-1])
        header, *rows = ([*cells[:at], *cells[at + 1 :]] for cells in [header, *rows])
    lines = table(header, rows, left)
    if cut:
        lines.append(f"too wide for {width} columns: {', '.join(cut)} (`peftbench show FILE CASE`)")
    return lines


def _cells_width(header: list[str], rows: list[list[str]]) -> int:
    columns = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header) - 1)]
    return sum(w + 2 for w in columns) + len(header[-1])


def _arrow(before: float | None, after: float | None, form: str) -> str:
    if after is None:
        return "-"
    return f"{'-' if before is None else format(before, form)} -> {format(after, form)}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.1f}"


MEMORY_SOURCES = {
    "GPU memory that NVML saw in training": "peak_gpu_memory_bytes",
    "GPU memory that torch reserved in training": "torch_peak_reserved_bytes",
    "growth of the process's resident memory in training (no GPU)": "host_peak_rss_delta_bytes",
}
"""The metric that is a case's peak, by what it is: the first that was measured."""


def memory_of(row: dict[str, Any]) -> tuple[str, int | None]:
    """The peak to show and its source: the GPU's where there is one, else the host's growth."""
    for source, name in MEMORY_SOURCES.items():
        if row[name] is not None:
            return source, row[name]
    return "not measured", None


def task_lines(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """`tinywiki_choice  29.0% -> 41.5% (standard error 3.5 points, 200 items)` for each task."""
    lines = []
    for name, task in tasks.items():
        share = _arrow(task["task_accuracy_base"], task["task_accuracy"], ".1%")
        se = task["task_accuracy_se"]
        about = "" if se is None else f"standard error {100 * se:.1f} points, "
        lines.append(f"{name}  {share} ({about}{task['task_items']:.0f} items)")
    return lines


def summary_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the training cases, that of the inference cases, or both."""
    trained = [r for r in rows if kind_of(r["case_id"]) == "train"]
    answered = [r for r in rows if kind_of(r["case_id"]) == "infer"]
    between = [""] if trained and answered else []
    return [
        *(training_lines(trained) if trained else []), *between,
        *(inference_lines(answered) if answered else []),
    ]  # fmt: skip


def infer_words(row: dict[str, Any]) -> str:
    """An inference case in a few words."""
    found = [
        f"{variant} {_ratio(row, variant, 'decode')}"
        for variant in VARIANTS[1:]
        if row[f"{variant}_decode_ratio"] is not None
    ]
    rate = row["base_decode_tokens_per_s"]
    return f"base {rate:,.0f} new tokens/s  decode time x base: {', '.join(found)}"


def _ratio(row: dict[str, Any], variant: str, part: str) -> str:
    """`1.002 [0.998, 1.006]`: a median and its interval."""
    name = f"{variant}_{part}_ratio"
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{row[name]:.3f}{ends}"


def infer_memory_of(row: dict[str, Any], variant: str) -> tuple[str, int | None]:
    """As `memory_of`, of one model of an inference case."""
    sources = {
        "GPU memory that NVML saw": "peak_gpu",
        "GPU memory in tensors": "torch_peak",
        "growth of the process's resident memory (no GPU)": "host_peak",
    }
    for source, name in sources.items():
        if row[f"{name}_base_bytes"] is not None:
            return source, row[f"{name}_{variant}_bytes"]
    return "not measured", None


INFERENCE_HEADER = ["inference", "model", "prefill tokens/s", "decode tokens/s", "weights MiB",
                    "peak MiB", "prefill time x base", "decode time x base", "status"]  # fmt: skip


def inference_cells(row: dict[str, Any]) -> list[list[str]]:
    """A line for each model of an inference case, under INFERENCE_HEADER."""
    if row["status"] != "ok":
        return [[row["case_id"], *["-"] * 7, f"{row['status']}: {row['reason']}"]]
    lines = []
    for variant in VARIANTS:
        rate = row[f"{variant}_decode_tokens_per_s"]
        if rate is None:
            why = row["null_reasons"].get(f"{variant}_decode_tokens_per_s", "no reason is given")
            lines.append([row["case_id"], variant, *["-"] * 6, why])
            continue
        over_base = ["1", "1"]
        if variant != "base":
            over_base = [_ratio(row, variant, part) for part in ("prefill", "decode")]
        lines.append([
            row["case_id"], variant,
            f"{row[f'{variant}_prefill_tokens_per_s']:,.0f}", f"{rate:,.0f}",
            _mib(row[f"{variant}_weight_bytes"]), _mib(infer_memory_of(row, variant)[1]),
            *over_base, "ok",
        ])  # fmt: skip
    return lines


def inference_notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the columns are."""
    ok = [r for r in rows if r["status"] == "ok"]
    sources = dict.fromkeys(infer_memory_of(r, "base")[0] for r in ok)
    notes = [f"peak MiB: {source}, that model alone in memory" for source in sources]
    if ok:
        notes.append("time x base: median of the turns' paired ratios, and its 95 % interval")
    return notes + [f"{r['case_id']} was disturbed: {d}" for r in ok for d in r["disturbances"]]


def inference_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the inference cases and its notes."""
    lines = [cells for row in rows for cells in inference_cells(row)]
    spare = ("weights MiB", "peak MiB", "prefill tokens/s", "prefill time x base")
    return [*fitted(INFERENCE_HEADER, lines, spare, left=2), "", *inference_notes(rows)]


def training_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line a case, then one for each thing a reader would ask about the numbers."""
    header = ["case", "train s", "tokens/s", "peak MiB", "trainable", "share", "perplexity",
              "preference acc.", "status"]  # fmt: skip
    lines = []
    for row in rows:
        if row["status"] != "ok":
            status = f"{row['status']}: {row['reason']}"
            lines.append([row["case_id"], *["-"] * 7, status])
            continue
        lines.append([
            row["case_id"],
            f"{row['train_s']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            _mib(memory_of(row)[1]),
            f"{row['trainable_params']:,}",
            f"{row['trainable_ratio']:.2%}",
            _arrow(row["perplexity_base"], row["perplexity"], ".4g"),
            _arrow(row["preference_accuracy_base"], row["preference_accuracy"], ".1%"),
            "ok",
        ])  # fmt: skip
    ok = [r for r in rows if r["status"] == "ok"]
    notes = []
    if ok:
        notes += [f"peak MiB: {source}" for source in dict.fromkeys(memory_of(r)[0] for r in ok)]
        floors = sorted({f"{r['perplexity_floor']:.4g}" for r in ok if r["perplexity_floor"]})
        if floors:
            notes.append(
                f"perplexity: before -> after, on held-out text; its entropy floor is"
                f" {' / '.join(floors)}"
            )
    notes += [f"{r['case_id']}  {line}" for r in ok for line in task_lines(r.get("tasks") or {})]
    notes += [f"{r['case_id']} was disturbed: {d}" for r in ok for d in r["disturbances"]]
    spare = ("share", "trainable", "tokens/s", "peak MiB")
    return [*fitted(header, lines, spare), "", *notes]
