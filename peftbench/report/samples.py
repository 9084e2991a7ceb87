"""What the models wrote before and after training: a prompt once, each adapter's answer below."""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.report.cases import Case

MOST_PROMPTS = 4  # of one model and method
MOST_CHARACTERS = 1200  # of one text: 200 cases must stay a page of a few MB


@dataclass(frozen=True)
class Answer:
    """`before` only where it is not what the base wrote in another case: a quantised base's own."""

    adapter: str
    after: str
    before: str | None


@dataclass(frozen=True)
class Prompt:
    prompt: str
    before: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Samples:
    """All of one model and method."""

    model: str
    method: str
    prompts: tuple[Prompt, ...]


def samples_of(cases: list[Case]) -> list[Samples]:
    groups: dict[tuple[str, str], dict[str, list[tuple[str, str, str]]]] = {}
    for case in cases:
        for sample in case.record.get("samples") or []:
            texts = [cut(str(sample.get(part) or "")) for part in ("prompt", "before", "after")]
            group = groups.setdefault((case.model, case.method), {})
            group.setdefault(texts[0], []).append((case.adapter, texts[1], texts[2]))
    return [
        Samples(*key, tuple(prompt_of(p, found) for p, found in list(by.items())[:MOST_PROMPTS]))
        for key, by in groups.items()
    ]


def prompt_of(prompt: str, found: list[tuple[str, str, str]]) -> Prompt:
    """The base's text is the one that most cases have."""
    befores = [before for _, before, _ in found]
    common = max(befores, key=befores.count)
    answers = (Answer(name, after, before if before != common else None)
               for name, before, after in found)  # fmt: skip
    return Prompt(prompt, common, tuple(answers))


def cut(text: str) -> str:
    """Without blank ends; the beginning of a long one."""
    stripped = text.strip()
    return stripped if len(stripped) <= MOST_CHARACTERS else stripped[:MOST_CHARACTERS] + " …"
