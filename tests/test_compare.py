"""Every class, verdict and exit code, on made files; and the outputs of a comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import made_sessions as made
import numpy as np
import pytest

from peftbench.cli import main
from peftbench.compare import by_time
from peftbench.compare.as_json import held, json_text
from peftbench.compare.compare import compare, compare_paths
from peftbench.compare.load import session_of
from peftbench.compare.markdown import MOST_BYTES, markdown_text
from peftbench.compare.rules import Rules, read_rules
from peftbench.compare.text import WIDTH, text_lines
from peftbench.compare.verdicts import STATUS
from peftbench.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "verdicts-1.json"
HALF_RIGHT = {"preference_accuracy": 0.5, "outcomes": "10" * 50}
NAMES = [f"m-{a}-{t}" for a in ("full", "lora", "ia3") for t in ("sft", "dpo")]


def base_cases(**changes):
    return [made.case(name, **changes) for name in NAMES]


def of(cases, **facts):
    return session_of("file.json", made.session(cases, **facts))


def judged(new_cases, *, base=None, history=None, rules=None, **facts):
    """{(case, metric): row} of `new_cases` against the base, and the comparison."""
    new = of(new_cases, run_id="run-b", start_unix_s=1.7e9 + 1e5, **facts)
    found = compare(base or of(base_cases()), new, history, rules or Rules())
    return {(r.case_id, r.metric): r for r in found.rows}, found


def with_case(record):
    """The base's cases with one replaced."""
    return [record if c["case_id"] == record["case_id"] else c for c in base_cases()]


def night(index: int, rng, *, slow: float = 1.0, cases=NAMES, **facts):
    made_cases = [
        made.case(n, train_s=2.0 * float(np.exp(rng.normal(0, 0.004))) * slow) for n in cases
    ]
    return of(made_cases, run_id=f"night-{index}", start_unix_s=1.6e9 + index * 86400,
              commit=f"{index:040x}", **facts)  # fmt: skip


def nights(count: int):
    rng = np.random.default_rng(3)
    return [night(i, rng) for i in range(count)]


def test_equal_files_gate_nothing_and_say_what_they_could_not_see():
    rows, found = judged(base_cases())
    assert found.exit_code == 0
    assert rows["m-lora-dpo", "trainable_params"].verdict == "unchanged"
    # the assumed noise of 2 % cannot exclude a change of 3 %: that is said, and not called equal
    assert rows["m-lora-dpo", "train_s"].verdict == "inconclusive"
    assert rows["m-lora-dpo", "train_s"].minimum_detectable > 0.05
    assert rows["m-lora-dpo", "energy_j"].reason == "not measured on either side: not here"


@pytest.mark.parametrize(
    ("changes", "metric", "verdict", "code"),
    [
        ({"trainable_params": 8192}, "trainable_params", "changed", 1),
        ({"train_s": 2.4}, "train_s", "regressed", 1),
        ({"train_s": 1.6}, "train_s", "improved", 0),
        # 16 MiB of 100 MiB is the margin of the host's memory
        ({"host_peak_rss_delta_bytes": 115 * 2**20}, "host_peak_rss_delta_bytes", "unchanged", 0),
        ({"host_peak_rss_delta_bytes": 117 * 2**20}, "host_peak_rss_delta_bytes", "regressed", 1),
        ({"host_peak_rss_delta_bytes": 83 * 2**20}, "host_peak_rss_delta_bytes", "improved", 0),
        ({"perplexity": 12.5}, "perplexity", "regressed", 1),
        ({"perplexity": 11.5}, "perplexity", "improved", 0),
        ({"perplexity": 12.01}, "perplexity", "inconclusive", 0),
        (HALF_RIGHT, "preference_accuracy", "regressed", 1),
        ({"train_s": float("nan")}, "train_s", "invalid", 3),
        ({"train_s": 0.0}, "train_s", "invalid", 3),
        ({"train_s": "fast"}, "train_s", "invalid", 3),
        ({"train_s": None}, "train_s", "missing", 3),
        ({"energy_j": 5.0}, "energy_j", "new", 0),
        ({"hash_": "other"}, "train_s", "redefined", 3),
        ({"data_digest": "other"}, "train_s", "redefined", 3),
        ({"device": "NVIDIA H200"}, "train_s", "incomparable", 3),
        ({"threads": 4}, "steps", "incomparable", 3),
        ({"disturbances": ["shared"]}, "train_s", "inconclusive", 0),
    ],
)  # fmt: skip
def test_one_change_is_one_verdict(changes, metric, verdict, code):
    rows, found = judged(with_case(made.case("m-lora-dpo", **changes)))
    assert rows["m-lora-dpo", metric].verdict == verdict
    assert found.exit_code == code
    others = {r.verdict for key, r in rows.items() if key[0] != "m-lora-dpo"}
    assert others <= {"unchanged", "inconclusive"}


