"""Responses become numbers here and nowhere else: by the reward role, and by what `sources` knows."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trl_ext.ops.ensemble import ENSEMBLE_MODES, check_weights, combine_scores
from trl_ext.ops.packing import pack
from trl_ext.roles import Role, SharedBaseModel, max_positions
from trl_ext.sources import ClassifierReward, RewardFunction, RewardSource, RewardSources, checked_reward
from trl_ext.text import Prompt, TextEncoder, end_token_ids
from trl_ext.token_rewards import PlacedReward, paying_tokens, sentence_ends

__all__ = [
    "AnsweredPrompt",
    "ClassifierReward",
    "ResponseScorer",
    "RewardFunction",
    "RewardSource",
    "RewardSources",
    "checked_reward",
    "combine",
    "placed_by_functions",
    "placed_by_role",
    "role_scores",
]


class AnsweredPrompt(Protocol):
    """What a scorer needs to know of a prompt: its text, its tokens, and columns for reward functions."""

    prompt: Prompt
    prompt_ids: list[int]
    columns: dict[str, Any]


@torch.no_grad()
def role_scores(
    model: SharedBaseModel,
    encoder: TextEncoder,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
    ensemble: str = "mean",
    ensemble_coef: float = 0.5,
    ensemble_weights: Sequence[float] | None = None,
    as_sampled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scores of sampled responses by the reward role, read where its reward models were trained to read them.

    Args:
        model: With a reward role.
        encoder: Of the model's tokenizer; adds what the chat template puts behind the end token.
        prompts: B prompts, texts or conversations.
        prompt_ids, response_ids: Their tokens, and those of a response to each, through its end token.
        max_tokens: The largest pass, padding included. Default: no limit.
        ensemble, ensemble_coef, ensemble_weights: How several reward adapters make one score
            (`ops.ensemble.combine_scores`).
        as_sampled: Responses of several turns: their text is never rendered anew as one message.

    Returns:
        Scores (B,) float32, and the standard deviation over the adapters of an ensemble (B,), None without one.

    Raises:
        ValueError: A score that is not finite, or a sequence longer than the model's positions.
    """
    ids = [
        encoder.scored_ids(*row, as_sampled=as_sampled) for row in zip(prompts, prompt_ids, response_ids, strict=True)
    ]
    positions, longest = max_positions(model.config), max(map(len, ids))
    if positions is not None and longest > positions:
        raise ValueError(
            f"a prompt and response of {longest} tokens, the end of the chat template included, exceed the model's "
            f"{positions} positions: no score can be read. Lower max_completion_length, or drop long prompts."
        )
    groups, starts = [[row] for row in ids], [[len(row)] for row in ids]
    parts = pack(groups, starts, encoder.pad_id, share=False, max_tokens=max_tokens)
    training = model.training
    model.eval()
    try:
        members = model.score_parts([part.to(model.input_device) for part in parts])
    finally:
        model.train(training)
    bad = (~members.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the reward role's score of the samples {bad} is not finite: {members[bad[0]].tolist()}. Look for NaN in "
            "the reward adapter, or compute in bfloat16 or float32 instead of float16."
        )
    scores, uncertainty = combine_scores(members, ensemble, ensemble_coef, ensemble_weights)
    return scores, uncertainty if members.shape[1] > 1 else None


