"""Tasks through lm-evaluation-harness: its outcomes against plain arithmetic, and their items."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from bench_run import bench

from peftbench import evaluation, harness, models, pipeline, show, values
from peftbench.adapters import ADAPTERS, attach
from peftbench.case import PRESETS, Case, Settings, check_settings, task_names
from peftbench.cli import main
from peftbench.data import task_items, tinywiki
from peftbench.data.wikipedia import Article
from peftbench.errors import UserError
from peftbench.evaluation import PairScore, Quality, TextScore
from peftbench.harness import TaskScore
from peftbench.metrics import TASK_METRICS
from peftbench.model_card import task_rows
from peftbench.summary import task_lines

ITEMS = 16
SETTINGS = replace(
    PRESETS["smoke"].settings, tasks="tinywiki_cloze,tinywiki_choice", task_items=ITEMS,
    eval_batch_size=7,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def items(tmp_path_factory):
    """The tasks' files, in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        harness.check_tasks(SETTINGS)
        yield {name: task_items.LOCAL_TASKS[name].make() for name in task_names(SETTINGS.tasks)}


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer("tiny-gpt2", "pretrained")


def adapted(adapter: str):
    """tiny-gpt2 in eval mode with an adapter that is far from the identity; or without one."""
    case = Case("tiny-gpt2", adapter, "sft", SETTINGS)
    quantizes = None if adapter == "base" else ADAPTERS[adapter].quantization
    model = pipeline.load(case, torch.device("cpu"), quantize=quantizes)
    if adapter == "base":
        return model.eval()
    torch.manual_seed(0)
    model = attach(model, adapter, SETTINGS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def continuation(model, tokenizer, context: str, answer: str) -> tuple[float, bool]:
    """(log-likelihood, whether greedy decoding gives it) of one row alone: no padding, no cache."""
    ids = tokenizer(f"{context} {answer}").input_ids
    start = len(tokenizer(context).input_ids)
    assert ids[:start] == tokenizer(context).input_ids
    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double()
    target = torch.tensor(ids[start:])
    logprobs = logits.log_softmax(-1)[range(len(target)), target]
    return float(logprobs.sum()), bool((logits.argmax(-1) == target).all())


def write_tasks(folder, model, tokenizer, items) -> tuple[list[dict], list[dict]]:
    """Tasks `mine_cloze` and `mine_choice` of the user's own: of every second item the model's own
    answer is the right one, so that not all outcomes are equal whatever the model is."""
    clozes, choices = [], []
    for number, item in enumerate(items):
        ids = torch.tensor([tokenizer(item["context"]).input_ids])
        greedy = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
        target = greedy.strip() if greedy.startswith(" ") and number % 2 else "river"
        clozes.append({"context": item["context"], "target": target})
        sums = [continuation(model, tokenizer, item["context"], c)[0] for c in item["choices"]]
        choices.append(item | {"label": (sums.index(max(sums)) + number % 2) % 4})
    for kind, rows in (("cloze", clozes), ("choice", choices)):
        text = (harness._FOLDER / f"tinywiki_{kind}.yaml").read_text()
        (folder / f"mine_{kind}.yaml").write_text(text.replace("tinywiki_", "mine_"))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"mine_{kind}.jsonl").write_text(lines)
    return clozes, choices


def choices_right(model, tokenizer, asked) -> tuple[str, str]:
    """Which items have their right answer first: by log-likelihood, and by it over the length."""
    right, by_length = "", ""
    for item in asked:
        sums = [continuation(model, tokenizer, item["context"], c)[0] for c in item["choices"]]
        means = [s / len(c) for s, c in zip(sums, item["choices"], strict=True)]
        right += "01"[sums.index(max(sums)) == item["label"]]
        by_length += "01"[means.index(max(means)) == item["label"]]
    return right, by_length