def test_a_redefined_case_names_the_settings_that_changed():
    """One that is newer than the older file counts as its default; more than three are counted."""
    then = {"learning_rate": 0.004, "rank": 8, "threads": 2, "seed": 0}

    def reason(**now: Any) -> str:
        def side(hash_: str, settings: dict[str, Any]) -> dict[str, Any]:
            facts = {"model": "m", "adapter": "lora", "method": "dpo", "settings": settings}
            return made.case("m-lora-dpo", hash_=hash_, case=facts)

        base = of(with_case(side("one", then)))
        rows, _ = judged(with_case(side("other", then | now)), base=base)
        return str(rows["m-lora-dpo", STATUS].reason)

    assert reason(rank=16) == "its settings changed: rank was 8, now it is 16"
    assert reason(rank=16, compile="layers") == (
        "its settings changed: compile was none, now it is layers; rank was 8, now it is 16"
    )
    assert reason(compile="none") == "its settings changed: case one is now other"
    many = reason(learning_rate=1.0, rank=16, threads=4, seed=3)
    assert many.endswith("; seed was 0, now it is 3; 1 more")


@pytest.mark.parametrize("status", ["oom", "timeout", "crashed", "failed", "invalid", "skipped"])
def test_a_case_that_was_ok_and_is_not_gates(status):
    rows, found = judged(with_case(made.stopped("m-lora-dpo", status)))
    assert rows["m-lora-dpo", STATUS].verdict == "failed"
    assert found.exit_code == 1
    expected = "invalid" if status == "invalid" else "failed"
    assert rows["m-lora-dpo", "train_s"].verdict == expected


def test_a_failure_that_stays_does_not_gate_and_its_end_is_an_improvement():
    failing = of(with_case(made.stopped("m-lora-dpo", "oom")))
    rows, found = judged(with_case(made.stopped("m-lora-dpo", "oom")), base=failing)
    assert (rows["m-lora-dpo", STATUS].verdict, found.exit_code) == ("failed", 0)
    rows, found = judged(base_cases(), base=failing)
    assert (rows["m-lora-dpo", STATUS].verdict, found.exit_code) == ("improved", 0)
    assert rows["m-lora-dpo", "train_s"].verdict == "new"


def test_a_dropped_case_is_missing_and_an_added_one_is_new():
    rows, found = judged(base_cases()[1:])
    assert {r.verdict for k, r in rows.items() if k[0] == NAMES[0]} == {"missing"}
    assert found.exit_code == 3
    rows, found = judged([*base_cases(), made.case("m-prefix-sft")])
    assert rows["m-prefix-sft", "train_s"].verdict == "new"
    assert found.exit_code == 0


def test_one_has_priority_over_three():
    _, found = judged(with_case(made.case("m-lora-dpo", steps=47))[1:])
    assert found.exit_code == 1


