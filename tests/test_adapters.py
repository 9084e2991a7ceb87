"""Every adapter of the table, on GPT-2 and LLaMA and on architectures that no table lists."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from peftbench.adapters import (
    ADAPTERS,
    adapter_off,
    attach,
    count_params,
    load_adapter,
    merged,
    moved_ratio,
    save_adapter,
    shared_copy,
    snapshot,
    trainable_names,
)
from peftbench.case import Settings
from peftbench.errors import UserError
from peftbench.methods import METHODS, stages
from peftbench.models import disable_dropout, load_model
from peftbench.quantization import layers_4bit, layers_8bit, quantized_layers
from peftbench.targets import ia3_targets, linear_shapes, lora_targets

SETTINGS = Settings(rank=4, alpha=12, prefix_tokens=5, seed=3)
SIZES = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
PEFT_ADAPTERS = [name for name in ADAPTERS if name != "full"]
MERGING = [name for name, row in ADAPTERS.items() if row.merges]
IDS = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(0))


def make_config(name: str) -> Any:
    import transformers as t

    kv = SIZES | {"num_key_value_heads": 2}
    configs: dict[str, Any] = {
        "gpt2": lambda: GPT2Config(
            vocab_size=61, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
            eos_token_id=1,
        ),
        "llama": lambda: LlamaConfig(**kv),
        "llama with biases": lambda: LlamaConfig(**kv, attention_bias=True, mlp_bias=True),
        "qwen2": lambda: t.Qwen2Config(**kv),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SIZES),
        "opt": lambda: t.OPTConfig(
            vocab_size=61, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=0, eos_token_id=1,
            pad_token_id=2,
        ),
        "olmo2": lambda: t.Olmo2Config(**kv),
        "phi3": lambda: t.Phi3Config(**kv),
    }  # fmt: skip
    return configs[name]()


ARCHITECTURES = ["gpt2", "llama"]
NO_BIASES = ["llama", "olmo2", "phi3"]
UNLISTED = ["qwen2", "gpt_neox", "opt", "olmo2", "phi3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved random model of each architecture, its weights wide enough for logits to matter."""
    made = {}
    for name in [*ARCHITECTURES, *UNLISTED, "llama with biases"]:
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(make_config(name))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 4
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    if request.node.callspec.params.get("adapter") == "bitfit" and request.param in NO_BIASES:
        return folders["llama with biases"]  # bitfit trains nothing else
    return folders[request.param]


def load(folder: str, adapter: str, dtype: torch.dtype = torch.float32) -> Any:
    model = load_model(
        folder, weights="pretrained", dtype=dtype, device=torch.device("cpu"),
        quantize=ADAPTERS[adapter].quantization, seed=0,
    )  # fmt: skip
    disable_dropout(model)
    return model


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits.clone()


def train(model: Any, steps: int, learning_rate: float = 1e-2) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


OF_ADAPTERS = ("lora_", "ia3_", "prompt_encoder", "vera_lambda", "ln_tuning_layers",
               "modules_to_save", ".start.")  # fmt: skip


