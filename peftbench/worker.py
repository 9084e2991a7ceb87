"""The child process of a round: how it is started, what it says, how it ends.

Every round runs in a fresh process, so no round sees another's allocator, caches or patched
modules. Children are forked from a server that has the heavy modules imported (first child some
seconds, every later one some hundredths; preloaded.py), or spawned where the platform has no fork
server. The server only imports: a threaded operation in it would hang every child.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from peftbench.case import Case
from peftbench.privacy import clean_file, without_secrets

# On a CUDA build `import peft` imports bitsandbytes, which asks for the device's capability: CUDA
# would be initialised in the server, and no forked child could use it any more.
PRELOAD_CUDA = (
    "torch", "numpy", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.generation.utils",
)  # fmt: skip
PRELOAD_CPU = (
    *PRELOAD_CUDA, "peft", "bitsandbytes", "accelerate", "peftbench.pipeline",
    "peftbench.training", "transformers.integrations.bitsandbytes",
    "transformers.tokenization_utils_tokenizers",
)  # fmt: skip

SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the server must never own a thread pool; children set their own
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


# In the session's folder: its first round compiles, whatever ran before it, and the rounds after it
# find the code there, so that two sessions of the same rounds compare.
COMPILE_CACHE = ".compiled"
_COMPILE_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# A cluster gives a parent other devices from round to round; the server has those of its start.
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_PATIENCE_S = 300.0  # of ranks that wait for one another
_LAST_WORDS_S = 5.0  # for ranks to say why they stopped, once one has
LOST_RANK = "another rank no longer answers"

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the user's to mend: no traceback


@dataclass(frozen=True)
class Outcome:
    """How a round that has no record ended."""

    status: str  # oom, timeout, crashed, failed, invalid, skipped or interrupted
    phase: str
    reason: str  # one line
    traceback: str = ""
    # of an `oom`, as far as the allocator says: bytes_asked, bytes_free, bytes_total
    memory: dict[str, int] = field(default_factory=dict)


class RoundStoppedError(Exception):
    """The child of a round ended without a record."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"{outcome.status} in phase {outcome.phase}: {outcome.reason}")
        self.outcome = outcome


def process_context() -> BaseContext:
    """The fork server with its preload list set, or spawn where it is not to be had."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peftbench.preloaded"])
    return context


@contextmanager
def _clean_start() -> Iterator[None]:
    """The server's environment, and a `__main__` without a file.

    multiprocessing re-imports the parent's main script in every child: here pytest, for nothing.
    """
    saved = {name: os.environ.get(name) for name in SERVER_ENVIRONMENT}
    main = sys.modules["__main__"]
    os.environ.update(SERVER_ENVIRONMENT)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_server(context: BaseContext) -> None:
    """Start the fork server, if it is not there, deaf to Ctrl-C.

    A terminal sends it to every process: the server would end in the middle of its imports with a
    traceback on the screen. Its children are ended by the parent that started them.
    """
    if context.get_start_method() != "forkserver":
        return
    resource_tracker.ensure_running()  # else the server starts it, and that ends the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()  # returns before the imports
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """One process of a child and the parent's end of its pipe."""

    def __init__(self, context: BaseContext, job: dict[str, Any], log: Path, scratch: Path) -> None:
        self.phase = "start"
        self.log = log
        self.done = False  # has said all that it has to say
        scratch.mkdir(exist_ok=True)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(  # type: ignore[attr-defined]
            target=child_main,
            args=(
                theirs, job, str(log), str(scratch), compile_cache_of(log),
                os.environ.get(_VISIBLE_DEVICES),
            ),
            daemon=True,
        )  # fmt: skip
        self.process.start()
        theirs.close()

    def death(self) -> Outcome:
        self.process.join(timeout=5.0)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        clean_file(self.log)
        tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
        return Outcome("crashed", self.phase, f"the process died with {how}", tail)

    def close(self, deadline: float) -> None:
        self.pipe.close()
        self.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        clean_file(self.log)
        self.process.close()