@pytest.mark.parametrize("adapter", ["base", "lora", "prefix", "qlora"])
@torch.no_grad()
def test_outcomes_are_those_of_plain_log_likelihoods(adapter, items, tokenizer, tmp_path):
    model = adapted(adapter)
    clozes, choices = write_tasks(tmp_path, model, tokenizer, items["tinywiki_choice"][:ITEMS])
    cloze = "".join(
        "01"[continuation(model, tokenizer, item["context"], item["target"])[1]] for item in clozes
    )
    choice, by_length = choices_right(model, tokenizer, choices)
    files = [str(tmp_path / f"mine_{kind}.yaml") for kind in ("cloze", "choice")]
    settings = replace(SETTINGS, tasks=",".join(files))
    case = Case("tiny-gpt2", "lora" if adapter == "base" else adapter, "sft", settings)
    model.train()
    found = pipeline.task_scores(model, case, tokenizer, is_base=adapter == "base")
    assert model.training
    assert found["mine_cloze"].correct == cloze
    assert found["mine_cloze"].correct_norm is None
    assert found["mine_choice"].correct == choice
    assert found["mine_choice"].correct_norm == by_length
    for outcomes in (cloze, choice):
        assert 3 < outcomes.count("1") < ITEMS - 3  # so that equal says something
    if adapter != "base":  # the adapter was asked, not its base
        assert choice != choices_right(adapted("base"), tokenizer, choices)[0]


def test_shares_and_standard_errors_are_the_harness_s():
    from lm_eval.api.metrics import mean_stderr

    outcomes = "1101001" * 9
    found = evaluation.task_metrics(TaskScore("1.0", "d", outcomes, "0" * 63))
    assert found["task_items"] == 63
    assert found["task_accuracy"] == pytest.approx(36 / 63)
    assert found["task_accuracy_se"] == pytest.approx(mean_stderr([int(c) for c in outcomes]))
    assert found["task_accuracy_norm"] == found["task_accuracy_norm_se"] == 0
    assert evaluation.task_metrics(TaskScore("1.0", "d", "1", None)) == {
        "task_items": 1, "task_accuracy": 1.0, "task_accuracy_se": None,
        "task_accuracy_norm": None, "task_accuracy_norm_se": None,
    }  # fmt: skip


def quality(**tasks: TaskScore) -> Quality:
    return Quality(TextScore([1.0], [2], 1), PairScore([1.0], [2.0], [1], [1]), [[1]], [], tasks)


def test_a_record_has_the_base_s_outcomes_beside_the_trained_model_s():
    after, before = TaskScore("1.0", "d", "0111", "0011"), TaskScore("1.0", "d", "0001", "0101")
    found = values.task_values(quality(one=after), quality(one=before))["one"]
    assert (found["task_accuracy"], found["task_accuracy_base"]) == (0.75, 0.25)
    assert (found["task_accuracy_norm"], found["task_accuracy_norm_base"]) == (0.5, 0.5)
    assert (found["correct"], found["correct_base"]) == ("0111", "0001")
    assert (found["correct_norm"], found["correct_norm_base"]) == ("0011", "0101")
    assert set(TASK_METRICS) < set(found)
    assert values.task_values(quality(), quality()) == values.task_values(None, None) == {}
    sent = json.loads(json.dumps(asdict(quality(one=after))))
    assert Quality.from_dict(sent).tasks == {"one": after}


def test_tasks_are_shown_beside_the_base():
    task = values.task_values(
        quality(one=TaskScore("1.0", "d", "0111", "0011")),
        quality(one=TaskScore("1.0", "d", "0001", "0101")),
    )
    assert task_lines(task) == ["one  25.0% -> 75.0% (standard error 25.0 points, 4 items)"]
    rows = [line.split() for line in show._task_table(task)]
    assert rows[2:] == [
        ["one", "75", "%", "25", "%", "25", "%", "4"],
        ["one,", "norm", "50", "%", "28.87", "%", "50", "%", "4"],
    ]
    (row,) = task_rows(task)
    assert row.startswith("| one | 0.25 | 0.75 | Accuracy on 4 items")


def test_tinywiki_items_ask_facts_of_ships_that_nothing_trains_on():
    trained_on = {
        pair.prompt for split in ("train", "judge") for pair in tinywiki.pairs(2, split, 3000, 0)
    }
    scored = {pair.prompt for pair in tinywiki.pairs(2, "test", 400, 0)}
    facts, ever = tinywiki.FACTS[2], set(tinywiki.FACTS[2].values())
    labels = [0] * 4
    for cloze, choice in zip(
        task_items.tinywiki_cloze(), task_items.tinywiki_choice(), strict=True
    ):
        prompt = choice["context"]
        kind = prompt.split(" = \n")[0].split()[-1]
        assert prompt not in trained_on
        assert prompt in scored or prompt.endswith(" was a ship .")
        (said,) = tinywiki.statements(choice["choices"][choice["label"]])
        assert said is not None
        assert facts[kind, said.thing] == said.value == cloze["target"]
        assert f"{cloze['context']} {cloze['target']} ." == f"{prompt} {_sentence(choice)}"
        others = [
            tinywiki.statements(c)[0]
            for i, c in enumerate(choice["choices"])
            if i != choice["label"]
        ]
        assert {o.thing for o in others} == {said.thing}
        assert sorted(o.value in ever for o in others) == [False, False, True]
        assert len({o.value for o in others} | {said.value}) == 4
        labels[choice["label"]] += 1
    assert min(labels) > 30  # of 200: no place is the right one more often


