"""How a step's cost grows with batch, length and model size: docs/growth.md, `make growth`.

    python scripts/growth.py
    python scripts/growth.py --models tiny-gpt2 --method dpo --output output/growth.md

Rows of synthetic ids of one exact length, a few steps a case, and before each case the machine's
rate in a large matrix product: the floor of a step is its counted operations over the best of these
rates. One doubling of the batch should double the time at most, one of the length as much as the
operations grow; where time grows by more than the operations do, the table says so. Without a
browser (chromium) the table is written and the picture is not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pages import write_part

from peftbench import provenance
from peftbench.case import Case, Settings
from peftbench.errors import UserError
from peftbench.fit import Choice, check_asked, probe_case, try_case
from peftbench.preflight import impossible, preflight
from peftbench.progress import Progress
from peftbench.record import dumps, write_atomically
from peftbench.result_files import read_json
from peftbench.session import Session, result_line
from peftbench.summary import MIB, memory_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "growth.md"
MODELS = "tiny-gpt2,smollm2-135m-instruct-q4,gpt-2"
BATCHES, LENGTHS = (1, 2, 4, 8, 16), (64, 128, 256, 512, 1024)
BATCH, LENGTH = 4, 128  # of the other axis
STEPS, WARMUP_STEPS = 6, 2
# Of one doubling, time over operations: beyond it the growth is said to be more than linear. Two
# steps timed one after the other differ by half as much on a machine that others use too.
MOST_EXCESS = 1.25
SIZE = (1500, 560)  # pixels


@dataclass(frozen=True)
class Cost:
    """Of one optimiser step, the median of the timed ones."""

    step_s: float
    flops: float  # counted operations
    machine_flops_per_s: float | None  # just before, in a large product; None beside other work
    tokens_per_s: float
    peak_bytes: int | None
    total_params: int


@dataclass(frozen=True)
class Measured:
    """One case, or why it has no numbers."""

    model: str
    batch: int
    length: int
    status: str
    reason: str
    cost: Cost | None = None


def plan(models: Sequence[str]) -> list[tuple[str, int, int]]:
    """(model, batch, length) along both axes; what they share is run once."""
    points = [(b, LENGTH) for b in BATCHES] + [(BATCH, n) for n in LENGTHS if n != LENGTH]
    return [(model, *point) for model in models for point in points]


def case_of(model: str, options: argparse.Namespace, batch: int, length: int) -> Case:
    choice = Choice(options.adapter, options.method, length, checkpointing=False)
    weights = "random" if model == "gpt-2" else "pretrained"  # its files are on a hub
    settings = Settings(dtype=options.dtype, weights=weights, device=options.device)
    check_asked(model, weights, [choice])
    case = probe_case(model, choice, batch, settings)
    longer = replace(case.settings, pairs=STEPS * batch, warmup_steps=WARMUP_STEPS)
    return replace(case, settings=longer)


def measure(options: argparse.Namespace) -> list[Measured]:
    points = plan(options.models.split(","))
    progress = Progress(len(points))
    session = Session(ROOT / "output" / "growth", progress, time_limit_s=1800.0)
    found = []
    try:
        for model, batch, length in points:
            try:
                case = case_of(model, options, batch, length)
            except UserError as error:  # a context that is too short
                found.append(Measured(model, batch, length, "skipped", str(error)))
                progress.finished(f"{model} {batch} x {length}: skipped")
                continue
            preflight([model], {options.adapter}, case.settings)
            if sentence := impossible(case):
                raise UserError(sentence)
            session.time_machine("start", case)
            record = try_case(session, case)
            progress.finished(f"{result_line(record)}  {batch} x {length}")
            found.append(measured_of(model, batch, length, record))
    finally:
        progress.close()
    return found


def measured_of(model: str, batch: int, length: int, record: dict[str, Any]) -> Measured:
    status, reason = str(record["status"]), str(record.get("reason") or "")
    if status != "ok" or record["train_flops"] is None:
        return Measured(model, batch, length, status, reason)
    flops = record["train_flops"] / (record["steps"] - WARMUP_STEPS)
    rate = None  # of the machine in a large product
    if record["mfu_ratio"] is not None:
        rate = record["flops_per_s"] / record["mfu_ratio"]
    cost = Cost(
        record["step_p50_s"], flops, rate,
        batch * length / record["step_p50_s"], memory_of(record)[1], record["total_params"],
    )  # fmt: skip
    return Measured(model, batch, length, status, "; ".join(record["disturbances"]), cost)


def along(found: Sequence[Measured], model: str, axis: str) -> list[tuple[Measured, Cost]]:
    """A model's cases along one axis, in its order, the point that both axes share included."""
    own = [(m, m.cost) for m in found if m.model == model and m.cost is not None]
    if axis == "batch":
        return sorted((o for o in own if o[0].length == LENGTH), key=lambda o: o[0].batch)
    return sorted((o for o in own if o[0].batch == BATCH), key=lambda o: o[0].length)


