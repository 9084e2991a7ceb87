"""The table at the end of a run, as plain text."""

from __future__ import annotations

from typing import Any

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


def summary_lines(rows: list[dict[str, Any]]) -> list[str]:
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
    notes += [f"{r['case_id']} was disturbed: {d}" for r in ok for d in r["disturbances"]]
    return [*table(header, lines), "", *notes]
