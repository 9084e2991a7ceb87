"""A result file as a person reads it: all cases in a table, or one record in full.

Reads what `pytest bench --benchmark-json` wrote and the single round files of `--results-dir`.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftbench.case import Settings
from peftbench.errors import UserError, unknown_name
from peftbench.metrics import METRICS, WINDOW, Kind, kind_of, metrics_of, phase_names
from peftbench.result_files import GIVE_FILE, case_records, read_json, reading
from peftbench.summary import MIB, summary_lines, table

# METRICS is in sections; each begins with the metric named here and ends where the next begins.
SECTIONS = {
    "train_s": "time",
    "peak_gpu_memory_bytes": "memory",
    "total_params": "parameters and storage",
    "pairs": "budget",
    "perplexity": "quality",
    "measure_s": "inference",
}
# A metric with one of these endings is shown in the row of the metric that it belongs to.
COMPANIONS = {"_se": "standard error", "_base": "base", "_unquantized_base": "unquantized base",
              "_low": "95 % from", "_high": "to"}  # fmt: skip
BAR_WIDTH = 24  # characters of the longest phase's bar
TEXT_WIDTH = 88


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The row of every case in a result file, in the file's order.

    A metric that is newer than the file is null with that reason.
    Raises: UserError for a file that is missing, no JSON, of another program, newer or damaged.
    """
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.json"))
        raise UserError(
            f"{str(path)!r} is a folder; `show` reads one file. In it are:"
            f" {', '.join(files[-3:]) or 'no result files'}"
        )
    data = read_json(path, GIVE_FILE)
    with reading(path, give=GIVE_FILE):
        return [_completed(record) for record in case_records(data)]


def _completed(row: dict[str, Any]) -> dict[str, Any]:
    if row["status"] != "ok":
        return row
    kind = kind_of(row["case_id"])
    if WINDOW[kind] not in row:
        raise UserError(f"is damaged: {row['case_id']} is ok but has no record in it")
    absent = [name for name in metrics_of(kind) if name not in row]
    reasons = dict.fromkeys(absent, "the file is older than this metric") | row["null_reasons"]
    return {"disturbances": []} | row | dict.fromkeys(absent) | {"null_reasons": reasons}