def best_rate(found: Sequence[Measured]) -> float | None:
    """Of the machine while it was measured: what a neighbour took for a moment is not its floor."""
    rates = [m.cost.machine_flops_per_s for m in found if m.cost is not None]
    return max((rate for rate in rates if rate is not None), default=None)


def floor_s(cost: Cost, rate: float | None) -> float | None:
    """What a step must take at this rate of the machine."""
    return None if rate is None else cost.flops / rate


def excess(before: Cost, after: Cost) -> float:
    """Growth of the time over growth of the operations; 1 is linear."""
    return (after.step_s / before.step_s) / (after.flops / before.flops)


def table(found: Sequence[Measured]) -> list[str]:
    """Markdown, by model and axis."""
    rate = best_rate(found)
    lines = [
        "| model | batch | tokens a row | step | tokens/s | GFLOP | of the floor | time / work of"
        " the row above | peak MiB | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for model in dict.fromkeys(m.model for m in found):
        for axis in ("batch", "length"):
            above: Cost | None = None
            for m, cost in along(found, model, axis):
                grown = None if above is None else excess(above, cost)
                told = "more than linear" if grown is not None and grown > MOST_EXCESS else ""
                lines.append(row(m, cost, rate, grown, ", ".join(filter(None, (told, m.reason)))))
                above = cost
        lines += [
            f"| {m.model} | {m.batch} | {m.length} | {m.status} | | | | | | {m.reason} |"
            for m in found if m.model == model and m.cost is None
        ]  # fmt: skip
    return lines


def row(m: Measured, cost: Cost, rate: float | None, grown: float | None, told: str) -> str:
    floor = "" if rate is None else f"{cost.step_s * rate / cost.flops:.2f}"
    return (
        f"| {m.model} | {m.batch} | {m.length} | {1e3 * cost.step_s:,.1f} ms"
        f" | {cost.tokens_per_s:,.0f} | {cost.flops / 1e9:,.1f} | {floor}"
        f" | {'' if grown is None else f'{grown:.2f}'}"
        f" | {'' if cost.peak_bytes is None else f'{cost.peak_bytes / MIB:,.0f}'} | {told} |"
    )


def figure(found: Sequence[Measured], title: str) -> Any:
    """Step times along batch, length and model size, each with its floor dashed."""
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(m.model for m in found))
    rate = best_rate(found)
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
    symbols = ("circle", "square", "diamond", "triangle-up", "x", "star")
    page = make_subplots(1, 3, subplot_titles=(
        f"batch, rows of {LENGTH} tokens", f"tokens a row, batch {BATCH}",
        f"parameters, {BATCH} rows of {LENGTH}",
    ))  # fmt: skip
    at: list[tuple[Measured, Cost]] = []
    for i, name in enumerate(names):
        style = {"color": colours[i % 6]}
        for column, axis in ((1, "batch"), (2, "length")):
            line = along(found, name, axis)
            x = [m.batch if axis == "batch" else m.length for m, _ in line]
            page.add_scatter(
                x=x, y=[cost.step_s for _, cost in line], name=name, legendgroup=name, line=style,
                marker={"symbol": symbols[i % 6], "size": 9}, showlegend=column == 1,
                row=1, col=column,
            )  # fmt: skip
            page.add_scatter(
                x=x, y=[floor_s(cost, rate) for _, cost in line], name=f"{name}: floor",
                legendgroup=name,
                line=style | {"dash": "dash"}, mode="lines", showlegend=column == 1,
                row=1, col=column,
            )  # fmt: skip
        at += [o for o in along(found, name, "batch") if o[0].batch == BATCH]
    at.sort(key=lambda o: o[1].total_params)
    for y, words, dash in (
        ([cost.step_s for _, cost in at], "all models", "solid"),
        ([floor_s(cost, rate) for _, cost in at], "all models: floor", "dash"),
    ):
        page.add_scatter(
            x=[cost.total_params for _, cost in at], y=y, name=words,
            text=[m.model for m, _ in at],
            line={"color": "#444444", "dash": dash}, row=1, col=3,
            mode="lines+markers+text" if dash == "solid" else "lines",
            textposition=["bottom right", *["top left"] * (len(at) - 1)],
        )  # fmt: skip
    page.update_xaxes(type="log")
    page.update_xaxes(tickvals=BATCHES, col=1)
    page.update_xaxes(tickvals=LENGTHS, col=2)
    page.update_yaxes(type="log", dtick=1, minor={"dtick": "D1", "showgrid": True})
    page.update_yaxes(title_text="seconds a step", col=1)
    page.update_layout(title=title, template="plotly_white", width=SIZE[0], height=SIZE[1])
    return page


