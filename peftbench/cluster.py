"""`--dispatch ray`: every round of the matrix as a task of a Ray cluster.

On the driver `Cluster` hands the rounds out and writes each record to disk when it comes; on a node
`run_round` runs one as on a single machine: the same child, the same record, the same statuses.
pytest-benchmark then gets the training time that was measured there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from peftbench import provenance
from peftbench.case import Case, Settings, expanded, is_local, task_names
from peftbench.errors import UserError
from peftbench.privacy import without_paths, without_secrets
from peftbench.progress import Progress
from peftbench.record import dumps, write_atomically
from peftbench.resume import provenance_difference
from peftbench.rounds import CaseRounds, file_stem
from peftbench.session import Session
from peftbench.worker import COMPILE_CACHE, Outcome, RoundStoppedError

ATTEMPTS = 4  # of a round whose node is lost, or whose task another job's takes the place of
_CONNECT_S = 5.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a benchmark sends nothing
    "RAY_worker_niceness": "0",  # else every other process of the node goes before a measured one
}
_FOLDER = "peftbench-rounds-"


@dataclass(frozen=True)
class RayOptions:
    """What a cluster is asked for. `address` None: what RAY_ADDRESS says, else one of this machine
    that is made for the session."""

    address: str | None = None
    runtime_env: Path | None = None  # a JSON file: the environment of the tasks, as Ray defines it
    cpus: int | None = None  # of a round; None: one beside a GPU, else all of a node
    memory_bytes: int = 0  # of a node, set aside for a round; 0: none


@dataclass(frozen=True)
class Round:
    """One round to run, and what became of it so far."""

    case: Case
    index: int
    needs: dict[str, float]  # as Ray's options of a task
    lost: tuple[str, ...] = ()  # why each earlier attempt came to nothing


class Cluster:
    """The rounds of a session on a Ray cluster. Raises: UserError where none can be reached."""

    def __init__(
        self,
        session: Session,
        options: RayOptions,
        task: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self._session, self._options = session, options
        self._ray = connect(options)
        # A worker is kept for the next round: its bases are scored, its server has the imports.
        # Retries are ours: Ray's own would leave no word in the record.
        self._task = self._ray.remote(max_calls=0, max_retries=0)(task or run_round)
        self._resources = alive(self._ray)
        self._running: dict[Any, Round] = {}  # by Ray's reference to the answer
        self._found: dict[tuple[str, int], dict[str, Any] | Outcome] = {}
        self._nodes: dict[str, int] = {}  # Ray's ids, numbered as their first answers come
        self._machines: dict[str, str] = {}  # of the first round that came back, by case hash

    def submit(self, cases: Iterable[tuple[Case, Iterable[int]]]) -> None:
        """Hand out cases' rounds, in this order.

        Raises: UserError, before any is, if there is one that no node can ever take.
        """
        wanted = [
            Round(case, index, needed(case.settings, self._options, self._resources))
            for case, rounds in cases
            for index in rounds
        ]
        for each in wanted:
            self._start(each)

    def record(self, case: Case, round_index: int) -> dict[str, Any]:
        """Wait for a round that was submitted; its record, which is on disk by then.

        What else ends meanwhile is written too. Raises: RoundStoppedError.
        """
        while (case.hash, round_index) not in self._found:
            if not self._running:
                raise AssertionError(f"{file_stem(case, round_index)} was never handed out")
            total = len(self._found) + len(self._running)
            self._session.progress.phase(f"{len(self._found)} of {total} rounds are back")
            references = list(self._running)
            ready, _ = self._ray.wait(references, num_returns=1, timeout=1.0)
            if ready:  # and whatever else is: one by one would look at all of them each time
                ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
            for reference in ready:
                self._answer(reference)
        found = self._found[case.hash, round_index]
        if isinstance(found, Outcome):
            raise RoundStoppedError(found)
        return found

    def close(self) -> None:
        """End what still runs, and leave the cluster."""
        try:
            self._cancel(list(self._running))
        finally:
            self._ray.shutdown()

    def _cancel(self, references: list[Any]) -> None:
        for reference in references:
            del self._running[reference]
            with contextlib.suppress(self._ray.exceptions.RayError):  # the cluster may be gone
                self._ray.cancel(reference, force=True)

    def _start(self, wanted: Round) -> None:
        job = {
            "case": with_absolute_paths(wanted.case).to_dict(),
            "index": wanted.index,
            "run_id": self._session.run_id,
            "time_limit_s": self._session.time_limit_s,
            "provenance": provenance.describe(),
            "gpus": wanted.needs["num_gpus"],
        }
        self._running[self._task.options(**wanted.needs).remote(job)] = wanted

    def _answer(self, reference: Any) -> None:
        """Take in what a task ended with; a case that stops needs no further rounds."""
        if reference not in self._running:
            return  # its case has stopped meanwhile
        ended = self._running.pop(reference)
        found = self._outcome(ended, reference)
        if found is None:
            return
        self._found[ended.case.hash, ended.index] = found
        if isinstance(found, Outcome):
            others = [r for r, each in self._running.items() if each.case.hash == ended.case.hash]
            for other in others:
                self._found[ended.case.hash, self._running[other].index] = found
            self._cancel(others)

    def _outcome(self, ended: Round, reference: Any) -> dict[str, Any] | Outcome | None:
        """The round's record, which is on disk, or why there is none; None: it runs again."""
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(reference)
        except errors.RayTaskError as error:
            return Outcome("failed", "dispatch", _line(error.cause), without_secrets(str(error)))
        except errors.RuntimeEnvSetupError as error:
            return Outcome("failed", "dispatch", f"--runtime-env: {_line(error)}")
        except errors.RayError as error:
            lost = (*ended.lost, f"{type(error).__name__}: {_line(error)}")
            if len(lost) == ATTEMPTS:
                return Outcome("crashed", "dispatch", f"lost {len(lost)} times: {lost[-1]}")
            self._start(replace(ended, lost=lost))
            return None
        node = self._nodes.setdefault(answer["node"], len(self._nodes) + 1)
        if answer["sentinels"] is not None:
            self._session.sentinels.setdefault(f"start of node {node}", answer["sentinels"])
        self._session.base_phases += answer["bases"]
        if "stopped" in answer:
            return Outcome(**answer["stopped"])
        record: dict[str, Any] = answer["record"]
        here = machine_of(record)
        first = self._machines.setdefault(ended.case.hash, here)
        if first != here:
            why = f"rounds of one case ran on {first} and on {here}; give a cluster of one kind"
            return Outcome("failed", "dispatch", why)
        record["dispatch"] = {
            "node": node, "attempts": len(ended.lost) + 1, "lost": list(ended.lost),
        }  # fmt: skip
        name = f"{file_stem(ended.case, ended.index)}.json"
        try:
            write_atomically(self._session.folder / name, dumps(record))
        except OSError as error:
            return Outcome("failed", "record", f"{type(error).__name__}: {_line(error)}")
        return record