def base_state(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Every tensor of the base, 4-bit storage and its scales included, by the base's own names."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = {}
    for name, parameter in base.named_parameters():
        if any(mark in name for mark in OF_ADAPTERS):
            continue
        name = name.replace(".base_layer", "").replace(".original_module", "")
        state[name] = parameter.detach().clone()
        quant_state = getattr(parameter, "quant_state", None)
        if quant_state is not None:
            state[name + ".absmax"] = quant_state.absmax.clone()
            state[name + ".state2"] = quant_state.state2.absmax.clone()
        if getattr(parameter, "SCB", None) is not None:
            state[name + ".SCB"] = parameter.SCB.clone()
    return state


# --- the whole table, on GPT-2 and LLaMA ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", PEFT_ADAPTERS)
def test_start_is_the_base_exactly_except_for_a_prefix_or_prompt(
    folder: str, adapter: str, dtype: torch.dtype
) -> None:
    model = load(folder, adapter, dtype)
    expected = logits(model)
    attached = attach(model, adapter, SETTINGS)
    difference = (logits(attached) - expected).abs().max().item()
    if adapter in ("prefix", "prompt"):
        assert difference > 1e-3
    elif adapter == "dora":  # divides by the weights' lengths and multiplies by them again
        assert difference < (1e-5 if dtype == torch.float32 else 0.1)
    else:
        assert difference == 0


def test_prefix_starts_from_the_bases_own_activations(folder: str) -> None:
    """The prefix acts as if its tokens had been read before: checked against reading them."""
    base = load(folder, "prefix")
    with torch.random.fork_rng():
        torch.manual_seed(SETTINGS.seed)
        expected_model = copy.deepcopy(base)
        attached = attach(base, "prefix", SETTINGS)
    table = attached.prompt_encoder["default"].embedding.weight.detach()
    first_keys = table.view(5, 2 * 2, -1)[:, 0]  # (tokens, layers x (key, value), heads x size)
    candidates = torch.arange(61)[None]
    found = []
    for position in range(5):
        ids = torch.zeros((61, 5), dtype=torch.long)
        ids[:, position] = candidates[0]
        with torch.no_grad():
            cache = expected_model(input_ids=ids, use_cache=True).past_key_values
        keys = cache.layers[0].keys[:, :, position].reshape(61, -1)
        distances = (keys - first_keys[position]).abs().amax(-1)
        assert distances.min() < 1e-5
        found.append(int(distances.argmin()))
    prompt = torch.tensor(found).expand(3, 5)
    expected = logits(expected_model, input_ids=torch.cat([prompt, IDS], 1))[:, 5:]
    assert torch.allclose(logits(attached), expected, atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_same_seed_gives_the_same_start_and_leaves_torchs_random_state_alone(
    folder: str, adapter: str
) -> None:
    starts = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        model = load(folder, adapter)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        starts.append(snapshot(attach(model, adapter, replace(SETTINGS, seed=seed))))
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = starts
    assert all(torch.equal(first[name], again[name]) for name in first)
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    drawn = ("lora", "qlora", "prefix", "dora", "rslora", "lora-8bit", "lora-bias", "prompt")
    assert differs is (adapter in drawn)


@pytest.mark.parametrize("quantized", ["qlora", "lora-8bit"])
def test_lora_has_the_same_start_and_targets_over_a_quantised_base(
    folder: str, quantized: str
) -> None:
    lora, other = (
        snapshot(attach(load(folder, name), name, SETTINGS)) for name in ("lora", quantized)
    )
    assert lora.keys() == other.keys()
    assert all(torch.equal(lora[name], other[name]) for name in lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_the_adapter_trains_and_its_weights_are_float32(
    folder: str, adapter: str, dtype: torch.dtype
) -> None:
    base = load(folder, adapter, dtype)
    names = {name for name, _ in base.named_parameters()}
    model = attach(base, adapter, SETTINGS)
    trainable = trainable_names(model)
    assert trainable
    if adapter == "full":
        assert trainable == names
    else:
        marks = {
            "prefix": ["prompt_encoder"], "prompt": ["prompt_encoder"], "ia3": ["ia3_l"],
            "vera": ["vera_lambda"], "ln": ["ln_tuning_layers"], "bitfit": ["ln_tuning_layers"],
            "lora-bias": ["lora_", "modules_to_save"],
        }.get(adapter, ["lora_"])  # fmt: skip
        marked = {n for n, _ in model.named_parameters() if any(mark in n for mark in marks)}
        assert trainable == marked
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert trainable_names(model) == trainable


@pytest.mark.parametrize("adapter", PEFT_ADAPTERS)
def test_training_leaves_the_base_bit_identical_and_moves_the_adapter(
    folder: str, adapter: str
) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    untouched = base_state(load(folder, adapter), adapter)
    before, start = snapshot(model), logits(model)
    train(model, steps=3)
    found = base_state(model, adapter)
    assert found.keys() == untouched.keys()
    assert all(torch.equal(found[name], untouched[name]) for name in untouched)
    assert moved_ratio(before, model) > 0.9
    assert (logits(model) - start).abs().max() > 1e-3


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_trainable_parameter_gets_a_gradient_by_the_second_step(
    folder: str, adapter: str
) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    train(model, steps=2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("adapter", PEFT_ADAPTERS)
def test_adapter_off_is_the_base_bit_for_bit_and_changes_no_flag(folder: str, adapter: str) -> None:
    base = load(folder, adapter)
    expected = logits(base)
    model = attach(base, adapter, SETTINGS)
    train(model, steps=2)
    tuned = logits(model)
    frozen = next(iter(trainable_names(model)))
    model.get_parameter(frozen).requires_grad_(False)
    flags = trainable_names(model)
    for training in (True, False):
        model.train(training)
        with adapter_off(model), torch.no_grad():
            assert model.training is training
            assert torch.equal(model(input_ids=IDS).logits, expected)
        assert model.training is training
        assert trainable_names(model) == flags
    assert torch.equal(logits(model), tuned)
    assert not torch.equal(tuned, expected)


@pytest.mark.parametrize("adapter", PEFT_ADAPTERS)
def test_adapter_off_between_forward_and_backward_keeps_the_gradient(
    folder: str, adapter: str
) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    train(model, steps=1)
    gradients = []
    for interrupted in (False, True):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        if interrupted:
            with adapter_off(model), torch.no_grad():
                model(input_ids=IDS)
        loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())


def test_a_full_model_has_no_adapter_to_switch_off(folder: str) -> None:
    model = attach(load(folder, "full"), "full", SETTINGS)
    with pytest.raises(ValueError, match="no adapter to switch off"), adapter_off(model):
        pass


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_save_and_load_give_equal_logits(
    folder: str, adapter: str, is_trainable: bool, tmp_path: Path
) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    trainable = trainable_names(model)
    train(model, steps=2)
    size = save_adapter(model, tmp_path)
    assert size == sum(f.stat().st_size for f in tmp_path.iterdir() if f.suffix == ".safetensors")
    # float32 entries and a header; PiSSA's as a LoRA of twice the rank
    entries = 4 * count_params(model)[1] * (2 if adapter == "pissa" else 1)
    assert entries < size < entries + 20_000
    again = load_adapter(load(folder, adapter), tmp_path, is_trainable=is_trainable)
    assert torch.equal(logits(again), logits(model))
    assert trainable_names(again) == (trainable if is_trainable else frozenset())
    if is_trainable:
        before = snapshot(again)
        train(again, steps=2)
        assert moved_ratio(before, again) > 0.9


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # bitfit's weights are the base's
@pytest.mark.parametrize("adapter", PEFT_ADAPTERS)
def test_plain_peft_loads_what_was_saved(folder: str, adapter: str, tmp_path: Path) -> None:
    """On the base as it is; PEFT also gives logits of a prompt's own positions."""
    from peft import PeftModel

    model = attach(load(folder, adapter), adapter, SETTINGS)
    start = logits(model)
    train(model, steps=2)
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(load(folder, adapter), tmp_path)
    found, expected = logits(plain)[:, -IDS.shape[1] :], logits(model)
    assert (found - expected).abs().max() < 1e-4 < (expected - start).abs().max()


@pytest.mark.parametrize("adapter", MERGING)
def test_merging_reproduces_the_logits_in_a_plain_model_that_can_be_reloaded(
    folder: str, adapter: str, tmp_path: Path
) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    base = logits(model)
    train(model, steps=4)
    tuned = logits(model)
    plain = merged(model, adapter)
    assert (tuned - base).abs().max() > 0.1  # so that the tolerance below means something
    assert (logits(plain) - tuned).abs().max() < 1e-4
    assert torch.equal(logits(model), tuned)
    assert not quantized_layers(plain)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert {n for n, _ in again.named_parameters()} == {
        n for n, _ in load(folder, "full").named_parameters()
    }
    assert (logits(again) - tuned).abs().max() < 1e-4


@pytest.mark.parametrize("adapter", [name for name in PEFT_ADAPTERS if name not in MERGING])
def test_an_adapter_that_does_not_merge_says_so(folder: str, adapter: str) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    with pytest.raises(UserError, match=f"{adapter} does not merge"):
        merged(model, adapter)


def test_qlora_over_the_query_and_value_layers_merges_the_others_too(folder: str) -> None:
    settings = replace(SETTINGS, targets="qv")
    model = attach(load(folder, "qlora"), "qlora", settings)
    train(model, steps=4)
    tuned = logits(model)
    plain = merged(model, "qlora")
    assert not layers_4bit(plain)
    assert (logits(plain) - tuned).abs().max() < 1e-4


@pytest.mark.parametrize("adapter", PEFT_ADAPTERS)
def test_left_padded_rows_with_their_positions_give_the_unpadded_logits(
    folder: str, adapter: str
) -> None:
    model = attach(load(folder, adapter), adapter, SETTINGS)
    train(model, steps=2)
    short = IDS[:1, :7]
    padded = torch.cat([torch.zeros((1, 5), dtype=torch.long), short], 1)
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    expected = logits(model, input_ids=short)[0]
    found = logits(
        model, input_ids=torch.cat([padded, IDS[1:2]]), attention_mask=mask,
        position_ids=(mask.cumsum(-1) - mask),
    )  # fmt: skip
    assert torch.allclose(found[0, 5:], expected, atol=1e-4)
    assert torch.allclose(found[1], logits(model, input_ids=IDS[1:2])[0], atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_row_has_a_family_and_a_rate_for_each_method(adapter: str) -> None:
    families = ("reference", "additive", "selective", "reparametrised", "hybrid")
    assert ADAPTERS[adapter].family in families
    stages_of_all = {stage for method in METHODS for stage in stages(method)}
    assert set(ADAPTERS[adapter].learning_rates) >= stages_of_all
    assert "reward" in ADAPTERS["lora"].learning_rates


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_shared_copy_is_the_base_and_costs_no_weights(folder: str, adapter: str) -> None:
    """4-bit scales included; what is put on one tree is not on the other."""
    base = load(folder, adapter)
    expected = logits(base)
    twin = shared_copy(base)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in base.parameters()}
    for layer, other in zip(layers_4bit(base).values(), layers_4bit(twin).values(), strict=True):
        assert layer.weight.quant_state is other.weight.quant_state
        assert layer.quant_state is other.quant_state
    for layer, other in zip(layers_8bit(base).values(), layers_8bit(twin).values(), strict=True):
        assert layer.state is not other.state
        assert layer.state.CB.data_ptr() == other.state.CB.data_ptr() == other.weight.data_ptr()
        assert layer.state.SCB is other.state.SCB
    if adapter == "full":
        return_value = logits(twin)
        assert torch.equal(return_value, expected)
        return
    model = attach(base, adapter, SETTINGS)
    train(model, steps=2)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), expected)
    assert not trainable_names(twin)


# --- what single adapters do ---


def test_lora_adds_alpha_over_rank_times_b_a(folders: dict[str, str]) -> None:
    """y = x W^T + (alpha / r) x A^T B^T, by hand, for two alphas."""
    for alpha in (4, 20):
        model = attach(load(folders["llama"], "lora"), "lora", replace(SETTINGS, alpha=alpha))
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape == (4, 64)
        b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(alpha))
        x = torch.randn((5, 64), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = x @ layer.base_layer.weight.T + (alpha / 4) * (x @ a.T @ b.T)
            assert torch.allclose(layer(x), expected, atol=1e-4)


def test_lora_has_no_dropout(folder: str) -> None:
    model = attach(load(folder, "lora"), "lora", SETTINGS)
    train(model, steps=2)
    expected = logits(model)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_lora_counts_rank_times_inputs_plus_outputs(folders: dict[str, str]) -> None:
    layers = {  # inputs + outputs of a block's layers
        "gpt2": [64 + 192, 64 + 64, 64 + 256, 256 + 64],
        "llama": [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64],
    }
    for name, sizes in layers.items():
        for adapter in ("lora", "qlora"):
            base = load(folders[name], adapter)
            total = count_params(load(folders[name], "full"))[0]
            trainable = 4 * 2 * sum(sizes)
            assert count_params(attach(base, adapter, SETTINGS)) == (total + trainable, trainable)


def test_ia3_scales_keys_values_and_feed_forward_inputs(folders: dict[str, str]) -> None:
    # a block of LLaMA: k and v have 2 heads of 16, down_proj has 128 inputs
    llama = attach(load(folders["llama"], "ia3"), "ia3", SETTINGS)
    assert count_params(llama)[1] == 2 * (32 + 32 + 128)
    layer = llama.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    scale = layer.ia3_l["default"]
    scale.data = torch.linspace(0.5, 1.5, 128).view_as(scale)
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = (x * scale.view(-1)) @ layer.base_layer.weight.T
        assert torch.allclose(layer(x), expected, atol=1e-5)
    # of GPT-2: c_attn makes query, key and value at once (3 x 64), c_proj has 256 inputs
    assert count_params(attach(load(folders["gpt2"], "ia3"), "ia3", SETTINGS))[1] == 2 * (192 + 256)


def test_prefix_counts_tokens_times_layers_times_keys_and_values(folders: dict[str, str]) -> None:
    for name, width in (("gpt2", 64), ("llama", 32)):
        model = attach(load(folders[name], "prefix"), "prefix", SETTINGS)
        assert count_params(model)[1] == 5 * 2 * 2 * width


def test_full_trains_every_weight_of_the_model(folder: str) -> None:
    model = attach(load(folder, "full"), "full", SETTINGS)
    total, trainable = count_params(model)
    assert total == trainable


def test_moved_ratio_leaves_out_rows_that_no_token_touched(folders: dict[str, str]) -> None:
    """GPT-2's positions beyond the batch's length have no gradient."""
    model = attach(load(folders["gpt2"], "full"), "full", SETTINGS)
    before = snapshot(model)
    assert moved_ratio(before, model) == 0
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    positions = torch.arange(64) < IDS.shape[1]
    rows = {"transformer.wpe.weight": positions}
    assert moved_ratio(before, model, rows) > 0.97
    counted = sum(t.numel() for t in before.values())
    assert moved_ratio(before, model) <= 1 - (64 - 12) * 64 / counted


def test_unknown_adapter_lists_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown adapter 'lorra'; did you mean lora"):
        attach(None, "lorra", SETTINGS)  # type: ignore[arg-type]


# --- architectures without a table entry ---


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [(m, a) for m in UNLISTED for a in ADAPTERS if a != "bitfit" or m not in NO_BIASES],
)
def test_every_adapter_works_on_architectures_that_no_table_lists(
    folders: dict[str, str], architecture: str, adapter: str, tmp_path: Path
) -> None:
    base = load(folders[architecture], adapter)
    expected = logits(base)
    model = attach(base, adapter, SETTINGS)
    if adapter == "dora":
        assert torch.allclose(logits(model), expected, atol=1e-5)
    elif adapter not in ("prefix", "prompt", "full"):
        assert torch.equal(logits(model), expected)
    before = snapshot(model)
    train(model, steps=3)
    tuned = logits(model)
    if adapter != "full":
        assert moved_ratio(before, model) > 0.9
        with adapter_off(model):
            assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path)
    again = load_adapter(load(folders[architecture], adapter), tmp_path)
    assert torch.equal(logits(again), tuned)
    if ADAPTERS[adapter].merges:
        assert (logits(merged(model, adapter)) - tuned).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES + UNLISTED)
