"""`peftbench infer`: talk to a model and its adapter in a terminal, tokens as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, TextStreamer

from peftbench import adapters, models
from peftbench.adapters import ADAPTERS, AdapterRow
from peftbench.agreement import AGREEMENT_RATIO, largest_difference
from peftbench.case import Case, Settings, public_name, short_name
from peftbench.data.tokens import make_encoder
from peftbench.errors import UserError
from peftbench.out_of_memory import is_out_of_memory
from peftbench.progress import say
from peftbench.quantization import BITS
from peftbench.result_files import read_json, reading
from peftbench.rollout import virtual_tokens

GIVE_TRAINED = "give a folder that `peftbench train` wrote"
HELP = "/base the base's answer to the same prompt, /reset a new conversation, /quit the end"


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.7  # 0: the most likely token each time
    top_p: float = 0.95

    def check(self) -> None:
        """Raises: UserError for a value that cannot be drawn with."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Trained:
    """A folder with an adapter, or with a whole model, and what the base must be for it."""

    folder: Path
    case: Case | None  # as `peftbench train` noted it; None: made by something else
    is_full: bool

    @property
    def row(self) -> AdapterRow | None:
        return None if self.case is None else ADAPTERS[self.case.adapter]


def find_trained(model: str, adapter: str, root: Path) -> Trained:
    """The folder that `--adapter` means: a path, or the newest training of that adapter in `root`.

    Raises: UserError where there is none.
    """
    folder = Path(adapter).expanduser()
    if adapter in ADAPTERS and not folder.is_dir():
        name = short_name(model)
        found = [
            file for file in root.glob(f"{name}-{adapter}-*/training.json")
            if read_json(file, GIVE_TRAINED)["case"]["adapter"] == adapter
        ]  # fmt: skip
        if not found:
            raise UserError(
                f"no finished training of {name} with {adapter} in {str(root)!r}; make one:"
                f" peftbench train --model {model} --adapter {adapter} --method sft"
            )
        folder = max(found, key=lambda file: file.stat().st_mtime).parent
    if not folder.is_dir():
        raise UserError(
            f"--adapter {adapter!r} is no folder and no adapter's name; choose from:"
            f" {', '.join(ADAPTERS)}"
        )
    is_full = not (folder / "adapter_config.json").is_file()
    if is_full and not (folder / "config.json").is_file():
        raise UserError(
            f"{str(folder)!r} holds neither adapter_config.json nor config.json; give a folder"
            " that `peftbench train` or PEFT's save_pretrained wrote"
        )
    note = folder / "training.json"
    if not note.is_file():
        return Trained(folder, None, is_full)
    noted = read_json(note, GIVE_TRAINED)
    with reading(note, give=GIVE_TRAINED):
        case = Case.from_dict(noted["case"])
    if case.model != public_name(model):
        raise UserError(
            f"{str(folder)!r} was trained on {case.model}, not on {public_name(model)}: give"
            f" --model {case.model}"
        )
    return Trained(folder, case, is_full)