def machine_of(record: dict[str, Any]) -> str:
    """What rounds of one case must have in common."""
    device = str(record["device"])
    return device if device != "cpu" else str(record["provenance"]["cpu"])


def connect(options: RayOptions) -> Any:
    """Ray's module, connected. Raises: UserError."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError(
            "--dispatch ray needs the package ray, which is missing: pip install 'peftbench[ray]'"
        ) from None
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    os.environ.update(_ENVIRONMENT)
    runtime_env = read_runtime_env(options.runtime_env)
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )  # fmt: skip
    except (OSError, RuntimeError, TypeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"no Ray cluster at {address}: {_line(error)}") from None
    finally:
        # Ray's own ends the test that runs, and the session goes on with the next
        signal.signal(signal.SIGTERM, on_term)
    return ray


def _check_address(address: str) -> None:
    """Raise UserError for an address where nobody listens: Ray itself would try for a minute."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"--ray-address {address!r} is none; give HOST:PORT as `ray start --head` prints it"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(
            f"no Ray cluster at {address}: {_line(error)}; start one with `ray start --head`"
        ) from None


def read_runtime_env(path: Path | None) -> dict[str, Any] | None:
    """The file's dictionary. Raises: UserError."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --runtime-env {str(path)!r}: {_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"--runtime-env {str(path)!r} holds no dictionary, as Ray's are")
    return found


def alive(ray: Any) -> list[dict[str, float]]:
    """The resources of every node that can take a task."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [resources for resources in found if resources.get("CPU", 0) >= 1]


