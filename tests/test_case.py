"""Identity of cases: names, hashes, validation."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from peftbench.adapters import ADAPTERS
from peftbench.case import (
    CHOICES,
    PRESETS,
    Case,
    Settings,
    check_ppo,
    check_settings,
    of_its_kind,
    public_name,
)
from peftbench.data.loading import check_lengths
from peftbench.errors import UserError, unknown_name
from peftbench.methods import INFER, METHODS, uses_ppo
from peftbench.models import MODELS, model_context, resolved
from peftbench.selection import is_asked


def test_id_reads_model_adapter_method():
    assert Case("tiny-gpt2", "lora", "dpo").id == "tiny-gpt2-lora-dpo"
    assert Case("someone/model-x", "ia3", "sft").id == "model-x-ia3-sft"
    assert Case("/data/models/mine/", "full", "orpo").id == "mine-full-orpo"


def test_hash_is_golden_so_a_new_field_cannot_void_history():
    assert Case("tiny-gpt2", "lora", "dpo").hash == "bb81c3e7c1d1"
    changed = Case("tiny-gpt2", "lora", "dpo", Settings(rank=16, dtype="bfloat16"))
    assert changed.hash == "0688b12da673"


def test_identity_holds_only_what_differs_from_the_default():
    case = Case("m", "lora", "sft", Settings(pairs=100, alpha=Settings().alpha))
    assert case.identity() == {"model": "m", "adapter": "lora", "method": "sft", "pairs": 100}


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
def test_every_setting_moves_the_hash(name):
    default = Settings()
    value = getattr(default, name)
    other = {bool: lambda: not value, str: lambda: value + "x"}.get(
        type(value), lambda: value + 1
    )()
    assert Case("m", "lora", "sft", replace(default, **{name: other})).hash != (
        Case("m", "lora", "sft", default).hash
    )


def test_case_survives_its_dictionary():
    case = Case("m", "lora", "dpo", Settings(rank=4, beta=0.5))
    assert Case.from_dict(case.to_dict()) == case


def test_steps_are_whole_windows_of_the_pairs():
    # 100 pairs in windows of 8 x 3 = 24: 4 whole windows, 4 pairs left out
    assert Settings(pairs=100, batch_size=8, gradient_accumulation=3).steps == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"pairs": 0}, "pairs is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; it must be a number that is not"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"orpo_lambda": math.inf}, "orpo_lambda is inf"),
        ({"beta": 0.0}, "beta is 0.0; it must be a number above 0"),
        ({"eval_context": 1}, "at least 2 tokens"),
        ({"eval_stride": 256}, "between 1 and eval_context - 1 = 255"),
        ({"pairs": 32, "batch_size": 16}, "2 steps, of which 2 warm up"),
        ({"engine": "jax"}, "unknown engine 'jax'; choose from: native, trl"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"value": "none"}, "unknown value 'none'; choose from: head, adapter"),
        ({"reward": "best"}, "unknown reward 'best'; choose from: model, true, count-token, none"),
        ({"reward": "true", "data": "wikitext-2"}, "known of tinywiki only, not of 'wikitext-2'"),
        ({"missing_eos": "drop"}, "unknown missing_eos 'drop'"),
        ({"missing_eos_score": math.nan}, "missing_eos_score is nan"),
        ({"ppo_batch_size": 0}, "ppo_batch_size is 0; it must be at least 1"),
        ({"ppo_minibatch_size": -1}, "ppo_minibatch_size is -1; it must not be negative"),
        ({"ppo_epochs": 0}, "ppo_epochs is 0"),
        ({"ppo_kl_coef": -0.1}, "ppo_kl_coef is -0.1"),
        ({"ppo_gamma": 1.5}, "ppo_gamma is 1.5; it must be between 0 and 1"),
        ({"ppo_temperature": 0.0}, "ppo_temperature is 0.0; it must be above 0"),
    ],
)
def test_settings_that_cannot_work_say_so_in_one_line(change, says):
    with pytest.raises(UserError) as error:
        check_settings(replace(Settings(), **change))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_only_what_the_tables_have_and_pass_the_checks(name):
    preset = PRESETS[name]
    check_settings(preset.settings)
    assert set(preset.models) <= set(MODELS)
    assert set(preset.adapters) <= set(ADAPTERS)
    assert set(preset.methods) <= set(METHODS)
    assert preset.about
    for model, adapter, method in preset.cells():
        assert model in MODELS
        assert adapter in ADAPTERS
        settings = preset.settings_of(method)
        check_settings(settings)
        if uses_ppo(method):
            check_ppo(settings)
        else:  # what only PPO needs must not move the hash of the others
            assert settings == of_its_kind(preset.settings, method)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_models_contexts(name):
    """With the prefix's positions counted; from the configs in the tables, without a network."""
    preset = PRESETS[name]
    for model in preset.models:
        context = model_context(model, "random")
        assert context is not None
        check_lengths(preset.settings, context - preset.settings.prefix_tokens)