def test_all_linear_is_what_peft_calls_all_linear(
    folders: dict[str, str], architecture: str
) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = load(folders[architecture], "lora")
    ours = lora_targets(model, "all-linear")
    assert set(ours) == set(linear_shapes(load(folders[architecture], "qlora")))
    theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    found = {n for n, m in theirs.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert set(ours) == found


ATTENTION = {
    "gpt2": ({"c_attn"}, {"c_attn"}, {"c_proj"}),
    "llama": ({"q_proj", "v_proj"}, {"k_proj", "v_proj"}, {"down_proj"}),
    "qwen2": ({"q_proj", "v_proj"}, {"k_proj", "v_proj"}, {"down_proj"}),
    "gpt_neox": ({"query_key_value"}, {"query_key_value"}, {"dense_4h_to_h"}),
    "opt": ({"q_proj", "v_proj"}, {"k_proj", "v_proj"}, {"fc2"}),
    "olmo2": ({"q_proj", "v_proj"}, {"k_proj", "v_proj"}, {"down_proj"}),
    "phi3": ({"qkv_proj"}, {"qkv_proj"}, {"down_proj"}),
}


@pytest.mark.parametrize("architecture", ATTENTION)
def test_targets_are_the_layers_that_the_papers_name(
    folders: dict[str, str], architecture: str
) -> None:
    model = load(folders[architecture], "lora")
    query_value, key_value, feedforward = ATTENTION[architecture]
    qv = lora_targets(model, "qv")
    assert {name.rsplit(".", 1)[-1] for name in qv} == query_value
    assert len(qv) == 2 * len(query_value)
    targets, inner = ia3_targets(model)
    assert {name.rsplit(".", 1)[-1] for name in inner} == feedforward
    assert len(inner) == 2
    assert {name.rsplit(".", 1)[-1] for name in set(targets) - set(inner)} == key_value
    assert not any("attn.c_proj" in name for name in targets)


def test_unknown_targets_are_refused(folder: str) -> None:
    with pytest.raises(UserError, match="choose from: all-linear, qv"):
        lora_targets(load(folder, "lora"), "mlp")
