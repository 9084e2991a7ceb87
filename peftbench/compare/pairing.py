"""Which case of one side is which of the other, and whether their numbers may be compared."""

from __future__ import annotations

from dataclasses import dataclass, fields

from peftbench.case import Settings
from peftbench.compare.load import CaseRow, Key, Round, Session
from peftbench.compare.rules import Rule, Rules
from peftbench.compare.verdicts import Row, plain_row, status_row, whole_case

MOST_SETTINGS = 3  # named in one reason


@dataclass(frozen=True)
class Pair:
    """One case as both sides have it."""

    base: CaseRow
    new: CaseRow


def paired_cases(base: Session, new: Session) -> list[tuple[CaseRow | None, CaseRow | None]]:
    """Every case of either side once: equal ids and hashes, then equal ids, then the rest alone."""
    left = dict(base.cases)
    found: list[tuple[CaseRow | None, CaseRow | None]] = []
    unmatched = []
    for key, row in new.cases.items():
        if key in left:
            found.append((left.pop(key), row))
        else:
            unmatched.append(row)
    for row in unmatched:
        same_id = next((k for k in left if k[0] == row.case_id), None)
        found.append((None if same_id is None else left.pop(same_id), row))
    found += [(row, None) for row in left.values()]
    return sorted(found, key=lambda pair: _sort_key(pair, base, new))


def _sort_key(
    pair: tuple[CaseRow | None, CaseRow | None], base: Session, new: Session
) -> tuple[str, str, str]:
    row = pair[1] or pair[0]
    assert row is not None
    return row.axes["model"], row.case_id, row.case_hash


def latest(history: list[Session], key: Key) -> CaseRow | None:
    """The last session's row in which the case was ok."""
    rows = (s.cases[key] for s in reversed(history) if key in s.cases)
    return next((row for row in rows if row.status == "ok"), None)


def judge_case(
    base: CaseRow | None, new: CaseRow | None, history: list[Session], rules: Rules
) -> tuple[list[Row], Pair | None]:
    """(rows, None) for a case that one verdict settles, else (its status row, the pair).

    A case that the base session lacks, or where it failed, is compared with the last session of the
    history in which it was ok.
    """
    if new is None:
        assert base is not None
        return whole_case(
            base, rules.gated(base.case_id, base.task_metrics), "missing",
            "the new session does not have this case", base.status, None,
        ), None  # fmt: skip
    tasks = new.task_metrics if base is None else base.task_metrics | new.task_metrics
    gated = rules.gated(new.case_id, tasks)
    if base is not None and base.case_hash != new.case_hash:
        return whole_case(
            new, gated, "redefined", settings_change(base, new), base.status, new.status
        ), None  # fmt: skip
    earlier = latest(history, (new.case_id, new.case_hash))
    if new.status != "ok":
        return failed_case(base or earlier, new, gated), None
    before = "new" if base is None else base.status
    with_numbers = base if base is not None and base.status == "ok" else earlier
    if with_numbers is None:
        reason = "the base does not have this case" if base is None else f"was {base.status} before"
        verdict = "new" if base is None else "improved"
        return whole_case(new, gated, "new", reason, None if base is None else base.status, "ok",
                          verdict), None  # fmt: skip
    difference = environment_difference(with_numbers.environment, new.environment)
    if difference is not None:
        return whole_case(new, gated, "incomparable", difference, before, "ok"), None
    for name, digest in with_numbers.inputs.items():
        if new.inputs.get(name, digest) != digest and same_first_seed(with_numbers, new):
            reason = f"{name.replace('_', ' ')} changed: other data or weights under the same name"
            return whole_case(new, gated, "redefined", reason, before, "ok"), None
    verdict, reason = "unchanged", "ok on both sides"
    if base is None:
        verdict, reason = "unchanged", "not in the base; compared with the last session that has it"
    elif base.status != "ok":
        verdict, reason = "improved", f"was {base.status}; compared with the last session it was ok"
    return [status_row(new, verdict, reason, before, "ok")], Pair(with_numbers, new)


def settings_change(base: CaseRow, new: CaseRow) -> str:
    """What two cases of one name have otherwise; their hashes where no setting tells."""
    defaults = {f.name: str(f.default) for f in fields(Settings)}  # of those newer than a file
    before, now = defaults | base.settings, defaults | new.settings
    changed = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    told = [f"{n} was {before.get(n, 'unknown')}, now it is {now.get(n, 'unknown')}"
            for n in changed[:MOST_SETTINGS]]  # fmt: skip
    if len(changed) > MOST_SETTINGS:
        told.append(f"{len(changed) - MOST_SETTINGS} more")
    if not (base.settings and new.settings and changed):
        told = [f"case {base.case_hash} is now {new.case_hash}"]
    return f"its settings changed: {'; '.join(told)}"