def test_quick_preset_is_30_cases_ppo_for_lora_and_full_and_inference_for_each_adapter():
    quick = PRESETS["quick"]
    cells = quick.cells()
    assert len(cells) == len(set(cells)) == 44
    assert [c for c in cells if c[2] == INFER] == [
        (m, a, INFER) for m in quick.models for a in quick.adapters
    ]
    assert [c for c in cells if c[2] == "ppo"] == [
        (m, a, "ppo") for m in ("tiny-gpt2", "tiny-llama") for a in ("full", "lora")
    ]
    assert cells[3] == ("tiny-gpt2", "full", "ppo")  # beside the methods of its adapter
    assert quick.settings.data == "tinywiki"


def test_cpu_real_has_full_for_sft_and_dpo_beside_its_adapters():
    model = "smollm2-135m-instruct-q4"
    cells = PRESETS["cpu-real"].cells()
    assert [c for c in cells if c[1] == "full"] == [(model, "full", "sft"), (model, "full", "dpo")]
    assert len(cells) == len(set(cells)) == 4 * 4 + 2


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ([(), (), ()], True),  # no option: the preset as it is
        ([(), (), ("sft", "dpo")], True),
        ([(), (), ("orpo",)], False),
        ([(), ("lora",), ()], False),
        ([("gpt-2",), ("full",), ("dpo",)], False),
    ],
)
def test_a_single_cell_stays_where_no_option_names_others(asked, kept):
    assert is_asked(("m", "full", "dpo"), asked) is kept


def test_quick_full_is_every_adapter_and_method():
    full = PRESETS["quick-full"]
    assert set(full.adapters) == set(ADAPTERS)
    assert set(full.methods) == set(METHODS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ppo_batch_size": 8}, "a multiple of the minibatch, which is 16"),
        ({"ppo_batch_size": 40}, "ppo_batch_size is 40; it must be a multiple"),
        ({"ppo_minibatch_size": 128}, "a multiple of the minibatch, which is 128"),
        ({"gradient_accumulation": 3, "ppo_minibatch_size": 32}, "gradient_accumulation 3"),
        ({"pairs": 64}, "64 pairs are 1 PPO updates of 64 prompts, of which 1 warm up"),
        ({"pairs": 32}, "32 pairs are 0 PPO updates"),
    ],
)
def test_budgets_that_ppo_cannot_divide_are_refused_for_ppo_alone(change, says):
    settings = replace(Settings(warmup_steps=1), **change)
    check_settings(settings)
    with pytest.raises(UserError) as error:
        check_ppo(settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_ppo_counts_its_own_updates_and_steps():
    settings = Settings(pairs=200, ppo_batch_size=64, batch_size=8, warmup_steps=2, ppo_epochs=1)
    assert (settings.ppo_updates, settings.ppo_minibatches) == (3, 8)
    assert settings.ppo_warmup_updates == 1  # 2 steps are within the first update's 8
    assert replace(settings, warmup_steps=9).ppo_warmup_updates == 2
    assert replace(settings, ppo_minibatch_size=32).ppo_minibatches == 2


def test_a_rate_that_changes_in_a_table_changes_the_hash():
    case = Case("tiny-gpt2", "lora", "sft", PRESETS["quick"].settings)
    found = resolved(case)
    assert found.settings.learning_rate == MODELS["tiny-gpt2"].learning_rates["lora"]["sft"]
    assert resolved(Case("gpt-2", "ia3", "dpo")).settings.learning_rate == 5e-3  # the adapter's
    rates = MODELS["tiny-gpt2"].learning_rates["lora"]
    pipeline = resolved(replace(case, method="sft+ppo")).settings
    assert pipeline.learning_rate == rates["ppo"]
    assert pipeline.sft_learning_rate == rates["sft"]
    assert pipeline.reward_learning_rate == rates["reward"]
    assert found.settings.sft_learning_rate == found.settings.reward_learning_rate == 0
    given = replace(case, settings=replace(case.settings, learning_rate=0.5))
    assert resolved(given) == given
    assert len({case.hash, found.hash, given.hash}) == 3
    assert resolved(found) == found


def test_the_public_name_of_a_path_is_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "a" / "my-model").mkdir(parents=True)
    assert public_name(f"{tmp_path}/a/my-model/") == "my-model"
    assert public_name("owner/name") == "owner/name"
    assert public_name("tinywiki") == "tinywiki"
    monkeypatch.chdir(tmp_path / "a" / "my-model")
    assert public_name(".") == "my-model"


def test_choices_are_settings():
    assert set(CHOICES) <= {f.name for f in fields(Settings)}


def test_unknown_name_offers_the_nearest():
    error = unknown_name("adapter", "lorra", ["ia3", "lora", "prefix", "qlora"])
    assert str(error) == (
        "unknown adapter 'lorra'; did you mean lora or qlora? choose from: ia3, lora, prefix, qlora"
    )
