"""The pytest plugin: options, the matrix as parameters, the runner, what the JSON gets.

Loaded in every pytest session of an environment that has peftbench, so it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from peftbench import gate, trackers
from peftbench.adapters import ADAPTERS
from peftbench.case import AXES, PRESETS, Case, Preset
from peftbench.errors import UserError
from peftbench.methods import INFER, METHODS
from peftbench.metrics import METRICS, kind_of
from peftbench.preflight import impossible, preflight, preflight_inference
from peftbench.privacy import without_secrets
from peftbench.progress import Progress, counted
from peftbench.record import FORMAT, dumps, write_atomically
from peftbench.round_reports import report_rounds
from peftbench.rounds import run_case
from peftbench.selection import Cases, select
from peftbench.session import Session
from peftbench.setting_options import SETTING_OPTIONS, add_setting_options, size
from peftbench.shard import Shard, expected_seconds, longest_first, parts
from peftbench.summary import summary_lines

CLUSTER_OPTIONS = ("ray_address", "runtime_env", "round_cpus", "round_memory")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftbench", "peftbench: what is trained, and how")
    group.addoption("--preset", default="quick", help=f"one of: {', '.join(PRESETS)}")
    group.addoption("--models", help="comma-separated names, Hub ids or local folders")
    group.addoption("--adapters", help=f"comma-separated, of: {', '.join(ADAPTERS)}")
    group.addoption("--methods", help=f"comma-separated, of: {', '.join(METHODS)}, and {INFER},"
                    " which measures what an adapter costs when the model answers")  # fmt: skip
    group.addoption(
        "--rounds", "--seeds", type=int, dest="rounds",
        help="fresh processes per case, with seeds seed, seed + 1, ...",
    )  # fmt: skip
    group.addoption(
        "--results-dir", default="output/runs", help="where each finished round is written at once"
    )
    group.addoption(
        "--resume", metavar="RUN_ID",
        help="go on with an interrupted run of the results folder, repeating no finished round",
    )  # fmt: skip
    group.addoption(
        "--case-timeout", type=float, default=7200.0, help="seconds after which a case is ended"
    )
    group.addoption(
        "--shard", metavar="I/N", help="only part I of N of the cases; `peftbench merge` joins them"
    )
    group.addoption(
        "--expected-times", metavar="PATH",
        help="earlier result files: by their times the parts of --shard become equally long, and"
        " a cluster takes the longest rounds first",
    )  # fmt: skip
    group.addoption(
        "--dispatch", choices=("local", "ray"), default="local",
        help="ray: every round is a task of a Ray cluster, each GPU measuring one at a time",
    )  # fmt: skip
    group.addoption(
        "--ray-address", metavar="HOST:PORT",
        help="the cluster's (default: RAY_ADDRESS, else one of this machine alone)",
    )  # fmt: skip
    group.addoption(
        "--runtime-env", metavar="JSON", help="the tasks' environment, in Ray's own form"
    )
    group.addoption(
        "--round-cpus", type=int, metavar="N",
        help="CPUs that a round takes of its node (default: one beside a GPU, else all)",
    )  # fmt: skip
    group.addoption(
        "--round-memory", type=size, metavar="SIZE", help="memory that a round takes of its node"
    )
    gate.add_options(group)
    group.addoption("--report-to", metavar="A,B", default="none", help=trackers.HELP)
    add_setting_options(group.addoption)


def selection(config: pytest.Config) -> tuple[Preset, Cases]:
    """The preset with the options applied, and its cases in order. Raises: UserError."""
    given = {option.setting: config.getoption(option.dest) for option in SETTING_OPTIONS}
    return select(
        config.getoption("preset"),
        {axis: config.getoption(axis) for axis in AXES},
        {name: value for name, value in given.items() if value is not None},
        config.getoption("rounds"),
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[SELECTION] = selection(config)
    except UserError as error:
        raise pytest.UsageError(without_secrets(str(error))) from None
    config.pluginmanager.register(ShardSelection())
    config.pluginmanager.register(ComparisonGate())  # inside the next, so after the file
    config.pluginmanager.register(RoundReports())  # after the comparison, which may run cases again
    config.pluginmanager.register(FileGuard())


SELECTION = pytest.StashKey[tuple[Preset, Cases]]()
SESSION = pytest.StashKey[Session]()
SHARD = pytest.StashKey[dict[str, Any]]()
VERDICT = pytest.StashKey[gate.Verdict]()
TRACKERS = pytest.StashKey[tuple[str, ...]]()
TOLD = pytest.StashKey[list[str]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "peftbench_run" in metafunc.fixturenames:
        kind = "infer" if "peftbench_infer" in metafunc.fixturenames else "train"
        cases = metafunc.config.stash[SELECTION][1]
        own = {key: case for key, case in cases.items() if kind_of(case.id) == kind}
        # strings, because pytest-benchmark stores nothing else as a parameter
        metafunc.parametrize(
            ("model", "adapter", "method"), list(own), ids=[case.id for case in own.values()]
        )


def is_bench_item(item: pytest.Item) -> bool:
    return "peftbench_run" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse what cannot work before the first case starts; with `--collect-only`, only names."""
    config = session.config
    items = [i for i in session.items if is_bench_item(i)]
    if not items or config.getoption("collectonly"):
        return
    preset, cases = config.stash[SELECTION]
    try:
        keys = [i.callspec.params for i in items]  # type: ignore[attr-defined]
        chosen = [cases[k["model"], k["adapter"], k["method"]] for k in keys]
        models = {c.model for c in chosen}
        preflight(
            [m for m in preset.models if m in models], {c.adapter for c in chosen}, preset.settings
        )
        preflight_inference([c for c in chosen if kind_of(c.id) == "infer"])
        refuse_other_modes(config)
        check_json_folder(config)
        gate.check_options(config)
        config.stash[TRACKERS] = trackers.tracker_names(config.getoption("report_to"))
        folder = writable_folder(Path(config.getoption("results_dir")))
        ours = Session(
            folder, Progress(len(items)), preset.rounds, config.getoption("case_timeout"),
            config.getoption("resume"), chosen, config.stash.get(SHARD, None),
        )  # fmt: skip
        if config.getoption("dispatch") == "ray":
            dispatch(config, ours, chosen)
    except UserError as error:
        raise pytest.UsageError(without_secrets(str(error))) from None
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=ours.clock))
    config.stash[SESSION] = ours


