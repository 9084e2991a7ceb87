"""Where the numbers come from: run, code, machine, libraries and settings of a part's sessions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from peftbench.compare.load import Session
from peftbench.report.cases import Case
from peftbench.report.sources import Part
from peftbench.show import commit_text


@dataclass(frozen=True)
class Fact:
    """`base` is what the session had that is compared with; None where nothing is compared."""

    name: str
    value: str
    base: str | None

    @property
    def differs(self) -> bool:
        return self.base is not None and self.base != self.value


@dataclass(frozen=True)
class Origin:
    """`settings` are those that all cases share."""

    title: str
    machine: str
    facts: tuple[Fact, ...]
    settings: tuple[tuple[str, str], ...]


def origin_of(part: Part, cases: list[Case]) -> Origin:
    described = [c.record["provenance"] for c in cases if c.record.get("provenance")]
    found: dict[str, Any] = described[0] if described else {}
    base = part.sessions[-2] if len(part.sessions) > 1 else None
    own = session_facts(part.newest)
    earlier = session_facts(base) if base is not None else {}
    names = dict.fromkeys([*own, *earlier])
    facts = [Fact(n, own.get(n, "–"), None if base is None else earlier.get(n, "–")) for n in names]
    facts += [Fact(name, text, None) for name, text in machine_facts(found)]
    return Origin(part.newest.name, machine_of(cases), tuple(facts), shared_settings(cases))


def session_facts(session: Session) -> dict[str, str]:
    """What differs between two sessions of one machine."""
    runs = ", ".join(sorted(session.run_ids)) or "not known"
    facts = {
        "file": session.name,
        "run": runs,
        "began": began(session),
        "code": commit_text(session.commit, session.dirty),
        "cases": str(len(session.cases)),
    }
    environments = [row.environment for row in session.cases.values() if row.environment]
    for name in dict.fromkeys(key for found in environments for key in found):
        facts[name] = ", ".join(dict.fromkeys(e[name] for e in environments if name in e))
    for name, version in session.libraries.items():
        commit = session.library_commits.get(name)
        facts[name] = version + (f" (commit {commit[:12]})" if commit else "")
    return facts


def began(session: Session) -> str:
    if not session.time_unix_s:
        return "not known"
    try:
        return datetime.fromtimestamp(session.time_unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "not known"  # no time that a calendar has


def machine_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory = found.get("memory_bytes")
    facts = [
        ("peftbench", found.get("peftbench")),
        ("python", found.get("python")),
        ("platform", found.get("platform")),
        ("cores", found.get("cpu_cores")),
        ("memory", f"{memory / 2**30:.1f} GiB" if isinstance(memory, (int, float)) else None),
        ("CUDA", found.get("torch_cuda")),
        ("container", found.get("container_image")),
    ]
    environment = found.get("environment") or {}
    return [(n, str(v)) for n, v in [*facts, *environment.items()] if v is not None]


def machine_of(cases: list[Case]) -> str:
    """In a few words, for the title: the GPU where one trained, else the processor."""
    for case in cases:
        record, found = case.record, case.record.get("provenance") or {}
        if record.get("device") == "cpu":
            threads = record.get("threads")
            cpu = " ".join(str(found.get("cpu") or "a CPU").replace("(R)", "").split())
            return cpu + (f", {threads} threads" if threads else "")
        if record.get("device"):
            gpu = record.get("gpu") or {}
            own = [d for d in gpu.get("devices") or [] if d.get("uuid") == gpu.get("device_uuid")]
            return str(own[0].get("name")) if own else str(record["device"])
    return "a machine that is not named"


def shared_settings(cases: list[Case]) -> tuple[tuple[str, str], ...]:
    found = [(c.record.get("case") or {}).get("settings") or {} for c in cases]
    found = [settings for settings in found if settings]
    if not found:
        return ()
    return tuple(
        (name, str(value))
        for name, value in found[0].items()
        if all(settings.get(name) == value for settings in found)
    )
