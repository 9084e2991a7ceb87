"""`peftbench infer`: what it answers, against a loop without cache; and in a real terminal."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from peftbench import adapters, chat, models
from peftbench.adapters import ADAPTERS
from peftbench.agreement import largest_difference
from peftbench.case import Case, Settings
from peftbench.chat import Chat, Sampling, answering_model, find_trained, without_adapter
from peftbench.data.tokens import make_encoder
from peftbench.errors import UserError
from peftbench.train_command import train_case

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(
    pairs=16, batch_size=4, prompt_length=32, completion_length=32, eval_tokens=256,
    eval_context=64, eval_stride=32, eval_pairs=8, eval_completions=4, eval_samples=1,
)  # fmt: skip
PROMPT = "The ship Aurora"
GREEDY = Sampling(max_new_tokens=10, temperature=0.0)


def load(name: str = "tiny-llama", *, quantize: str | None = None):
    return models.load_model(
        name, weights="pretrained", dtype=torch.float32, device=torch.device("cpu"),
        quantize=quantize, seed=0,
    )  # fmt: skip


def adapted_model(adapter: str):
    """A tiny LLaMA with an adapter that says something."""
    model = adapters.attach(load(quantize=ADAPTERS[adapter].quantization), adapter, SETTINGS)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((0.5 if adapter == "ia3" else 0.1) * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def greedy_ids(model, ids: list[int], count: int, eos: int) -> list[int]:
    """The likeliest token each time, by whole forward passes."""
    out: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + out]), use_cache=False).logits
        out.append(int(logits[0, -1].argmax()))
        if out[-1] == eos:
            break
    return out


def talk_to(model, tokenizer, sampling: Sampling = GREEDY, base=None) -> Chat:
    return Chat(model, base or partial(without_adapter, model), tokenizer, sampling, 256)


@pytest.mark.parametrize("adapter", ["lora", "qlora", "ia3", "prefix", "prompt", "lora-8bit"])
def test_an_answer_is_what_whole_forward_passes_give(adapter, capsys):
    model, tokenizer = adapted_model(adapter), models.load_tokenizer("tiny-llama", "pretrained")
    encoder = make_encoder(tokenizer)
    ids = encoder.with_bos(encoder.encode(PROMPT))
    talk = talk_to(model, tokenizer)
    talk.ask(PROMPT)
    expected = greedy_ids(model, ids, 10, tokenizer.eos_token_id)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert talk.history[-1]["content"] == text
    capsys.readouterr()
    talk.ask_base()
    base = greedy_ids(
        load(quantize=ADAPTERS[adapter].quantization), ids, 10, tokenizer.eos_token_id
    )
    said = tokenizer.decode(base, skip_special_tokens=True)
    assert capsys.readouterr().out.rstrip("\n") == said.rstrip("\n")
    assert said != text
    assert talk.history[-1]["content"] == text  # the conversation goes on with the adapter's


def test_tokens_come_as_they_are_drawn(monkeypatch):
    written: list[str] = []

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    tokenizer = models.load_tokenizer("tiny-llama", "pretrained")
    talk = talk_to(load(), tokenizer, Sampling(max_new_tokens=30, temperature=0.0))
    monkeypatch.setattr(sys, "stdout", Screen())
    talk.ask(PROMPT)
    assert len([text for text in written if text.strip()]) >= 5
    assert "".join(written).strip() == talk.history[-1]["content"].strip()


def test_control_characters_do_not_reach_the_terminal(capsys):
    answer = chat.Answer(models.load_tokenizer("tiny-llama", "pretrained"))
    answer.on_finalized_text("a\x1b[2Jb\tc\r\x07", stream_end=True)
    assert capsys.readouterr().out == "a[2Jb\tc\n"


def test_sampling_is_seeded_and_warm():
    tokenizer = models.load_tokenizer("tiny-llama", "pretrained")

    def answer(seed: int) -> str:
        torch.manual_seed(seed)
        talk = talk_to(load(), tokenizer, Sampling(max_new_tokens=30, temperature=1.0))
        talk.ask(PROMPT)
        return talk.history[-1]["content"]

    assert answer(1) == answer(1) != answer(2)


def test_a_long_prompt_is_cut_to_the_context():
    from small_tokenizers import chat as chat_tokenizer

    plain = models.load_tokenizer("tiny-llama", "pretrained")
    talk = Chat(None, partial(without_adapter, None), plain, Sampling(max_new_tokens=16), 48)
    talk.history = [{"role": "user", "content": "the ship sails " * 50}]
    whole = make_encoder(plain).encode(talk.history[0]["content"])
    assert talk.prompt_ids() == whole[-32:]
    tokenizer = chat_tokenizer()
    turns = [{"role": role, "content": f"{word} " * 5} for role, word in
             (("user", "one"), ("assistant", "two"), ("user", "three"))]  # fmt: skip
    talk = Chat(None, partial(without_adapter, None), tokenizer, Sampling(max_new_tokens=16), None)
    talk.history = turns
    assert talk.is_chat
    everything = talk.prompt_ids()
    last_alone = list(tokenizer.apply_chat_template(
        turns[2:], add_generation_prompt=True, return_dict=False
    ))  # fmt: skip
    talk.context = 16 + len(everything) - 1
    assert talk.prompt_ids() == last_alone  # the oldest turn goes, with its answer
    talk.context = 10
    with pytest.raises(UserError, match="leaves no room"):
        talk.prompt_ids()


@pytest.mark.parametrize(
    ("adapter", "merge", "is_merged", "words"),
    [
        ("lora", None, True, "merged (logits agree"),
        ("ia3", None, True, "merged (logits agree"),
        ("lora", False, False, "not merged"),
        ("prefix", None, False, ""),
        ("qlora", None, False, "not merged (over 4 bits)"),
        ("qlora", True, True, "merged (logits agree"),
        ("lora-8bit", None, False, "not merged (over 8 bits)"),
        ("pissa", None, True, "merged (logits agree"),
        ("lora-bias", None, True, "merged (logits agree"),
        ("prompt", None, False, ""),
    ],
)
def test_merged_where_it_loses_nothing(adapter, merge, is_merged, words):
    model = adapted_model(adapter)
    trained = chat.Trained(Path("x"), Case("tiny-llama", adapter, "sft", SETTINGS), False)
    answering, said = answering_model(model, trained, SETTINGS, merge)
    assert (answering is not model) == is_merged
    assert words in said
    if is_merged:
        assert not hasattr(answering, "peft_config")
        assert largest_difference(model, answering) < 1e-4


def test_what_does_not_merge_is_not_merged(monkeypatch):
    trained = chat.Trained(Path("x"), Case("tiny-llama", "prefix", "sft", SETTINGS), False)
    with pytest.raises(UserError, match="prefix does not merge"):
        answering_model(adapted_model("prefix"), trained, SETTINGS, True)
    # a merge that goes wrong is noticed
    trained = chat.Trained(Path("x"), Case("tiny-llama", "lora", "sft", SETTINGS), False)
    monkeypatch.setattr(adapters, "merged", lambda model, adapter: load())
    answering, said = answering_model(model := adapted_model("lora"), trained, SETTINGS, None)
    assert answering is model
    assert "would change its logits" in said
    with pytest.raises(UserError, match="more than rounding"):
        answering_model(model, trained, SETTINGS, True)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trainings")
    for adapter in ("lora", "full"):
        case = Case("tiny-gpt2", adapter, "sft", SETTINGS)
        train_case(case, root / case.id, resume=False, overwrite=False, checkpoint_every_s=60.0)
    return root


def test_an_adapter_is_found_by_folder_and_by_name(trainings, tmp_path):
    by_name = find_trained("tiny-gpt2", "lora", trainings)
    assert by_name == find_trained("tiny-gpt2", str(trainings / "tiny-gpt2-lora-sft"), tmp_path)
    assert by_name.case.adapter == "lora"
    assert not by_name.is_full
    assert find_trained("tiny-gpt2", "full", trainings).is_full
    for model, adapter, words in (
        ("tiny-gpt2", "ia3", "no finished training of tiny-gpt2 with ia3"),
        ("tiny-llama", str(by_name.folder), "was trained on tiny-gpt2, not on tiny-llama"),
        ("tiny-gpt2", "./nothing", "no folder and no adapter's name"),
        ("tiny-gpt2", str(tmp_path), "neither adapter_config.json nor config.json"),
    ):
        with pytest.raises(UserError, match=words):
            find_trained(model, adapter, trainings)


@pytest.mark.parametrize("harm", ["weights cut", "no weights"])
def test_an_adapter_that_is_damaged_is_one_line(trainings, tmp_path, harm):
    folder = tmp_path / "adapter"
    shutil.copytree(trainings / "tiny-gpt2-lora-sft", folder)
    weights = folder / "adapter_model.safetensors"
    if harm == "weights cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(UserError, match=r"the adapter in '.*/adapter' cannot be read: "):
        chat.with_adapter(load("tiny-gpt2"), folder)


def test_a_damaged_note_of_a_training_is_said_once(trainings, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trainings / "tiny-gpt2-lora-sft", folder)
    (folder / "training.json").write_text("{")
    with pytest.raises(UserError) as caught:
        find_trained("tiny-gpt2", str(folder), tmp_path)
    assert str(caught.value).count("training.json") == 1
    assert str(caught.value).endswith("; give a folder that `peftbench train` wrote")


def test_an_adapter_of_another_model_is_one_line(trainings, tmp_path):
    with pytest.raises(UserError, match="does not fit"):
        chat.with_adapter(load("tiny-llama"), trainings / "tiny-gpt2-lora-sft")


@pytest.mark.parametrize(
    "sampling",
    [Sampling(max_new_tokens=0), Sampling(temperature=-1.0), Sampling(top_p=0.0),
     Sampling(temperature=float("nan"))],
)  # fmt: skip
def test_sampling_that_cannot_be_drawn_is_one_line(sampling):
    with pytest.raises(UserError, match="it must be"):
        sampling.check()


class Terminal:
    """A real terminal, by tmux."""

    def __init__(self, name: str, command: str) -> None:
        self._tmux = ["tmux", "-L", name]
        subprocess.run(
            [*self._tmux, "-f", "/dev/null", "new-session", "-d", "-x", "200", "-y", "50",
             f"{command}; sleep 60"], check=True, cwd=ROOT,
        )  # fmt: skip

    def keys(self, *keys: str) -> None:
        subprocess.run([*self._tmux, "send-keys", *keys], check=True)

    def screen(self) -> str:
        shown = [*self._tmux, "capture-pane", "-p", "-S", "-200"]
        return subprocess.run(shown, check=True, capture_output=True, text=True).stdout

    def wait(self, done, what: str) -> str:
        deadline = time.monotonic() + 90
        while not done(screen := self.screen()):
            assert time.monotonic() < deadline, f"no {what} on the screen:\n{screen}"
            time.sleep(0.05)
        return screen

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)


def test_in_a_real_terminal(trainings):
    infer = shlex.join([
        sys.executable, "-m", "peftbench", "infer", "--model", "tiny-gpt2", "--adapter", "lora",
        "--output", str(trainings), "--max-new-tokens", "60", "--temperature", "0",
    ])  # fmt: skip
    terminal = Terminal("peftbench-test", "; ".join([f'{infer}; echo "left with $?"'] * 3))
    try:
        screen = terminal.wait(lambda s: s.rstrip().endswith(">"), "prompt")
        assert "tiny-gpt2 on cpu, float32:" in screen
        assert "merged (logits agree" in screen
        assert "/quit" in screen
        terminal.keys(PROMPT, "Enter")
        screen = terminal.wait(lambda s: s.count("\n>") == 2, "answer")
        answer = screen.split(f"> {PROMPT}")[1].split("\n>")[0].split()
        assert len(answer) > 5
        terminal.keys("/base", "Enter")
        screen = terminal.wait(lambda s: s.count("\n>") == 3, "base's answer")
        assert screen.split("> /base")[1].split("\n>")[0].split() not in ([], answer)
        terminal.keys("/reset", "Enter", "/base", "Enter", "/nonsense", "Enter")
        screen = terminal.wait(lambda s: "unknown command /nonsense" in s, "answer to nonsense")
        assert "a new conversation" in screen
        assert "nothing was asked yet" in screen
        terminal.keys("/quit", "Enter")
        terminal.wait(lambda s: s.count("left with 0") == 1 and s.rstrip().endswith(">"), "second")
        terminal.keys("C-d")
        terminal.wait(lambda s: s.count("left with 0") == 2 and s.rstrip().endswith(">"), "third")
        terminal.keys("C-c")
        screen = terminal.wait(lambda s: s.count("left with 0") == 3, "end")
        assert "Traceback" not in screen
    finally:
        terminal.close()
