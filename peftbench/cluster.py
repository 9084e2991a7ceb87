"""`--dispatch ray`: every round of the matrix as a task of a Ray cluster.

On the driver `Cluster` hands the rounds out and writes each record to disk when it comes; on a node
`run_round` runs one as on a single machine: the same child, the same record, the same statuses.
pytest-benchmark then gets the training time that was measured there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftbench import provenance
from peftbench.case import Case, Settings, expanded, is_local, task_names
from peftbench.errors import UserError
from peftbench.progress import Progress
from peftbench.record import dumps, write_atomically
from peftbench.resume import provenance_difference
from peftbench.rounds import CaseRounds, file_stem
from peftbench.session import Session
from peftbench.worker import Outcome, RoundStoppedError

ATTEMPTS = 4  # of a round whose node is lost, or whose task another job's takes the place of
_CONNECT_S = 5.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a benchmark sends nothing
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a task without a GPU must not see one
}


@dataclass(frozen=True)
class RayOptions:
    """What a cluster is asked for. `address` None: what RAY_ADDRESS says, else a new local one."""

    address: str | None = None
    runtime_env: Path | None = None  # a JSON file: the environment of the tasks, as Ray defines it
    cpus: int | None = None  # of a round; None: its threads, or all of a node
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

    def submit(self, case: Case, rounds: Iterable[int]) -> None:
        """Hand out rounds of a case. Raises: UserError if no node can ever take one."""
        needs = needed(case.settings, self._options, self._resources)
        for index in rounds:
            self._start(Round(case, index, needs))

    def record(self, case: Case, round_index: int) -> dict[str, Any]:
        """Wait for a round that was submitted; its record, which is on disk by then.

        What else ends meanwhile is written too. Raises: RoundStoppedError.
        """
        while (case.hash, round_index) not in self._found:
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
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _start(self, wanted: Round) -> None:
        job = {
            "case": with_absolute_paths(wanted.case).to_dict(),
            "index": wanted.index,
            "run_id": self._session.run_id,
            "time_limit_s": self._session.time_limit_s,
            "provenance": provenance.describe(),
        }
        self._running[self._task.options(**wanted.needs).remote(job)] = wanted

    def _answer(self, reference: Any) -> None:
        """Take in what a task ended with."""
        ended = self._running.pop(reference)
        errors = self._ray.exceptions
        key = (ended.case.hash, ended.index)
        try:
            answer = self._ray.get(reference)
        except errors.RayTaskError as error:
            self._found[key] = Outcome("failed", "dispatch", _line(error.cause), str(error))
            return
        except errors.RuntimeEnvSetupError as error:
            self._found[key] = Outcome("failed", "dispatch", f"--runtime-env: {_line(error)}")
            return
        except errors.RayError as error:
            lost = (*ended.lost, f"{type(error).__name__}: {_line(error)}")
            if len(lost) < ATTEMPTS:
                self._start(replace(ended, lost=lost))
            else:
                self._found[key] = Outcome(
                    "crashed", "dispatch", f"lost {len(lost)} times: {lost[-1]}"
                )
            return
        node = self._nodes.setdefault(answer["node"], len(self._nodes) + 1)
        if answer["sentinels"] is not None:
            self._session.sentinels.setdefault(f"start of node {node}", answer["sentinels"])
        self._session.base_phases += answer["bases"]
        if "stopped" in answer:
            self._found[key] = Outcome(**answer["stopped"])
            return
        record = answer["record"]
        record["dispatch"] = {
            "node": node, "attempts": len(ended.lost) + 1, "lost": list(ended.lost),
        }  # fmt: skip
        name = f"{file_stem(ended.case, ended.index)}.json"
        write_atomically(self._session.folder / name, dumps(record))
        self._found[key] = record


def connect(options: RayOptions) -> Any:
    """Ray's module, connected. Raises: UserError."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError(
            "--dispatch ray needs the package ray, which is missing: pip install 'peftbench[ray]'"
        ) from None
    address = options.address or os.environ.get("RAY_ADDRESS")
    _check_address(address)
    os.environ.update(_ENVIRONMENT)
    runtime_env = read_runtime_env(options.runtime_env)
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {_line(error)}") from None
    return ray


def _check_address(address: str | None) -> None:
    """Raise UserError for an address where nobody listens: Ray itself would try for a minute."""
    if address in (None, "auto", "local"):
        return
    assert address is not None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"--ray-address {address!r} is none; give HOST:PORT as `ray start --head` prints it"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
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

    With GPUs one of them, whole, and a core; on CPUs the round's threads, or where it takes all
    cores, all of a node: of the smallest, as nobody knows which it will be.
    Raises: UserError if no node has as much.
    """
    gpus = int(settings.device != "cpu" and any(n.get("GPU", 0) >= 1 for n in nodes))
    if settings.device == "cuda" and not gpus:
        raise UserError("--device cuda: no node of the Ray cluster has a GPU")
    smallest = min((int(node["CPU"]) for node in nodes), default=0)
    cpus = options.cpus or settings.threads or (1 if gpus else smallest)
    needs: dict[str, float] = {"num_cpus": cpus, "num_gpus": gpus}
    if options.memory_bytes:
        needs["memory"] = options.memory_bytes
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    if not any(all(n.get(names[k], 0) >= v for k, v in needs.items()) for n in nodes):
        wanted = ", ".join(f"{v:.0f} {names[k]}" for k, v in needs.items() if v)
        raise UserError(
            f"no node of the Ray cluster has what a round asks for ({wanted or 'a CPU'}):"
            " lower --round-cpus, --round-memory or --threads, or add a node"
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
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# On a node. Of this worker process, by run and by the devices that it may use.
_sessions: dict[tuple[str, str | None], Session] = {}


def run_round(job: dict[str, Any]) -> dict[str, Any]:
    """One round in a child of this process: its `record`, or the outcome that `stopped` it.

    Beside it the `node`, its `sentinels` before the first round, and phases of `bases` that were
    scored for this one.
    """
    import ray

    case = Case.from_dict(job["case"])
    answer: dict[str, Any] = {
        "node": ray.get_runtime_context().get_node_id(), "sentinels": None, "bases": [],
    }  # fmt: skip
    difference = provenance_difference(job["provenance"], provenance.describe(), other_machine=True)
    if difference is not None:
        why = f"a node has another installation than the driver: {difference}; make them equal"
        return answer | {"stopped": asdict(Outcome("failed", "dispatch", why))}
    key = (job["run_id"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    if key not in _sessions:
        _sessions[key] = Session(
            Path(tempfile.gettempdir()), Progress(1), time_limit_s=job["time_limit_s"],
            run_id=job["run_id"],
        )  # fmt: skip
    session = _sessions[key]
    scored = len(session.base_phases)
    # of the task: a node that is given back must not keep it
    session.folder = Path(tempfile.mkdtemp(prefix="peftbench-"))
    try:
        with CaseRounds(session, case, first=job["index"]) as rounds:
            rounds.setup()
            rounds.train()
            rounds.teardown()
        answer["record"] = rounds.records[0]
    except RoundStoppedError as stop:
        answer["stopped"] = asdict(stop.outcome)
    finally:
        shutil.rmtree(session.folder, ignore_errors=True)
    answer["sentinels"] = session.sentinels.get("start")
    answer["bases"] = session.base_phases[scored:]
    return answer
