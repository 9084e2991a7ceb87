"""The PPO loop on GPT-2 and LLaMA with every adapter: what it samples, scores, moves and leaves."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from sync_counter import SyncCounter
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftbench import adapters, ppo_roles, ppo_training, rollout, training
from peftbench.batches import collate, completion_logprobs
from peftbench.case import Settings
from peftbench.data.task import TokenPair, TokenTask
from peftbench.errors import InvalidTrainingError, UserError
from peftbench.methods import ppo
from peftbench.models import disable_dropout
from peftbench.quantization import layers_4bit, layers_8bit, prepare_quantized, quantize_layer
from peftbench.reward_model import ScalarModel, pair_accuracy, train_reward_model

EOS = 3
SETTINGS = Settings(
    rank=2, alpha=4, prefix_tokens=3, pairs=24, batch_size=4, warmup_steps=1, prompt_length=7,
    completion_length=6, learning_rate=1e-2, reward="count-token", missing_eos="keep",
    ppo_batch_size=8, ppo_epochs=2, reward_learning_rate=1e-2, sft_learning_rate=1e-2, seed=5,
    reward_start="base",
)  # fmt: skip


def make_model(name: str, adapter: str) -> Any:
    """A small random model, its output spread wide; quantised where the adapter wants that."""
    torch.manual_seed(1)
    if name == "gpt2":
        config: Any = GPT2Config(vocab_size=40, n_positions=64, n_embd=64, n_layer=2, n_head=2,
                                 bos_token_id=EOS, eos_token_id=EOS)  # fmt: skip
        model: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            eos_token_id=EOS,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    disable_dropout(model)
    if kind := adapters.ADAPTERS[adapter].quantization:
        from peftbench.quantization import mark_quantized, names_to_quantize

        for path in names_to_quantize(model, kind):
            layer = quantize_layer(model.get_submodule(path), kind, torch.float32)
            model.set_submodule(path, layer)
        mark_quantized(model, kind, torch.float32)
        prepare_quantized(model, kind)
    return model.eval()


def make_task(pairs: int = 24) -> TokenTask:
    g = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        n = int(torch.randint(low, high, (1,), generator=g))
        return tuple(torch.randint(4, 40, (n,), generator=g).tolist())

    rows = tuple(TokenPair(ids(1, 8), (*ids(2, 6), EOS), (*ids(2, 6), EOS)) for _ in range(pairs))
    return TokenTask("t", "d", rows, (), rows[:8], (1, 2), 2, None, 0, 0)


def start(name: str, adapter: str, **changes: Any) -> tuple[Any, Any, Settings]:
    """(policy, the base on a tree of its own, settings)."""
    settings = replace(SETTINGS, **changes)
    model = make_model(name, adapter)
    plain = adapters.shared_copy(model)
    return adapters.attach(model, adapter, settings), plain, settings


def make_roles(
    model: Any, plain: Any, adapter: str, settings: Settings, *, after_sft: bool = False
) -> ppo_roles.Roles:
    roles = ppo_roles.build_roles(
        model, plain, adapter, settings, None, training.SilentGate(), after_sft=after_sft
    )
    ppo_roles.train_roles(roles, make_task(), settings)
    return roles


def run(name: str, adapter: str, **changes: Any) -> tuple[Any, training.Training]:
    model, plain, settings = start(name, adapter, **changes)
    roles = make_roles(model, plain, adapter, settings)
    task = make_task(settings.pairs)
    return model, ppo_training.train(model, roles, task, settings, EOS, training.SilentGate())


def disturb(model: Any) -> None:
    """Move what trains away from its start, where LoRA and IA3 are the identity."""
    g = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)


EVERY = [  # a LLaMA has no biases for bitfit
    (n, a) for n in ("gpt2", "llama") for a in adapters.ADAPTERS if (n, a) != ("llama", "bitfit")
]


@pytest.mark.parametrize(("name", "adapter"), EVERY)
def test_generated_logprobs_are_the_teacher_forced_ones(name, adapter):
    """On prompts of different lengths, completions of different lengths, at a temperature."""
    model, _, _ = start(name, adapter)
    disturb(model)
    model.eval()
    prompts = [p.prompt for p in make_task().train]
    with torch.no_grad():
        drawn = rollout.sample(model, prompts, 20, 1.5, EOS, torch.Generator().manual_seed(0))
        batch = collate(drawn.pairs, "chosen")
        forced, _, _ = ppo_roles.score_tokens(model, batch, 1.5, None)
        other, _, _ = ppo_roles.score_tokens(model, batch, 1.0, None)
    assert len({len(p) for p in prompts}) > 2
    assert len({len(c) for c in drawn.completions}) > 1
    assert (forced - drawn.logprobs).abs().max() < 1e-4
    assert (other - drawn.logprobs).abs().max() > 1e-2  # the temperature is in both


def wide_model(name: str) -> Any:
    """Random, with weights of more than LARGE_WEIGHT entries."""
    torch.manual_seed(1)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=400, n_positions=64, n_embd=256, n_layer=2, n_head=4)
        ).eval()
    config = LlamaConfig(
        vocab_size=400, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("name", "adapter"), [(n, a) for n, a in EVERY if not adapters.ADAPTERS[a].quantization]
)
def test_the_tree_of_token_steps_answers_as_the_model(name, adapter, monkeypatch):
    """With LoRA folded in or too large for it, with the adapter on or off; the model is kept."""
    model = wide_model(name)
    disable_dropout(model)
    model = adapters.attach(model, adapter, SETTINGS)
    disturb(model)
    model.eval()
    base = model.get_base_model() if adapter != "full" else model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.arange(12).view(4, 3)

    def difference() -> float:
        tree = rollout.few_rows_tree(base, len(ids))
        with torch.no_grad():
            return float((tree(ids).logits - base(ids).logits).abs().max())

    assert difference() < 1e-4
    tree = rollout.few_rows_tree(base, len(ids))
    kinds = {type(module).__name__ for module in tree.modules()}
    assert "FewRowsLinear" in kinds  # the head at least
    folds = adapter in ("lora", "rslora", "lora-bias")
    assert not folds or not any("lora" in n for n, _ in tree.named_parameters())
    own = {p.data_ptr() for p in model.parameters()}
    copies = sum(p.nbytes for p in tree.parameters() if p.data_ptr() not in own)
    assert 0 < copies <= rollout.FOLDED_BYTES if folds else copies == 0
    if folds:
        with model.disable_adapter():
            assert difference() < 1e-4
        monkeypatch.setattr(rollout, "FOLDED_BYTES", 0)
        assert difference() < 1e-4
        tree = rollout.few_rows_tree(base, len(ids))
        assert all(p.data_ptr() in own for p in tree.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_is_drawn_is_of_the_right_shape_and_never_impossible():
    logprobs = torch.log_softmax(torch.randn(3000, 50), -1)
    logprobs[:, ::2] = -math.inf
    drawn = rollout.draw(logprobs, rollout.uniforms(3000, torch.Generator().manual_seed(0)))
    assert drawn.shape == (3000, 1)
    assert (drawn % 2 == 1).all()


def test_a_completion_ends_with_its_first_eos_and_nothing_counts_after_it():
    model, _, _ = start("gpt2", "lora")
    prompts = [(5, 6, 7)] * 64
    with torch.no_grad():
        drawn = rollout.sample(model, prompts, 30, 1.0, EOS, torch.Generator().manual_seed(0))
    ended = [EOS in c for c in drawn.completions]
    assert any(ended)
    assert drawn.ended.tolist() == ended
    for completion, logprobs in zip(drawn.completions, drawn.logprobs, strict=True):
        assert EOS not in completion[:-1]
        assert len(completion) == 30 or completion[-1] == EOS
        assert (logprobs[len(completion) :] == 0).all()
        assert (logprobs[: len(completion)] < 0).all()


@pytest.mark.parametrize(("name", "adapter"), [("gpt2", "prefix"), ("llama", "lora")])
def test_rows_that_have_ended_are_no_longer_computed_and_the_others_draw_the_same(
    monkeypatch, name, adapter
):
    model, _, _ = start(name, adapter)
    disturb(model)
    model.eval()
    prompts = [p.prompt for p in make_task().train] * 4
    honest, rows = rollout.few_rows_tree, []

    def tree(*arguments: Any) -> Any:
        made = honest(*arguments)
        step = made.forward

        def forward(input_ids: torch.Tensor, **options: Any) -> Any:
            rows.append(len(input_ids))
            return step(input_ids=input_ids, **options)

        made.forward = forward  # not a hook, which the model would share
        return made

    def sampled() -> rollout.Rollout:
        rows.clear()
        with torch.no_grad():
            return rollout.sample(model, prompts, 30, 1.5, EOS, torch.Generator().manual_seed(0))

    monkeypatch.setattr(rollout, "few_rows_tree", tree)
    few, few_rows = sampled(), list(rows)
    monkeypatch.setattr(rollout, "ENDED_RATIO", 2.0)
    whole, whole_rows = sampled(), list(rows)
    assert len({len(p) for p in prompts}) > 2
    assert whole_rows == [len(prompts)] * len(whole_rows)
    for step, count in enumerate(few_rows, start=1):
        running = sum(len(c) > step for c in whole.completions)
        assert running <= count < running / (1 - 0.25) + 1
    assert sum(few_rows) < 0.95 * sum(whole_rows)
    assert few.completions == whole.completions
    assert torch.equal(few.ended, whole.ended)
    assert (few.logprobs - whole.logprobs).abs().max() < 1e-5


def test_sampling_is_from_the_scored_distribution():
    """First tokens of 2000 draws against the softmax: chi-square within 5 sigma."""
    model, _, _ = start("llama", "lora")
    with torch.no_grad():
        drawn = rollout.sample(
            model, [(5, 6, 7)] * 2000, 1, 2.0, EOS, torch.Generator().manual_seed(0)
        )
        p = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 2.0, -1)
    counts = torch.bincount(torch.tensor([c[0] for c in drawn.completions]), minlength=40)
    often = 2000 * p > 5
    chi2 = (((counts - 2000 * p) ** 2) / (2000 * p))[often].sum().item()
    n = int(often.sum())
    assert n > 10
    assert chi2 < n + 5 * math.sqrt(2 * n)


@pytest.mark.parametrize(("name", "adapter"), EVERY)
def test_the_trees_share_the_base_and_the_reference_is_the_base(name, adapter):
    """However the policy moves, and with the reward's adapter in place."""
    pure = make_model(name, adapter)
    model, plain, settings = start(name, adapter, reward="model")
    roles = make_roles(model, plain, adapter, settings)
    disturb(model)
    batch = collate(make_task().train[:4], "chosen")
    with torch.no_grad():
        expected = completion_logprobs(pure, batch)
        assert torch.equal(completion_logprobs(roles.reference, batch), expected)
        assert not torch.allclose(completion_logprobs(model, batch), expected, atol=1e-3)
    assert roles.reward_model is not None
    own = {p.data_ptr() for p in model.parameters()}
    of_reward = {p.data_ptr(): p.nbytes for p in roles.reward_model.adapted.parameters()}
    of_reference = {p.data_ptr() for p in roles.reference.parameters()}
    extra = sum(size for at, size in of_reward.items() if at not in own | of_reference)
    # the reward costs its adapter and a head, 64 weights and a bias
    assert extra + 4 * 65 == roles.reward_model.own_bytes
    if adapter == "full":
        assert roles.reference_bytes == sum(p.nbytes for p in model.parameters())
        assert not own & of_reference
    else:
        assert roles.reference_bytes == 0
        assert of_reference < own


