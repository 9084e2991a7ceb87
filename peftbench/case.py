"""What is to be run: Case, Settings and the presets. Imports nothing heavy.

A case is three strings (model, adapter, method) and the settings that can move one of its numbers.
Its hash covers the three strings and only those settings that differ from their default, so a new
field must come with a default that means what the code did before it, or the same numbers sooner:
then no history is voided.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peftbench.errors import UserError
from peftbench.methods import INFER, uses_ppo


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
    prefix_tokens: int = 16  # also of prompt
    vera_rank: int = 256  # as in VeRA's paper: its two matrices are random and shared
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
    processes: int = 1  # that train the case together, each its share of every batch (DDP)
    sharding: str = "none"  # full: each process holds a slice of every parameter (FSDP)
    pair_prompts: str = "once"  # once: a pair's sides share a pass over their prompt; twice
    compile: str = "none"  # layers: the decoder layers through torch.compile, before the warm-up
    beta: float = 0.1  # DPO's temperature
    orpo_lambda: float = 0.1  # weight of ORPO's odds-ratio term (the paper's lambda, TRL's `beta`)
    orpo_nll_on: str = "all"  # all: prompt and chosen, as the authors' code; completion
    # PPO
    ppo_batch_size: int = 64  # prompts of one update, in the pairs' order
    # completions of one optimiser step; 0: as many as the pairs of another method's
    ppo_minibatch_size: int = 0
    ppo_epochs: int = 4  # passes over the completions of an update
    ppo_kl_coef: float = 0.05  # weight of the KL to the reference in the reward
    ppo_clip_range: float = 0.2  # of the ratio, and of the value
    ppo_value_coef: float = 0.1
    ppo_gamma: float = 1.0
    ppo_gae_lambda: float = 0.95
    ppo_temperature: float = 1.0  # of sampling, and of every log-probability
    value: str = "head"  # head: on the policy's trunk; adapter: LoRA and a head of its own
    reward: str = "model"  # model: trained on the pairs; true: tinywiki's; count-token; none
    reward_learning_rate: float = 0.0  # of the reward model; 0: the table's
    reward_start: str = "sft"  # the reward model's first epoch is SFT on the chosen sides; base
    reward_sft_learning_rate: float = 0.0  # of that epoch; 0: the table's
    missing_eos: str = "replace"  # a completion without EOS: replace its score, add to it, or keep
    missing_eos_score: float = -1.0
    sft_learning_rate: float = 0.0  # of the first stage of sft+dpo and sft+ppo; 0: the table's
    # how quality is scored
    eval_tokens: int = 8192
    eval_context: int = 256
    eval_stride: int = 128
    eval_pairs: int = 400
    eval_batch_size: int = 32
    eval_samples: int = 4  # prompts for generated samples and for the KL on own samples
    eval_sample_length: int = 32
    eval_completions: int = 256  # held-out prompts completed for the true reward and the judges
    # how inference is measured
    infer_batch_size: int = 8  # prompts answered together
    infer_prompt_tokens: int = 128
    infer_new_tokens: int = 32  # of each answer, the first belonging to the prefill
    infer_turns: int = 30  # of each model, in turn with the others; multiples of 6 are balanced
    infer_merge_4bit: bool = False  # merge qlora as well, over its base dequantised
    # tasks of lm-evaluation-harness
    tasks: str = ""  # comma-separated: local tasks, the harness's, or YAML files; empty: none
    task_items: int = 0  # the first so many items of each; 0: all
    # repetition
    seed: int = 0  # round r of a case runs with seed + r

    @property
    def steps(self) -> int:
        """Optimiser steps of the budget, warm-up included (PPO counts its own)."""
        return self.pairs // (self.batch_size * self.gradient_accumulation)

    @property
    def ppo_updates(self) -> int:
        """PPO's updates of the budget, warm-up included: one pass over the pairs' prompts."""
        return self.pairs // self.ppo_batch_size

    @property
    def ppo_minibatch(self) -> int:
        """Completions of one of PPO's optimiser steps, in `gradient_accumulation` micro-batches."""
        return self.ppo_minibatch_size or self.batch_size * self.gradient_accumulation

    @property
    def ppo_micro_batch(self) -> int:
        """Completions of one of PPO's forward and backward passes."""
        return self.ppo_minibatch // self.gradient_accumulation

    @property
    def ppo_minibatches(self) -> int:
        """Optimiser steps of one of PPO's epochs."""
        return self.ppo_batch_size // self.ppo_minibatch

    @property
    def ppo_warmup_updates(self) -> int:
        """PPO's first updates, outside the training clock: they hold the `warmup_steps`."""
        return math.ceil(self.warmup_steps / (self.ppo_epochs * self.ppo_minibatches))

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
    "pair_prompts": ("once", "twice"),
    "sharding": ("none", "full"),
    "compile": ("none", "layers"),
    "orpo_nll_on": ("all", "completion"),
    "value": ("head", "adapter"),
    "reward": ("model", "true", "count-token", "none"),
    "reward_start": ("sft", "base"),
    "missing_eos": ("replace", "add", "keep"),
}