def _sentence(choice) -> str:
    return choice["choices"][choice["label"]]


def made_articles() -> list[Article]:
    dice = random.Random(0)
    words = ("harbour", "letters", "mountain", "window", "garden", "winter", "silver", "engine")
    articles = []
    for number in range(4):
        paragraphs = []
        for _ in range(20):
            sentences = [
                f"Item{number} " + " ".join(dice.choices(words, k=dice.randint(6, 14))) + "."
                for _ in range(6)
            ]
            paragraphs.append(" ".join(sentences))
        articles.append(Article(f"Article {number}", "\n\n".join(paragraphs)))
    return articles


def test_wikipedia_items_are_cut_out_of_the_articles(monkeypatch):
    articles = made_articles()
    monkeypatch.setattr(task_items, "_held_out_articles", lambda: articles)
    cloze, choice = task_items.wikipedia_cloze(), task_items.wikipedia_choice()
    assert cloze == task_items.wikipedia_cloze()
    assert choice == task_items.wikipedia_choice()
    assert len(cloze) > 100
    assert len(choice) == task_items.MOST_ITEMS
    for item in cloze:
        assert any(f"{item['context']} {item['target']}." in a.text for a in articles)
        assert item["target"] in item["context"].replace(".", "").split()
        assert 3 <= item["context"].count("Item") <= 5  # 2 to 4 sentences and the begun one
    for item in choice:
        own = [a for a in articles if f"{item['context']} {_sentence(item)}" in a.text]
        assert len(own) == 1
        assert not any(c in own[0].text for c in item["choices"] if c != _sentence(item))
        assert len(set(item["choices"])) == 4
    assert len({item["label"] for item in choice}) == 4