def needed(
    settings: Settings, options: RayOptions, nodes: list[dict[str, float]]
) -> dict[str, float]:
    """What Ray must set aside for a round, so that no two that are measured share it.

    With GPUs one of them, whole, and a core for each of the case's processes. Without, all of a
    node, whatever the round's threads: others beside it would disturb it. Of the largest, so that
    none has room for two.
    Raises: UserError if no node has as much.
    """
    has_gpus = settings.device != "cpu" and any(n.get("GPU", 0) >= 1 for n in nodes)
    gpus = settings.processes if has_gpus else 0
    if settings.device == "cuda" and not gpus:
        raise UserError("--device cuda: no node of the Ray cluster has a GPU")
    largest = max((int(node["CPU"]) for node in nodes), default=1)
    cpus = options.cpus or gpus or largest
    needs: dict[str, float] = {"num_cpus": cpus, "num_gpus": gpus}
    if options.memory_bytes:
        needs["memory"] = options.memory_bytes
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    if not any(all(n.get(names[k], 0) >= v for k, v in needs.items()) for n in nodes):
        wanted = ", ".join(f"{v:.0f} {names[k]}" for k, v in needs.items() if v)
        raise UserError(
            f"no node of the Ray cluster has what a round asks for ({wanted or 'a CPU'}):"
            " lower --round-cpus or --round-memory, or add a node"
        )
    return needs


def with_absolute_paths(case: Case) -> Case:
    """A task runs in a folder of Ray's: local models, data and tasks by their whole paths.

    The case's hash does not change: it holds their names alone.
    """

    def whole(name: str) -> str:
        path = expanded(name)
        return str(path.absolute()) if is_local(name) or path.exists() else name

    tasks = ",".join(whole(name) for name in task_names(case.settings.tasks))
    settings = replace(case.settings, data=whole(case.settings.data), tasks=tasks)
    return replace(case, model=whole(case.model), settings=settings)


def _line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return without_paths(without_secrets(line))


# On a node. Of this worker process, by run and by the devices that it may use.
_sessions: dict[tuple[str, str | None], Session] = {}


def run_round(job: dict[str, Any]) -> dict[str, Any]:
    """One round in a child of this process: its `record`, or the outcome that `stopped` it.

    Beside it the `node`, its `sentinels` before the first round, and phases of `bases` that were
    scored for this one.
    """
    import ray

    case = Case.from_dict(job["case"])
    if not job["gpus"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    answer: dict[str, Any] = {
        "node": ray.get_runtime_context().get_node_id(), "sentinels": None, "bases": [],
    }  # fmt: skip
    with _without("OMP_NUM_THREADS"):  # which Ray sets, and no user: `describe` keeps its answer
        here = provenance.describe()
    difference = provenance_difference(job["provenance"], here, other_machine=True)
    if difference is not None:
        why = f"a node has another installation than the driver: {difference}; make them equal"
        return answer | {"stopped": asdict(Outcome("failed", "dispatch", why))}
    session = _session(job)
    scored = len(session.base_phases)
    try:
        with CaseRounds(session, case, first=job["index"]) as rounds:
            rounds.setup()
            rounds.train()
            rounds.teardown()
        answer["record"] = rounds.records[0]
    except RoundStoppedError as stop:
        answer["stopped"] = asdict(stop.outcome)
    finally:
        _empty(session.folder)
    answer["sentinels"] = session.sentinels.get("start")
    answer["bases"] = session.base_phases[scored:]
    return answer


def _session(job: dict[str, Any]) -> Session:
    """This worker's, with a folder of its own on the node."""
    key = (job["run_id"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    if key not in _sessions:
        place = Path(tempfile.gettempdir())
        for old in place.glob(f"{_FOLDER}*-*"):  # of workers that were killed
            pid = old.name.removeprefix(_FOLDER).partition("-")[0]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _sessions[key] = Session(
            folder, Progress(1), time_limit_s=job["time_limit_s"], run_id=job["run_id"]
        )
    return _sessions[key]


def _empty(folder: Path) -> None:
    """What a round leaves goes, but for the compiled code that the next one finds."""
    for path in folder.glob("*"):
        if path.is_dir() and path.name != COMPILE_CACHE:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    """The environment without a variable, for the time being."""
    before = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before
