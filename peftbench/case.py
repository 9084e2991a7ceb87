"""What is to be run: Case, Settings and the presets. Imports nothing heavy.

A case is three strings (model, adapter, method) and the settings that can move one of its numbers.
Its hash covers the three strings and only those settings that differ from their default, so a new
field must come with a default that means what the code did before it: then no history is voided.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peftbench.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Everything beside model, adapter and method that can move a number.

    Lengths are in tokens. The defaults are frozen: presets override them, code never changes them.
    """

    # how the case is run
    engine: str = "native"  # native: the one loop of training.py; trl: TRL's trainers
    device: str = "auto"  # auto: cuda when there is one, else cpu
    dtype: str = "float32"  # of frozen weights and of the compute; what trains is always float32
    threads: int = 0  # CPU threads of the training process; 0: all cores
    gpu_memory_limit_bytes: int = 0  # train as if the GPU had no more than this; 0: all of it
    host_memory_limit_bytes: int = 0  # address space that a round may add to its imports'; 0: any
    # what is trained
    weights: str = (
        "pretrained"  # random: built from the config, seeded; quality is then not measured
    )
    targets: str = (
        "all-linear"  # which linear layers LoRA and QLoRA adapt; qv: query and value only
    )
    rank: int = 8
    alpha: int = 16
    prefix_tokens: int = 16
    # on what
    data: str = "tinywiki"
    pairs: int = 512  # preference pairs seen by every method; SFT reads their chosen side
    prompt_length: int = 64
    completion_length: int = 64
    # how
    batch_size: int = 16  # pairs of one forward pass
    gradient_accumulation: int = 1
    warmup_steps: int = 2  # first steps of the budget, outside the training clock
    time_budget_s: float = 0.0  # stop training after so many seconds; 0: the pairs are the budget
    learning_rate: float = 0.0  # 0: the table's value for this adapter, method and model
    schedule: str = "linear"  # linear: to zero over the budget; constant
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    beta: float = 0.1  # DPO's temperature
    orpo_lambda: float = 0.1  # weight of ORPO's odds-ratio term (the paper's lambda, TRL's `beta`)
    orpo_nll_on: str = "all"  # all: prompt and chosen, as the authors' code; completion
    # how quality is scored
    eval_tokens: int = 8192
    eval_context: int = 256
    eval_stride: int = 128
    eval_pairs: int = 400
    eval_batch_size: int = 32
    eval_samples: int = 4  # prompts for generated samples and for the KL on own samples
    eval_sample_length: int = 32
    # repetition
    seed: int = 0  # round r of a case runs with seed + r

    @property
    def steps(self) -> int:
        """Optimiser steps of the budget, warm-up included (PPO counts its own)."""
        return self.pairs // (self.batch_size * self.gradient_accumulation)

    @property
    def measures_quality(self) -> bool:
        """Random weights or random ids have no quality to speak of."""
        return self.weights == "pretrained" and self.data != "synthetic"


