"""The models a case can name, how each is had, and how one is loaded. Imports no torch on its own.

A model is a row of MODELS, a Hub id (owner/name) or a local folder. Weights come from safetensors
(or a GGUF file in a local folder) and no code of a model's repository is ever run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftbench import hub
from peftbench.adapters import find_adapter
from peftbench.case import Case, expanded, is_local
from peftbench.data import assets
from peftbench.errors import UserError, unknown_name
from peftbench.methods import INFER, stages
from peftbench.model_files import check_folder, file_hash, read_config, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.quantization import Quantization


@dataclass(frozen=True)
class ModelRow:
    """A model that can be given by its short name."""

    kind: Literal["package", "asset", "hub", "folder"]
    location: (
        str  # package: folder beside this file; asset: its name; hub: owner/name; folder: path
    )
    about: str = ""
    revision: str | None = None  # hub: the commit, so that a row means the same weights for ever
    gated: bool = False  # hub: needs an accepted licence and a token
    # adapter -> method -> rate, where the adapter's own does not fit: tiny models take larger steps
    learning_rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # for random weights without a network


# Found with the quick preset on seeds 0 and 1, both models: by held-out preference accuracy for
# DPO and ORPO, by perplexity for SFT. One table for both, so that they compare. From `dora` on by
# the sweeps in results/sweeps/tiny*.md: the best mean over both models, where it beats the analogy
# with LoRA by more than a standard error. PPO's true rewards there tell no rate from another: what
# is best on one model is not on the other.
_TINY_LEARNING_RATES = {
    "full": {"sft": 1.5e-3, "dpo": 5e-4, "orpo": 1.5e-3, "ppo": 2e-4},
    "lora": {"sft": 5e-3, "dpo": 3e-3, "orpo": 4e-3, "ppo": 1e-3, "reward": 1e-3},
    "qlora": {"sft": 5e-3, "dpo": 3e-3, "orpo": 4e-3, "ppo": 1e-3},
    "ia3": {"sft": 0.1, "dpo": 0.15, "orpo": 0.15, "ppo": 0.05},
    "prefix": {"sft": 0.2, "dpo": 0.3, "orpo": 0.4, "ppo": 0.05},
    "dora": {"sft": 5e-3, "dpo": 3e-3, "orpo": 4e-3, "ppo": 1e-3},
    "rslora": {"sft": 3e-3, "dpo": 4e-3, "orpo": 8e-3, "ppo": 5e-4},
    "vera": {"sft": 0.05, "dpo": 0.12, "orpo": 0.2, "ppo": 0.01},
    "ln": {"sft": 0.08, "dpo": 0.08, "orpo": 0.32, "ppo": 5e-3},
    "pissa": {"sft": 2e-3, "dpo": 4e-3, "orpo": 2e-3, "ppo": 5e-4},
    "lora-8bit": {"sft": 5e-3, "dpo": 3e-3, "orpo": 4e-3, "ppo": 1e-3},
    "lora-bias": {"sft": 5e-3, "dpo": 3e-3, "orpo": 4e-3, "ppo": 1e-3},
    "bitfit": {"sft": 0.02, "dpo": 0.08, "orpo": 0.08, "ppo": 5e-3},
    "prompt": {"sft": 0.1, "dpo": 0.1, "orpo": 0.1, "ppo": 0.03},
}

MODELS: dict[str, ModelRow] = {
    "tiny-gpt2": ModelRow(
        "package", "tiny/tiny-gpt2", learning_rates=_TINY_LEARNING_RATES,
        about="GPT-2 architecture, pretrained on tinywiki's first domain, inside the package",
    ),
    "tiny-llama": ModelRow(
        "package", "tiny/tiny-llama", learning_rates=_TINY_LEARNING_RATES,
        about="LLaMA architecture, pretrained on tinywiki's first domain, inside the package",
    ),
    "smollm2-135m-instruct-q4": ModelRow(
        "asset", "smollm2-135m-instruct-q4",
        # of 64 steps on query and value alone; 4e-3 diverges with DPO
        learning_rates={
            **{a: {"dpo": 2e-3, "orpo": 3e-3} for a in ("lora", "qlora")},
            # by the sweep in results/sweeps/real.md, 32 steps; all at the end of its grid
            **{a: {"sft": 2e-3} for a in ("dora", "lora-8bit", "lora-bias")},
            "rslora": {"sft": 8e-4}, "vera": {"sft": 0.04},
        },
        about="SmolLM2-135M-Instruct dequantised from Q4_1, out of a PyPI wheel; its figures are"
        " not the original's",
        config={
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        },
    ),
    "gpt-2": ModelRow(
        "hub", "openai-community/gpt2", revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        about="GPT-2 small, 124 M parameters",
        config={
            "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768,
            "n_layer": 12, "n_head": 12, "bos_token_id": 50256, "eos_token_id": 50256,
        },
    ),
    "llama-7b": ModelRow(
        "hub", "meta-llama/Llama-2-7b-hf", revision="01c7f73d771dfac7d292323805ebc428287df4f9",
        gated=True, about="Llama 2, 6.7 B parameters; gated",
        config={
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
}  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# architectures whose only biases are those that a config asks for; all norms are RMSNorms
_BIAS_FLAGS = {
    "llama": ("attention_bias", "mlp_bias"), "mistral": (), "gemma": ("attention_bias",),
    "gemma2": ("attention_bias",), "gemma3_text": ("attention_bias",), "phi3": (),
    "olmo2": ("attention_bias",), "qwen3": ("attention_bias",), "granite": ("attention_bias",
    "mlp_bias"), "smollm3": ("attention_bias", "mlp_bias"),
}  # fmt: skip
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def find_model(model: str) -> ModelRow:
    """The table's row, or one made for a local folder or a Hub id.

    Raises: UserError for a name that is none of the three.
    """
    if model in MODELS:
        return MODELS[model]
    folder = expanded(model)
    if folder.exists() or is_local(model):
        return ModelRow("folder", str(folder))
    if _HUB_ID.fullmatch(model):
        return ModelRow("hub", model)
    raise UserError(
        f"{unknown_name('model', model, MODELS)}; or give a Hub id (owner/name) or a local folder"
    )


def resolved(case: Case) -> Case:
    """The case with its learning rates written out: the setting if given, else the table's.

    So a rate changed in a table changes the case's hash. A pipeline's own rate is that of its last
    stage.
    """
    if case.method == INFER:
        return case
    settings, (*before, last) = case.settings, stages(case.method)
    wanted = {"learning_rate": (case.adapter, last)}
    if before:
        wanted["sft_learning_rate"] = (case.adapter, "sft")
    if last == "ppo" and settings.reward == "model":
        wanted["reward_learning_rate"] = ("lora", "reward")
        if settings.reward_start == "sft":
            wanted["reward_sft_learning_rate"] = ("lora", "sft")
    rates: dict[str, Any] = {
        name: getattr(settings, name) or table_rate(case.model, adapter, stage)
        for name, (adapter, stage) in wanted.items()
    }
    return replace(case, settings=replace(settings, **rates))


def table_rate(model: str, adapter: str, stage: str) -> float:
    """The model's own rate for adapter and method, else the adapter's."""
    own = find_model(model).learning_rates.get(adapter, {})
    return own.get(stage) or find_adapter(adapter).learning_rates[stage]


def check_model(model: str, weights: str) -> None:
    """Raise UserError, one line, if this model cannot be had; loads nothing and imports no torch.

    An asset that is not cached yet passes: fetching it has its own messages.
    """
    row = find_model(model)
    if weights == "random" and row.config:
        return
    if row.kind in ("package", "folder"):
        check_folder(_local_folder(row), weights, model, in_package=row.kind == "package")
    if row.kind == "hub":
        hub.check_repo(row.location, row.revision, gated=row.gated, weights=weights)
    if weights == "pretrained":
        _check_not_quantized(model, row)


def model_context(model: str, weights: str) -> int | None:
    """Positions that the model has, in tokens; None if its config does not say."""
    row = find_model(model)
    config = _config_values(row)
    found = next((config[key] for key in _CONTEXT_KEYS if key in config), None)
    return None if found is None else int(found)


def load_config(model: str, weights: str) -> PreTrainedConfig:
    """The model's config: the known constants for random weights of a listed model."""
    from transformers import AutoConfig

    row = find_model(model)
    if weights == "random" and row.config:
        values = dict(row.config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    gguf = _gguf_file(row)
    try:
        return AutoConfig.from_pretrained(
            _source(row), **_source_arguments(row), **({"gguf_file": gguf} if gguf else {})
        )
    except (OSError, ValueError) as error:
        raise _load_error(model, row, error) from error


def load_tokenizer(model: str, weights: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for random weights whose tokenizer is not on this machine."""
    from transformers import AutoTokenizer

    row = find_model(model)
    random = weights == "random"
    if random and row.kind == "asset" and assets.cached_path(row.location) is None:
        return None
    arguments = _source_arguments(row)
    if random:
        arguments["local_files_only"] = True  # not worth a download: synthetic ids do
    if gguf := _gguf_file(row):
        arguments["gguf_file"] = gguf
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _source(row), **arguments
        )
    except (OSError, ValueError, ImportError) as error:
        if random:
            return None
        raise _load_error(model, row, error) from error
    if tokenizer.vocab_size > 0:
        return tokenizer
    # transformers 5 makes an empty tokenizer of some classes where the files are missing
    if random:
        return None
    raise UserError(f"{model} has no tokenizer files; add its tokenizer or use --weights random")


def load_model(
    model: str, *, weights: str, dtype: torch.dtype, device: torch.device,
    quantize: Quantization | None, seed: int,
) -> PreTrainedModel:  # fmt: skip
    """The base model on the device, in eval mode, nothing frozen, without a cache for training.

    `quantize` says in what its linear layers are held. `seed` makes random weights.
    """
    from safetensors import SafetensorError

    from peftbench.weights import build_random, load_pretrained

    config = load_config(model, weights)
    if weights == "random":
        loaded = build_random(config, dtype=dtype, device=device, quantize=quantize, seed=seed)
    else:
        row = find_model(model)
        try:
            loaded = load_pretrained(
                _source(row), config, _source_arguments(row), _gguf_file(row),
                dtype=dtype, device=device, quantize=quantize,
            )  # fmt: skip
        except (OSError, SafetensorError) as error:
            raise _load_error(model, row, error) from error
    loaded.config.use_cache = False
    return loaded.eval()


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0, also those that modules keep as plain numbers.

    Attention and OPT apply dropout as a function with a number of their own, which replacing
    `nn.Dropout` alone would leave on in training mode.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


def weights_hash(model: str, weights: str, seed: int) -> str:
    """sha256 of the safetensors (or GGUF) file, or over the files' hashes; "random, seed N"."""
    if weights == "random":
        return f"random, seed {seed}"
    row = find_model(model)
    if row.kind == "asset":
        folder = assets.fetch(row.location)
        files = assets.manifest(row.location)["files"]
        hashes = [files[f.name]["sha256"] for f in weight_files(folder)]
    else:
        hashes = [file_hash(file) for file in _weight_files(row)]
    if not hashes:
        raise UserError(f"{model} has no weights on this machine; load it first")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters as stored; quantised ones with their scales."""
    from peftbench.quantization import storage_bytes

    return sum(storage_bytes(parameter) for parameter in model.parameters())


def _local_folder(row: ModelRow) -> Path:
    return Path(__file__).parent / row.location if row.kind == "package" else Path(row.location)


def _source(row: ModelRow) -> str:
    """What transformers' `from_pretrained` takes; fetches an asset that is not cached."""
    if row.kind == "hub":
        return row.location
    return str(assets.fetch(row.location) if row.kind == "asset" else _local_folder(row))


def _source_arguments(row: ModelRow) -> dict[str, Any]:
    if row.kind == "hub":
        return {
            "revision": row.revision or "main", "token": hub.hub_token(),
            "trust_remote_code": False,
        }  # fmt: skip
    return {"trust_remote_code": False, "local_files_only": True}


def _gguf_file(row: ModelRow) -> str | None:
    """The GGUF file to read from a local folder that has no safetensors."""
    if row.kind != "folder":
        return None
    files = weight_files(_local_folder(row))
    return files[0].name if files and files[0].suffix == ".gguf" else None


def _config_values(row: ModelRow) -> Mapping[str, Any]:
    """config.json's values, without transformers. Empty for a GGUF file, which keeps its own."""
    if row.config:
        return row.config
    if row.kind == "hub":
        return hub.read_config(row.location, row.revision)
    return read_config(_local_folder(row))


def has_biases(model: str) -> bool:
    """Whether any layer has a bias, told by the config: False only where that is certain."""
    values = _config_values(find_model(model))
    flags = _BIAS_FLAGS.get(values.get("model_type", ""))
    return flags is None or any(values.get(flag, False) for flag in flags)


def _check_not_quantized(model: str, row: ModelRow) -> None:
    if "quantization_config" in _config_values(row):
        raise UserError(
            f"{model} is already quantised; give the full-precision model: qlora quantises it"
        )


def _weight_files(row: ModelRow) -> list[Path]:
    if row.kind == "hub":
        return hub.cached_weights(row.location, row.revision)
    return weight_files(_local_folder(row))


def _load_error(model: str, row: ModelRow, error: Exception) -> UserError:
    """One line for what transformers raised while it read a model."""
    if isinstance(error, UserError):
        return error
    if row.kind == "hub" and isinstance(error, OSError):
        return hub.unreachable(row.location, row.revision, error)
    reason = " ".join(str(error).split("\n")[0].split())[:240]
    return UserError(f"cannot load {model}: {reason}")
