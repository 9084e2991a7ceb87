"""`peftbench bench`, `train`, `infer` and `fit`: their options, and their exit codes.

What they do is in train_command.py and chat.py, which import torch: only who asks for it waits.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftbench import trackers
from peftbench.adapters import ADAPTERS
from peftbench.case import (
    AXES,
    CHOICES,
    PRESETS,
    Case,
    Settings,
    check_ppo,
    check_settings,
    preset_for,
)
from peftbench.errors import InvalidTrainingError, UserError, check_names
from peftbench.hub import hub_token
from peftbench.methods import METHODS, uses_ppo
from peftbench.setting_options import SETTING_OPTIONS, TRAIN_OPTIONS, add_setting_options, size

TRAINED = Path("output/train")
BENCH_JSON = Path("output/run.json")
LEAST_MEMORY_BYTES = 2**20  # less is a unit that was left out
DIVERGED, OUT_OF_MEMORY, STOPPED = 5, 6, 130


def add_use_commands(commands: Any) -> None:
    """`bench`, which pytest does; `train` and `infer`: one case for use, not for the table."""
    commands.add_parser(  # `main` hands its arguments to pytest before any is read here
        "bench", add_help=False, help="the benchmark without a checkout: `pytest bench` and all of"
        " its options",
    )  # fmt: skip
    train = commands.add_parser(
        "train", help="train one case and keep it: progress, checkpoints, a model card",
        description="Trains as the benchmark does, for use: the adapter in PEFT's format, with the"
        " tokenizer and a model card. Ctrl-C keeps what was done; --resume goes on.",
    )  # fmt: skip
    for name, words in (
        ("model", "a name of `peftbench list`, a Hub id or a local folder"),
        ("adapter", f"one of: {', '.join(ADAPTERS)}"),
        ("method", f"one of: {', '.join(METHODS)}"),
    ):
        train.add_argument(f"--{name}", required=True, help=words)
    train.add_argument("--preset", help="whose settings to begin with (default: the model's)")
    train.add_argument("--output", type=Path, metavar="DIR", help=f"default: {TRAINED}/<case>")
    train.add_argument("--resume", action="store_true", help="go on with what DIR has")
    train.add_argument("--overwrite", action="store_true", help="begin anew where DIR has one")
    train.add_argument(
        "--checkpoint-every", type=float, default=60.0, metavar="SECONDS", help="default: 60"
    )
    train.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it when it is done")
    train.add_argument("--report-to", metavar="A,B", default="none", help=trackers.HELP)
    settings = train.add_argument_group("settings, each in place of the preset's")
    add_setting_options(settings.add_argument, TRAIN_OPTIONS)
    infer = commands.add_parser("infer", help="talk to a model and its adapter in a terminal")
    infer.add_argument("--model", required=True, help="a name, a Hub id or a local folder")
    infer.add_argument(
        "--adapter", metavar="DIR|NAME", help="a folder of `peftbench train` or PEFT, or an"
        " adapter's name: its newest training; none: the base",
    )  # fmt: skip
    infer.add_argument("--output", type=Path, default=TRAINED, metavar="DIR",
                       help=f"where trainings lie (default: {TRAINED})")  # fmt: skip
    infer.add_argument("--device", choices=CHOICES["device"], default="auto")
    infer.add_argument("--dtype", choices=CHOICES["dtype"], help="default: as it was trained")
    infer.add_argument("--threads", type=int, default=0, help="of the CPU (0: all)")
    infer.add_argument("--seed", type=int, default=0)
    infer.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    infer.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    infer.add_argument("--top-p", type=float, default=0.95)
    infer.add_argument(
        "--merge", action=argparse.BooleanOptionalAction,
        help="fold the adapter into the weights (default: where that loses nothing)",
    )  # fmt: skip


def add_fit_command(commands: Any) -> None:
    """`fit`: what can be trained with so much memory."""
    fit = commands.add_parser(
        "fit", help="which adapter, method and batch fit into so much memory",
        description="Tries every choice in short runs under the memory limit (of the GPU; on a CPU"
        " of the process, beyond its imports) and doubles the batch until it no longer fits.",
    )  # fmt: skip
    fit.add_argument("--model", required=True, help="a name, a Hub id or a local folder")
    fit.add_argument("--memory", required=True, type=size, metavar="SIZE", help="such as 24GiB")
    fit.add_argument("--adapters", default="full,lora,qlora,ia3,prefix", metavar="A,B")
    fit.add_argument("--methods", default="sft,dpo", metavar="A,B")
    fit.add_argument("--lengths", default="128,512", metavar="N,M",
                     help="tokens of prompt and completion (default: 128,512)")  # fmt: skip
    fit.add_argument("--weights", choices=CHOICES["weights"], default="random",
                     help="random (the default) needs no download and costs the same")  # fmt: skip
    fit.add_argument("--device", choices=CHOICES["device"], default="auto")
    fit.add_argument("--dtype", choices=CHOICES["dtype"], help="default: bfloat16 with CUDA")
    fit.add_argument("--threads", type=int, default=0, metavar="N",
                     help="CPU threads of a probe (default: all cores)")  # fmt: skip
    fit.add_argument("--results", nargs="+", type=Path, default=[], metavar="FILE",
                     help="records in which the qualities of this model stand")  # fmt: skip
    fit.add_argument("--case-timeout", type=float, default=600.0, metavar="SECONDS")


def add_plan_command(commands: Any) -> None:
    """`plan`: what a matrix will take, from earlier records."""
    plan = commands.add_parser(
        "plan", help="estimate a matrix's time, energy and memory from earlier records",
        description="Estimates what `pytest bench` with the same options will take, from earlier"
        " records of one kind of machine. Nothing is measured and nothing is run.",
    )  # fmt: skip
    plan.add_argument("--preset", default="quick", help=f"one of: {', '.join(PRESETS)}")
    for axis in AXES:
        plan.add_argument(f"--{axis}", metavar="A,B", help="in the place of the preset's")
    plan.add_argument("--rounds", "--seeds", type=int, dest="rounds")
    plan.add_argument("--gpus", type=int, default=1, metavar="K",
                      help="GPUs, or machines without one, that take rounds (1)")  # fmt: skip
    plan.add_argument("--records", nargs="+", type=Path, default=[Path("results")], metavar="PATH",
                      help="earlier result files or folders (default: results)")  # fmt: skip
    plan.add_argument("--machine", metavar="NAME", help="whose records count: a part of its name"
                      " (default: that of the newest)")  # fmt: skip
    plan.add_argument("--longest-first", action="store_true",
                      help="as `--dispatch ray --expected-times` does")  # fmt: skip
    plan.add_argument("--mean-hours", type=float, default=float("inf"), metavar="H",
                      help="between two failures of a GPU (default: none fails)")  # fmt: skip
    plan.add_argument("--away-minutes", type=float, default=10.0, metavar="M",
                      help="until a failed GPU takes rounds again (default: 10)")  # fmt: skip
    plan.add_argument("--dispatch-ms", type=float, default=0.0, metavar="MS",
                      help="the driver's time for a round (0; docs/scaling.md)")  # fmt: skip
    plan.add_argument("--check", type=Path, metavar="FILE",
                      help="a session that was run: how far off the estimate is")  # fmt: skip
    settings = plan.add_argument_group("settings, each in place of the preset's")
    add_setting_options(settings.add_argument)


def plan_ahead(options: argparse.Namespace) -> list[str]:
    """The estimate's lines."""
    from peftbench.plan import (
        Failures,
        check_failures,
        check_lines,
        costs_of,
        expect,
        of_one_machine,
        plan_lines,
        read_past,
    )
    from peftbench.preflight import impossible
    from peftbench.selection import select

    for name, least, most in (
        ("gpus", 1, 1e6), ("mean_hours", 1e-3, math.inf), ("away_minutes", 0, 1e6),
        ("dispatch_ms", 0, 1e6),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is {getattr(options, name)}; it must be from {least:g} to {most:g}"
            )
    given = {o.setting: getattr(options, o.dest) for o in SETTING_OPTIONS}
    preset, cases = select(
        options.preset, {axis: getattr(options, axis) for axis in AXES},
        {name: value for name, value in given.items() if value is not None}, options.rounds,
    )  # fmt: skip
    real = [] if options.check is None else read_past(options.check)
    if options.check is not None and not real:
        raise UserError(f"--check {str(options.check)!r} has no round in it; give another session")
    seen = {(p.start_unix_s, p.machine) for p in real}  # which must not foretell itself
    past = [p for path in options.records for p in read_past(path)]
    past = [p for p in past if (p.start_unix_s, p.machine) not in seen]
    past = of_one_machine(past, options.machine or (real[0].machine if real else None))
    costs = costs_of(past, options.dispatch_ms / 1000)
    failures = Failures(options.mean_hours, 60 * options.away_minutes)
    possible = [c for c in cases.values() if impossible(c) is None]
    if real:  # of a session with fewer cases that many
        ran = {done.case_hash for done in real[0].rounds}
        possible = [c for c in possible if c.hash in ran] or possible
    known, unknown = expect(possible, past)
    if options.longest_first:
        known.sort(key=lambda expected: -expected.seconds)
    if not known:
        raise UserError(
            f"the records of {past[0].machine} have none of these models and methods; give others"
            " with --records, or --machine"
        )
    check_failures(known, costs, failures)
    lines = plan_lines(known, unknown, preset.rounds, options.gpus, past, costs, failures)
    if real:
        lines += ["", *check_lines(known, preset.rounds, costs, real[0])]
    return lines


