"""The `peftbench` command. Exit codes: 0 done, 2 a mistake in what was given, 130 stopped;
`compare` adds 1, 3 and 4 for what it found; `train` 5 for a training that diverged, and `train` and
`infer` 6 for too little memory."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftbench import __version__, provenance
from peftbench.data import assets
from peftbench.errors import UserError, check_names
from peftbench.hub import hub_token
from peftbench.progress import counted
from peftbench.record import dumps
from peftbench.setting_options import size
from peftbench.show import (
    commit_text,
    find_row,
    overview_lines,
    read_rows,
    record_lines,
)
from peftbench.summary import table
from peftbench.use_commands import (
    add_fit_command,
    add_plan_command,
    add_use_commands,
    bench,
    fit_into,
    infer,
    plan_ahead,
    train_for_use,
)

NO_NVML = "nvidia-ml-py is not installed, so the driver cannot be asked: pip install nvidia-ml-py"
DRIVER_STEP = "install the NVIDIA driver, or give the container the GPU (docker run --gpus all)"
GPU_FACTS = {
    "driver_version": "driver {}",
    "cuda_driver_version": "CUDA up to {}",
    "power_limit_w": "at most {:g} W",
    "mig": "MIG {}",
    "uuid": "{}",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftbench",
        description="What each way of adapting a language model costs, what it buys, and whether"
        " that changed. The benchmark is `pytest bench`; this is what is around it.",
    )
    parser.add_argument("--version", action="version", version=f"peftbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="models, adapters, methods, data, tasks and presets")
    env = commands.add_parser("env", help="code, libraries and machine, and what a GPU run needs")
    env.add_argument("--json", action="store_true", help="as a dictionary, for a bug report")
    show = commands.add_parser("show", help="a result file: all its cases, or one in full")
    show.add_argument("file", metavar="FILE", type=Path, help="a JSON that `pytest bench` wrote")
    show.add_argument("case", metavar="CASE", nargs="?", help="an id, or a part of one")
    asset = commands.add_parser("assets", help="the real model and text that presets use offline")
    actions = asset.add_subparsers(dest="action", required=True)
    fetch = actions.add_parser("fetch", help="download, check and keep them in the cache")
    fetch.add_argument("names", nargs="*", help=f"of: {', '.join(assets.ASSETS)} (default: all)")
    actions.add_parser("list", help="what there is, and what is in the cache")
    completion = commands.add_parser("completion", help="a shell's completion of this command")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    add_comparison_commands(commands)
    add_use_commands(commands)
    add_fit_command(commands)
    add_plan_command(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def add_comparison_commands(commands: Any) -> None:
    """`compare` and `history`, which docs/comparison.md explains, and `report`, docs/report.md."""
    compare = commands.add_parser("compare", help="what changed between two sessions")
    compare.add_argument("base", metavar="BASE", type=Path, help="a result file, or a folder: its"
                         " newest session before NEW, all of it being the history")  # fmt: skip
    compare.add_argument(
        "new", metavar="NEW", type=Path, help="a result file, or a folder's newest"
    )
    compare.add_argument("--history", metavar="DIR", type=Path, help="earlier sessions")
    compare.add_argument(
        "--strict", action="store_true", help="exit with 4 for a suspect or a want of history"
    )
    compare.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    compare.add_argument("--all", action="store_true", help="every row, not only what stands out")
    history = commands.add_parser("history", help="a folder's sessions: series and change points")
    history.add_argument("folder", metavar="DIR", type=Path)
    history.add_argument("--case", metavar="P", help="only ids that match this pattern, or hold it")
    history.add_argument("--metric", metavar="M", help="only this metric")
    report = commands.add_parser("report", help="one HTML page out of result files")
    report.add_argument("files", metavar="FILE", type=Path, nargs="+", help="result files, or"
                        " folders: their newest session is shown, all are its history")  # fmt: skip
    report.add_argument("-o", "--output", metavar="HTML", type=Path, required=True)
    report.add_argument(
        "--memory", type=size, metavar="SIZE",
        help="such as 24GiB: name the fastest case that fits into it, and the best",
    )  # fmt: skip
    export = commands.add_parser("export", help="every round as a row of a CSV or Parquet table")
    export.add_argument(
        "files", metavar="FILE", type=Path, nargs="+", help="result files or folders"
    )
    export.add_argument("-o", "--output", metavar="TABLE", type=Path, required=True,
                        help="ends in .csv or .parquet")  # fmt: skip
    merge = commands.add_parser("merge", help="the files of a run's shards as one session's file")
    merge.add_argument("files", metavar="FILE", type=Path, nargs="+", help="what every"
                       " `pytest bench --shard I/N --benchmark-json=FILE` wrote")  # fmt: skip
    merge.add_argument("-o", "--output", metavar="JSON", type=Path, required=True)
    merge.add_argument("--partial", action="store_true", help="also without some of the shards")
    for command in (compare, history, report):
        command.add_argument(
            "--subject", metavar="LIBRARY", help="order and name sessions by this library's version"
        )


def list_tables() -> None:
    """Everything that has a name, from the tables themselves."""
    from peftbench.adapters import ADAPTERS
    from peftbench.case import PRESETS
    from peftbench.data.loading import DATA
    from peftbench.data.task_items import LOCAL_TASKS
    from peftbench.methods import INFER, METHODS
    from peftbench.models import MODELS

    sections = {
        "models": [[n, m.about] for n, m in MODELS.items()],
        "adapters": [
            [n, "; ".join((f"{a.about} ({a.family})", *(f"arXiv {paper}" for paper in a.papers)))]
            for n, a in ADAPTERS.items()
        ],
        "methods": [
            *([n, m.name] for n, m in METHODS.items()),
            [INFER, "no training: what the adapter costs when the model answers"],
        ],
        "data": [[n, d.about] for n, d in DATA.items()],
        "tasks": [[n, t.about] for n, t in LOCAL_TASKS.items()],
        "presets": [[n, p.about] for n, p in PRESETS.items()],
    }
    for name, rows in sections.items():
        print("\n".join(table([name, ""], rows)) + "\n")


def list_assets() -> None:
    rows = []
    for name, asset in assets.ASSETS.items():
        folder = assets.cached_path(name)
        state = "in the cache" if folder else "not fetched"
        rows.append([name, f"{asset.download_bytes / 2**20:.0f} MiB", state, asset.about])
    print("\n".join(table(["asset", "download", "state", ""], rows)))


def fetch_assets(names: list[str]) -> None:
    check_names("asset", names, assets.ASSETS)
    for name in names or list(assets.ASSETS):
        print(f"{name}: {assets.fetch(name)}")


def environment() -> dict[str, Any]:
    """Provenance of this machine, its GPUs, and what a GPU run still needs. Holds no secret.

    `gpus` has what the driver says of each GPU that a run would see; `gpu_note` says why there is
    none, or why they may be more than a run would see.
    """
    found = provenance.describe()
    gpus, note = _gpus() if "nvidia-ml-py" in found["libraries"] else ([], NO_NVML)
    found |= {"gpus": gpus, "gpu_note": note, "hub_token_set": hub_token() is not None}
    return found | {"missing_for_gpu": missing_for_gpu(found)}


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    from peftbench.measuring.nvml import open_devices  # only `env` asks the driver

    devices, note = open_devices(
        os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")
    )
    return [device.info() for device in devices], note


def missing_for_gpu(found: dict[str, Any]) -> list[str]:
    """What keeps GPU runs from working, each with the next step."""
    missing = []
    if "torch" not in found["libraries"]:
        missing.append("torch is not installed: take a CUDA build, https://pytorch.org")
    elif found["torch_cuda"] is None:
        missing.append("torch is a CPU build: install a CUDA build, https://pytorch.org")
    if not found["gpus"]:
        step = f"; {DRIVER_STEP}" if found["gpu_note"].startswith("NVML") else ""
        missing.append(f"no GPU is to be seen: {found['gpu_note']}{step}")
    if "bitsandbytes" not in found["libraries"]:
        missing.append("bitsandbytes is missing, which qlora needs: pip install bitsandbytes")
    if not found["hub_token_set"]:
        missing.append(
            "no Hub token is set, which gated models (llama-7b) need: accept the licence on the"
            " Hub and set HF_TOKEN, or use --weights random"
        )
    return missing


def environment_lines(found: dict[str, Any]) -> list[str]:
    """`environment()` in groups, as a person reads it."""
    container = found["container_image"] or ("yes" if found["in_container"] else "no")
    gpus = [[str(gpu["name"]), _gpu_text(gpu)] for gpu in found["gpus"]]
    note = [["note" if gpus else "none", found["gpu_note"]]] if found["gpu_note"] else []
    groups = {
        "peftbench": [
            ["version", found["peftbench"]],
            ["code", commit_text(found["commit"], found["commit_dirty"])],
        ],
        "python and platform": [
            ["python", found["python"]],
            ["platform", found["platform"]],
            ["container", container],
        ],
        "libraries": [[name, _library_text(found, name)] for name in provenance.LIBRARIES],
        "CPU and memory": [
            ["cpu", found["cpu"]],
            ["cores", _cores_text(found)],
            ["memory", _memory_text(found)],
            *([name, value] for name, value in found["environment"].items()),
        ],
        "GPU": [*gpus, *note],
        "Hub": [["token", "set" if found["hub_token_set"] else "not set"]],
    }
    lines = []
    for title, rows in groups.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows), ""]
    missing = found["missing_for_gpu"]
    if missing:
        return [*lines, "missing for GPU runs", *(f"  - {sentence}" for sentence in missing)]
    return [*lines, "nothing is missing for GPU runs"]


def _library_text(found: dict[str, Any], name: str) -> str:
    if name not in found["libraries"]:
        return "not installed"
    parts = [found["libraries"][name]]
    if name == "torch":
        parts.append(f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "CPU build")
    origin = found["library_commits"].get(name)
    if origin is not None:
        parts.append(commit_text(origin["commit"], origin["dirty"]))
        parts += [origin["repository"]] if origin["repository"] else []
    return ", ".join(parts)


def _gpu_text(info: dict[str, Any]) -> str:
    total = info["total_bytes"]
    memory = [] if total is None else [f"{total / 2**30:.1f} GiB"]
    known = {key: value for key, value in info.items() if value is not None}
    return ", ".join([*memory, *(GPU_FACTS[k].format(known[k]) for k in GPU_FACTS if k in known)])


def _cores_text(found: dict[str, Any]) -> str:
    text = f"{found['cpu_cores_available']} of {found['cpu_cores']} available"
    quota = found["cpu_quota_cores"]
    return text if quota is None else f"{text}, limited to the time of {quota:g}"


def _memory_text(found: dict[str, Any]) -> str:
    total, limit = found["memory_bytes"], found["memory_limit_bytes"]
    text = "unknown" if total is None else f"{total / 2**30:.1f} GiB"
    return text if limit is None else f"{text}, limited to {limit / 2**30:.1f} GiB"


def show_environment(*, as_json: bool) -> None:
    found = environment()
    print(dumps(found) if as_json else "\n".join(environment_lines(found)))


def show_file(path: Path, case: str | None) -> None:
    rows = read_rows(path)
    lines = overview_lines(rows) if case is None else record_lines(find_row(rows, case))
    write("\n".join(lines))


def write(text: str) -> None:
    """Records may hold any script, and not every terminal can show it."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the exit code is still ours to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: of result files everything that is read is kept, and looking
    for what is not takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def compare_files(options: argparse.Namespace) -> int:
    """Print a comparison; its exit code."""
    # numpy and scipy take a third of a second: only those who compare pay for them
    from peftbench.compare.as_json import json_text
    from peftbench.compare.compare import compare_paths
    from peftbench.compare.markdown import markdown_text
    from peftbench.compare.text import text_lines

    with uncollected():
        found = compare_paths(
            options.base, options.new, options.history, strict=options.strict,
            subject=options.subject,
        )  # fmt: skip
    if options.format == "text":
        write("\n".join(text_lines(found, every_row=options.all)))
    else:
        write((markdown_text if options.format == "markdown" else json_text)(found).rstrip("\n"))
    return found.exit_code