def is_kept(ours: Session, case: Case, round_index: int) -> bool:
    """Whether an interrupted run had finished the round."""
    return ours.earlier(case, case.settings.seed + round_index) is not None


def dispatch(config: pytest.Config, ours: Session, cases: list[Case]) -> None:
    """Hand out every round that is not on disk, the longest first if times are known.

    Raises: UserError.
    """
    from peftbench.cluster import Cluster, RayOptions

    times = config.getoption("expected_times")
    if times is not None:
        cases = longest_first(cases, expected_seconds(Path(times)))
    runtime_env = config.getoption("runtime_env")
    cluster = Cluster(ours, RayOptions(
        config.getoption("ray_address"),
        None if runtime_env is None else Path(runtime_env),
        config.getoption("round_cpus"),
        config.getoption("round_memory") or 0,
    ))  # fmt: skip
    ours.elsewhere = cluster
    try:
        cluster.submit([
            (case, [i for i in range(ours.rounds) if not is_kept(ours, case, i)])
            for case in cases if impossible(case) is None
        ])  # fmt: skip
    except BaseException:
        ours.close()
        raise


def refuse_other_modes(config: pytest.Config) -> None:
    """Modes of pytest-benchmark in which it calls the rounds in another way."""
    if config.getoption("benchmark_disable", False) or config.getoption("benchmark_cprofile", None):
        raise UserError(
            "--benchmark-disable and --benchmark-cprofile do not work with bench/;"
            " use --collect-only to see the cases, or run without them"
        )
    if config.getoption("numprocesses", None) or "PYTEST_XDIST_WORKER" in os.environ:
        raise UserError("pytest-xdist (-n) would run measured cases side by side; leave it out")
    ours = {n: config.getoption(n) for n in CLUSTER_OPTIONS if config.getoption(n) is not None}
    if ours and config.getoption("dispatch") != "ray":
        raise UserError(f"--{next(iter(ours)).replace('_', '-')} needs --dispatch ray")
    if config.getoption("dispatch") == "ray" and config.getoption("confirm"):
        raise UserError(
            "--confirm runs suspects again on this machine; with --dispatch ray leave it out"
        )
    cpus = config.getoption("round_cpus")
    if cpus is not None and cpus < 1:
        raise UserError(f"round-cpus is {cpus}; it must be at least 1")
    if config.getoption("case_timeout") <= 0:
        raise UserError(f"case-timeout is {config.getoption('case_timeout')}; it must be above 0")