class Answer(TextStreamer):  # type: ignore[misc]
    """Writes an answer as its tokens come, and keeps its text.

    A model's control characters do not reach the terminal.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        clean = "".join(c for c in text if c.isprintable() or c in "\n\t")
        self.text += clean
        sys.stdout.write(clean + ("\n" if stream_end else ""))
        sys.stdout.flush()


@dataclass
class Chat:
    """One conversation. Without a chat template each line is a text that the model goes on with."""

    model: Any  # that answers
    base: Callable[[], AbstractContextManager[Any]]  # inside, what it gives answers as the base
    tokenizer: Any
    sampling: Sampling
    context: int | None  # tokens that prompt and answer may have together
    history: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def prompt_ids(self) -> list[int]:
        """Ids of the conversation up to the last user's line, cut to the context.

        The oldest turns go first; of a single text its beginning.
        """
        room = None if self.context is None else self.context - self.sampling.max_new_tokens
        if room is not None and room < 1:
            raise UserError(
                f"--max-new-tokens {self.sampling.max_new_tokens} leaves no room for a prompt: the"
                f" model's context is {self.context}; lower it"
            )
        if not self.is_chat:
            encoder = make_encoder(self.tokenizer)
            ids = encoder.with_bos(encoder.encode(self.history[-1]["content"]))
            return ids if room is None else ids[-room:]
        turns = list(self.history)
        while True:
            ids = list(self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            ))  # fmt: skip
            if room is None or len(ids) <= room:
                return ids
            if len(turns) < 3:
                return ids[-room:]
            turns = turns[2:]

    def generate(self, model: Any) -> str:
        """Stream one answer and return it. Ctrl-C ends it early: what came stays."""
        ids = torch.tensor([self.prompt_ids()], device=next(model.parameters()).device)
        greedy = self.sampling.temperature == 0
        eos = self.tokenizer.eos_token_id
        drawn = {} if greedy else {
            "temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0
        }  # fmt: skip
        config = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens, do_sample=not greedy, use_cache=True,
            eos_token_id=eos, pad_token_id=eos, **drawn,
        )  # fmt: skip
        answer = Answer(self.tokenizer)
        try:
            with torch.no_grad():
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                    streamer=answer,
                )  # fmt: skip
        except KeyboardInterrupt:
            answer.end()
            say("[stopped]")
        return answer.text

    def ask(self, line: str) -> None:
        if not self.is_chat:
            self.history.clear()
        self.history.append({"role": "user", "content": line})
        answer = self.generate(self.model)
        self.history.append({"role": "assistant", "content": answer})

    def ask_base(self) -> None:
        """The last prompt again, to the base; the conversation goes on with the first answer."""
        if not self.history:
            say("nothing was asked yet")
            return
        answer = self.history.pop()
        try:
            with self.base() as base:
                self.generate(base)
        finally:
            self.history.append(answer)

    def loop(self) -> None:
        """Read lines until /quit, Ctrl-D or Ctrl-C."""
        with suppress(ImportError):  # where there is one: arrow keys, and earlier lines
            import readline  # noqa: F401
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                say("")
                return
            if line == "/quit":
                return
            if line == "/reset":
                self.history.clear()
                say("a new conversation")
            elif line == "/base":
                self.ask_base()
            elif line.startswith("/"):
                say(f"unknown command {line.split()[0]}; {HELP}")
            elif line:
                self.ask(line)


def chat(
    model: str,
    trained: Trained | None,
    settings: Settings,
    dtype: str | None,
    sampling: Sampling,
    *,
    merge: bool | None,
) -> None:
    """Load and talk. `merge` None: where the adapter merges without loss.

    `dtype` None: what it was trained in, else bfloat16 on a GPU and float32 on a CPU.
    Raises: UserError for what cannot be loaded.
    """
    from peftbench.pipeline import device_name, prepare_process

    sampling.check()
    device = prepare_process(settings)
    known = None if trained is None else trained.case
    if dtype is None:
        there = "bfloat16" if device.type == "cuda" else "float32"
        dtype = there if known is None else known.settings.dtype
    settings = replace(settings, dtype=dtype)
    if known is not None:  # of random weights the seed makes the base
        settings = replace(settings, weights=known.settings.weights, seed=known.settings.seed)
    row = None if trained is None else trained.row

    def load(name: str, weights: str) -> Any:
        return models.load_model(
            name, weights=weights, dtype=getattr(torch, settings.dtype), device=device,
            quantize=None if row is None else row.quantization, seed=settings.seed,
        )  # fmt: skip

    tokenizer = models.load_tokenizer(model, settings.weights)
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer on this machine: nothing can be said to it")
    context = models.model_context(model, settings.weights)
    words = "the base alone" if trained is None else f"{trained.folder}"
    base: Callable[[], AbstractContextManager[Any]]
    if trained is None:
        answering = load(model, settings.weights)
        base = partial(nullcontext, answering)
    elif trained.is_full:
        answering = load(str(trained.folder), "pretrained")
        # only who asks for the base pays for it
        base = partial(loaded, cache(partial(load, model, settings.weights)))
    else:
        adapted = with_adapter(load(model, settings.weights), trained.folder)
        context = None if context is None else context - virtual_tokens(adapted)
        answering, merged_words = answering_model(adapted, trained, settings, merge)
        words += merged_words
        base = partial(without_adapter, adapted)
    say(f"{short_name(model)} on {device_name(device)}, {settings.dtype}: {words}")
    talk = Chat(answering.eval(), base, tokenizer, sampling, context)
    say("a conversation" if talk.is_chat else "no chat template: it goes on with what you write")
    say(HELP)
    talk.loop()


def with_adapter(base: Any, folder: Path) -> Any:
    """Raises: UserError for an adapter that is damaged, or of another model."""
    try:
        return adapters.load_adapter(base, folder)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        unread = isinstance(error, (OSError, SafetensorError))
        what = "cannot be read" if unread else "does not fit"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter in {str(folder)!r} {what}: {reason}") from None


@contextmanager
def without_adapter(adapted: Any) -> Iterator[Any]:
    with adapters.adapter_off(adapted):
        yield adapted


@contextmanager
def loaded(load: Callable[[], Any]) -> Iterator[Any]:
    yield load()


def answering_model(
    adapted: Any, trained: Trained, settings: Settings, merge: bool | None
) -> tuple[Any, str]:
    """The model that answers, merged where that is asked for or loses nothing, and the words.

    The merged one is a second copy of the base: the first stays, so that /base answers exactly.
    Raises: UserError for `merge` where the adapter does not merge, or merging changes its answers.
    """
    row = trained.row
    if row is None or trained.case is None or not row.merges:
        if merge:
            name = "this adapter" if trained.case is None else trained.case.adapter
            raise UserError(f"--merge: {name} does not merge, or is not known to; leave it out")
        return adapted, ""
    if merge is False or (merge is None and row.quantization):
        over = f" (over {BITS[row.quantization]} bits)" if row.quantization else ""
        return adapted, ", not merged" + over
    merged = adapters.merged(adapted, trained.case.adapter)
    difference = largest_difference(adapted, merged)
    if difference > AGREEMENT_RATIO[settings.dtype]:
        if merge:
            raise UserError(
                f"merged and unmerged answers differ by {difference:.2g} of the largest logit:"
                f" more than rounding in {settings.dtype}; leave --merge out"
            )
        return adapted, f", not merged (that would change its logits by {difference:.2g})"
    return merged, f", merged (logits agree to {difference:.1g})"