class Child:
    """The parent's handle on one child. Use as a context manager: leaving it reaps its processes.

    A case with `processes` has as many: its ranks. The first one's messages are the child's; of the
    others it matters that they live. They share what is done to the child: its end, its scratch.
    """

    def __init__(
        self,
        context: BaseContext,
        job: dict[str, Any],
        log: Path,
        on_phase: Callable[[str], None],
        time_limit_s: float,
    ) -> None:
        self._on_phase = on_phase
        self._deadline = time.monotonic() + time_limit_s
        self._time_limit_s = time_limit_s
        self._closed = False
        # of its own, so that a killed child leaves nothing behind
        self._scratch = Path(tempfile.mkdtemp(dir=log.parent, prefix=".tmp-"))
        self._ranks: list[_Process] = []
        count = job["case"]["settings"]["processes"] if job["kind"] == "case" else 1
        try:
            with _clean_start():
                _start_server(context)
                for rank in range(count):
                    place = {
                        "rank": rank, "count": count,
                        "store": str((self._scratch / "ranks").absolute()),
                        # long before the time is up, so that the others can say who is missing
                        "patience_s": min(_PATIENCE_S, time_limit_s / 4),
                    }  # fmt: skip
                    own_log = log.with_name(f"{log.stem}-rank{rank}.log") if rank else log
                    self._ranks.append(
                        _Process(
                            context, job | {"place": place}, own_log, self._scratch / str(rank)
                        )
                    )
        except BaseException:  # Ctrl-C while the server imports: nobody has this object yet
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Of the first rank."""
        pid: int | None = self._ranks[0].process.pid
        return pid

    @property
    def phase(self) -> str:
        return self._ranks[0].phase

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing, and free what belongs to them.

        May be called again: Ctrl-C can interrupt it, and whoever owns the child then calls it anew.
        """
        if self._closed:
            return
        deadline = time.monotonic() + 2.0
        while self._ranks:
            self._ranks[-1].close(deadline)
            self._ranks.pop()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._closed = True

    def send(self, message: str) -> None:
        first = self._ranks[0]
        try:
            first.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RoundStoppedError(self._blamed({0: first.death()})) from error

    def receive(self, wanted: str) -> Any:
        """The value of the next message of that kind; phases on the way are announced.

        Raises: RoundStoppedError when a rank reports a failure, dies, or runs out of time.
        """
        while True:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                for each in self._ranks:
                    each.process.kill()
                raise RoundStoppedError(self._timeout())
            for rank in self._heard(min(left_s, 3600.0)):
                message = self._message(rank)
                if isinstance(message, Outcome):
                    raise RoundStoppedError(self._blamed({rank: message}))
                if rank or message is None:
                    continue
                kind, value = message
                if kind != wanted:
                    raise AssertionError(f"child said {kind!r} where {wanted!r} was due")
                return value

    def _heard(self, seconds: float) -> list[int]:
        """The ranks that have something to say, or have ended without their last word."""
        pipes = {each.pipe: rank for rank, each in enumerate(self._ranks) if not each.done}
        return sorted(pipes[pipe] for pipe in wait(list(pipes), seconds))  # type: ignore[index]

    def _message(self, rank: int) -> tuple[str, Any] | Outcome | None:
        """What a rank says: None where it is only its phase, an Outcome where it has stopped."""
        each = self._ranks[rank]
        try:
            kind, value = each.pipe.recv()
        except (EOFError, ConnectionResetError):
            each.done = True
            return each.death()
        if kind == "phase":
            each.phase = value
            if rank == 0:
                self._on_phase(value)
            return None
        if kind == "stopped":
            each.done = True
            return Outcome(**value)
        each.done = kind == "result"
        return kind, value

    def _blamed(self, stopped: dict[int, Outcome]) -> Outcome:
        """Why the child stopped, once some of its ranks have.

        When one dies or fails, the others soon report that they lost it; where all that speak have
        lost one, it is one that says nothing.
        """
        if len(self._ranks) == 1:
            return stopped[0]
        deadline = time.monotonic() + _LAST_WORDS_S
        while (left_s := deadline - time.monotonic()) > 0 and not all(e.done for e in self._ranks):
            for rank in self._heard(left_s):
                message = self._message(rank)
                if isinstance(message, Outcome):
                    stopped[rank] = message
        own = {rank: found for rank, found in stopped.items() if found.reason != LOST_RANK}
        if own:
            rank, found = min(own.items(), key=lambda item: item[1].status != "crashed")
            return replace(found, reason=f"rank {rank} of {len(self._ranks)}: {found.reason}")
        silent = [rank for rank in range(len(self._ranks)) if rank not in stopped]
        whom = ", ".join(map(str, silent)) or "unknown"
        phase = self._ranks[silent[0]].phase if silent else self.phase
        return Outcome(
            "timeout", phase, f"rank {whom} of {len(self._ranks)} did not answer the others"
        )

    def _timeout(self) -> Outcome:
        reason = f"no end after {self._time_limit_s:g} s"
        if len(self._ranks) > 1:
            where = (f"rank {r} in {each.phase}" for r, each in enumerate(self._ranks))
            reason += f": {', '.join(where)}"
        return Outcome("timeout", self.phase, reason)


