"""Whatever two files hold, each case of either side has one verdict per metric, and the exit code
follows from them."""

from __future__ import annotations

import json
import math
import random

import made_sessions as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftbench.cli import main
from peftbench.compare.as_json import json_text
from peftbench.compare.compare import compare
from peftbench.compare.load import merged, session_of
from peftbench.compare.markdown import markdown_text
from peftbench.compare.rules import Rules
from peftbench.compare.text import text_lines
from peftbench.compare.verdicts import STATUS, VERDICTS
from peftbench.record import STATUSES

NAMES = [f"m-{a}-{t}" for a in ("full", "lora", "ia3", "prefix") for t in ("sft", "dpo")]
METRICS = ("train_s", "method_s", "host_peak_rss_delta_bytes", "steps", "perplexity",
           "preference_accuracy", "reward_margin", "load_s")  # fmt: skip
NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 10**12), st.none(),
    st.sampled_from(["", "12", True, [], {}, 0, -0.0, 1e-308, 1e308]),
)  # fmt: skip


@st.composite
def records(draw, name):
    """One case: plain, or with something about it that a file may hold."""
    status = draw(st.sampled_from(["ok", "ok", "ok", "ok", *STATUSES[1:]]))
    if status != "ok":
        return made.stopped(name, status)
    changes = draw(st.dictionaries(st.sampled_from(METRICS), NUMBERS, max_size=2))
    facts = draw(st.fixed_dictionaries({}, optional={
        "hash_": st.sampled_from(["redefined", "again"]),
        "device": st.sampled_from(["cpu", "NVIDIA H200", "NVIDIA A100"]),
        "threads": st.sampled_from([1, 2]), "data_digest": st.sampled_from(["d", "e"]),
        "disturbances": st.sampled_from([[], ["shared"]]),
        "outcomes": st.sampled_from(["", "1", "10" * 50, made.OUTCOMES, None]),
        "tasks": st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.builds(made.task, st.sampled_from(["1", "10" * 50]), st.sampled_from(["t", "u"])),
        ),
    }))  # fmt: skip
    record = made.case(name, seeds=draw(st.integers(1, 3)), **changes, **facts)
    record["rounds"] = draw(st.permutations(record["rounds"]))
    for entry in record["rounds"]:
        entry["seed"] += draw(st.sampled_from([0, 0, 0, 5]))
        entry.update(draw(st.dictionaries(st.sampled_from(METRICS), NUMBERS, max_size=1)))
    return record


@st.composite
def sides(draw, run_id):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6))  # with repetitions
    return made.session(
        [draw(records(name)) for name in names], run_id=run_id,
        sentinels=draw(st.sampled_from([made.SENTINELS, {"launch_s": 1e-6}, {"launch_s": None}])),
        metric_versions=draw(st.sampled_from([{}, {"train_s": 1}, {"train_s": 2, "steps": 1}])),
    )  # fmt: skip


def read(data):
    return session_of("file.json", json.loads(json.dumps(data)))


def check(found, base, new, rules):
    """One verdict for each case and metric, none beside them, and the documented exit code."""
    seen = [(r.case_id, r.case_hash, r.metric) for r in found.rows]
    assert len(seen) == len(set(seen))
    assert all(r.verdict in VERDICTS and r.reason for r in found.rows)
    cases = {(r.case_id, r.case_hash) for r in found.rows}
    # a redefined case is one row set for both of its hashes; the other may be in the history alone
    in_base = {case_id for case_id, _ in base.cases}
    gone = {k for k in base.cases if k not in cases}
    redefined = [r for r in found.rows if r.verdict == "redefined" and r.metric == STATUS]
    assert cases | gone == set(base.cases) | set(new.cases)
    assert sorted(k[0] for k in gone) == sorted(
        r.case_id
        for r in redefined
        if r.case_id in in_base and (r.case_id, r.case_hash) not in base.cases
    )
    for case in cases:
        metrics = {r.metric for r in found.rows if (r.case_id, r.case_hash) == case}
        of_tasks = {name for name in metrics if ":" in name}
        assert metrics - of_tasks == {STATUS, *(rule.metric for rule in rules.gated(case[0]))}
        assert of_tasks >= {n for side in (new, base) if case in side.cases
                            for n in side.cases[case].task_metrics}  # fmt: skip
    verdicts = {r.verdict for r in found.rows if r.was_ok or r.verdict != "failed"}
    expected = 0
    if verdicts & {"regressed", "changed", "failed"} or found.suite:
        expected = 1
    elif verdicts & {"missing", "incomparable", "redefined", "invalid"}:
        expected = 3
    elif verdicts & {"suspect", "no-history"} and found.strict:
        expected = 4
    assert found.exit_code == expected
    for r in found.rows:
        numbers = (r.change, r.low, r.high, r.minimum_detectable)
        assert all(n is None or not math.isnan(n) for n in numbers), r
        if r.verdict == "unchanged" and isinstance(r.new, float) and isinstance(r.base, float):
            assert r.metric_class != "exact" or r.base == r.new or r.reason.startswith("equal")


COMMON = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@COMMON
@given(sides("run-a"), sides("run-b"), st.booleans())
def test_two_files(base, new, strict):
    left, right = read(base), read(new)
    found = compare(left, right, None, Rules(), strict=strict)
    check(found, left, right, Rules())
    json.loads(json_text(found))
    assert text_lines(found)
    assert markdown_text(found)
    assert json_text(found) == json_text(compare(left, right, None, Rules(), strict=strict))


@COMMON
@given(sides("run-a"), sides("run-b"), st.lists(sides("run-c"), max_size=4), st.booleans())
def test_with_a_history_of_mixed_sessions(base, new, earlier, strict):
    left, right = read(base), read(new)
    past = []
    for i, data in enumerate(earlier):
        for benchmark in data["benchmarks"]:
            benchmark["extra_info"]["run_id"] = f"run-{i}"
        past.append(read(data))
    found = compare(left, right, past, Rules(), strict=strict)
    check(found, left, right, Rules())


@COMMON
@given(sides("run-a"), sides("run-b"), sides("run-b"))
def test_a_session_of_several_files_in_any_order(base, first, second):
    left, parts = read(base), [read(first), read(second)]
    right = merged(parts)
    check(compare(left, right, None, Rules()), left, right, Rules())
    assert right.cases.keys() == merged(parts[::-1]).cases.keys()


@COMMON
@given(data=st.data())
def test_a_damaged_file_is_one_line_or_a_comparison(tmp_path_factory, data):
    """Bytes cut off or values replaced anywhere: exit code 2 with one line, or a documented one."""
    text = json.dumps(made.session([made.case(n) for n in NAMES[:2]]))
    whole = json.loads(text)  # a copy: parts of a made session are shared with the next one's
    if data.draw(st.booleans()):
        # a share, not a number: the time in the file has now one digit more and now one less
        text = text[: int(data.draw(st.floats(0, 1, exclude_max=True)) * len(text))]
    else:
        rng = random.Random(data.draw(st.integers(0, 10**6)))
        replaced(whole, rng, data.draw(st.sampled_from([None, 7, "x", [], {}, -1.5])))
        text = json.dumps(whole)
    folder = tmp_path_factory.mktemp("damaged")
    good = made.write(folder / "a.json", made.session([made.case(n) for n in NAMES[:2]]))
    bad = made.write(folder / "b.json", text)
    assert main(["compare", str(good), str(bad)]) in (0, 1, 2, 3)


def replaced(data, rng, value):
    """One value somewhere in the tree, replaced."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = rng.choice(keys)
        inner = data[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.2:
            data[key] = value
            return
        data = inner