def fit_into(options: argparse.Namespace) -> int:
    """Answer what fits; the exit code."""
    from peftbench.fit import answer_lines, check_asked, choices, search
    from peftbench.preflight import preflight
    from peftbench.provenance import torch_cuda_version

    if options.memory < LEAST_MEMORY_BYTES:
        raise UserError(
            f"--memory is {options.memory} bytes; give at least 1MiB, for example 24GiB"
        )
    adapters, methods = options.adapters.split(","), options.methods.split(",")
    check_names("adapter", adapters, ADAPTERS)
    check_names("method", methods, METHODS)
    try:
        lengths = [int(n) for n in options.lengths.split(",")]
    except ValueError:
        raise UserError(
            f"--lengths is {options.lengths!r}; write numbers of tokens such as 128,512"
        ) from None
    dtype = options.dtype or ("bfloat16" if torch_cuda_version() else "float32")
    settings = Settings(
        device=options.device, dtype=dtype, weights=options.weights, data="synthetic",
        threads=options.threads, eval_context=min(lengths), eval_stride=1,
    )  # fmt: skip
    asked = choices(adapters, methods, lengths)
    check_asked(options.model, options.weights, asked)
    preflight([options.model], set(), replace(settings, prompt_length=1, completion_length=1))
    folder = BENCH_JSON.parent / "fit"
    found = list(
        search(options.model, options.memory, asked, settings, folder, options.case_timeout)
    )
    print("\n".join(answer_lines(found, options.memory, options.results)))
    return 0