class _Pipe:
    """The child's end: what `pipeline.Parent` asks for. Only the first rank waits for a go."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection = connection
        self._rank = rank
        self.current = "import"

    def phase(self, name: str) -> None:
        self.current = name
        self._connection.send(("phase", name))

    def ready(self) -> None:
        if self._rank:
            return
        self._connection.send(("ready", None))
        if self._connection.recv() != "go":
            raise AssertionError("the parent said something else than go")

    def trained(self, seconds: float) -> None:
        if not self._rank:
            self._connection.send(("trained", seconds))


def compile_cache_of(log: Path) -> str:
    """The user's own, or the session's. Asked of the parent, which never imports torch: a server
    that has, has torch's own choice in its environment, a folder that all sessions share."""
    own = os.environ.get(_COMPILE_CACHE_VARIABLE)
    return str((Path(own) if own else log.parent / COMPILE_CACHE).absolute())


def child_main(
    connection: Connection,
    job: dict[str, Any],
    log: str,
    scratch: str,
    compile_cache: str,
    visible_devices: str | None,
) -> None:
    """Run one job and send its result; what goes wrong becomes a status here and nowhere else."""
    _die_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # not relative, as a compiler runs in folders of its own
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path(scratch).absolute())
    os.environ.update(SERVER_ENVIRONMENT)  # a spawned child has no server to inherit it from
    os.environ[_COMPILE_CACHE_VARIABLE] = compile_cache
    os.environ.pop(_VISIBLE_DEVICES, None)
    if visible_devices is not None:
        os.environ[_VISIBLE_DEVICES] = visible_devices
    pipe = _Pipe(connection, job["place"]["rank"])
    try:
        connection.send(("result", _run(job, pipe)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BaseException as error:  # noqa: BLE001 - the worker's boundary
        connection.send(("stopped", asdict(outcome_of(error, pipe.current))))


def _die_with_parent() -> None:
    """When pytest is killed its fork server ends, and so must a child in the middle of training.

    Linux only; elsewhere the child ends at its next message.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _run(job: dict[str, Any], pipe: _Pipe) -> Any:
    from peftbench import pipeline
    from peftbench.evaluation import Quality
    from peftbench.ranks import Ranks

    case = Case.from_dict(job["case"])
    if job["kind"] == "base":
        return pipeline.score_base(case, job["quantize"], pipe)
    if job["kind"] == "sentinels":
        return pipeline.time_machine(case, pipe)
    if job["kind"] == "infer":
        from peftbench import inference

        return inference.run_infer_round(case, pipe)
    bases = [None if b is None else Quality.from_dict(b) for b in (job["base"], job["unquantized"])]
    return pipeline.run_round(
        case, bases[0], bases[1], job["peak_flops_per_s"], pipe, Ranks(**job["place"])
    )


def outcome_of(error: BaseException, phase: str) -> Outcome:
    """The status of an exception that ended a round."""
    from peftbench.errors import InvalidInferenceError, InvalidTrainingError, UserError
    from peftbench.measuring.phases import UnaccountedTimeError
    from peftbench.out_of_memory import is_out_of_memory, oom_bytes
    from peftbench.ranks import LostRankError

    text = without_secrets("".join(traceback.format_exception(error)))
    lines = without_secrets(str(error)).strip().splitlines()
    message = lines[0] if lines else ""
    if is_out_of_memory(error):
        return Outcome(
            "oom", phase, f"{type(error).__name__}: {message}", text, oom_bytes(str(error))
        )
    if isinstance(error, LostRankError):
        return Outcome("crashed", phase, LOST_RANK, text)
    if isinstance(error, (InvalidTrainingError, InvalidInferenceError, UnaccountedTimeError)):
        return Outcome("invalid", phase, message)
    if isinstance(error, UserError) or getattr(error, "errno", None) in _DISK:
        return Outcome("failed", phase, message)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return Outcome("failed", phase, f"{type(error).__name__}: {message}{where}", text)