def check_json_folder(config: pytest.Config) -> None:
    """Make the file's folder: pytest-benchmark opens it when everything has been measured."""
    path = gate.json_path(config)
    if path is None:
        return
    with contextlib.suppress(OSError):  # the sentence below says it
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir():
        raise UserError(
            f"--benchmark-json {str(path)!r} cannot be written; give a file in a folder that can be"
        )


def writable_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"results folder {str(folder)!r} cannot be written ({error.strerror});"
            f" give another with --results-dir"
        ) from None
    return folder


@pytest.fixture
def peftbench_run(
    model: str, adapter: str, method: str, request: pytest.FixtureRequest, benchmark: Any
) -> Any:
    """A function that trains and measures the test's case and returns its row."""
    config = request.config
    case = config.stash[SELECTION][1][model, adapter, method]
    session = config.stash[SESSION]
    benchmark.group = case.id.removesuffix(f"-{adapter}-{method}")

    def run() -> dict[str, Any]:
        sentence = impossible(case)
        if sentence is not None:
            session.skip(case, sentence)
            pytest.skip(sentence)
        try:
            row = run_case(session, case, benchmark)
        except UserError as error:  # only a resumed run on another device gets here
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        if row["status"] not in ("ok", "oom"):
            pytest.fail(
                f"{case.id}: {row['status']} in phase {row['phase']}: {row['reason']}\n"
                + row.get("traceback", ""),
                pytrace=False,
            )
        return row

    return run