def test_exact_numbers_are_compared_by_seed_where_rounds_are_unequal():
    def tokens(counts):
        record = made.case("m-lora-dpo", seeds=len(counts))
        for entry, count in zip(record["rounds"], counts, strict=True):
            entry["train_tokens"] = count
        return with_case(record)

    base = of(tokens([10, 20, 30]))
    rows, _ = judged(tokens([10, 20]), base=base)
    # the medians are 20 and 15: no change, for the common seeds are equal
    assert rows["m-lora-dpo", "train_tokens"].verdict == "unchanged"
    rows, _ = judged(tokens([10, 21, 30]), base=base)
    row = rows["m-lora-dpo", "train_tokens"]
    assert (row.verdict, row.base, row.new) == ("changed", 20, 21)


def test_damaged_numbers_whose_sum_is_infinite_give_no_change_that_is_not_a_number():
    damaged = made.case("m-full-sft", seeds=2, train_s=1.7e308)
    past = session_of("b.json", made.session([damaged]))
    row = next(r for r in compare(past, past, None, Rules()).rows if r.metric == "train_s")
    assert (row.base, row.change) == (1.7e308, 0.0)
    assert held(sys.float_info.max) is None  # ten digits of it are infinite, which JSON has not


def test_history_makes_a_slow_down_of_five_per_cent_certain():
    past = nights(20)
    rng = np.random.default_rng(4)
    new = night(20, rng)
    slow = night(20, rng, slow=1.05, cases=["m-lora-dpo"])
    new.cases.update(slow.cases)
    found = compare(past[-1], new, past, Rules())
    verdicts = {r.case_id: r for r in found.rows if r.metric == "train_s"}
    assert verdicts["m-lora-dpo"].verdict == "regressed"
    assert verdicts["m-lora-dpo"].sessions == 20
    assert {v.verdict for k, v in verdicts.items() if k != "m-lora-dpo"} <= {"unchanged", "suspect"}
    assert found.exit_code == 1


def test_two_sessions_of_history_are_no_history():
    past = nights(2)
    found = compare(past[-1], night(2, np.random.default_rng(4)), past, Rules(), strict=True)
    assert {r.verdict for r in found.rows if r.metric == "train_s"} == {"no-history"}
    assert found.exit_code == 4
    assert compare(past[-1], night(2, np.random.default_rng(4)), past, Rules()).exit_code == 0


def test_a_slower_library_is_the_suite_and_a_slower_machine_is_not():
    past, rng = nights(20), np.random.default_rng(5)
    slow = night(20, rng, slow=1.06, libraries={"torch": "2.13.0", "peft": "0.22.0"})
    found = compare(past[-1], slow, past, Rules())
    assert [(line.metric, len(line.cases)) for line in found.suite] == [("train_s", len(NAMES))]
    assert "adapter: full 2/2, ia3 2/2, lora 2/2" in " ".join("\n".join(text_lines(found)).split())
    assert json.loads(json_text(found))["suite"][0]["shares"][0] == {
        "axis": "adapter", "name": "full", "worse": 2, "of": 2
    }  # fmt: skip
    assert [(c.name, c.base, c.new) for c in found.libraries] == [("peft", "0.21.2", "0.22.0")]
    assert found.exit_code == 1
    slower = {n: v / 1.06 if "_per_s" in n else v for n, v in made.SENTINELS.items()}
    slower["launch_s"] = made.SENTINELS["launch_s"] * 1.06
    machine = night(21, rng, slow=1.06, sentinels=slower)
    found = compare(past[-1], machine, past, Rules())
    assert found.suite == ()
    assert not [r for r in found.rows if r.metric == "train_s" and r.verdict == "regressed"]


def test_an_acknowledged_change_does_not_gate_and_moves_the_base(tmp_path):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "peftbench-acknowledged.toml").write_text(
        '[[change]]\nmetric = "trainable_params"\ncase = "*-lora-*"\n'
        f'commit = "{"b" * 9}"\nreason = "rank 16"\n'
    )
    rules = read_rules(tmp_path)
    doubled = with_case(made.case("m-lora-dpo", trainable_params=8192))
    rows, found = judged(doubled, rules=rules, commit="b" * 40)
    row = rows["m-lora-dpo", "trainable_params"]
    assert (row.verdict, row.acknowledged) == ("changed", "rank 16 (bbbbbbbbb)")
    assert found.exit_code == 0
    assert judged(doubled, rules=rules, commit="c" * 40)[1].exit_code == 1