@pytest.mark.parametrize("adapter", [a for a in adapters.ADAPTERS if a != "full"])
def test_reward_and_value_are_not_the_policys_to_count_or_to_save(adapter, tmp_path):
    model, plain, settings = start("gpt2", adapter, reward="model", value="adapter")
    alone = adapters.attach(make_model("gpt2", adapter), adapter, settings)
    make_roles(model, plain, adapter, settings)
    assert adapters.count_params(model) == adapters.count_params(alone)
    assert adapters.trainable_names(model) == adapters.trainable_names(alone)
    assert adapters.snapshot(model).keys() == adapters.snapshot(alone).keys()
    sizes = [adapters.save_adapter(m, tmp_path / n) for m, n in ((model, "a"), (alone, "b"))]
    assert sizes[0] == sizes[1]
    if adapters.ADAPTERS[adapter].merges:
        plain_model = adapters.merged(model, adapter)
        names = {n for n, _ in plain_model.named_parameters()}
        assert names == {n for n, _ in make_model("gpt2", "full").named_parameters()}


@pytest.mark.parametrize("value", ["head", "adapter"])
@pytest.mark.parametrize(("name", "adapter"), EVERY)
def test_a_training_moves_the_policy_and_steps_once_a_minibatch(name, adapter, value, monkeypatch):
    """24 prompts in batches of 8, 2 epochs, minibatches of 4: 3 x 2 x 2 steps."""
    steps: list[int] = []
    plain_step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *a, **k: (steps.append(1), plain_step(*a, **k))[1]
    )
    model, plain, settings = start(name, adapter, value=value)
    before = adapters.snapshot(model)
    base = {n: p.detach().clone() for n, p in plain.named_parameters()}
    roles = make_roles(model, plain, adapter, settings)
    found = ppo_training.train(model, roles, make_task(), settings, EOS, training.SilentGate())
    assert len(steps) == len(found.losses) == len(found.step_s) == 12
    assert adapters.moved_ratio(before, model) > (0.5 if adapter == "full" else 0.9)
    assert found.grad_bytes >= sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert found.ppo is not None
    assert [row["episodes"] for row in found.ppo.history] == [8, 8, 8]
    if adapter != "full":
        assert all(torch.equal(p, base[n]) for n, p in plain.named_parameters())