def bench(arguments: list[str]) -> int:
    """`pytest bench` with these arguments on the matrix inside the package; pytest's exit code."""
    import pytest

    from peftbench import matrix

    if not any(argument.startswith("--benchmark-json") for argument in arguments):
        BENCH_JSON.parent.mkdir(parents=True, exist_ok=True)
        arguments = [f"--benchmark-json={BENCH_JSON}", *arguments]
    given = [
        str(matrix.__file__), "-p", "no:cacheprovider", f"--rootdir={Path.cwd()}",
        # of peftbench itself, which is here already: there is nothing in it to rewrite
        "-W", "ignore::pytest.PytestAssertRewriteWarning",
    ]  # fmt: skip
    return int(pytest.main([*given, "--benchmark-columns=median,rounds", *arguments]))


def train_for_use(options: argparse.Namespace) -> int:
    """Train one case; its exit code."""
    from peftbench.preflight import impossible, preflight

    name = options.preset or preset_for(options.model)
    check_names("preset", [name], PRESETS)
    check_names("adapter", [options.adapter], ADAPTERS)
    check_names("method", [options.method], METHODS)
    if not options.checkpoint_every >= 0:
        raise UserError(f"--checkpoint-every is {options.checkpoint_every}; it must be 0 or more")
    report_to = trackers.tracker_names(options.report_to)
    given = {o.setting: getattr(options, o.dest) for o in TRAIN_OPTIONS}
    chosen = {k: v for k, v in given.items() if v is not None}
    settings = replace(PRESETS[name].settings_of(options.method), **chosen)
    check_settings(settings)
    if uses_ppo(options.method):
        check_ppo(settings)
    case = Case(options.model, options.adapter, options.method, settings)
    if settings.engine != "native":
        raise UserError("train goes through the native engine; leave --engine out")
    if sentence := impossible(case):
        raise UserError(sentence)
    preflight([case.model], {case.adapter}, settings)
    quiet_libraries()
    from peftbench.out_of_memory import is_out_of_memory
    from peftbench.train_command import StoppedError, memory_advice, push_to_hub, train_case

    folder = options.output or TRAINED / case.id
    print(f"settings of preset {name}")
    try:
        train_case(
            case, folder, resume=options.resume, overwrite=options.overwrite,
            checkpoint_every_s=options.checkpoint_every, report_to=report_to,
        )  # fmt: skip
    except StoppedError as error:
        print(f"peftbench: stopped at {error}, kept in {folder}: the same command with --resume"
              " goes on", file=sys.stderr)  # fmt: skip
        return STOPPED
    except InvalidTrainingError as error:
        print(f"peftbench: {error}", file=sys.stderr)
        return DIVERGED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"peftbench: not enough memory; give {memory_advice(case)}", file=sys.stderr)
        return OUT_OF_MEMORY
    if options.push_to_hub is not None:
        print(f"pushed to {push_to_hub(folder, options.push_to_hub, hub_token())}")
    return 0


def infer(options: argparse.Namespace) -> int:
    """Talk to a model; the exit code."""
    from peftbench.models import check_model

    settings = Settings(device=options.device, threads=options.threads, seed=options.seed)
    check_model(options.model, settings.weights)
    quiet_libraries()
    from peftbench.chat import Sampling, chat, find_trained
    from peftbench.out_of_memory import is_out_of_memory

    trained = None
    if options.adapter is not None:
        trained = find_trained(options.model, options.adapter, options.output)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    try:
        chat(options.model, trained, settings, options.dtype, sampling, merge=options.merge)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("peftbench: not enough memory; give --dtype bfloat16 or --no-merge, or a smaller"
              " model", file=sys.stderr)  # fmt: skip
        return OUT_OF_MEMORY
    return 0


def quiet_libraries() -> None:
    """What the libraries say while they load is for their developers."""
    from peftbench.worker import SERVER_ENVIRONMENT

    for name, value in SERVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("bitsandbytes", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