@torch.no_grad()
def placed_by_role(
    model: SharedBaseModel,
    encoder: TextEncoder,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    pays: str,
    *,
    max_tokens: int | None = None,
    ensemble: str = "mean",
    ensemble_coef: float = 0.5,
    ensemble_weights: Sequence[float] | None = None,
) -> Tensor:
    """What the reward role's score has gained at the end of each token or sentence but the last one.

        placed_t = s(prompt, y_1 .. y_t) - s(prompt, y_1 .. y_u)        u the end before t, or 0: the prompt alone

    The role's score is a potential: what is paid on the way is taken off the end, so that a response gets its whole
    score in all, and no policy is better than before (Ng, Harada and Russell 1999, "Policy Invariance Under Reward
    Transformations"). What a chat template writes behind the end token is read for the whole score only.

    Args:
        model, encoder, prompt_ids, response_ids, max_tokens, ensemble, ensemble_coef, ensemble_weights: See
            `role_scores`.
        pays: "sentence" or "token".

    Returns:
        (B, T) float32 on the model's device, T the longest response; 0 on the last token of each.

    Raises:
        ValueError: A score that is not finite.
    """
    width = max(map(len, response_ids))
    rows = [[*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    starts = [[len(prompt)] for prompt in prompt_ids]
    parts = pack([[row] for row in rows], starts, encoder.pad_id, share=False, max_tokens=max_tokens)
    training = model.training
    model.eval()
    try:
        members = model.score_response_tokens([part.to(model.input_device) for part in parts], (len(rows), width))
    finally:
        model.train(training)
    if not members.isfinite().all():
        raise ValueError("the reward role's score of a beginning is not finite: look for NaN in its adapter.")
    before = combine_scores(members.flatten(0, 1), ensemble, ensemble_coef, ensemble_weights)[0].view(len(rows), width)
    placed = torch.zeros_like(before)
    for i, ids in enumerate(response_ids):
        inner = list(range(1, len(ids)))  # numbers of tokens after which there is another one
        if pays == "sentence":
            ends = sentence_ends(_text_of(encoder, ids))
            inner = sorted({n for n in (k + 1 for k in _paying(encoder, ids, ends)) if n < len(ids)})
        if inner:
            scores = before[i, [0, *inner]]
            placed[i, [n - 1 for n in inner]] = scores[1:] - scores[:-1]
    return placed


def placed_by_functions(
    encoder: TextEncoder,
    response_ids: Sequence[Sequence[int]],
    placed: Sequence[Sequence[PlacedReward | None] | None],
    weights: Sequence[float],
) -> Tensor | None:
    """What reward functions gave to parts of responses, weighted, on the tokens that are paid.

    Args:
        encoder: Of the model's tokenizer.
        response_ids: B responses through their end tokens.
        placed: For each function, what `RewardSources.take_placed` gave.
        weights: One for each function.

    Returns:
        (B, T) float32, T the longest response; None where no function gave anything to a part.

    Raises:
        ValueError: A place in a text that its tokens do not decode to.
    """
    if not any(placed):
        return None
    paid = torch.zeros(len(response_ids), max(map(len, response_ids)), dtype=torch.float64)
    for given, weight in zip(placed, weights, strict=True):
        for i, reward in enumerate(given or ()):
            if reward is None:
                continue
            ends = [end for end, _ in reward.characters]
            tokens = zip(_paying(encoder, response_ids[i], ends), (r for _, r in reward.characters), strict=True)
            for token, number in (*reward.tokens, *tokens):
                paid[i, token] += weight * number
    return paid.float()


def _text_of(encoder: TextEncoder, ids: Sequence[int]) -> str:
    """As reward functions get it."""
    return str(encoder.tokenizer.decode(list(ids), skip_special_tokens=True))


def _paying(encoder: TextEncoder, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    return paying_tokens(lambda some: _text_of(encoder, some), ids, ends) if ends else []


def combine(per_function: Tensor, weights: Tensor, role: Tensor | None, role_weight: float) -> Tensor:
    """One score for a response, from all that scored it.

        s = role_weight * s_role + sum_f weights_f s_f, over the functions f that apply

    Args:
        per_function: What each reward function gave, (B, F); NaN where it does not apply.
        weights: (F,).
        role: Score of the reward role, (B,), or None without one.
        role_weight: Its weight.

    Returns:
        Scores, (B,).

    Raises:
        ValueError: A response that nothing scored.
    """
    total = (per_function * weights.to(per_function.device)).nansum(dim=1)
    if role is not None:
        return total + role_weight * role
    unscored = per_function.isnan().all(dim=1).nonzero().flatten().tolist()
    if unscored:
        raise ValueError(
            f"every reward function returned None for the samples {unscored} of the batch: each response needs a "
            "score. Return a number from at least one function."
        )
    return total


class ResponseScorer:
    """One number for each response: the weighted sum of reward functions, classifiers and the reward role.

    Args:
        model: Its reward role scores; None leaves it out.
        tokenizer: The model's, or a `TextEncoder` of it.
        reward_funcs: `RewardSources`, or what they are made of.
        reward_weights: One for each of them. Default: 1 each.
        role_weight: Of the reward role.
        ensemble: How several reward adapters make one score: "mean", "min" or "variance" (`ops.combine_scores`).
        ensemble_coef: Lambda of "variance".
        ensemble_weights: One for each reward adapter. Default: all the same.

    Raises:
        TypeError, ValueError: See `RewardSources`; or an unknown `ensemble`.
    """

    def __init__(
        self,
        model: SharedBaseModel | None,
        tokenizer: Any,
        reward_funcs: RewardSources | RewardSource | Sequence[RewardSource] | None = None,
        *,
        reward_weights: Sequence[float] | None = None,
        role_weight: float = 1.0,
        ensemble: str = "mean",
        ensemble_coef: float = 0.5,
        ensemble_weights: Sequence[float] | None = None,
    ):
        if ensemble not in ENSEMBLE_MODES:
            raise ValueError(f"ensemble={ensemble!r} is unknown: use one of {', '.join(ENSEMBLE_MODES)}.")
        if not math.isfinite(role_weight):
            raise ValueError(f"reward_role_weight={role_weight!r}: give a finite number.")
        self.model = model if model is not None and model.has_role(Role.REWARD) else None
        if not isinstance(reward_funcs, RewardSources):
            device = None if model is None else model.input_device
            has_role = self.model is not None
            reward_funcs = RewardSources(reward_funcs, reward_weights, has_reward_role=has_role, device=device)
        self.sources = reward_funcs
        if not isinstance(tokenizer, TextEncoder):
            config = None if model is None else model.generation_config
            tokenizer = TextEncoder(tokenizer, end_token_ids(tokenizer, config))
        self.encoder = tokenizer
        members = 0 if self.model is None else list(self.model.adapters.values()).count(Role.REWARD)
        check_weights(ensemble_weights, ensemble, members)
        self.role_weight, self.ensemble, self.ensemble_coef = role_weight, ensemble, ensemble_coef
        self.ensemble_weights = ensemble_weights

    def __call__(self, samples: Sequence[tuple[AnsweredPrompt, list[int]]]) -> list[float]:
        """Scores of some responses, each given as the prompt that it answers and its token ids, the end included.

        Raises:
            ValueError: A function returned what is no reward, or nothing applies to a response.
        """
        rows, ids = [row for row, _ in samples], [response for _, response in samples]
        per_function = torch.zeros(len(samples), 0, dtype=torch.float64)
        if self.sources.functions:
            texts = self.encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
            per_function = self.sources(
                prompts=[row.prompt for row in rows],
                completions=[self.encoder.completion(row.prompt, t) for row, t in zip(rows, texts, strict=True)],
                completion_ids=ids,
                **{name: [row.columns[name] for row in rows] for name in rows[0].columns},
            )
        role = None
        if self.model is not None:
            prompts, prompt_ids = [row.prompt for row in rows], [row.prompt_ids for row in rows]
            role, _ = role_scores(
                self.model,
                self.encoder,
                prompts,
                prompt_ids,
                ids,
                ensemble=self.ensemble,
                ensemble_coef=self.ensemble_coef,
                ensemble_weights=self.ensemble_weights,
            )
            role = role.cpu()
        weights = torch.tensor(self.sources.weights, dtype=torch.float64)
        return combine(per_function, weights, role, self.role_weight).tolist()
