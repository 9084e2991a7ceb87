"""`peftbench report`: what is on the page, what never becomes markup, mistakes in one line."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_files import ADAPTERS, HOSTILE, MIB, NO_GPU, hostile, many, record, session

from peftbench.adapters import ADAPTERS as ALL
from peftbench.cli import main
from peftbench.compare.rules import read_rules
from peftbench.report.cases import cases_of, curve_of
from peftbench.report.html import context, page, printable, script_json
from peftbench.report.marks import MARKS, SHAPES, SPARE, marks_of
from peftbench.report.sources import read_parts
from peftbench.report.sparklines import EDGE, HEIGHT, WIDTH, drawing
from peftbench.report.takeaways import winners

RESULTS = Path(__file__).parent.parent / "results" / "xeon-amx-2c"
VOID = {"meta", "link", "input", "br", "img", "path", "circle"}


class Page(HTMLParser):
    """Elements, attributes, scripts and the rows of tables, as a parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "br":
            self.handle_data(" ")
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "table" in self.open and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    def table(self, heading: str) -> list[list[str]]:
        """The rows below the first table that has this heading."""
        found = next(t for t in self.tables if any(heading in cell for cell in t[0]))
        return [[" ".join(cell.split()) for cell in row] for row in found[1:]]

    def tips_of(self, text: str) -> list[str]:
        return [a["data-tip"] for _, a in self.tags if text in a.get("data-tip", "")]


def made(*files: Path) -> str:
    return page(context(read_parts(list(files), read_rules(Path("/nonexistent")))))


def data_of(text: str) -> dict:
    return json.loads(Page(text).scripts[0])


# what is on the page


@pytest.mark.parametrize(("models", "cases"), [(None, 2), (10, 200)])
def test_the_page_is_small_and_every_case_has_its_row(tmp_path, models, cases):
    file = tmp_path / "r.json"
    if models is None:
        session(file, [record("m", "lora", "sft"), record("m", "ia3", "sft", 1)])
    else:
        many(file, models)
    text = made(file)
    assert len(text.encode()) < 10 * 2**20
    rows = Page(text).table("trainable")
    assert len(rows) == cases
    ids = [b["extra_info"]["case_id"] for b in benchmarks(file)]
    assert [row[0].removesuffix(" ") for row in rows] == ids


def benchmarks(file: Path) -> list[dict]:
    return json.loads(file.read_text())["benchmarks"]


def test_numbers_stand_in_the_units_of_the_headings(tmp_path):
    text = made(session(tmp_path / "r.json", [record("m", "lora", "sft", 3)]))
    found = Page(text)
    assert found.table("trainable")[0] == [
        "m-lora-sft", "ok", "4.50", "4.00", "5,003", "103.0", "–", "4,000", "0.25",
        "40 → 19.85", "1.200", "50.0 → 70.3",
    ]  # fmt: skip
    assert found.tips_of("1.00% of all parameters")
    headings = [
        " ".join(cell.split()) for cell in next(t for t in found.tables if len(t[0]) == 12)[0]
    ]
    assert headings[2] == "time s"
    assert headings[5] == "peak memory MiB"
    case = data_of(text)["cases"][0]
    assert (case["memory"], case["preference_accuracy"]) == (103.0, 70.3)


def test_what_was_not_measured_is_a_dash_with_its_reason(tmp_path):
    reason = "RAPL cannot be read"
    one = record("m", "lora", "sft")
    one["null_reasons"]["energy_j"] = reason
    text = made(session(tmp_path / "r.json", [one]))
    assert Page(text).tips_of(f"not measured: {reason}")
    assert data_of(text)["costs"][3]["missing"] == reason


def test_a_case_that_failed_says_how_and_loses_no_axis(tmp_path):
    failed = {"case_id": "big-model-qlora-dpo", "case_hash": "ab", "status": "oom",
              "phase": "train", "reason": "needs 3 GiB more"}  # fmt: skip
    text = made(session(tmp_path / "r.json", [record("m", "lora", "sft")], failed=[failed]))
    found = Page(text)
    assert found.table("trainable")[1][:3] == ["big-model-qlora-dpo", "oom", "–"]
    assert found.tips_of("not measured: the case ended as oom")
    assert "in train: needs 3 GiB more" in text
    row = next(a for _, a in found.tags if a.get("data-status") == "oom")
    axes = (row["data-model"], row["data-adapter"], row["data-method"])
    assert axes == ("big-model", "qlora", "dpo")


