"""What the figures are drawn from: rounded to what a screen can show, in the units of the axes."""

from __future__ import annotations

from typing import Any

from peftbench.metrics import HEADLINE_PHASES, PHASES
from peftbench.report.cases import CURVES, MEMORY, PHASE_MEMORY, Case
from peftbench.report.marks import Mark
from peftbench.summary import MIB

DIGITS = 5  # significant: a thousandth of a panel's width

COSTS = (
    {"key": "time", "metric": "method_s", "title": "time", "unit": "s",
     "what": "wall time until the user has the adapter: reference pass, warm-up and training"},
    {"key": "memory", "metric": "", "title": "peak memory", "unit": "MiB", "what": ""},
    {"key": "parameters", "metric": "trainable_params", "title": "trainable parameters", "unit": "",
     "what": "parameters that require a gradient"},
    {"key": "energy", "metric": "energy_j", "title": "energy", "unit": "J",
     "what": "energy of the training window"},
)  # fmt: skip
QUALITIES = (
    {"key": "preference_accuracy", "title": "preference accuracy", "unit": "%", "better": "higher",
     "factor": 100, "what": "share of held-out pairs whose better answer the model finds likelier"},
    {"key": "perplexity", "title": "perplexity", "unit": "", "better": "lower", "factor": 1,
     "what": "on held-out text"},
    {"key": "bits_per_byte", "title": "bits per byte", "unit": "bits", "better": "lower",
     "factor": 1, "what": "on held-out text; comparable between tokenizers"},
    {"key": "true_reward", "title": "true reward", "unit": "", "better": "higher", "factor": 1,
     "what": "share of a sampled completion's sentences that are true"},
)  # fmt: skip


def figure_data(cases: list[Case], marks: dict[str, Mark]) -> dict[str, Any]:
    """`costs` and `qualities` carry the reason where no case has one."""
    sources = sorted({MEMORY[c.memory] for c in cases if c.memory})
    costs = [dict(cost) | {"missing": missing(cases, str(cost["metric"]))} for cost in COSTS]
    costs[1]["what"] = "; ".join(sources)
    qualities = [dict(q) | {"missing": missing(cases, str(q["key"]))} for q in QUALITIES]
    seen = {name for case in cases for name, _, _ in case.phases}
    return {
        "adapters": [{"name": n, "colour": m.colour, "symbol": m.symbol, "dash": m.dash}
                     for n, m in marks.items()],
        "costs": costs,
        "qualities": qualities,
        "phases": [n for n in PHASES if n in seen] + sorted(seen - set(PHASES)),
        "headline": list(HEADLINE_PHASES),
        "cases": [case_data(case) for case in cases],
    }  # fmt: skip


def missing(cases: list[Case], metric: str) -> str:
    """Why no case has a metric, by the reason most cases give; "" where one has it."""
    if metric == "":
        names = list(MEMORY)
        return "" if any(case.memory for case in cases) else missing(cases, names[-1])
    if not cases:
        return "no case of this page trains"
    if any(case.values[metric] is not None for case in cases):
        return ""
    reasons = [case.reasons[metric] for case in cases]
    return max(reasons, key=reasons.count)


def case_data(case: Case) -> dict[str, Any]:
    values = case.values
    out: dict[str, Any] = {
        "id": case.case_id, "model": case.model, "adapter": case.adapter, "method": case.method,
        "time": rounded(values["method_s"]),
        "memory": rounded(case.memory_bytes, 1 / MIB),
        "parameters": values["trainable_params"],
        "energy": rounded(values["energy_j"]),
    }  # fmt: skip
    for quality in QUALITIES:
        name, factor = str(quality["key"]), float(str(quality["factor"]))
        for ending in ("", "_se", "_base"):
            out[name + ending] = rounded(values.get(name + ending), factor)
    out["phases"] = {n: rounded(size, 1 / MIB) for n, _, size in case.phases if size is not None}
    out["memory_source"] = PHASE_MEMORY[case.phase_memory] if case.phase_memory else ""
    out["curve"] = [[step for step, _ in case.curve], [rounded(loss) for _, loss in case.curve]]
    out["curve_axes"] = CURVES[case.curve_kind]
    return out


def rounded(value: float | None, factor: float = 1.0) -> float | None:
    return None if value is None else float(f"{value * factor:.{DIGITS}g}")