_AT_LEAST_ONE = (
    "pairs", "batch_size", "gradient_accumulation", "processes", "rank", "alpha", "prefix_tokens",
    "vera_rank", "prompt_length", "completion_length", "eval_tokens", "eval_pairs",
    "eval_batch_size", "eval_samples", "eval_sample_length", "ppo_batch_size", "ppo_epochs",
    "eval_completions", "infer_batch_size", "infer_prompt_tokens", "infer_turns",
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
        "warmup_steps", "threads", "seed", "gpu_memory_limit_bytes", "host_memory_limit_bytes",
        "ppo_minibatch_size", "task_items",
    ):  # fmt: skip
        value = getattr(settings, name)
        if value < 0:
            raise UserError(f"{name} is {value}; it must not be negative")
    for name in (
        "learning_rate", "time_budget_s", "weight_decay", "max_grad_norm", "orpo_lambda",
        "ppo_kl_coef", "ppo_value_coef", "reward_learning_rate", "sft_learning_rate",
        "reward_sft_learning_rate",
    ):  # fmt: skip
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value}; it must be a number that is not negative")
    if not (math.isfinite(settings.beta) and settings.beta > 0):
        raise UserError(f"beta is {settings.beta}; it must be a number above 0")
    for name in ("ppo_clip_range", "ppo_gamma", "ppo_gae_lambda"):
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it must be between 0 and 1")
    if not (math.isfinite(settings.ppo_temperature) and settings.ppo_temperature > 0):
        raise UserError(f"ppo_temperature is {settings.ppo_temperature}; it must be above 0")
    if not math.isfinite(settings.missing_eos_score):
        raise UserError(f"missing_eos_score is {settings.missing_eos_score}; it must be a number")
    if settings.reward == "true" and settings.data != "tinywiki":
        raise UserError(f"reward 'true' is known of tinywiki only, not of {settings.data!r}")
    if settings.infer_new_tokens < 2:
        raise UserError(
            f"infer_new_tokens is {settings.infer_new_tokens}; it must be at least 2: the first"
            " belongs to the prefill"
        )
    if settings.batch_size % settings.processes:
        raise UserError(
            f"batch_size is {settings.batch_size}; it must be a multiple of processes, which"
            f" is {settings.processes}: they share every batch"
        )
    if settings.sharding != "none" and settings.processes == 1:
        raise UserError(
            f"sharding is {settings.sharding!r}, but processes is 1: give at least 2, among which"
            " the model is spread"
        )
    if settings.tasks and not settings.measures_quality:
        raise UserError(
            "--tasks asks what a model has learnt: give pretrained weights and data that are text"
        )
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