def find_row(rows: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """The case of that id or hash, else the only one whose id contains the text.

    Raises: UserError where there is none, or more than one.
    """
    found = [r for r in rows if wanted in (r["case_id"], r.get("case_hash"))]
    found = found or [r for r in rows if wanted in r["case_id"]]
    if not found:
        raise unknown_name("case", wanted, {r["case_id"] for r in rows})
    if len(found) > 1:
        names = [r["case_id"] for r in found]
        if len(set(names)) == 1:
            names = [f"{r['case_id']} ({r['case_hash']})" for r in found]
        raise UserError(
            f"{wanted!r} fits {len(found)} cases: {', '.join(names)};"
            " give the whole id, or the hash where the ids are equal"
        )
    return found[0]


def overview_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The summary table of all cases, and where the numbers come from."""
    lines = summary_lines(rows)
    described = next((r for r in rows if "provenance" in r), None)
    if described is not None:
        lines += ["", *provenance_lines(described)]
    return _printable(lines)


def record_lines(row: dict[str, Any]) -> list[str]:
    """Everything about one case but its single losses and items."""
    lines = [f"{row['case_id']}: {row['status']}{_repetition(row)}"]
    lines += [f"disturbed: {sentence}" for sentence in row.get("disturbances", [])]
    if row["status"] != "ok":
        lines += ["", f"phase   {row.get('phase') or '?'}", f"reason  {row.get('reason', '?')}"]
    if "case" in row:
        lines += ["", *_settings_lines(row)]
    if row["status"] == "ok":
        lines += _rank_lines(row)
        for title, names in metric_sections(kind_of(row["case_id"])).items():
            lines += ["", *_metric_lines(row, title, names)]
        if row.get("tasks"):
            lines += ["", *_task_table(row["tasks"])]
        lines += ["", *_null_lines(row), *_phase_lines(row), *_sample_lines(row)]
    if "provenance" in row:
        lines += ["", *provenance_lines(row)]
    return _printable(lines)


def _rank_lines(row: dict[str, Any]) -> list[str]:
    """Memory of each rank of a case that several processes trained."""
    ranks = row.get("ranks")
    if ranks is None:
        return []

    def cells(name: str, values: dict[str, Any]) -> list[str]:
        sizes = (values["host_peak_rss_delta_bytes"], values["torch_peak_allocated_bytes"])
        return [name, *("-" if s is None else f"{s / MIB:,.1f}" for s in sizes)]

    each = [cells(f"rank {rank['rank']}", rank) for rank in ranks["each"]]
    each += [cells(name, ranks[name]) for name in ("max", "sum")]
    ratio = ranks["scaling_efficiency_ratio"]
    scaling = "scaling efficiency: not known, as no process holds the whole model"
    if ratio is not None:
        scaling = f"scaling efficiency against one process: {ratio:.2f} (1: perfect)"
    return ["", scaling, "", *table(["peak MiB", "host growth", "GPU, torch"], each)]


def _repetition(row: dict[str, Any]) -> str:
    counted, all_rounds = counted_rounds(row), row.get("rounds", [])
    if len(all_rounds) < 2:
        return ""
    left_out = len(all_rounds) - len(counted)
    but = f", {left_out} disturbed and left out" if left_out else ""
    seeds = ", ".join(str(r["seed"]) for r in counted)
    return f", median of {len(counted)} rounds (seeds {seeds}{but})"


def counted_rounds(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds that `merge_rounds` takes its medians of."""
    rounds: list[dict[str, Any]] = row.get("rounds", [])
    return [r for r in rounds if not r.get("disturbances")] or rounds


def metric_sections(kind: Kind) -> dict[str, list[str]]:
    """Names of the kind's metrics by section title, in the table's order."""
    sections: dict[str, list[str]] = {}
    title = ""
    for name, metric in METRICS.items():
        title = SECTIONS.get(name, title)
        if kind in metric.kinds:
            sections.setdefault(title, []).append(name)
    return sections


def quantity(value: int | float, unit: str) -> str:
    """A stored value as a person reads it: MiB for bytes, % for ratios, ms below 0.1 s.

    A value that is no count has three or four significant digits.
    """
    if unit == "bytes":
        size = value / MIB
        return f"{size:,.1f} MiB" if size >= 10 else f"{size:.3g} MiB"
    if unit == "ratio":
        return f"{100 * value:.4g} %"
    if unit == "s":
        if value < 0.1:
            return f"{1000 * value:.3g} ms"
        return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"
    if unit in ("FLOP", "FLOP/s") and value >= 1e9:
        return f"{value / 1e12:,.4g} T{unit}"
    if isinstance(value, float):
        number = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    else:
        number = f"{value:,}"
    return number if unit == "1" else f"{number} {unit}"


def commit_text(commit: str | None, dirty: bool | None) -> str:
    """A commit, short, and whether the code differed from it."""
    if commit is None:
        return "no commit known"
    return f"commit {commit[:12]}" + (" with changes that are not in it" if dirty else "")


def _metric_lines(row: dict[str, Any], title: str, names: list[str]) -> list[str]:
    """A table of the section's measured metrics; columns that would be empty are left out."""
    stems = [n for n in names if row[n] is not None and not _belongs_to_another(n)]
    header = [title, "value", *COMPANIONS.values(), "over the rounds"]
    cells = [
        [name, *(_shown(row, name + ending) for ending in ("", *COMPANIONS)), _spread(row, name)]
        for name in stems
    ]
    used = [i for i in range(len(header)) if i < 2 or any(line[i] for line in cells)]
    # the last column is flush left in `table`: an empty one keeps the numbers flush right
    return table(
        [*(header[i] for i in used), ""], [[*(line[i] for i in used), ""] for line in cells]
    )


def _task_table(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each accuracy of each task."""
    header = ["task", "accuracy", "standard error", "base", "items", ""]
    lines = []
    for name, task in tasks.items():
        for metric, label in (("task_accuracy", name), ("task_accuracy_norm", f"{name}, norm")):
            if task[metric] is not None:
                numbers = [task[metric + ending] for ending in ("", "_se", "_base")]
                shown = ["-" if n is None else quantity(n, "ratio") for n in numbers]
                lines.append([label, *shown, f"{task['task_items']:.0f}", ""])
    return table(header, lines)


def _belongs_to_another(name: str) -> bool:
    return any(name.endswith(e) and name.removesuffix(e) in METRICS for e in COMPANIONS)


def _shown(row: dict[str, Any], name: str) -> str:
    value = row.get(name) if name in METRICS else None
    return "" if value is None else quantity(value, METRICS[name].unit)


def _spread(row: dict[str, Any], name: str) -> str:
    values = [r[name] for r in counted_rounds(row) if r.get(name) is not None]
    if len(values) < 2 or min(values) == max(values):
        return ""
    unit = METRICS[name].unit
    return f"{quantity(min(values), unit)} to {quantity(max(values), unit)}"


def _null_lines(row: dict[str, Any]) -> list[str]:
    """What was not measured, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name in metrics_of(kind_of(row["case_id"])):
        if row[name] is None:
            reason = row["null_reasons"].get(name, "no reason is given")
            by_reason.setdefault(reason, []).append(name)
    if not by_reason:
        return []
    lines = ["not measured"]
    for reason, names in by_reason.items():
        lines += [f"  {reason}:", *_wrapped(", ".join(names), "    ")]
    return [*lines, ""]


def _phase_lines(row: dict[str, Any]) -> list[str]:
    """Seconds and peaks of each phase that ran; the bar is the share of the longest."""
    phases = row.get("phases", {})
    known = phase_names(kind_of(row["case_id"]))
    names = [n for n in known if n in phases] + [n for n in phases if n not in known]
    if not names:
        return []
    longest_s = max(phases[n]["seconds"] for n in names) or 1.0
    fields = dict.fromkeys(f for n in names for f in phases[n] if f.endswith("_bytes"))
    peaks = [f for f in fields if any(phases[n].get(f) is not None for n in names)]
    rows = [
        [
            name,
            quantity(phases[name]["seconds"], "s"),
            *(_peak(phases[name].get(peak)) for peak in peaks),
            "#" * round(BAR_WIDTH * phases[name]["seconds"] / longest_s),
        ]
        for name in names
    ]
    return table(["phase", "time", *(p.removesuffix("_bytes") for p in peaks), ""], rows)


def _peak(size: int | None) -> str:
    return "-" if size is None else quantity(size, "bytes")


def _settings_lines(row: dict[str, Any]) -> list[str]:
    """The settings whose value is not the default."""
    defaults = asdict(Settings())
    rows = [
        [name, str(value), str(defaults.get(name, "not a setting of this version"))]
        for name, value in row["case"]["settings"].items()
        if name not in defaults or value != defaults[name]
    ]
    if not rows:
        return ["settings: all at their default"]
    return table(["setting", "value", "default"], rows)


def _sample_lines(row: dict[str, Any]) -> list[str]:
    lines = []
    for number, sample in enumerate(row.get("samples") or [], start=1):
        lines += ["", f"sample {number}"]
        for part in ("prompt", "before", "after"):
            lines += _wrapped(sample.get(part, ""), f"  {part:<8}")
    return lines


def provenance_lines(row: dict[str, Any]) -> list[str]:
    """Run, code, machine and libraries of a record, in a few lines."""
    found = row["provenance"]
    commits = found.get("library_commits", {})
    memory = found.get("memory_bytes")
    libraries = []
    for name, version in found.get("libraries", {}).items():
        came_from = commits.get(name)
        at = f" ({commit_text(came_from['commit'], came_from['dirty'])})" if came_from else ""
        libraries.append(f"{name} {version}{at}")
    machine = [
        str(found.get("cpu")),
        f"{found.get('cpu_cores')} cores",
        *([f"{memory / 2**30:.1f} GiB"] if memory else []),
        f"{found.get('platform')}, python {found.get('python')}",
    ]
    code = commit_text(found.get("commit"), found.get("commit_dirty"))
    return [
        f"run        {row.get('run_id', '?')} on {row.get('device', '?')}",
        f"peftbench  {found.get('peftbench')}, {code}",
        f"machine    {', '.join(machine)}",
        *_wrapped(", ".join(libraries), "libraries  "),
    ]


def _wrapped(text: str, label: str) -> list[str]:
    """The text in lines of TEXT_WIDTH, the first after a label and the others as far in."""
    words = " ".join(text.split()) or "-"
    return textwrap.wrap(
        words, TEXT_WIDTH, initial_indent=label, subsequent_indent=" " * len(label),
        break_on_hyphens=False,
    )  # fmt: skip


def _printable(lines: list[str]) -> list[str]:
    """A model may generate anything: control characters must not reach the terminal."""
    return ["".join(c if c.isprintable() else "?" for c in line).rstrip() for line in lines]