def failed_case(base: CaseRow | None, new: CaseRow, gated: list[Rule]) -> list[Row]:
    """A case that ended otherwise than ok; a skip that stays one is no failure."""
    before = None if base is None else base.status
    why = f"{new.status}: {new.reason or 'no reason is given'}"
    if before == new.status == "skipped":
        return whole_case(new, gated, "unchanged", why, before, new.status)
    if before is None and new.status in ("oom", "skipped"):  # an answer, and no worse than before
        return whole_case(new, gated, "new", why, before, new.status)
    metrics = "invalid" if new.status == "invalid" else "failed"
    if before not in (None, "ok"):
        why = f"{why} (was {before} before)"
    return whole_case(new, gated, metrics, why, before, new.status, "failed")


def environment_difference(base: dict[str, str], new: dict[str, str]) -> str | None:
    """A sentence on the first thing that both know and that is not equal; None without one."""
    for name in sorted(base.keys() & new.keys()):
        if base[name] != new[name]:
            return f"{name} was {base[name]}, now it is {new[name]}"
    return None


def same_first_seed(base: CaseRow, new: CaseRow) -> bool:
    """Digests are of a record's first round; pairs are drawn by its seed."""
    return bool(base.rounds and new.rounds) and base.rounds[0].seed == new.rounds[0].seed


def value(row: CaseRow, metric: str) -> float | None:
    """The session's value: the median of the rounds that count; None where one lacks it."""
    rounds = row.calm_rounds
    if len(rounds) == 1:  # of most nights, and a history asks a million times
        return rounds[0].values.get(metric)
    known = sorted(r.values[metric] for r in rounds if metric in r.values)
    if not known or len(known) != len(rounds):
        return None
    low, high = known[(len(known) - 1) // 2], known[len(known) // 2]
    # halves first: the sum of two damaged values can be infinite
    return low if low == high else low / 2 + high / 2


def by_seed(row: CaseRow, metric: str) -> dict[int, list[float]]:
    """All rounds' values by seed."""
    found: dict[int, list[float]] = {}
    for entry in row.rounds:
        if metric in entry.values:
            found.setdefault(entry.seed, []).append(entry.values[metric])
    return found


def rounds_by_seed(row: CaseRow) -> dict[int, Round]:
    """The first round of each seed among those that count."""
    found: dict[int, Round] = {}
    for entry in row.calm_rounds:
        found.setdefault(entry.seed, entry)
    return found


def unusable(pair: Pair, rule: Rule, versions: tuple[int | None, int | None]) -> Row | None:
    """The verdict of a metric that has no two numbers to compare; None if it has."""
    name = rule.metric
    for side, row in (("the new session's", pair.new), ("the base's", pair.base)):
        broken = next((r.broken[name] for r in row.rounds if name in r.broken), None)
        if broken is not None:
            return plain_row(pair.new, rule, "invalid", f"{side} value {broken}")
    base, new = value(pair.base, name), value(pair.new, name)
    if base is None and new is None:
        why = pair.new.null_reasons.get(name) or "neither file has it"
        return plain_row(pair.new, rule, "unchanged", f"not measured on either side: {why}")
    if new is None:
        why = pair.new.null_reasons.get(name) or "the file does not have it"
        return plain_row(pair.new, rule, "missing", f"not measured any more: {why}", base)
    if base is None:
        why = pair.base.null_reasons.get(name) or "the file is older than this metric"
        return plain_row(pair.new, rule, "new", f"not measured before: {why}", new=new)
    if None not in versions and versions[0] != versions[1]:
        reason = f"the metric's definition changed: version {versions[0]} is now {versions[1]}"
        return plain_row(pair.new, rule, "redefined", reason, base, new)
    digests = {row.task_digests[name] for row in (pair.base, pair.new) if name in row.task_digests}
    if len(digests) > 1:
        reason = "the task's items changed: another version of it, or other text under its name"
        return plain_row(pair.new, rule, "redefined", reason, base, new)
    logarithm = rule.metric_class in ("noisy", "seeded") and needs_logarithm(rule)
    if logarithm and any(r.values.get(name, 1.0) <= 0 for r in pair.base.rounds + pair.new.rounds):
        return plain_row(pair.new, rule, "invalid", "a value is not above 0", base, new)
    return None


def needs_logarithm(rule: Rule) -> bool:
    """Times and perplexities; margins, in nats, may be negative, and shares differ by points."""
    return rule.metric_class == "noisy" or rule.metric == "perplexity"