# what moves a number of an inference case; all else stands at its default there
OF_INFER = (
    "device", "dtype", "threads", "gpu_memory_limit_bytes", "host_memory_limit_bytes", "weights",
    "targets", "rank", "alpha", "prefix_tokens", "vera_rank", "seed", "infer_batch_size",
    "infer_prompt_tokens", "infer_new_tokens", "infer_turns", "infer_merge_4bit",
)  # fmt: skip


def of_its_kind(settings: Settings, method: str) -> Settings:
    """The settings without those that mean nothing to the case: so its hash does not move."""
    if method == INFER:
        return Settings(**{name: getattr(settings, name) for name in OF_INFER})
    unused: dict[str, Any] = {
        f.name: f.default for f in fields(Settings) if f.name.startswith("infer_")
    }
    return replace(settings, **unused)


def check_ppo(settings: Settings) -> None:
    """Raise UserError for a budget that PPO cannot divide; the other methods do not mind."""
    minibatch = settings.ppo_minibatch
    if settings.ppo_batch_size % minibatch:
        raise UserError(
            f"ppo_batch_size is {settings.ppo_batch_size}; it must be a multiple of the minibatch,"
            f" which is {minibatch} (ppo_minibatch_size, or batch_size x gradient_accumulation)"
        )
    if minibatch % settings.gradient_accumulation:
        raise UserError(
            f"ppo_minibatch_size is {minibatch}; it must be a multiple of gradient_accumulation"
            f" {settings.gradient_accumulation}"
        )
    if settings.ppo_micro_batch % settings.processes:
        raise UserError(
            f"PPO's micro-batch is {settings.ppo_micro_batch} (ppo_minibatch_size, or batch_size);"
            f" it must be a multiple of processes, which is {settings.processes}: they share it"
        )
    if settings.ppo_updates <= settings.ppo_warmup_updates:
        raise UserError(
            f"{settings.pairs} pairs are {settings.ppo_updates} PPO updates of"
            f" {settings.ppo_batch_size} prompts, of which {settings.ppo_warmup_updates} warm up:"
            f" nothing is left to time; raise --pairs or lower --ppo-batch-size"
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
        return f"{short_name(self.model)}-{self.adapter}-{self.method}"

    @property
    def hash(self) -> str:
        """12 hexadecimal digits over the axes and the settings that differ from their default."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def weights_dtype(self) -> str:
        """What the base's weights are held in: what trains is always float32."""
        trains_all = self.adapter == "full" and self.method != INFER
        return "float32" if trains_all else self.settings.dtype

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

        What is in it is told by the record's `weights_hash`, `data_digest` and its tasks' digests.
        """
        tasks = ",".join(public_name(name) for name in task_names(self.settings.tasks))
        settings = replace(self.settings, data=public_name(self.settings.data), tasks=tasks)
        return replace(self, model=public_name(self.model), settings=settings)

    def with_seed(self, seed: int) -> Case:
        return replace(self, settings=replace(self.settings, seed=seed))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        return cls(data["model"], data["adapter"], data["method"], Settings(**data["settings"]))


def task_names(text: str) -> tuple[str, ...]:
    """The names of a value of `tasks`, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


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


def short_name(model: str) -> str:
    """As case ids have it: without the owner or the path."""
    return public_name(model).rsplit("/", 1)[-1]


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
    extra: tuple[tuple[str, str, str], ...] = ()  # single cells beside the product of the axes
    # settings of PPO's cases alone: so the hashes of the others do not move with them
    ppo: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, str, str]]:
        """(model, adapter, method) of each case, in order."""
        product = itertools.product(self.models, self.adapters, self.methods)
        adapters = list(dict.fromkeys([*self.adapters, *(cell[1] for cell in self.extra)]))
        return sorted(
            dict.fromkeys([*product, *self.extra]),
            key=lambda cell: (self.models.index(cell[0]), adapters.index(cell[1])),
        )

    def settings_of(self, method: str) -> Settings:
        """The settings of the method's cases."""
        given = replace(self.settings, **(self.ppo if uses_ppo(method) else {}))
        return of_its_kind(given, method)