@pytest.mark.parametrize(("name", "adapter"), EVERY)
def test_the_first_minibatch_has_ratio_1(name, adapter, monkeypatch):
    """And so no KL and nothing clipped: seen before the run-time check judges it."""
    seen: list[list[float]] = []
    monkeypatch.setattr(
        ppo_training.PPO, "check_first_minibatch", lambda self, step: seen.append(step)
    )
    run(name, adapter)
    assert len(seen) == 3
    for _, _, approx_kl, clip_ratio, log_ratio in seen:
        assert abs(log_ratio) < 1e-5
        assert abs(approx_kl) < 1e-6
        assert clip_ratio == 0


def test_a_part_of_an_update_waits_for_the_device_once(monkeypatch):
    """At its end, to read its results. The rollout's flag that all have ended is read on the host,
    which a CPU cannot tell from a wait: in there only the reads of results are counted."""
    counter, reads = SyncCounter(), []
    model, plain, settings = start("llama", "lora", reward="model")
    roles = make_roles(model, plain, "lora", settings)
    read, honest = torch.Tensor.tolist, rollout.sample

    def tolist(tensor: torch.Tensor) -> Any:
        if counter.open or sampling:
            reads.append(tuple(tensor.shape))
        return read(tensor)

    sampling: list[bool] = []

    def sample(*arguments: Any) -> rollout.Rollout:
        was_open, counter.open = counter.open, False
        sampling.extend([True] * was_open)
        found = honest(*arguments)
        counter.open = was_open
        sampling.clear()
        return found

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(rollout, "sample", sample)
    monkeypatch.setattr(training, "synchronize", counter.synchronize)
    monkeypatch.setattr(ppo_training, "synchronize", counter.synchronize)
    counter.synchronized = 1  # as the roles' making would have done
    with counter:
        outcome = ppo_training.train(model, roles, make_task(), settings, EOS, counter)
    assert outcome.ppo is not None
    timed = len(outcome.ppo.history) - outcome.ppo.warmup_updates
    assert timed == 2
    assert counter.waits == []
    orders = [shape for shape in reads if shape == (settings.ppo_batch_size,)]
    assert len(orders) == settings.ppo_epochs * timed  # permutations, drawn on the host
    assert len(reads) - len(orders) == 3 * timed


