"""The estimate of a matrix: arithmetic on made sessions, the simulation, and real records."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import made_sessions as made
import pytest

from peftbench.case import PRESETS, Case
from peftbench.cli import main
from peftbench.errors import UserError
from peftbench.models import resolved
from peftbench.plan import (
    ALIKE,
    EXACT,
    OTHER_SETTINGS,
    Costs,
    Expected,
    Failures,
    Past,
    costs_of,
    expect,
    of_one_machine,
    past_of,
    read_past,
    simulate,
)

ROOT = Path(__file__).parent.parent
QUICK = PRESETS["quick"].settings
FREE = Costs(0.0, 0.0, {})
LORA = resolved(Case("tiny-gpt2", "lora", "sft", QUICK))


def expected(seconds: float, case: Case = LORA, bases: tuple = ()) -> Expected:
    return Expected(case, seconds, None, None, EXACT, bases)


def session(*times: tuple[Case, float, float], sentinel_s: float = 1.0) -> dict:
    """Cases with the second of their start and their length; the run's name says second 0."""
    cases = []
    for case, _, total_s in times:
        axes = {"model": case.model, "adapter": case.adapter, "method": case.method}
        cases.append(made.case(case.id, hash_=case.hash, total_s=total_s, case=axes))
    ours = {"start_unix_s": 1000.0 + 2.0, "seconds": sentinel_s} | made.SENTINELS
    data = made.session(cases, run_id="19700101T001640Z-abcdef", sentinels=ours)
    for entry, (_, start_s, total_s) in zip(data["benchmarks"], times, strict=True):
        for numbers in entry["extra_info"]["rounds"]:
            numbers |= {"start_unix_s": 1000.0 + start_s, "total_s": total_s}
    data["peftbench"]["bases"] = [
        {
            "model": "tiny-gpt2",
            "dtype": "float32",
            "quantized": False,
            "phases": {"a": 1.5, "b": 0.5},
        }
    ]
    return data


def whole(data: dict) -> Past:
    (found,) = past_of(data)
    assert found.is_whole
    return found


def test_a_sessions_parts_are_told_apart():
    """2 s to the sentinels and 1 s in them, 2 s of a base, 10 s in rounds, 0.5 s beside each."""
    other = resolved(Case("tiny-gpt2", "ia3", "sft", QUICK))
    past = whole(session((LORA, 5.5, 4.0), (other, 10.0, 6.0)))
    assert past.start_up_s == pytest.approx(3.0)
    assert past.bases_s == {("tiny-gpt2", "float32", False): 2.0}
    assert past.between_s == pytest.approx(0.5)
    assert past.wall_s == pytest.approx(16.0)


def test_a_planned_session_is_the_one_that_was():
    other = resolved(Case("tiny-gpt2", "ia3", "sft", QUICK))
    past = whole(session((LORA, 5.5, 4.0), (other, 10.0, 6.0)))
    known, unknown = expect([LORA, other], [past])
    assert [e.seconds for e in known] == [4.0, 6.0]
    assert not unknown
    assert simulate(known, 1, 1, costs_of([past])).makespan_s == pytest.approx(past.wall_s)


def test_what_did_not_run_in_one_go_tells_rounds_and_nothing_beside_them():
    """Resumed, on two machines, side by side, and of an age in which sentinels had no time."""
    other = resolved(Case("tiny-gpt2", "ia3", "sft", QUICK))
    resumed = session((LORA, -500.0, 4.0), (other, 10.0, 6.0))
    mixed = session((LORA, 5.5, 4.0), (other, 10.0, 6.0))
    mixed["benchmarks"][1]["extra_info"]["device"] = "NVIDIA H200"
    beside = session((LORA, 5.5, 40.0), (other, 5.5, 41.0))
    old = session((LORA, 5.5, 4.0))
    del old["peftbench"]["sentinels"]["start"]["start_unix_s"]
    for data, machines in ((resumed, 1), (mixed, 2), (beside, 1), (old, 1)):
        found = past_of(data)
        assert len(found) == machines
        assert not any(p.is_whole for p in found)
        assert [r.numbers["total_s"] for p in found for r in p.rounds]
        with pytest.raises(UserError, match="from start to end"):
            costs_of(found)
    assert past_of(made.session([made.stopped("m-lora-dpo", "oom")])) == []


def test_what_is_known_of_a_case_is_said():
    past = whole(session((LORA, 5.5, 4.0)))
    other_pairs = LORA.with_seed(5)
    like = resolved(Case("tiny-gpt2", "ia3", "sft", QUICK))
    strange = resolved(Case("tiny-llama", "lora", "sft", QUICK))
    known, unknown = expect([LORA, other_pairs, like, strange], [past])
    assert [e.source for e in known] == [EXACT, OTHER_SETTINGS, ALIKE]
    assert unknown == [strange]


def test_a_case_counts_the_median_of_its_rounds():
    past = [whole(session((LORA, 5.5, seconds))) for seconds in (4.0, 5.0, 30.0)]
    assert expect([LORA], past)[0][0].seconds == 5.0