def show_history(options: argparse.Namespace) -> None:
    from peftbench.compare.history import read_history
    from peftbench.compare.history_text import history_lines

    with uncollected():
        found = read_history(options.folder, options.case, options.metric, options.subject)
    write("\n".join(history_lines(found)))


def make_report(options: argparse.Namespace) -> None:
    from peftbench.report.html import write_report

    write(write_report(options.files, options.output, options.subject, options.memory))


def print_completion(shell: str) -> None:
    import shtab

    print(shtab.complete(build_parser(), shell))


def merge_shards(options: argparse.Namespace) -> None:
    from peftbench.merge import merge

    cases = merge(options.files, options.output, partial=options.partial)
    print(f"{cases} cases of {len(options.files)} shards in {options.output}")


def export_table(options: argparse.Namespace) -> None:
    from peftbench.export import export

    print(f"{counted(export(options.files, options.output), 'round')} in {options.output}")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["bench"]:
        return bench(given[1:])
    options, unknown = build_parser().parse_known_args(given)
    if unknown:  # said by the command, whose usage helps; `parse_args` shows that of all commands
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if options.command == "compare":
            return compare_files(options)
        if options.command == "train":
            return train_for_use(options)
        if options.command == "infer":
            return infer(options)
        if options.command == "fit":
            return fit_into(options)
        if options.command == "plan":
            write("\n".join(plan_ahead(options)))
        elif options.command == "history":
            show_history(options)
        elif options.command == "report":
            make_report(options)
        elif options.command == "completion":
            print_completion(options.shell)
        elif options.command == "export":
            export_table(options)
        elif options.command == "merge":
            merge_shards(options)
        elif options.command == "list":
            list_tables()
        elif options.command == "env":
            show_environment(as_json=options.json)
        elif options.command == "show":
            show_file(options.file, options.case)
        elif options.action == "fetch":
            fetch_assets(options.names)
        else:
            list_assets()
    except UserError as error:
        print(f"peftbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