def test_another_policy_than_the_scored_one_is_noticed(monkeypatch):
    """Trap 5, left padding without position ids, in the scoring alone."""
    kept = ppo_training.PPO.score

    def wrong(self, index, sampled, order):
        experience, *rest = kept(self, index, sampled, order)
        experience.logprobs += 0.05
        return experience, *rest

    monkeypatch.setattr(ppo_training.PPO, "score", wrong)
    with pytest.raises(RuntimeError, match=r"log ratio up to 0\.05"):
        run("gpt2", "lora")


@pytest.mark.parametrize("gradient_accumulation", [1, 2])
def test_completions_of_another_policy_than_the_scored_one_are_noticed(
    gradient_accumulation, monkeypatch
):
    """A policy that moves between rollout and scoring, by less than one would see."""
    kept = ppo_training.PPO.roll_out

    def moved(self, index):
        sampled = kept(self, index)
        with torch.no_grad():
            for parameter in self.policy_parameters:
                parameter += 0.02
        return sampled

    monkeypatch.setattr(ppo_training.PPO, "roll_out", moved)
    with pytest.raises(RuntimeError, match="were not drawn from the policy that was scored"):
        run("gpt2", "lora", batch_size=4 // gradient_accumulation,
            gradient_accumulation=gradient_accumulation)  # fmt: skip


