"""The reward model's arithmetic and the named rewards. No method of its own: PPO uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from peftbench.data.tinywiki import names_its_subject, true_statement_ratio
from peftbench.errors import InvalidTrainingError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (prompts, completions) as token ids -> (B,) scores
RewardFunction = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], torch.Tensor]

# Of the toy reward: a token that is frequent enough to be found, and without a tokenizer any.
COUNTED_WORD, COUNTED_TOKEN_ID = " the", 5


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over pairs, nats; both are (B,) scores.

    Raises: ValueError if the shapes differ.
    Source: Stiennon et al. 2020, section 3.4, https://arxiv.org/abs/2009.01325
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)};"
            " they must be equal"
        )
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def normalisation(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gain, bias), scalars, with which gain x score + bias has mean 0 and standard deviation 1.

    Scores that are all equal get gain 1. Source: Ziegler et al. 2019, section 2.1.
    """
    std = scores.std(correction=0)
    gain = torch.where(std > 1e-6, 1 / std, torch.ones_like(std))
    return gain, -scores.mean() * gain


def check_shape(scores: torch.Tensor, completions: int) -> torch.Tensor:
    """The scores in float32. Raises: UserError for a wrong shape."""
    if not isinstance(scores, torch.Tensor) or scores.shape != (completions,):
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise UserError(
            f"the reward of {completions} completions has shape {shape};"
            f" it must be a tensor of shape ({completions},)"
        )
    return scores.float()


def check_finite(scores: Sequence[float]) -> None:
    """Raises: InvalidTrainingError for the first score that is no finite number."""
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            raise InvalidTrainingError(f"the reward of completion {row} is {score}")


def named_reward(name: str, tokenizer: PreTrainedTokenizerBase | None) -> RewardFunction:
    """The function of a name: `true`, `count-token` or `none`.

    Raises: UserError for `true` without a tokenizer: it judges text.
    """
    if name == "count-token":
        counted = COUNTED_TOKEN_ID if tokenizer is None else _first_id(tokenizer, COUNTED_WORD)
        return lambda _, completions: torch.tensor([token_share(c, counted) for c in completions])
    if name == "none":
        return lambda _, completions: torch.zeros(len(completions))
    if tokenizer is None:
        raise UserError("reward 'true' judges text, and these synthetic ids have none")
    return lambda prompts, completions: torch.tensor(
        true_statement_ratios(tokenizer, prompts, completions)
    )


def _first_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    return ids[0]


def token_share(completion: Sequence[int], counted: int) -> float:
    """The toy reward: share of the completion's tokens that are `counted`; the best is 1."""
    return sum(token == counted for token in completion) / max(1, len(completion))


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def truth_is_known(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether completions of these tinywiki prompts can be judged: none was cut too short."""
    return all(names_its_subject(text_of(tokenizer, prompt)) for prompt in prompts)


def check_truth_is_known(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], prompt_length: int
) -> None:
    """Raises: UserError where the reward `true` could not judge a completion of these prompts."""
    if not truth_is_known(tokenizer, prompts):
        raise UserError(
            f"prompt_length {prompt_length} cuts off whom a prompt is about, which reward 'true'"
            " must know; raise it"
        )


def true_statement_ratios(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> list[float]:
    """tinywiki's true reward of each completion: share of its sentences that are facts."""
    return [
        true_statement_ratio(text_of(tokenizer, prompt), text_of(tokenizer, completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def win_ratio(after: Sequence[float], before: Sequence[float]) -> float:
    """Share of items on which `after` is the higher; a tie counts half."""
    wins = math.fsum((a > b) + 0.5 * (a == b) for a, b in zip(after, before, strict=True))
    return wins / len(after)
