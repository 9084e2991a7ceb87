"""The arrows between modules, and what may be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "peftbench"
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes"}
# modules that only run in a child process, where torch is loaded anyway
CHILD_ONLY = {
    "pipeline", "training", "evaluation", "batches", "values", "quantization", "weights", "targets",
    "out_of_memory", "measuring.phases", "measuring.flops", "measuring.sentinels",
    "methods.sft", "methods.dpo", "methods.orpo", "methods.ppo", "methods.reward",
    "biases", "pissa", "prompt",
    "rollout", "reward_model", "ppo_roles", "ppo_training", "ppo_values",
    # and those of a command that trains or answers in its own process
    "checkpoint", "chat", "inference", "agreement", "compiling", "shared_prompts", "ranks",
    "sharding", "head",
}  # fmt: skip

LAYERS = [
    {
        "errors",
        "metrics",
        "measuring.nvml",
        "privacy",
        "out_of_memory",
        "ranks",
        "methods",
        "matrix",
    },
    {"case", "record", "data.task", "measuring.host", "progress", "summary", "provenance"},
    {
        "agreement",
        "head",
        "data.tinywiki",
        "data.wikipedia",
        "data.tokens",
        "measuring.sampler",
        "result_files",
    },
    {"show", "setting_options", "trackers"},
    {"hub", "model_files", "data.assets", "data.corpus", "data.preference", "measuring.energy"},
    {"data.files", "measuring.gpu"},
    {"data.hub", "data.task_items"},
    {"harness"},
    {
        "data.loading",
        "biases",
        "pissa",
        "prompt",
        "quantization",
        "weights",
        "targets",
        "measuring.phases",
        "batches",
        "compiling",
        "measuring.flops",
        "measuring.sentinels",
    },
    {
        "adapters",
        "shared_prompts",
        "sharding",
        "methods.sft",
        "methods.dpo",
        "methods.orpo",
        "methods.ppo",
        "methods.reward",
    },
    {"rollout"},
    {"models", "evaluation"},
    # comparing: from files to words, above what it reads and beside what runs
    {"compare.load", "compare.rules", "compare.statistics"},
    {"compare.index", "compare.verdicts", "compare.decisions", "compare.change_points"},
    {"compare.order", "compare.pairing"},
    {"compare.by_class", "compare.by_time"},
    {"compare.by_seed", "compare.history"},
    {"compare.compare", "compare.text"},
    {"compare.history_text", "compare.markdown", "compare.as_json", "export"},
    {"training", "trl_engine"},
    {"reward_model", "checkpoint"},
    {"ppo_roles"},
    {"ppo_training", "ppo_values"},
    {"values", "infer_values"},
    {"pipeline", "preflight", "model_card", "selection"},
    {"train_command", "chat", "inference"},
    {"worker"},
    {"preloaded", "resume", "shard"},
    {"merge"},
    {"session"},
    {"rounds"},
    {"gate", "fit", "round_reports", "cluster", "plan"},
    {"report.marks", "report.sources"},
    {"report.cases", "report.changes", "report.sparklines"},
    {"report.table", "report.takeaways", "report.figures", "report.samples", "report.origin"},
    {"report.html"},
    {"use_commands"},
    {"plugin", "cli"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
    }


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """Dotted names imported; blocks under TYPE_CHECKING do not count."""
    found: set[str] = set()

    def visit(node: ast.AST, inside_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(
                    a.name for a in child.names if not (inside_function and top_level_only)
                )
            elif isinstance(child, ast.ImportFrom) and not (inside_function and top_level_only):
                found.add(child.module or "")
                found.update(f"{child.module}.{a.name}" for a in child.names)
            visit(child, inside_function or isinstance(child, (ast.FunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_child_modules_import_heavy_libraries_at_the_top(name):
    roots = {i.split(".")[0] for i in imports(modules()[name], top_level_only=True)}
    assert name in CHILD_ONLY or not roots & HEAVY


def test_every_module_has_its_layer():
    placed = set().union(*LAYERS)
    own = {"__init__", "", "data", "measuring", "compare", "report"}
    assert set(modules()) - own == placed


@pytest.mark.parametrize("depth", range(len(LAYERS)))
def test_imports_go_one_way(depth):
    above = set().union(*LAYERS[depth + 1 :])
    for name in sorted(LAYERS[depth]):
        own = {
            i.removeprefix("peftbench.")
            for i in imports(modules()[name], top_level_only=True)
            if i.startswith("peftbench.")
        }
        assert not own & above, f"{name} imports {sorted(own & above)}"


def test_collecting_and_the_command_line_import_no_torch():
    code = (
        "import sys, peftbench.plugin, peftbench.cli, peftbench.worker, peftbench.report.html;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_names_a_place_that_a_user_does_not_have():
    """No package registry's host, no path of a development machine."""
    root = PACKAGE.parent
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "/work" + "/", "download.pytorch" + ".org"]
    tracked = subprocess.run(
        ["git", "-C", str(root), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    for file in tracked:
        path = root / file
        if path.suffix in {".safetensors", ".png"} or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        for host in hosts:
            assert host not in text, f"{file} names {host}"