@pytest.fixture
def peftbench_infer(peftbench_run: Any) -> Any:
    """The same of an inference case: by this name a test asks for those."""
    return peftbench_run


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(
    report: pytest.TestReport,
) -> tuple[str, str, str] | None:
    """Bench cases have a line of their own: no dots between them."""
    if report.when == "call" and "peftbench_run" in getattr(report, "keywords", {}):
        return (report.outcome, "", "")
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Training cases first. Of a kind without a case pytest makes a test without parameters."""
    others = [item for item in items if not is_bench_item(item)]
    ours = [item for item in items if is_bench_item(item) and is_case(item)]
    ours.sort(key=lambda item: "peftbench_infer" in item.fixturenames)  # type: ignore[attr-defined]
    items[:] = [*others, *ours]
    for item in ours:
        item.keywords["peftbench_run"] = True


def is_case(item: pytest.Item) -> bool:
    return isinstance(item.callspec.params["model"], str)  # type: ignore[attr-defined]


class ShardSelection:
    """Keeps this shard's part of the cases that `-k` and the like have left."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        try:
            self._select(config, items)
        except UserError as error:
            raise pytest.UsageError(without_secrets(str(error))) from None

    @staticmethod
    def _select(config: pytest.Config, items: list[pytest.Item]) -> None:
        given, times = config.getoption("shard"), config.getoption("expected_times")
        if given is None:
            if times is not None and config.getoption("dispatch") != "ray":
                raise UserError("--expected-times needs --shard or --dispatch ray")
            return
        shard = Shard.parse(given)
        ids = [i.callspec.id for i in items if is_bench_item(i)]  # type: ignore[attr-defined]
        seconds = {} if times is None else expected_seconds(Path(times))
        own = set(parts(ids, shard.count, seconds)[shard.index - 1])
        rest = [i for i in items if is_bench_item(i) and i.callspec.id not in own]  # type: ignore[attr-defined]
        config.hook.pytest_deselected(items=rest)
        items[:] = [i for i in items if i not in rest]
        config.stash[SHARD] = shard.to_dict(ids)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """The host's name says nothing about a number."""
    if config.stash.get(SESSION, None) is not None:
        machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Every case under one key of our own, those without a time included."""
    session = config.stash.get(SESSION, None)
    if session is not None:
        complete = session.rows and session.rows[-1]["status"] != "interrupted"
        if complete and session.elsewhere is None:
            session.time_machine("end", next(iter(config.stash[SELECTION][1].values())))
        output_json["peftbench"] = session_json(session)


def session_json(session: Session) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run_id": session.run_id,
        **({} if session.shard is None else {"shard": session.shard}),
        "sentinels": session.sentinels,
        "bases": session.base_phases,
        "metric_versions": {name: metric.version for name, metric in METRICS.items()},
        "cases": [
            {
                k: row[k]
                for k in ("case_id", "case_hash", "status", "phase", "reason", "oom")
                if k in row
            }
            for row in session.rows
        ],
    }


class ComparisonGate:
    """After the file is written: what changed, and whether that fails the session."""

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        result = yield
        config = session.config
        ours = config.stash.get(SESSION, None)
        if ours is None or not ours.rows or config.getoption("compare_to") is None:
            return result
        if ours.rows[-1]["status"] == "interrupted":
            return result
        try:
            cases = list(config.stash[SELECTION][1].values())
            found = gate.judge(config, ours, cases, session_json(ours))
        except UserError as error:
            found = gate.Verdict([f"cannot compare: {error}"], gate.USAGE_ERROR, None)
        config.stash[VERDICT] = found
        fails = config.getoption("fail_on_regression") or found.exit_code == gate.USAGE_ERROR
        if found.exit_code != 0 and fails and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return result


class RoundReports:
    """After everything that is measured or written: `--report-to`."""

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        result = yield
        ours = session.config.stash.get(SESSION, None)
        if ours is None or not ours.rows or ours.rows[-1]["status"] == "interrupted":
            return result
        if names := session.config.stash[TRACKERS]:
            session.config.stash[TOLD] = report_rounds(ours.folder, ours.run_id, names)
        return result


class FileGuard:
    """Around pytest-benchmark's end of the session, which writes the JSON file.

    Registered when pytest is configured: after pytest-benchmark, so that it encloses it, and before
    the terminal, whose summary must come after it.
    """

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        ours = session.config.stash.get(SESSION, None)
        try:
            return (yield)
        except OSError as error:
            if ours is None:
                raise
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
            path = gate.json_path(session.config)
            target = "the file" if path is None else path.name
            ours.not_written = (
                f"{target} could not be written ({error.strerror}); every finished round is kept:"
                f" make room and run again with --resume {ours.run_id}"
            )
            return None
        finally:
            if ours is not None:
                ours.progress.close()
                ours.close()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash.get(SESSION, None)
    if session is None or not session.rows:
        return
    terminalreporter.section(f"peftbench: {counted(len(session.rows), 'case')}")
    for line in summary_lines(session.rows):
        terminalreporter.write_line(line)
    kept = f"each round is kept in {session.folder}"
    if session.rows[-1]["status"] == "interrupted":
        kept += f"; the same command with --resume {session.run_id} goes on"
    terminalreporter.write_line(kept)
    for line in config.stash.get(TOLD, []):
        terminalreporter.write_line(line)
    verdict = config.stash.get(VERDICT, None)
    if verdict is not None:
        terminalreporter.section("peftbench: what changed")
        for line in verdict.lines:
            terminalreporter.write_line(line)
        if verdict.file is not None:
            terminalreporter.write_line(f"verdicts: {verdict.file}")
    if session.not_written is not None:
        terminalreporter.write_line(f"ERROR: {session.not_written}", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """pytest-benchmark writes no file when no case has a time: then ours holds the statuses."""
    session = config.stash.get(SESSION, None)
    target = gate.json_path(config)
    if session is None or target is None or any(r["status"] == "ok" for r in session.rows):
        return
    empty = {"benchmarks": [], "machine_info": {}, "commit_info": {}, "version": "5.3.1"}
    write_atomically(target, dumps(empty | {"peftbench": session_json(session)}))
