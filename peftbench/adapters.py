"""The adapters a case can name: how each is put on a model, switched off, saved, merged, counted.

Adding one is a row of ADAPTERS. Trainable weights are float32 on every base, also on a 4-bit or
bfloat16 one. A `full` model is a row like the others; it has no adapter to switch off.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftbench.errors import UserError, unknown_name
from peftbench.targets import bias_targets, ia3_targets, lora_targets, norm_targets

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from peftbench.case import Settings
    from peftbench.quantization import Quantization


@dataclass(frozen=True)
class AdapterRow:
    """One way of fine-tuning."""

    about: str
    family: str  # reference, additive, selective, reparametrised or hybrid
    config: Callable[[PreTrainedModel, Settings], PeftConfig | None]  # None: no adapter, all trains
    quantization: Quantization | None  # of the base
    merges: bool  # its effect can be folded into the base's weights
    learning_rates: Mapping[str, float]  # by method; a model's row may have its own
    papers: tuple[str, ...] = ()  # arXiv numbers


def _full(model: PreTrainedModel, settings: Settings) -> None:
    """No adapter: every weight trains."""


def _is_transposed(model: PreTrainedModel, layer: str) -> bool:
    """Whether a layer's weight is (inputs, outputs), as GPT-2's Conv1D has it."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(layer), Conv1D)


def _lora(
    model: PreTrainedModel, settings: Settings, *, dora: bool = False, rslora: bool = False
) -> PeftConfig:
    """Low-rank updates. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685"""
    from peft import LoraConfig

    targets = lora_targets(model, settings.targets)
    return LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0,
        bias="none", target_modules=targets, use_dora=dora, use_rslora=rslora,
        fan_in_fan_out=_is_transposed(model, targets[0]),
    )  # fmt: skip