def test_rounds_go_to_the_device_that_is_free_first():
    tasks = [expected(s) for s in (3.0, 1.0, 1.0, 1.0)]
    assert simulate(tasks, 1, 2, FREE).makespan_s == 3.0
    assert simulate(tasks, 2, 2, FREE).makespan_s == 6.0
    assert simulate(tasks, 1, 1, FREE).busy_s == 6.0
    assert simulate(tasks, 1, 9, FREE).makespan_s == 3.0


def test_every_device_starts_once_and_scores_each_base_once():
    base = ("tiny-gpt2", "float32", False)
    costs = Costs(start_up_s=10.0, between_s=0.5, bases_s={base: 2.0})
    tasks = [expected(1.0, bases=(base,))] * 4
    assert simulate(tasks, 1, 1, costs).makespan_s == pytest.approx(10 + 2 + 4 * 1.5)
    assert simulate(tasks, 1, 4, costs).busy_s == pytest.approx(4 * (10 + 2 + 1.5))


def test_the_driver_hands_out_one_round_after_the_other():
    costs = Costs(0.0, 0.0, {}, dispatch_s=0.1)
    found = simulate([expected(1.0)] * 10, 1, 10, costs)
    assert found.makespan_s == pytest.approx(10 * 0.1 + 1.0)
    assert found.dispatch_s == pytest.approx(1.0)


def test_lost_devices_cost_what_their_rates_say():
    """A round of an hour on devices that last ten: e^(1/10) - 1 = 10.5 % are lost on the way."""
    tasks = [expected(3600.0)] * 4000
    found = simulate(tasks, 1, 50, FREE, Failures(mean_hours=10.0, away_s=60.0, seed=1))
    lost_ratio = found.lost_rounds / len(tasks)
    assert lost_ratio == pytest.approx(2.718281828**0.1 - 1, rel=0.15)
    # an attempt that is lost had half an hour, nearly
    assert found.lost_s / found.lost_rounds == pytest.approx(1800, rel=0.1)
    assert found.makespan_s > simulate(tasks, 1, 50, FREE).makespan_s
    again = simulate(tasks, 1, 50, FREE, Failures(mean_hours=10.0, away_s=60.0, seed=1))
    assert again == found


def test_a_lost_round_is_handed_out_once_its_loss_is_known():
    """Of two devices the first is lost half way through the only round: the other then begins."""
    lives = iter([0.5, 1000.0, 1000.0])  # hours

    class Dice:
        def expovariate(self, rate: float) -> float:
            return next(lives)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftbench.plan.random.Random", lambda seed: Dice())
        found = simulate([expected(3600.0)], 1, 2, FREE, Failures(mean_hours=1.0, away_s=60.0))
    assert found.makespan_s == pytest.approx(1800 + 3600)
    assert (found.lost_rounds, found.lost_s) == (1, pytest.approx(1800))


def test_a_machine_is_chosen_by_its_name_and_else_the_newest(tmp_path):
    one, two = session((LORA, 5.0, 4.0)), session((LORA, 5.0, 8.0))
    two["benchmarks"][0]["extra_info"]["device"] = "NVIDIA H200"
    for entry in two["benchmarks"][0]["extra_info"]["rounds"]:
        entry["start_unix_s"] -= 100
    two["peftbench"]["run_id"] = "19700101T001500Z-abcdef"
    for number, data in enumerate((one, two)):
        made.write(tmp_path / f"{number}.json", data)
    past = read_past(tmp_path)
    assert {p.machine for p in of_one_machine(past, None)} == {"Some CPU, 2 threads"}
    assert {p.machine for p in of_one_machine(past, "h200")} == {"NVIDIA H200"}
    longer = replace(past[1], machine="NVIDIA H200 NVL")
    assert of_one_machine([*past, longer], "NVIDIA H200") == [past[1]]
    with pytest.raises(UserError, match="is 0 of the machines in the records; there are: Some CPU"):
        of_one_machine(past, "A100")


def test_real_sessions_foretell_each_other_within_a_fifth(capsys):
    """The committed sessions of quick on one machine, each foretold by the others."""
    files = sorted((ROOT / "results" / "xeon-amx-2c" / "quick").glob("*.json"))
    errors = []
    for file in files:
        assert main(["plan", "--records", *map(str, files), "--check", str(file)]) == 0
        text = capsys.readouterr().out
        assert "ESTIMATE" in text
        (line,) = [x for x in text.splitlines() if x.startswith("wall time") and ":" in x[20:]]
        if "real" in line:
            errors.append(abs(float(line.rpartition(" ")[2].rstrip("%"))))
    assert len(errors) >= 1
    assert statistics.median(errors) < 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus is 0; it must be from 1"),
        (["--preset", "quik"], "quick"),
        (["--records", "nowhere.json"], "cannot read 'nowhere.json'"),
        (["--machine", "cray"], "of the machines in the records"),
        (["--models", "gpt-2"], "have none of these models and methods"),
        (["--mean-hours", "-1"], "--mean-hours is -1.0"),
        (["--mean-hours", "0.001"], "would hardly ever end"),
        (["--away-minutes", "inf"], "--away-minutes is inf"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