@pytest.mark.parametrize(("name", "adapter"), EVERY)
def test_a_learning_rate_of_almost_0_leaves_everything_still(name, adapter):
    _, found = run(name, adapter, learning_rate=1e-30)
    assert found.ppo is not None
    for row in found.ppo.history:
        assert abs(row["approx_kl"]) < 1e-6
        assert row["clip_ratio"] == 0
        moved = adapter in ("prefix", "prompt")  # before the first step
        assert row["kl_k3"] > 1e-4 if moved else abs(row["kl_k1"]) < 1e-5


def test_every_parameter_has_a_gradient_or_the_training_stops(monkeypatch):
    kept = torch.autograd.backward

    def forgets(loss, **options):
        kept(loss, **options)
        victim.grad = None

    model, plain, settings = start("gpt2", "lora")
    victim = next(p for p in model.parameters() if p.requires_grad)
    roles = make_roles(model, plain, "lora", settings)
    monkeypatch.setattr(torch.autograd, "backward", forgets)
    with pytest.raises(RuntimeError, match="1 of 18 parameters have no gradient"):
        ppo_training.train(model, roles, make_task(), settings, EOS, training.SilentGate())


def test_micro_batches_do_not_change_the_step():
    """batch 4 x 1 against batch 2 x 2: the same minibatches, so the same losses and weights."""
    found = [
        run("llama", "lora", batch_size=b, gradient_accumulation=a, warmup_steps=0)
        for b, a in ((4, 1), (2, 2))
    ]
    one, two = (t.losses for _, t in found)
    assert one == pytest.approx(two, abs=1e-5)
    weights = [adapters.snapshot(m) for m, _ in found]
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-4) for n in weights[0])


def test_the_operations_of_an_update_are_those_of_its_passes():
    """By hand: two a weight and token forward, two more backward, as the base is frozen."""
    model = wide_model("llama")
    settings = replace(SETTINGS, pairs=8, warmup_steps=0)
    plain = adapters.shared_copy(model)
    model = adapters.attach(model, "lora", settings)
    roles = make_roles(model, plain, "lora", settings)
    task = make_task(8)
    found = ppo_training.flops_per_token(model, roles, task, settings, 399)

    linear = {n: m.weight.numel() for n, m in plain.named_modules() if type(m) is torch.nn.Linear}
    head = linear.pop("lm_head")
    trunk = sum(linear.values())
    # counted on the first of the update's two micro-batches of 4
    rows, width = 4, max(len(pair.prompt) for pair in task.train[:4])
    # rollout: the prompts, then 5 passes over a token; the head runs once for each drawn token
    rollout_flops = rows * (width + 5) * 2 * trunk + rows * 6 * 2 * head
    tokens = rows * (width + 6)
    forward = 2 * trunk * tokens + 2 * head * rows * 6  # the head on the completion's columns
    # score: policy and reference; two epochs forward and backward; of the first epoch's two
    # micro-batches one has its forward pass from the scoring
    expected = rollout_flops + 2 * forward + 2 * 2 * forward - forward / 2
    assert found * 2 * tokens == pytest.approx(expected, rel=0.05)