def test_a_record_of_another_age_is_shown(tmp_path):
    old = {"format": 1, "status": "ok", "case_id": "m-lora-sft", "case_hash": "1", "train_s": 2.5}
    (tmp_path / "r.json").write_text(json.dumps(old))
    found = Page(made(tmp_path / "r.json"))
    row = found.table("trainable")[0]
    assert row[:4] == ["m-lora-sft", "ok", "–", "2.50"]
    assert found.tips_of("the file is older than this metric")


@pytest.mark.parametrize("broken", [{"phases": 3}, {"samples": [4]}, {"losses": 5}])
def test_a_damaged_record_is_one_line(tmp_path, capsys, broken):
    file = session(tmp_path / "r.json", [record("m", "lora", "sft") | broken])
    assert main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err.startswith(f"peftbench: {str(file)!r} is damaged (")


def test_the_committed_results_make_a_page():
    """Every case of the newest session of each preset; an older one is there as its history."""
    files = sorted(RESULTS.glob("*/*.json"))
    text = made(*files)
    shown = [row[0].split()[0] for row in Page(text).table("trainable")]
    assert len(shown) == len(set(shown))
    for folder in RESULTS.iterdir():
        runs = [json.loads(file.read_text()) for file in folder.glob("*.json")]
        newest = max(runs, key=lambda run: run["peftbench"]["run_id"])
        ids = {b["extra_info"]["case_id"] for b in newest["benchmarks"]}
        assert {i for i in ids if not i.endswith("-infer")} <= set(shown)
        assert all(i in text for i in ids)
    assert len(text.encode()) < 10 * 2**20


def test_same_files_same_bytes(tmp_path):
    files = [many(tmp_path / f"{i}.json", 1, number=i) for i in range(2)]
    assert made(*files) == made(*files)


# takeaways


def test_qualities_within_two_standard_errors_are_not_told_apart(tmp_path):
    # of the difference: 2 * sqrt(0.02^2 + 0.02^2) = 0.0566
    records = [
        record("m", "full", "dpo", preference_accuracy=0.900, method_s=3.0),
        record("m", "lora", "dpo", preference_accuracy=0.844, method_s=2.0),
        record("m", "ia3", "dpo", preference_accuracy=0.843, method_s=2.0),
    ]
    part = read_parts([session(tmp_path / "r.json", records)], read_rules(tmp_path))[0]
    accuracy, _, fastest, memory, _ = winners(cases_of(part))[0].best
    assert (accuracy.adapters, accuracy.text, accuracy.others) == (("full",), "90 %", ("lora",))
    assert fastest.adapters == ("lora", "ia3")
    assert memory.text == "100.0 MiB"


def test_the_fastest_and_the_best_that_fit_are_named(tmp_path, capsys):
    """Of full, which is best, 100 MiB are too few; of what fits, lora is best and ia3 fastest."""

    def case(adapter: str, mebibytes: int, seconds: float, loss: float) -> dict:
        return record("m", adapter, "sft", host_peak_rss_delta_bytes=mebibytes * MIB,
                      method_s=seconds, nll_per_token=loss)  # fmt: skip

    cases = [case("full", 101, 1.0, 1.0), case("lora", 100, 3.0, 2.0), case("ia3", 50, 2.0, 3.0)]
    file = session(tmp_path / "r.json", cases)
    output = tmp_path / "report.html"
    for memory, words in (
        ("100MiB", ["m", "sft", "2 of 3", "ia3 2 s", "lora 2 nats nll_per_token"]),
        ("1GiB", ["m", "sft", "3 of 3", "full 1 s", "full 1 nats nll_per_token"]),
        ("10MiB", ["m", "sft", "0 of 3", "nothing fits"]),
    ):
        assert main(["report", str(file), "-o", str(output), "--memory", memory]) == 0
        assert Page(output.read_text()).table("best that fits") == [words]
    assert main(["report", str(file), "-o", str(output)]) == 0
    assert "best that fits" not in output.read_text()
    with pytest.raises(SystemExit):
        main(["report", str(file), "-o", str(output), "--memory", "much"])
    assert "write for example 24GiB" in capsys.readouterr().err