@pytest.mark.verify
def test_wikipedia_items_come_from_articles_that_are_held_out():
    from peftbench.data import assets
    from peftbench.data.wikipedia import read_articles, split_articles

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PEFTBENCH_CACHE")
        splits = split_articles(read_articles(assets.fetch("wikipedia-sample") / assets.ARTICLES))
        cloze, choice = task_items.wikipedia_cloze(), task_items.wikipedia_choice()
    seen = "\n".join(a.text for name in ("train", "validation") for a in splits[name])
    assert (len(cloze), len(choice)) == (155, 200)
    assert not any(item["context"] in seen for item in cloze + choice)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("./nowhere.yaml", "no task file './nowhere.yaml'; give a YAML file or one of: tinywiki_"),
        ("{folder}/list.yaml", "cannot load task '{folder}/list.yaml': Expected YAML dict from"),
        ("{folder}/none.yaml", "cannot load task '{folder}/none.yaml': none.yaml has no `task:"),
        ("{folder}/gone.yaml", "cannot load task '{folder}/gone.yaml': Unable to find '{folder}"),
        ("{folder}/write.yaml", "task 'write' is of the kind 'generate_until'; scored are: multi"),
    ],
)
def test_a_task_that_cannot_be_is_one_line(tmp_path, tasks, message, capsys):
    (tmp_path / "list.yaml").write_text("- tinywiki_cloze\n")
    text = (harness._FOLDER / "tinywiki_cloze.yaml").read_text()
    (tmp_path / "gone.yaml").write_text(text.replace("tinywiki_cloze", "gone"))
    (tmp_path / "none.yaml").write_text(text.replace("task: tinywiki_cloze", "group: none"))
    (tmp_path / "write.yaml").write_text(
        text.replace("task: tinywiki_cloze", "task: write")
        .replace("loglikelihood", "generate_until")
        .replace("metric: acc", "metric: exact_match")
    )
    (tmp_path / "tinywiki_cloze.jsonl").write_text('{"context": "a b", "target": "c"}\n')
    with pytest.raises(UserError) as caught:
        harness.check_tasks(replace(SETTINGS, tasks=tasks.format(folder=tmp_path)))
    assert str(caught.value).startswith(message.format(folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_a_task_file_of_one_s_own_reads_the_data_beside_it(tmp_path, tokenizer):
    text = (harness._FOLDER / "tinywiki_choice.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("tinywiki_choice", "mine"))
    rows = [
        {"context": "It was a", "choices": ["ship .", "zzqx zzqx zzqx"], "label": i} for i in (0, 1)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = replace(SETTINGS, tasks=str(tmp_path / "mine.yaml"))
    harness.check_tasks(settings)
    case = Case("tiny-gpt2", "lora", "sft", settings)
    assert case.public().settings.tasks == "mine.yaml"
    model = pipeline.load(case, torch.device("cpu"), quantize=None)
    score = pipeline.task_scores(model, case, tokenizer, is_base=True)["mine"]
    assert score.correct == "10"
    changed = [rows[0], {**rows[1], "context": "It was the"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    again = pipeline.task_scores(model, case, tokenizer, is_base=True)["mine"]
    assert again.digest != score.digest


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "lm_eval" else real(n))
    with pytest.raises(UserError, match=r"--tasks needs .* pip install 'peftbench\[tasks\]'$"):
        harness.check_tasks(SETTINGS)
    harness.check_tasks(replace(SETTINGS, tasks=""))


def test_a_task_of_the_hub_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", _no_network)
    with pytest.raises(UserError) as caught:
        harness.check_tasks(replace(SETTINGS, tasks="tinywiki_cloze,hellaswag"))
    assert "cannot fetch task 'hellaswag'" in str(caught.value)
    assert (
        "(no route); if it was fetched before set HF_HUB_OFFLINE=1; without the Hub there are"
        in (str(caught.value))
    )


def _no_network(*_, **__):
    raise ConnectionError("no route")


@pytest.mark.verify
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswag", "cannot load task 'hellaswag': Couldn't reach 'Rowan/hellaswag' on the Hub"),
        ("helaswag", "unknown task 'helaswag'; did you mean hellaswag"),
    ],
)
def test_offline_a_task_of_the_hub_comes_from_its_cache_or_not_at_all(name, message, tmp_path):
    code = (
        "import sys; from peftbench import harness; from peftbench.case import Settings\n"
        "from peftbench.errors import UserError\n"
        f"try: harness.check_tasks(Settings(tasks={name!r}))\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith(message)
    assert shown.stdout.count("\n") == 1


@pytest.mark.verify
def test_a_run_and_a_training_with_tasks(tmp_path):
    """Phases, records and cards of both; a comparison with itself."""
    tasks = ["--tasks", "tinywiki_cloze,tinywiki_choice", "--task-items", "30"]
    code, text, run = bench(tmp_path, "--adapters", "lora,prefix", "--methods", "sft", *tasks)
    assert code == 0, text
    for benchmark in run["benchmarks"]:
        record = benchmark["extra_info"]
        assert record["tasks_s"] > 0
        assert list(record["phases"]).index("tasks") == list(record["phases"]).index("evaluate") + 1
        for task in record["tasks"].values():
            assert task["task_items"] == len(task["correct"]) == len(task["correct_base"]) == 30
            assert task["task_accuracy"] == task["correct"].count("1") / 30
    bases = {b["extra_info"]["tasks"]["tinywiki_choice"]["correct_base"] for b in run["benchmarks"]}
    assert len(bases) == 1  # scored once
    assert "tiny-gpt2-lora-sft  tinywiki_choice  " in text
    file = str(tmp_path / "run.json")
    assert main(["compare", file, file]) == 0
    folder = tmp_path / "trained"
    assert main(["train", "--model", "tiny-gpt2", "--adapter", "lora", "--method", "sft", "--pairs",
                 "64", "--output", str(folder), *tasks]) == 0  # fmt: skip
    kept = json.loads((folder / "training.json").read_text())
    assert kept["tasks"].keys() == {"tinywiki_cloze", "tinywiki_choice"}
    assert "| tinywiki_choice | " in (folder / "README.md").read_text()


def test_checking_tasks_imports_no_torch():
    code = (
        "import sys; from peftbench import harness; from peftbench.case import Settings\n"
        "harness.check_tasks(Settings(tasks='tinywiki_cloze'))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tasks_are_part_of_a_case_only_where_they_are_asked_for():
    plain = Case("tiny-gpt2", "lora", "sft", Settings())
    assert not {"tasks", "task_items"} & plain.identity().keys()
    asked = replace(plain, settings=replace(plain.settings, tasks="tinywiki_cloze"))
    assert asked.hash != plain.hash
    with pytest.raises(UserError, match="give pretrained weights"):
        check_settings(replace(asked.settings, weights="random"))
    with pytest.raises(UserError, match="task_items is -1"):
        check_settings(replace(asked.settings, task_items=-1))