def draw(page: Any, target: Path) -> bool:
    """A PNG of the figure through a headless browser; False where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "growth.html"
        page.write_html(file, include_plotlyjs=True, config={"displayModeBar": False})
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=5000",
             f"--user-data-dir={folder}/profile", f"--screenshot={target}", file.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    return True


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    where = provenance.describe()
    title = f"{options.adapter}, {options.method}, {options.dtype}: {where['cpu']}"
    known = {name: where[name] for name in ("commit", "cpu", "libraries")}
    return {"schema": "peftbench-growth", **known, "title": title}


def read(file: Path) -> tuple[dict[str, Any], list[Measured]]:
    """What an earlier run has written. Raises: UserError where there is nothing of the kind."""
    facts = read_json(file)
    if not isinstance(facts, dict) or facts.get("schema") != "peftbench-growth":
        raise UserError(f"{file} is no file of this script; run it without --redraw")
    found = [
        Measured(**case | {"cost": None if case["cost"] is None else Cost(**case["cost"])})
        for case in facts.pop("cases")
    ]
    return facts, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--adapter", default="lora")
    parser.add_argument("--method", default="sft")
    parser.add_argument("--redraw", action="store_true",
                        help="page and picture out of the .json, without a run")  # fmt: skip
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=PAGE,
                        help="page whose table is replaced, .json and .png beside it")  # fmt: skip
    options = parser.parse_args()
    written = options.output.with_suffix(".json")
    try:
        if options.redraw:
            facts, found = read(written)
        else:
            found = measure(options)
            facts = facts_of(options)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            cases = [asdict(m) for m in found]
            write_atomically(written, dumps(facts | {"cases": cases}))
    except UserError as error:
        parser.error(str(error))
    title = facts["title"]
    lines = table(found)
    print("\n".join(lines))
    picture = f"![step times]({options.output.stem}.png)"
    part = [f"{title}; commit {str(facts['commit'])[:12]}.", "", *lines, "", picture]
    write_part(options.output, "growth", "\n".join(part))
    if not draw(figure(found, title), options.output.with_suffix(".png")):
        print("no browser: the picture is not drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