def test_gradient_checkpointing_does_not_change_the_step():
    losses = [run("llama", "lora", gradient_checkpointing=g)[1].losses for g in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_seed_repeats_bit_for_bit_and_another_does_not():
    losses = [run("gpt2", "lora", seed=s)[1].losses for s in (5, 5, 6)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("adapter", adapters.ADAPTERS)
def test_after_an_sft_stage_the_reference_is_the_sft_model(adapter):
    model, plain, settings = start("gpt2" if adapter == "bitfit" else "llama", adapter)
    sft = replace(settings, learning_rate=1e-2)
    training.train(model, make_task(), sft, "sft", training.SilentGate(), nullcontext())
    batch = collate(make_task().train[:4], "chosen")
    with torch.no_grad():
        expected = completion_logprobs(model, batch)
    roles = make_roles(model, plain, adapter, settings, after_sft=True)
    disturb(model)
    with torch.no_grad():
        assert torch.allclose(completion_logprobs(roles.reference, batch), expected, atol=1e-6)
        assert not torch.allclose(completion_logprobs(model, batch), expected, atol=1e-3)
        assert not torch.allclose(completion_logprobs(plain, batch), expected, atol=1e-3) or (
            adapter == "full"
        )
    assert not any(p.requires_grad for p in roles.reference.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert roles.reference_bytes == trained


def test_values_are_of_the_state_before_each_token():
    """A head that reads one unit, against that unit of the hidden states, row by row unpadded."""
    model, _, _ = start("llama", "lora")
    head = torch.nn.Linear(64, 1)
    head.weight.data.zero_()
    head.weight.data[0, 5] = 1.0
    head.bias.data.zero_()
    pairs = make_task().train[:4]
    with torch.no_grad():
        _, values, _ = ppo_roles.score_tokens(model, collate(pairs, "chosen"), 1.0, head)
        for pair, row in zip(pairs, values, strict=True):
            ids = torch.tensor([pair.prompt + pair.chosen])
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, :, 5]
            n, p = len(pair.chosen), len(pair.prompt)
            assert torch.allclose(row[:n], hidden[p - 1 : p - 1 + n], atol=1e-5)
            assert (row[n:] == 0).all()


def test_the_reward_reads_prompt_and_completion_at_the_last_token():
    model = ScalarModel(make_model("gpt2", "lora"), SETTINGS).eval()
    pairs = make_task().train[:4]
    with torch.no_grad():
        scores = model.scores(collate(pairs, "chosen"))
        for pair, score in zip(pairs, scores, strict=True):
            alone = model(collate([pair], "chosen"))[0, len(pair.prompt) + len(pair.chosen) - 1]
            assert score.item() == pytest.approx(alone.item(), abs=1e-5)
        other = [replace(pair, prompt=(7, *pair.prompt)) for pair in pairs]
        assert (model.scores(collate(other, "chosen")) - scores).abs().min() > 1e-4


def test_the_reward_model_learns_its_pairs_and_is_normalised():
    """Chosen completions begin with token 10, rejected with 20: one epoch tells them apart."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(21, 40, (128, 3), generator=g).tolist()
    rows = tuple(TokenPair((5, 6), (10, *n), (20, *n)) for n in noise)
    task = replace(make_task(), train=rows[:96], test=rows[96:])
    settings = replace(SETTINGS, pairs=96, rank=4)
    model = ScalarModel(make_model("llama", "lora"), settings)
    with torch.no_grad():
        start_accuracy = pair_accuracy(model, task.test, 8)
    losses = train_reward_model(model, task, settings)
    assert len(losses) == 24
    with torch.no_grad():
        assert pair_accuracy(model, task.test, 8) > max(0.95, start_accuracy)
        batch = collate(task.test, "both")
        scores = model.normalise(model.scores(batch))
        assert torch.allclose(model.scores(batch), scores, atol=1e-4)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not any(p.requires_grad for p in model.parameters())


def bad_reward(what: Any) -> Any:
    def reward(prompts, completions):
        if isinstance(what, Exception):
            raise what
        return what

    return reward


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        (torch.zeros(7), UserError, r"shape \(7,\); it must be a tensor of shape \(8,\)"),
        (torch.full((8,), math.nan), InvalidTrainingError, "completion 0 is nan"),
        (ZeroDivisionError("by your function"), ZeroDivisionError, "by your function"),
    ],
)
def test_a_reward_that_cannot_be_used_stops_the_first_update(what, error, says):
    model, plain, settings = start("gpt2", "lora")
    roles = replace(make_roles(model, plain, "lora", settings), reward=bad_reward(what))
    before = adapters.snapshot(model)
    with pytest.raises(error, match=says):
        ppo_training.train(model, roles, make_task(), settings, EOS, training.SilentGate())
    assert adapters.moved_ratio(before, model) == 0


def test_a_model_without_eos_is_refused():
    model, plain, settings = start("gpt2", "lora")
    roles = make_roles(model, plain, "lora", settings)
    with pytest.raises(UserError, match="without one no completion ends"):
        ppo_training.train(model, roles, make_task(), settings, None, training.SilentGate())


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(InvalidTrainingError, match=r"the loss is nan at step \d"):
        run("gpt2", "lora", learning_rate=1e30, max_grad_norm=0.0)


def test_the_clock_stops_after_the_time_budget():
    _, found = run("gpt2", "lora", time_budget_s=1e-9, pairs=24)
    assert found.ppo is not None
    assert len(found.ppo.history) == 2  # one warms up, one is timed


@pytest.mark.parametrize(
    ("adapter", "layers"), [("qlora", layers_4bit), ("lora-8bit", layers_8bit)]
)
def test_a_quantised_base_keeps_its_layers_in_both_trees(adapter, layers):
    model, plain, _ = start("gpt2", adapter)
    assert len(layers(plain)) == 8
    shared = {id(p) for p in plain.parameters()} & {id(p) for p in model.parameters()}
    assert len(shared) == len(list(plain.parameters()))


def toy(reward: str) -> list[dict[str, Any]]:
    """PPO on the toy reward: a small model of random weights, near uniform over its 40 tokens."""
    settings = replace(
        SETTINGS, rank=4, alpha=8, pairs=960, batch_size=16, ppo_batch_size=32, ppo_epochs=4,
        completion_length=8, reward=reward, ppo_kl_coef=0.01,
    )  # fmt: skip
    torch.manual_seed(2)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=64, n_layer=2,
                                      n_head=2, bos_token_id=EOS, eos_token_id=EOS))  # fmt: skip
    base.transformer.wte.weight.data *= 10  # wide enough for one token to take nearly all
    disable_dropout(base)
    plain = adapters.shared_copy(base)
    model = adapters.attach(base, "lora", settings)
    roles = make_roles(model, plain, "lora", settings)
    found = ppo_training.train(model, roles, make_task(960), settings, EOS, training.SilentGate())
    assert found.ppo is not None
    return found.ppo.history


def test_the_toy_reward_rises_to_four_fifths_of_its_best():
    """The best policy writes nothing but the counted token: share 1."""
    history = toy("count-token")
    assert history[0]["reward_mean"] < 0.2
    assert history[-1]["reward_mean"] > 0.8


def test_with_the_reward_switched_off_the_policy_stays_at_its_start():
    history = toy("none")
    assert history[0]["explained_variance"] is None
    assert max(abs(row["kl_k3"]) for row in history) < 0.01


def test_kl_is_never_clearly_negative():
    """The sum of k1 over samples has an expectation of at least 0."""
    _, found = run("llama", "lora", pairs=48, learning_rate=3e-2)
    assert found.ppo is not None
    moved = [row["kl_k1"] for row in found.ppo.history[2:]]
    assert sum(moved) > 0
    assert min(moved) > -0.02
    assert all(row["kl_k3"] >= 0 for row in found.ppo.history)


def test_the_last_returns_are_those_of_the_rewards():
    """Experience against GAE by a plain loop over one row at a time."""
    model, plain, settings = start("llama", "lora", ppo_gae_lambda=0.9, ppo_gamma=0.8)
    roles = make_roles(model, plain, "lora", settings)
    assert roles.value_head is not None
    torch.nn.init.normal_(roles.value_head.weight)
    state = ppo_training.PPO(model, roles, make_task(), settings, EOS)
    sampled = state.roll_out(0)
    experience, _, _ = state.score(0, sampled, state.orders(0)[0])
    for row, completion in enumerate(sampled.completions):
        n = len(completion)
        score = sum(t == 5 for t in completion) / n
        values, advantage = experience.values[row, :n].tolist(), 0.0
        for t in reversed(range(n)):
            reward = score if t == n - 1 else 0.0  # the policy is the reference: no KL yet
            ahead = values[t + 1] if t < n - 1 else 0.0
            advantage = reward + 0.8 * ahead - values[t] + 0.8 * 0.9 * advantage
            expected = advantage + values[t]
            assert experience.returns[row, t].item() == pytest.approx(expected, abs=1e-4)
    counted = experience.advantages[experience.mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-5)
    assert counted.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(
        ppo.whiten(experience.advantages, experience.mask) * 0, experience.mask * 0.0
    )