def test_what_ppos_own_samples_decide_is_not_compared_unless_asked():
    names = ("m-lora-ppo", "m-lora-sft+ppo", "m-lora-dpo")
    base = of([made.case(name) for name in names])
    rows, _ = judged([made.case(name, train_tokens=1, train_flops=1) for name in names],
                         base=base)  # fmt: skip
    assert rows["m-lora-dpo", "train_tokens"].verdict == "changed"
    assert {case for case, metric in rows if metric in ("train_tokens", "train_flops")} == {
        "m-lora-dpo"
    }
    asked = Rules(overrides=(("train_tokens", "*-ppo", {"ignore": False}),))
    assert "train_tokens" in {rule.metric for rule in asked.gated("m-lora-ppo")}


def test_overrides_hold_for_a_metric_and_for_a_pattern_of_cases(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.peftbench.metrics]\n"
        'train_s = { margin = 0.5, cases = { "*-ia3-*" = { margin = 0.1 } } }\n'
        "steps = { ignore = true }\nevaluate_s = { ignore = false }\n"
    )
    rules = read_rules(tmp_path)
    assert rules.of("train_s", "m-lora-dpo").margin == 0.5
    assert rules.of("train_s", "m-ia3-dpo").margin == 0.1
    names = {rule.metric for rule in rules.gated("m-lora-dpo")}
    assert "steps" not in names
    assert "evaluate_s" in names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.peftbench.metrics]\ntrian_s = { margin = 1 }", "did you mean train_s"),
        ("[tool.peftbench.metrics]\ntrain_s = 0.05", "write { margin = 0.05 }"),
        ("[tool.peftbench.metrics]\ntrain_s = { margin = true }", "margin is True"),
        ('[tool.peftbench.metrics]\ntrain_s = { class = "soft" }', "unknown class"),
        ("[tool.peftbench.compare]\nnoise = 1", "unknown key"),
        ("[tool", "is no valid TOML"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, text, message):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rules(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"benchmarks": [', "is not JSON"),
        ("[]", "not of peftbench"),
        ('{"benchmarks": [], "version": "5"}', "not of peftbench"),
        (made.session([], format=99), "has format 99"),
        (made.session([]), "holds no case"),
        ({"peftbench": {"format": 1}}, "is damaged"),
    ],
    ids=["empty", "truncated", "a list", "another program", "newer", "no case", "no benchmarks"],
)
def test_a_file_that_cannot_be_compared_is_one_line_and_exit_code_2(
    tmp_path, capsys, content, message
):
    good = made.write(tmp_path / "good.json", made.session(base_cases()))
    bad = made.write(tmp_path / "bad.json", content)
    for arguments in ([good, bad], [bad, good]):
        assert main(["compare", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "bad.json" in error
        assert error.count("\n") == 1


def test_outputs_are_the_same_bytes_each_time_and_fit_a_terminal(tmp_path):
    new = with_case(made.case("m-lora-dpo", train_s=2.4, trainable_params=8192))
    files = [
        made.write(tmp_path / "a.json", made.session(base_cases())),
        made.write(tmp_path / "b.json", made.session(new, run_id="run-b")),
    ]
    first, second = (compare_paths(files[0], files[1], None) for _ in range(2))
    assert text_lines(first) == text_lines(second)
    assert json_text(first) == json_text(second)
    assert markdown_text(first) == markdown_text(second)
    assert max(len(line) for line in text_lines(first)) <= WIDTH + 2
    assert text_lines(first)[4].startswith("result     1 regressed, 1 changed, ")


def test_the_verdict_file_is_as_documented():
    names = ("m-full-dpo", "m-ia3-dpo", "m-lora-dpo")
    new = [made.case("m-lora-dpo", train_s=2.4, trainable_params=8192), made.case("m-ia3-dpo")]
    base = of([made.case(name) for name in names])
    _, found = judged(new, base=base, libraries={"torch": "2.13.0", "peft": "0.22.0"})
    text = json_text(found)
    assert json.loads(text) == json.loads(GOLDEN.read_text()), "schema changed: a new version?"
    assert text == GOLDEN.read_text()


def test_markdown_holds_hostile_names_and_stays_below_a_mebibyte():
    hostile = "m-<script>alert(1)</script>|[x](http://e.x)`-dpo"
    _, found = judged([*base_cases(), made.stopped(hostile, "crashed", "**<img src=x>**\n# no")])
    text = markdown_text(found)
    assert "<script" not in text
    assert "<img" not in text
    assert "\n# no" not in text
    assert r"\|" in text
    many = [made.case(f"m-lora-{i:04d}", steps=47) for i in range(900)]
    base = of([made.case(f"m-lora-{i:04d}") for i in range(900)])
    _, found = judged(many, base=base)
    text = markdown_text(found)
    assert len(text.encode()) <= MOST_BYTES
    assert "rows are left out" in text
    assert text.index("### changed") < text.index("<details>")


def test_the_command_line_has_the_exit_code_and_every_format(tmp_path, capsys):
    base = made.write(tmp_path / "a.json", made.session(base_cases()))
    new = made.write(tmp_path / "b.json", made.session(base_cases()[1:], run_id="run-b"))
    for form, start in (("text", "base "), ("markdown", "## peftbench"), ("json", "{")):
        assert main(["compare", str(base), str(new), "--format", form]) == 3
        assert capsys.readouterr().out.startswith(start)


def test_rounding_that_moves_some_cases_of_a_method_is_no_regression():
    """As on a real pair of runs: DPO's perplexities differ by per cents, the others hardly."""
    jitter = {"m-full-dpo": 1.036, "m-lora-dpo": 0.98, "m-ia3-dpo": 1.034, "m-prefix-dpo": 0.95,
              "m-qlora-dpo": 1.014, "m-full-sft": 1.0000001}  # fmt: skip
    base = of([made.case(n) for n in jitter])
    new = [made.case(n, perplexity=12.0 * factor) for n, factor in jitter.items()]
    rows, found = judged(new, base=base)
    assert {r.verdict for r in found.rows if r.metric == "perplexity"} <= {"inconclusive"}
    assert found.exit_code == 0
    # a training that did not happen is far beyond it
    new = [made.case(n, perplexity=12.0 * (30.0 if n == "m-lora-dpo" else f))
           for n, f in jitter.items()]  # fmt: skip
    rows, _ = judged(new, base=base)
    assert rows["m-lora-dpo", "perplexity"].verdict == "regressed"


def test_quality_that_falls_in_most_cases_is_the_suites_line():
    names = [f"m-{a}-sft" for a in "abcdefghij"]
    base = of([made.case(n) for n in names])
    new = [made.case(n, perplexity=12.0 * (1.02 + 0.002 * i)) for i, n in enumerate(names)]
    _, found = judged(new, base=base)
    # 10 worse and none better: p = 1 / 1024
    assert [(line.metric, len(line.cases)) for line in found.suite] == [("perplexity", 10)]
    assert found.exit_code == 1


def with_task(outcomes, digest="t", **more):
    tasks = {"cloze": made.task(outcomes, digest), "choice": made.task("10" * 100), **more}
    return made.case("m-lora-sft", tasks=tasks)


def test_a_task_is_compared_item_by_item_and_beside_the_other_tasks():
    base = of([with_task("1" * 120 + "0" * 80)])
    rows, found = judged([with_task("1" * 90 + "0" * 110)], base=base)
    row = rows["m-lora-sft", "task_accuracy:cloze"]
    assert (row.verdict, row.base, row.new) == ("regressed", 0.6, 0.45)
    assert row.change == pytest.approx(-0.15)
    assert "McNemar on 200 items: 30 lost, 0 won" in row.reason
    assert rows["m-lora-sft", "task_accuracy:choice"].verdict == "unchanged"
    assert found.exit_code == 1
    assert "task_accuracy:cloze" in "\n".join(text_lines(found))
    # as many lost as won: the same accuracy, and no verdict on the items' places
    swapped, _ = judged([with_task("0" * 30 + "1" * 120 + "0" * 50)], base=base)
    assert "30 lost, 30 won" in swapped["m-lora-sft", "task_accuracy:cloze"].reason
    assert swapped["m-lora-sft", "task_accuracy:cloze"].verdict != "regressed"


def test_a_task_with_other_items_is_redefined_and_one_that_is_gone_is_missing():
    base = of([with_task("1" * 200)])
    rows, _ = judged([with_task("0" * 200, digest="u")], base=base)
    assert rows["m-lora-sft", "task_accuracy:cloze"].verdict == "redefined"
    assert rows["m-lora-sft", "task_accuracy:choice"].verdict == "unchanged"
    gone = made.case("m-lora-sft", tasks={"cloze": made.task("1" * 200)})
    rows, _ = judged([gone], base=base)
    assert rows["m-lora-sft", "task_accuracy:choice"].verdict == "missing"
    rows, _ = judged([with_task("1" * 200, more=made.task("10"))], base=base)
    assert rows["m-lora-sft", "task_accuracy:more"].verdict == "new"


def test_a_project_sets_the_margin_of_all_tasks_or_of_one(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.peftbench.metrics.task_accuracy]\nmargin = 0.03\n"
        '[tool.peftbench.metrics."task_accuracy:cloze"]\nignore = true\n'
    )
    (tmp_path / "peftbench-acknowledged.toml").write_text(
        '[[change]]\nmetric = "task_accuracy:*"\ncase = "*"\ncommit = "aaaaaaa"\nreason = "r"\n'
    )
    rules = read_rules(tmp_path)
    assert rules.of("task_accuracy:choice", "m").margin == 0.03
    assert rules.of("task_accuracy:cloze", "m").ignore
    assert rules.acknowledged[0].covers("task_accuracy:choice", "m")


def test_the_index_keeps_what_tasks_have(tmp_path, monkeypatch):
    from peftbench.compare.index import from_entry, to_entry

    session = of([with_task("110", more=made.task("01"))])
    assert from_entry("file.json", json.loads(json.dumps(to_entry(session)))) == session


@pytest.mark.parametrize(("spread", "verdict"), [(0.2, "inconclusive"), (0.005, "regressed")])
def test_a_metric_of_few_cases_has_the_noise_of_its_like(spread, verdict):
    """Ten inference cases, of which two have a merged model: as the quick preset of real nights."""
    names = [f"m-a{number}-infer" for number in range(10)]
    moves = [1 + spread, 1 - spread, 1 + spread / 2, 1 - spread / 2, 1.0] * 2

    def side(factors: list[float], merged_s: float) -> list[dict[str, Any]]:
        return [
            made.case(name, base_decode_s=0.002 * factor, train_s=None,
                      merged_decode_s=merged_s if name in names[:2] else None)
            for name, factor in zip(names, factors, strict=True)
        ]  # fmt: skip

    rows, found = judged(side(moves, 0.0024), base=of(side([1.0] * 10, 0.002)))
    row = rows[names[0], "merged_decode_s"]
    assert row.verdict == verdict
    assert ("noise as base_decode_s has in this pair" in row.reason) == (spread > 0.02)
    assert ("noise taken as 2 %" in row.reason) == (spread < 0.02)
    assert found.exit_code == (1 if verdict == "regressed" else 0)


def test_a_spread_that_few_cases_show_is_known_less_well():
    assert by_time._pair_df(34) == by_time.PAIR_DF
    assert by_time._pair_df(10) == pytest.approx(3.33)