def _dora(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """LoRA of the weights' directions, and their lengths. Source: Liu et al. 2024, 2402.09353"""
    return _lora(model, settings, dora=True)


def _lora_bias(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """LoRA; the norms' own weights; and the biases of the layers with LoRA that have one.

    A bias trains as a vector beside LoRA's B, at 0 first: PEFT's `bias="all"` would train the
    base's own, which switching the adapter off does not undo.
    Source: Hu et al. 2021, with the biases of Ben Zaken et al. 2021 (2106.10199) and the norms of
    Chen et al. 2023 (LongLoRA, 2309.12307)
    """
    config: Any = _lora(model, settings)
    config.lora_bias = any(model.get_submodule(n).bias is not None for n in config.target_modules)
    config.modules_to_save = norm_targets(model)
    return config


def _bitfit(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """Every bias that the model has, the norms' included; a model without any is refused.

    In PEFT's LN tuning, which swaps whole layers of any kind; `biases.py` has what makes them cost
    their biases alone. Source: Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199
    """
    from peft import LNTuningConfig

    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=bias_targets(model))


def _rslora(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """LoRA scaled by alpha / sqrt(r). Source: Kalajdzievski 2023, arXiv 2312.03732"""
    return _lora(model, settings, rslora=True)


def _vera(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """Learned scales between two random matrices that all layers share, made from the seed.

    Source: Kopiczko et al. 2024, https://arxiv.org/abs/2310.11454
    """
    from peft import VeraConfig

    targets = lora_targets(model, settings.targets)
    return VeraConfig(
        task_type="CAUSAL_LM", r=settings.vera_rank, target_modules=targets, vera_dropout=0.0,
        projection_prng_key=settings.seed, save_projection=False,
        fan_in_fan_out=_is_transposed(model, targets[0]),
    )  # fmt: skip


def _ln(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """The norms' own weights. Source: Zhao et al. 2023, https://arxiv.org/abs/2312.11420"""
    from peft import LNTuningConfig

    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=norm_targets(model))


def _ia3(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """Learned scales of keys, values and the feed-forward's inner activations."""
    from peft import IA3Config

    targets, feedforward = ia3_targets(model)
    return IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward,
        fan_in_fan_out=_is_transposed(model, targets[0]),
    )  # fmt: skip


def _prefix(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """Learned keys and values before the first token. Source: Li & Liang 2021, arXiv 2101.00190"""
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=settings.prefix_tokens, prefix_projection=False
    )


def _prompt(model: PreTrainedModel, settings: Settings) -> PeftConfig:
    """Learned embeddings before the first token, at those of random real tokens first.

    Source: Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 3.2 (sampled vocabulary)
    """
    from peft import PromptTuningConfig

    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=settings.prefix_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
    )  # fmt: skip


ADAPTERS: dict[str, AdapterRow] = {
    "full": AdapterRow(
        "every weight of the model trains; the reference", "reference", _full,
        quantization=None, merges=False,
        learning_rates={"sft": 5e-5, "dpo": 1e-5, "orpo": 2e-5, "ppo": 1e-5},
    ),
    "lora": AdapterRow(
        "low-rank updates of the linear layers", "reparametrised", _lora,
        quantization=None, merges=True,
        # reward: of PPO's reward model, which is a LoRA adapter whatever the policy's is
        learning_rates={"sft": 5e-4, "dpo": 1e-4, "orpo": 2e-4, "ppo": 1e-4, "reward": 1e-4},
        papers=("2106.09685",),
    ),
    "qlora": AdapterRow(
        "lora over a base held in 4 bits (NF4, double quantisation)", "reparametrised", _lora,
        quantization="nf4", merges=True,
        learning_rates={"sft": 5e-4, "dpo": 1e-4, "orpo": 2e-4, "ppo": 1e-4},
        papers=("2305.14314",),
    ),
    "ia3": AdapterRow(
        "learned scales of keys, values and feed-forward activations", "additive", _ia3,
        quantization=None, merges=True,
        learning_rates={"sft": 1e-2, "dpo": 5e-3, "orpo": 5e-3, "ppo": 5e-3},
        papers=("2205.05638",),
    ),
    "prefix": AdapterRow(
        "learned keys and values before the first token", "additive", _prefix,
        quantization=None, merges=False,
        learning_rates={"sft": 1e-2, "dpo": 5e-3, "orpo": 5e-3, "ppo": 5e-3},
        papers=("2101.00190", "2110.07602"),
    ),
    "dora": AdapterRow(
        "lora of the weights' directions, their lengths beside it", "reparametrised", _dora,
        quantization=None, merges=True,
        learning_rates={"sft": 5e-4, "dpo": 1e-4, "orpo": 2e-4, "ppo": 1e-4},
        papers=("2402.09353",),
    ),
    "rslora": AdapterRow(
        "lora scaled by alpha / sqrt(rank)", "reparametrised", _rslora,
        quantization=None, merges=True,
        learning_rates={"sft": 2e-4, "dpo": 5e-5, "orpo": 1e-4, "ppo": 5e-5},
        papers=("2312.03732",),
    ),
    "vera": AdapterRow(
        "learned scales between random matrices that all layers share", "reparametrised", _vera,
        quantization=None, merges=True,
        learning_rates={"sft": 1e-2, "dpo": 2e-3, "orpo": 5e-3, "ppo": 2e-3},
        papers=("2310.11454",),
    ),
    "ln": AdapterRow(
        "the norms' own weights", "selective", _ln,
        quantization=None, merges=True,
        learning_rates={"sft": 2e-3, "dpo": 5e-4, "orpo": 1e-3, "ppo": 5e-4},
        papers=("2312.11420",),
    ),
    "pissa": AdapterRow(
        "lora that starts at the weights' principal components", "reparametrised", _lora,
        quantization=None, merges=True,
        learning_rates={"sft": 2e-4, "dpo": 5e-5, "orpo": 1e-4, "ppo": 5e-5},
        papers=("2404.02948",),
    ),
    "lora-8bit": AdapterRow(
        "lora over a base held in 8 bits (LLM.int8)", "reparametrised", _lora,
        quantization="int8", merges=True,
        learning_rates={"sft": 5e-4, "dpo": 1e-4, "orpo": 2e-4, "ppo": 1e-4},
        papers=("2208.07339",),
    ),
    "lora-bias": AdapterRow(
        "lora, the biases and the norms' own weights", "hybrid", _lora_bias,
        quantization=None, merges=True,
        learning_rates={"sft": 5e-4, "dpo": 1e-4, "orpo": 2e-4, "ppo": 1e-4},
        papers=("2106.09685", "2106.10199", "2312.11420"),
    ),
    "bitfit": AdapterRow(
        "the biases", "selective", _bitfit,
        quantization=None, merges=True,
        learning_rates={"sft": 2e-3, "dpo": 5e-4, "orpo": 1e-3, "ppo": 5e-4},
        papers=("2106.10199",),
    ),
    "prompt": AdapterRow(
        "learned embeddings before the first token", "additive", _prompt,
        quantization=None, merges=False,
        learning_rates={"sft": 3e-2, "dpo": 1e-2, "orpo": 2e-2, "ppo": 1e-2},
        papers=("2104.08691",),
    ),
}  # fmt: skip


def find_adapter(adapter: str) -> AdapterRow:
    """The table's row. Raises: UserError with the nearest names."""
    if adapter not in ADAPTERS:
        raise unknown_name("adapter", adapter, ADAPTERS)
    return ADAPTERS[adapter]


def attach(model: PreTrainedModel, adapter: str, settings: Settings) -> PreTrainedModel | PeftModel:
    """The model with the adapter on it: only the adapter's weights train, in float32.

    The same seed gives the same start on every device, whatever ran before; torch's own random
    state is left as it was. For `full` the model itself, its weights in float32.
    """
    import torch
    from peft import get_peft_model

    row = find_adapter(adapter)
    model.requires_grad_(False)
    config = row.config(model, settings)
    if config is None:
        return model.float().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        attached = get_peft_model(model, config)
        if adapter == "prefix" and model.device.type != "meta":
            _start_prefix_from_activations(attached, settings)
    if adapter == "pissa":
        from peftbench.pissa import start_at_principal_components

        start_at_principal_components(attached)
    _make_ready(attached, only_biases=adapter == "bitfit")
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return attached


def _make_ready(model: PeftModel, *, only_biases: bool) -> None:
    """What PEFT's own layers lack for this package, on a model that was wrapped just now."""
    from peftbench.biases import drop_biases_that_the_base_lacks, train_biases_alone
    from peftbench.prompt import read_in_front

    if only_biases:
        train_biases_alone(model)
    drop_biases_that_the_base_lacks(model)
    _keep_norms_in_their_dtype(model)
    if model.active_peft_config.peft_type == "PROMPT_TUNING":
        read_in_front(model)


def _keep_norms_in_their_dtype(model: PeftModel) -> None:
    """An RMSNorm whose trained weight is float32 would make float32 of a bfloat16 input, which the
    next layer refuses."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, LNTuningLayer | ModulesToSaveWrapper):
            module.register_forward_hook(_in_the_inputs_dtype)


def _in_the_inputs_dtype(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    return output.to(inputs[0].dtype)


def _start_prefix_from_activations(model: PeftModel, settings: Settings) -> None:
    """Set the prefix to the base's own keys and values for tokens drawn at random.

    PEFT's default start, noise of standard deviation 1, is far from anything the model has seen.
    Source: Li & Liang 2021, section 7.4: activations of real words, even unrelated ones, do better.
    """
    import torch
    from peft import initialize_kv_prefix_from_past_key_values

    base = model.get_base_model()
    ids = torch.randint(base.config.get_text_config().vocab_size, (1, settings.prefix_tokens))
    was_training = base.training
    base.eval()
    with torch.no_grad():
        cache = base(input_ids=ids.to(base.device), use_cache=True).past_key_values
    base.train(was_training)
    initialize_kv_prefix_from_past_key_values(
        model, past_key_values=cache, num_virtual_tokens=settings.prefix_tokens
    )


def inner_model(model: Any) -> Any:
    """The model that holds the adapter's layers, as PEFT's own `generate` uses it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another tree of modules over the same parameters and buffers: it costs no weights.

    Made before `attach`, it stays the plain base whatever is put on the first tree, and may carry
    an adapter of its own. So policy, reward, value and reference stand on one base at once with
    adapters of any types, which one `PeftModel` refuses, and nothing has to be switched: switching
    adapters between a forward pass and its backward leaves gradients out without an error.
    """
    from peftbench.quantization import layers_8bit

    shared: list[object] = [*model.parameters(), *model.buffers()]
    # a quantised layer holds its weight's scales a second time
    shared += [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    for layer in layers_8bit(model).values():
        shared += [layer.state.CB, layer.state.SCB]
    return copy.deepcopy(model, {id(item): item for item in shared})


@contextlib.contextmanager
def adapter_off(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, the model answers as its base: the reference of DPO and the KL.

    PEFT switches the adapter's gradients off and, at the end, on again even where they were off
    before; here every flag is put back as it was found.
    Raises: ValueError for a model without an adapter: it has no reference in it.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError("a fully trained model has no adapter to switch off")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != flags[name]:
                parameter.requires_grad_(flags[name])


def trainable_names(model: torch.nn.Module) -> frozenset[str]:
    """Names of the parameters that train: taken after attaching, checked again later."""
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


def count_params(model: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, the adapter's included; a 4-bit weight counts as one, and what
    PiSSA keeps of its start counts too: it takes memory."""
    from peftbench.quantization import logical_size

    parameters = list(model.parameters())
    return (
        sum(logical_size(p) for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def save_adapter(model: PreTrainedModel | PeftModel, folder: Path) -> int:
    """Write what was trained as safetensors and return those files' bytes; `full` writes all."""
    from peft import PeftModel

    from peftbench import pissa

    if isinstance(model, PeftModel) and pissa.is_pissa(model):
        pissa.save_as_lora(model, folder)
        written = "adapter_model*.safetensors"
    elif isinstance(model, PeftModel):
        with warnings.catch_warnings():
            # PEFT takes the biases beside LoRA's B for torn shards, as they have one dimension
            warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
            # "auto" would ask the Hub for the base's vocabulary size
            model.save_pretrained(folder, save_embedding_layers=False)
        written = "adapter_model*.safetensors"
    else:
        model.save_pretrained(folder)
        written = "model*.safetensors"
    return sum(file.stat().st_size for file in folder.glob(written))


def load_adapter(
    base: PreTrainedModel, folder: Path, *, is_trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """A saved adapter on its base (in place); for a `full` folder the model that is saved there.

    `PeftModel.from_pretrained(is_trainable=True)` refuses prefix tuning, so the adapter is made
    anew from its config and then given its weights.
    """
    import torch
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / "adapter_config.json").is_file():
        loaded: PreTrainedModel = type(base).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        return loaded.to(base.device).requires_grad_(is_trainable).eval()
    from peftbench import pissa

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    state = load_file(folder / "adapter_model.safetensors")
    base.requires_grad_(False)
    if pissa.was_saved(folder):
        model, state = pissa.wrapped(base, config, state)
    else:
        model = get_peft_model(base, config)
    _make_ready(model, only_biases=all(name.endswith(".bias") for name in state))
    outcome = set_peft_model_state_dict(model, state)
    # PEFT copies a prefix's weights in by a way of its own and still calls their key unexpected
    if unknown := set(outcome.unexpected_keys) - {"prompt_embeddings"}:
        raise UserError(f"the adapter in {folder} does not fit this base: {min(unknown)}")
    if not is_trainable:
        model.requires_grad_(False)  # PEFT leaves a prefix trainable also in inference mode
    return model.eval()


def merged(model: PeftModel, adapter: str) -> PreTrainedModel:
    """A plain model with the adapter folded into a copy of the base; `model` is left as it was.

    Over a quantised base the copy is dequantised first: folding into 4 bits rounds the adapter
    away.
    Raises: UserError for an adapter that cannot be folded in.
    """
    from transformers.pytorch_utils import Conv1D

    from peftbench.biases import make_plain_layers
    from peftbench.quantization import dequantize_layer, quantized_layers, unmark_quantized

    if not find_adapter(adapter).merges:
        raise UserError(f"{adapter} does not merge: {ADAPTERS[adapter].about}")
    if not find_adapter(adapter).quantization:
        tree = copy.deepcopy(model)
        make_plain_layers(tree)
        plain = tree.merge_and_unload()
        for parameter in plain.parameters():  # norms that were trained in float32
            parameter.data = parameter.data.to(model.dtype)
        return plain
    deltas = _lora_deltas(model)
    base: PreTrainedModel = copy.deepcopy(model).unload()
    for name, layer in quantized_layers(base).items():
        full: Any = dequantize_layer(layer, base.dtype)
        if name in deltas:
            delta = deltas[name].T if isinstance(full, Conv1D) else deltas[name]
            full.weight.data += delta.to(full.weight.dtype)
        base.set_submodule(name, full)
    unmark_quantized(base)
    return base


def _lora_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """(outputs, inputs) update of each adapted layer, by the base layer's path: alpha / r B A."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight(model.active_adapter).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy, on the host, of everything that trains."""
    return {
        name: p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def moved_ratio(
    before: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    rows: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Share of the snapshot's entries that are different now.

    `rows` gives, for a parameter's name, a mask over its first dimension, True where it counts: an
    embedding row that no token touched cannot move. LoRA's A has no gradient in the first step,
    where B is still 0, so two steps must have been made.
    """
    now = dict(model.named_parameters())
    moved = entries = 0
    for name, old in before.items():
        different = now[name].detach().cpu() != old
        if rows is not None and name in rows:
            different = different[rows[name].cpu()]
        moved += int(different.sum())
        entries += different.numel()
    return moved / entries