AXES = ("models", "adapters", "methods")  # as options name them

# lambda: three of some twenty tokens tell true from false, and ORPO's term is a mean over all
_QUICK = Settings(
    pairs=384, batch_size=8, orpo_lambda=4.0, eval_tokens=4096, eval_context=128, eval_stride=64,
    infer_batch_size=4, infer_prompt_tokens=64, infer_new_tokens=16, infer_turns=24,
)  # fmt: skip
# bfloat16: with AMX twice as fast as float32 here; batches of 2 give 64 steps out of 128 pairs
_CPU_REAL = Settings(data="wikipedia-sample", dtype="bfloat16", pairs=128, batch_size=2,
                     orpo_lambda=2.0, targets="qv", eval_tokens=16384, eval_pairs=200,
                     eval_context=512, eval_stride=448, eval_batch_size=8,
                     infer_batch_size=4, infer_prompt_tokens=64, infer_new_tokens=16,
                     infer_turns=24)  # fmt: skip
_QUICK_PPO = {"ppo_batch_size": 32}
# The generator's own reward: a learned one is gamed, which `quick` shows. So many prompts teach a
# tiny model the facts; larger minibatches, as single completions are noise.
_TRUTH_PPO = {"reward": "true", "ppo_kl_coef": 0.02, "ppo_minibatch_size": 32,
              "learning_rate": 3e-3}  # fmt: skip
# Text cut out of an article has no EOS. A token step takes as long for 32 rows as for 8, and its
# SFT epoch would be a third of the reward model.
_CPU_REAL_PPO = {"ppo_batch_size": 32, "ppo_minibatch_size": 8, "missing_eos": "keep",
                 "reward_start": "base", "eval_completions": 32}  # fmt: skip
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
        about="34 trainings and 10 inference cases on the embedded models, minutes on a laptop CPU",
        extra=(
            *((m, a, "ppo") for m in ("tiny-gpt2", "tiny-llama") for a in ("full", "lora")),
            *((m, a, INFER) for m in ("tiny-gpt2", "tiny-llama")
              for a in ("full", "lora", "qlora", "ia3", "prefix")),
        ),
        ppo=_QUICK_PPO,
    ),
    "quick-full": Preset(
        ("tiny-gpt2", "tiny-llama"),
        ("full", "lora", "qlora", "ia3", "prefix", "dora", "rslora", "vera", "ln", "pissa",
         "lora-8bit", "lora-bias", "bitfit", "prompt"),
        ("sft", "dpo", "orpo", "ppo", "sft+dpo", "sft+ppo"), _QUICK,
        ppo=_QUICK_PPO,
        about="168 cases: every adapter, with PPO and both pipelines",
    ),
    "ppo-truth": Preset(
        ("tiny-gpt2", "tiny-llama"), ("lora",), ("ppo", "sft+ppo"), replace(_QUICK, pairs=1536),
        rounds=3, ppo=_TRUTH_PPO,
        about="that PPO makes tinywiki's completions truer: both models, three seeds",
    ),
    "cpu-real": Preset(
        ("smollm2-135m-instruct-q4",), ("lora", "qlora", "ia3", "prefix"),
        ("sft", "dpo", "orpo", "ppo"), _CPU_REAL, ppo=_CPU_REAL_PPO,
        about="a real pretrained model on real Wikipedia text, on a CPU",
        # the reference for the adapters; with orpo and ppo it would say the same at more cost
        extra=tuple(("smollm2-135m-instruct-q4", "full", m) for m in ("sft", "dpo")),
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


def preset_for(model: str) -> str:
    """The preset whose settings suit a model: the first made for it, else a GPU's."""
    made = (n for n, p in PRESETS.items() if n not in ("smoke", "ppo-truth") and model in p.models)
    return next(made, "gpu")
