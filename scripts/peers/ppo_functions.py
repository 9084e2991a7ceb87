"""peftbench's PPO arithmetic against TRL 1.12's, in TRL's environment.

TRL's rewards, GAE and losses are no functions but lines inside `PPOTrainer.train`: they are taken
out of its source between two of its own lines and run as they stand.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from work import read_arguments

from peftbench.methods import ppo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

ARGS = SimpleNamespace(
    kl_estimator="k1", kl_coef=0.07, gamma=0.97, lam=0.9, cliprange=0.15, cliprange_value=0.3,
    vf_coef=0.1, whiten_rewards=False,
)  # fmt: skip
ROWS, COLUMNS = 6, 11


def trl_lines(first: str, last: str, **names: Any) -> dict[str, Any]:
    """The variables after TRL's lines from the one that starts with `first` to before `last`."""
    source = inspect.getsource(PPOTrainer.train).splitlines()
    starts = [i for i, line in enumerate(source) if line.strip().startswith(first)]
    start = starts[0]
    end = next(i for i in range(start, len(source)) if source[i].strip().startswith(last))
    found = {**vars(ppo_trainer), "args": ARGS, **names}
    exec(textwrap.dedent("\n".join(source[start:end])), found)
    return found


def main() -> None:
    _, outcome_file = read_arguments()
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([[11], [7], [1], [10], [4], [11]])
    mask = torch.arange(COLUMNS) < lengths
    whole = torch.ones_like(mask)
    old, new, reference, values, new_values = noise(), noise(), noise(), noise(), noise()
    scores = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    new = old + 0.3 * new  # ratios on both sides of the clip range
    rows = [
        rewards_of(old, reference, scores, whole),
        *gae_of(noise() * mask, values * mask, mask),
        whitening_of(noise(), mask),
        *losses_of(old, new, noise(), values, new_values, noise(), mask),
    ]
    for found in rows:
        if not found["difference"] < 1e-6:
            raise RuntimeError(f"{found['name']}: largest difference {found['difference']}")
    outcome_file.write_text(json.dumps({"rows": rows}))


def row(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """Largest absolute difference; the values are of order 1."""
    if float(theirs.detach().abs().max()) < 1e-3:
        raise RuntimeError(f"{name}: TRL gives nothing to compare with")
    return {"name": name, "difference": float((ours - theirs).detach().abs().max())}


def rewards_of(
    old: torch.Tensor, reference: torch.Tensor, scores: torch.Tensor, whole: torch.Tensor
) -> dict[str, Any]:
    """On full rows: in a shorter one TRL puts the score one position after the last token."""
    last = torch.full((ROWS,), COLUMNS - 1)
    found = trl_lines(
        "# Formula used by", "# 5. whiten rewards", logprobs=old, ref_logprobs=reference,
        scores=scores, sequence_lengths=last, sequence_lengths_p1=last + 1,
    )  # fmt: skip
    ours = ppo.token_rewards(old, reference, scores, whole, ARGS.kl_coef)
    return row("rewards: k1 and the score, full rows", ours, found["rewards"])


def gae_of(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> list[dict[str, Any]]:
    """Both start from rewards and values that are 0 after a row's end."""
    found = trl_lines(
        "# 6. compute advantages", "advantages = masked_whiten", rewards=rewards, values=values,
        responses=torch.zeros(ROWS, COLUMNS),
    )  # fmt: skip
    advantages, returns = ppo.advantages_and_returns(rewards, values, mask, ARGS.gamma, ARGS.lam)
    return [
        row("advantages (GAE), ragged rows", advantages, found["advantages"] * mask),
        row("returns, ragged rows", returns, found["returns"] * mask),
    ]


def whitening_of(advantages: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """TRL divides the variance by n - 1, peftbench, as OpenAI's code, by n."""
    n = mask.sum().double()
    theirs = ppo_trainer.masked_whiten(advantages, mask) * mask * torch.sqrt(n / (n - 1))
    return row("whitening, TRL's times sqrt(n / (n - 1))", ppo.whiten(advantages, mask), theirs)


def losses_of(
    old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor,
    old_values: torch.Tensor, new_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
) -> list[dict[str, Any]]:  # fmt: skip
    """Losses and their gradients; `mask` stands for both of TRL's masks."""
    tokens = int(mask.sum())
    leaves = [t.clone().requires_grad_() for t in (new, new_values, new, new_values)]
    rows = slice(None)
    found = trl_lines(
        "vpredclipped = torch.clamp(", "accelerator.backward", vpred=leaves[1],
        mb_values=old_values, mb_return=returns, new_logprobs=leaves[0], mb_logprobs=old,
        mb_advantage=advantages, padding_mask=~mask, padding_mask_p1=~mask, micro_batch_inds=rows,
    )  # fmt: skip
    policy = ppo.policy_loss(leaves[2], old, advantages, mask, ARGS.cliprange, tokens)
    value = ppo.value_loss(leaves[3], old_values, returns, mask, ARGS.cliprange_value, tokens)
    torch.autograd.backward([found["loss"], policy + ARGS.vf_coef * value])
    return [
        row("policy loss, ragged rows", policy, found["pg_loss"]),
        row("value loss, ragged rows", value, found["vf_loss"]),
        row("gradient to the log-probabilities", grad(leaves[2]), grad(leaves[0])),
        row("gradient to the values", grad(leaves[3]), grad(leaves[1])),
    ]


def grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


if __name__ == "__main__":
    main()