def test_adapters_differ_in_shape_and_colour_and_line():
    every = [*MARKS.values(), *SPARE]
    assert len({m.symbol for m in every}) == len({m.colour for m in every}) == len(every)
    assert {m.symbol for m in every} == set(SHAPES)
    assert set(MARKS) == set(ALL)
    assert list(marks_of(["other", "prefix", "lora"])) == ["lora", "prefix", "other"]
    assert all(contrast_on_white(m.colour) >= 4.5 for m in every)


def contrast_on_white(colour: str) -> float:
    """WCAG 2.2: relative luminance of an sRGB colour against 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_a_curve_is_a_running_mean_of_the_rounds_mean():
    # two rounds of 20 steps: means 0..19; the window of a tenth is 2 steps
    rounds = [
        {"losses": [float(i - 1) for i in range(20)]},
        {"losses": [i + 1.0 for i in range(20)]},
    ]
    kind, curve = curve_of({"rounds": rounds})
    assert kind == "loss"
    assert curve[:3] == ((1, 0.0), (2, 0.5), (3, 1.5))
    assert curve[-1] == (20, 18.5)
    updates = [{"reward_mean": 0.25}, {"reward_mean": None}, {"reward_mean": 0.75}]
    ppo = {"losses": [9.0], "ppo_history": updates}
    assert curve_of(ppo) == ("reward", ((1, 0.25), (3, 0.75)))


# comparison and history


def test_what_became_worse_comes_first(tmp_path):
    base = session(tmp_path / "a.json", [record("m", a, "sft", i) for i, a in enumerate(ADAPTERS)])
    worse = {"host_peak_rss_delta_bytes": 150 * MIB, "host_peak_rss_bytes": 350 * MIB}
    records = [record("m", "full", "sft", 0, **worse)]
    records += [record("m", a, "sft", i) for i, a in enumerate(ADAPTERS) if 0 < i < 4]
    new = session(tmp_path / "b.json", records, number=1)
    text = made(new, base)  # in whichever order they are given
    found = Page(text)
    verdicts = re.findall(r'<details class="verdict-(\w[\w-]*)"', text)
    assert verdicts[:2] == ["regressed", "missing"]
    row = found.table("90 % interval")[0]
    assert row[:5] == ["m-full-sft", "host_peak_rss_delta", "100.0 MiB", "150.0 MiB", "+50.0 %"]
    table = found.table("trainable")
    assert table[0][2] == "regressed"
    assert table[1][2] == "no change seen"


def test_files_of_other_cases_are_shown_beside_each_other(tmp_path):
    quick = [record("m", a, "sft") for a in ADAPTERS]
    files = [
        session(tmp_path / "quick0.json", quick),
        session(tmp_path / "quick1.json", quick, number=1),
        session(tmp_path / "real.json", [record("big", "lora", "sft")], number=2),
    ]
    parts = read_parts(files, read_rules(tmp_path))
    assert [[s.name for s in p.sessions] for p in parts] == [
        ["quick0.json", "quick1.json"], ["real.json"],
    ]  # fmt: skip
    assert [p.comparison is None for p in parts] == [False, True]


def test_redefined_cases_of_one_name_are_one_history(tmp_path):
    before = [record("m", a, "sft") for a in ADAPTERS]
    after = [record("m", a, "sft") | {"case_hash": f"new{a}"} for a in ADAPTERS]
    files = [session(tmp_path / "a.json", before), session(tmp_path / "b.json", after, number=1)]
    text = made(*files)
    assert len(Page(text).table("trainable")) == 5
    assert "5 redefined" in text
    assert "5 cases of this page have been measured in one session only" in text


def test_a_history_marks_where_the_level_changed(tmp_path):
    for i in range(14):
        size = (100 if i < 7 else 120) * MIB + (i % 3) * 1000
        one = record("m", "lora", "sft", host_peak_rss_delta_bytes=size)
        session(tmp_path / "in" / f"{i:02d}.json", [one], number=i)
    text = made(tmp_path / "in")
    rows = Page(text).table("which is")
    assert rows[0][1:6] == ["host_peak_rss_delta", "100.0 MiB", "120.0 MiB", "+20.0 %", "worse"]
    assert rows[0][6] == "7777777..8888888"
    assert text.count('<g class="worse"><path class="bar"') == 1


def test_a_drawing_spans_its_box_and_breaks_at_a_gap():
    svg = drawing((1.0, None, 3.0, 2.0), {})
    step = (WIDTH - 2 * EDGE) / 3
    ends = (HEIGHT - EDGE, EDGE, HEIGHT / 2)
    path = (f"M{EDGE:.1f} {ends[0]:.1f}M{EDGE + 2 * step:.1f} {ends[1]:.1f}"
            f"L{EDGE + 3 * step:.1f} {ends[2]:.1f}")  # fmt: skip
    assert f'd="{path}"' in svg


def test_noise_stays_in_the_middle_of_a_drawing():
    # 1 % of 100 in a height of at least 10 %: 0.45 and 0.55 of what is between the edges
    svg = drawing((100.0, 101.0), {})
    low, high = (HEIGHT - EDGE - share * (HEIGHT - 2 * EDGE) for share in (0.45, 0.55))
    assert f'd="M{EDGE:.1f} {low:.1f}L{WIDTH - EDGE:.1f} {high:.1f}"' in svg


# nothing from a record becomes markup, and nothing leaves the file


def test_hostile_text_stays_text(tmp_path):
    text = made(hostile(tmp_path / "r.json"))
    found = Page(text)
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 3
    assert not {"img", "iframe", "object", "base"} & set(names)
    assert not [a for _, a in found.tags for key in a if key.startswith("on")]
    assert printable(HOSTILE) in {a.get("data-model") for _, a in found.tags}
    ours = text.replace(found.scripts[1], "")
    assert not [c for c in ours if not c.isprintable() and c not in "\n\t"]


def test_json_in_a_script_cannot_end_it():
    data = {"</script><!--": "<script>&\u2028\ud800"}
    text = script_json(data)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_the_policy_names_exactly_the_scripts_of_the_page(tmp_path):
    found = Page(made(session(tmp_path / "r.json", [record("m", "lora", "sft")])))
    policy = next(a["content"] for t, a in found.tags if "http-equiv" in a)
    digests = [hashlib.sha256(s.encode()).digest() for s in found.scripts[1:]]
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    assert f"script-src {allowed};" in policy
    assert "default-src 'none'" in policy


def test_no_element_points_outside_the_file(tmp_path):
    found = Page(made(many(tmp_path / "r.json", 1)))
    links = [a[key] for _, a in found.tags for key in ("src", "href", "action") if key in a]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)


# the command


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    file = session(tmp_path / "r.json", [record("m", "lora", "sft")])
    out = tmp_path / "new folder" / "r.html"
    assert main(["report", str(file), "-o", str(out)]) == 0
    size = out.stat().st_size / 2**20
    said = capsys.readouterr().out
    assert said == f"wrote {out}: 1 case of 1 session, {size:.1f} MiB\n"
    assert NO_GPU in out.read_text()


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    good = session(tmp_path / "good.json", [record("m", "lora", "sft")])
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "r.html"
    for files, target, problem in [
        (["gone.json"], out, "cannot read"),
        ([tmp_path / "bad.json"], out, "is not JSON"),
        ([good, tmp_path / "other.json"], out, "is JSON, but not of peftbench"),
        ([tmp_path / "empty"], out, "has no result file"),
        ([good], tmp_path / "empty", "cannot write"),
    ]:
        assert main(["report", *map(str, files), "-o", str(target)]) == 2
        said = capsys.readouterr().err
        assert problem in said
        assert said.count("\n") == 1
    assert not out.exists()
