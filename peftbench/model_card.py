"""The README.md beside a trained adapter: what it is, what it was trained on, what came of it."""

from __future__ import annotations

from typing import Any

from peftbench.adapters import ADAPTERS
from peftbench.case import Settings
from peftbench.methods import METHODS
from peftbench.metrics import METRICS

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
SHOWN = (
    "perplexity", "bits_per_byte", "next_token_accuracy", "preference_accuracy", "true_reward",
    "reward_margin", "reward_model_accuracy", "final_loss", "trainable_params", "adapter_bytes",
)  # fmt: skip


def model_card(found: dict[str, Any], base_name: str, *, is_on_hub: bool) -> str:
    """Markdown with the Hub's front matter, from what `training.json` holds.

    `base_name` is a Hub id where `is_on_hub`, else a name that the Hub does not have.
    """
    case, metrics = found["case"], found["metrics"]
    adapter, method = case["adapter"], case["method"]
    is_full = adapter == "full"
    front = [
        "---",
        *([f"base_model: {base_name}"] if is_on_hub else []),
        f"library_name: {'transformers' if is_full else 'peft'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("peftbench", adapter, *method.split("+"))),
        "---",
    ]
    versions = found["provenance"]["libraries"]
    commit = found["provenance"]["commit"]
    title = f"{plain(base_name)}, {adapter}, {method}"
    body = [
        f"# {title}",
        "",
        f"{plain(base_name)} fine-tuned with `{adapter}` ({ADAPTERS[adapter].about}) by"
        f" {METHODS[method].name}, made by `peftbench train`.",
        "",
        "## What came of it",
        "",
        "On held-out data; base is the same model before training.",
        "",
        "| metric | base | trained | meaning |",
        "|---|---|---|---|",
        *metric_rows(metrics),
        *task_rows(found["tasks"]),
        "",
        "## How it was made",
        "",
        f"Data: `{plain(case['settings']['data'])}`, {case['settings']['pairs']} pairs (digest"
        f" `{found['data_digest'][:12]}`). Training took {found['seconds']:.0f} s.",
        "",
        "| setting | value |",
        "|---|---|",
        *setting_rows(case["settings"]),
        "",
        "Versions: "
        + ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions)
        + f", peftbench {found['provenance']['peftbench']}"
        + (f" ({commit[:12]})" if commit else ""),
        "",
        "## How to use it",
        "",
        "```python",
        *usage(base_name, is_full=is_full, is_on_hub=is_on_hub),
        "```",
        "",
        f"Or talk to it in a terminal: `peftbench infer --model {plain(base_name)}"
        " --adapter <this folder>`.",
    ]
    return "\n".join([*front, *body]) + "\n"


def metric_rows(metrics: dict[str, Any]) -> list[str]:
    """A row for each metric of SHOWN that was measured."""
    rows = []
    for name in SHOWN:
        value = metrics.get(name)
        if value is not None:
            base = metrics.get(f"{name}_base")
            rows.append(
                f"| {name} | {'' if base is None else shown(base)} | {shown(value)}"
                f" | {METRICS[name].definition} |"
            )
    return rows


def task_rows(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each task of `--tasks`."""
    return [
        f"| {plain(name)} | {shown(task['task_accuracy_base'])} | {shown(task['task_accuracy'])} |"
        f" Accuracy on {task['task_items']} items of this task of lm-evaluation-harness, version"
        f" {plain(task['version'])}. |"
        for name, task in tasks.items()
    ]


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def setting_rows(settings: dict[str, Any]) -> list[str]:
    """Those that are not at their default, and what the most asked ones are."""
    default = Settings()
    always = ("dtype", "learning_rate", "batch_size", "schedule", "seed")
    names = [
        name for name, value in settings.items()
        if name in always or value != getattr(default, name)
    ]  # fmt: skip
    return [f"| {name} | {plain(str(settings[name]))} |" for name in names if name not in ("data",)]


def usage(base_name: str, *, is_full: bool, is_on_hub: bool) -> list[str]:
    """Lines of Python that load it with the libraries alone."""
    where = f'"{plain(base_name)}"' if is_on_hub else '"path/to/the/base"'
    if is_full:
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({where})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]


def plain(text: str) -> str:
    """On one line, without what Markdown or a table would read."""
    return "".join(c for c in text if c.isprintable() and c not in "|`<>[]")