CHOICES: dict[str, tuple[str, ...]] = {
    "engine": ("native", "trl"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "weights": ("pretrained", "random"),
    "targets": ("all-linear", "qv"),
    "schedule": ("linear", "constant"),
    "optimizer": ("adamw", "paged-adamw-8bit"),
    "orpo_nll_on": ("all", "completion"),
}

_AT_LEAST_ONE = (
    "pairs", "batch_size", "gradient_accumulation", "rank", "alpha", "prefix_tokens",
    "prompt_length", "completion_length", "eval_tokens", "eval_pairs", "eval_batch_size",
    "eval_samples", "eval_sample_length",
)  # fmt: skip


def check_settings(settings: Settings) -> None:
    """Raise UserError for the first value that cannot work."""
    for name, allowed in CHOICES.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise UserError(f"unknown {name} {value!r}; choose from: {', '.join(allowed)}")
    for name in _AT_LEAST_ONE:
        value = getattr(settings, name)
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name in (
        "warmup_steps", "threads", "seed", "gpu_memory_limit_bytes", "host_memory_limit_bytes"
    ):  # fmt: skip
        value = getattr(settings, name)
        if value < 0:
            raise UserError(f"{name} is {value}; it must not be negative")
    for name in ("learning_rate", "time_budget_s", "weight_decay", "max_grad_norm", "orpo_lambda"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value}; it must be a number that is not negative")
    if not (math.isfinite(settings.beta) and settings.beta > 0):
        raise UserError(f"beta is {settings.beta}; it must be a number above 0")
    if settings.eval_context < 2:
        raise UserError(f"eval_context is {settings.eval_context}; it must be at least 2 tokens")
    if not 1 <= settings.eval_stride < settings.eval_context:
        raise UserError(
            f"eval_stride is {settings.eval_stride}; it must be between 1 and"
            f" eval_context - 1 = {settings.eval_context - 1}"
        )
    if settings.steps <= settings.warmup_steps:
        raise UserError(
            f"{settings.pairs} pairs in batches of {settings.batch_size} x"
            f" {settings.gradient_accumulation} are {settings.steps} steps, of which"
            f" {settings.warmup_steps} warm up: nothing is left to time;"
            f" raise --pairs or lower --batch-size"
        )


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    model: str  # a name of MODELS, a Hub id or a local folder
    adapter: str  # a name of ADAPTERS
    method: str  # a name of METHODS
    settings: Settings = field(default_factory=Settings)

    @property
    def id(self) -> str:
        """`tiny-gpt2-lora-dpo`: the test id. A path or a Hub id gives its last part."""
        model = public_name(self.model).rsplit("/", 1)[-1]
        return f"{model}-{self.adapter}-{self.method}"

    @property
    def hash(self) -> str:
        """12 hexadecimal digits over the axes and the settings that differ from their default."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def weights_dtype(self) -> str:
        """What the base's weights are held in: what trains is always float32."""
        return "float32" if self.adapter == "full" else self.settings.dtype

    def identity(self) -> dict[str, Any]:
        """What the hash covers, as plain values: the same on every machine."""
        public = self.public()
        return {"model": public.model, "adapter": self.adapter, "method": self.method} | {
            f.name: getattr(public.settings, f.name)
            for f in fields(Settings)
            if getattr(public.settings, f.name) != f.default
        }

    def public(self) -> Case:
        """As records hold it: of a local model or data set the name alone, not where it lies.

        What is in it is told by the record's `weights_hash` and `data_digest`.
        """
        settings = replace(self.settings, data=public_name(self.settings.data))
        return replace(self, model=public_name(self.model), settings=settings)

    def with_seed(self, seed: int) -> Case:
        return replace(self, settings=replace(self.settings, seed=seed))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        return cls(data["model"], data["adapter"], data["method"], Settings(**data["settings"]))


def parse_bytes(text: str) -> int:
    """`24GiB`, `800MiB`, `1.5 GiB` or a plain number of bytes.

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 24GiB or 800MiB")
    power = ("B", "KiB", "MiB", "GiB", "TiB").index(match[2] or "B")
    return round(float(match[1]) * (1 << 10 * power))


def public_name(name: str) -> str:
    """A local path's last part; a table's name or a Hub id as it is."""
    path = expanded(name)
    return path.absolute().name if is_local(name) or path.exists() else name


def is_local(name: str) -> bool:
    """Whether a name is written as a path, which a Hub id (owner/name) never is."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def expanded(name: str) -> Path:
    """The path, `~` resolved. Raises: UserError for the home of a user that does not exist."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot tell what {name!r} means: {error}; give the full path") from None


@dataclass(frozen=True)
class Preset:
    """A named selection of the matrix with its settings."""

    models: tuple[str, ...]
    adapters: tuple[str, ...]
    methods: tuple[str, ...]
    settings: Settings
    rounds: int = 1
    about: str = ""


# lambda: three of some twenty tokens tell true from false, and ORPO's term is a mean over all
_QUICK = Settings(
    pairs=384, batch_size=8, orpo_lambda=4.0, eval_tokens=4096, eval_context=128, eval_stride=64
)
# bfloat16: with AMX twice as fast as float32 here; batches of 2 give 64 steps out of 128 pairs
_CPU_REAL = Settings(data="wikipedia-sample", dtype="bfloat16", pairs=128, batch_size=2,
                     orpo_lambda=2.0, targets="qv", eval_tokens=16384, eval_pairs=200,
                     eval_context=512, eval_stride=448, eval_batch_size=8)  # fmt: skip
_GPU = Settings(data="wikitext-2", dtype="bfloat16", pairs=2048, batch_size=16, prompt_length=128,
                completion_length=128, eval_tokens=65536, eval_context=512, eval_stride=256,
                eval_pairs=400, eval_batch_size=8)  # fmt: skip

PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        ("tiny-gpt2",), ("lora", "full"), ("sft", "dpo"),
        replace(_QUICK, pairs=64, eval_tokens=1024, eval_pairs=32),
        about="4 cases in seconds, for the tests",
    ),
    "quick": Preset(
        ("tiny-gpt2", "tiny-llama"), ("full", "lora", "qlora", "ia3", "prefix"),
        ("sft", "dpo", "orpo"), _QUICK,
        about="30 cases on the embedded models and corpus, a few minutes on a laptop CPU",
    ),
    "cpu-real": Preset(
        ("smollm2-135m-instruct-q4",), ("lora", "qlora", "ia3", "prefix"),
        ("sft", "dpo", "orpo"), _CPU_REAL,
        about="a real pretrained model on real Wikipedia text, on a CPU",
    ),
    "gpu": Preset(
        ("gpt-2",), ("full", "lora", "qlora", "ia3", "prefix"), ("sft", "dpo", "orpo"), _GPU,
        about="gpt-2 on WikiText-2, one GPU",
    ),
    "nightly": Preset(
        ("gpt-2", "llama-7b"), ("full", "lora", "qlora", "ia3", "prefix"),
        ("sft", "dpo", "orpo"), replace(_GPU, batch_size=8), rounds=3,
        about="gpt-2 and llama-7b, every adapter and method, for a nightly GPU job",
    ),
}  # fmt: skip
