"""Responses become numbers here and nowhere else: by the reward role, by functions, sync or async, and by classifiers.

Only a function's `None` means that a reward does not apply to a response. NaN, from whatever it comes, is an error.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from trl_ext.ops.ensemble import ENSEMBLE_MODES, combine_scores
from trl_ext.ops.packing import pack
from trl_ext.roles import Role, SharedBaseModel, max_positions
from trl_ext.text import Prompt, TextEncoder, end_token_ids, load_tokenizer

RewardFunction: TypeAlias = Callable[..., Any]
RewardSource: TypeAlias = str | torch.nn.Module | RewardFunction  # a classifier's id, a classifier, a function


class AnsweredPrompt(Protocol):
    """What a scorer needs to know of a prompt: its text, its tokens, and columns for reward functions."""

    prompt: Prompt
    prompt_ids: list[int]
    columns: dict[str, Any]


class RewardSources:
    """Reward functions and classifiers, as functions that are checked at every call, with weights and unique names.

    Args:
        sources: Functions `f(prompts, completions, completion_ids, **columns)` with one number or None for each
            completion, sync or async; sequence classifiers with one label or their ids; in a list or alone; None.
        weights: One for each. Default: 1 each.
        has_reward_role: Whether a reward role scores too: then there need not be a source.
        processing_classes: Tokenizers of the classifiers, one entry for each source (None: the classifier's own).
        device: Where classifiers compute. Default: the CPU.

    Attributes:
        functions, names, weights: One entry for each source.

    Raises:
        TypeError: A source that is no function, classifier or id.
        ValueError: Nothing scores, or not one finite weight per source.
    """

    def __init__(
        self,
        sources: RewardSource | Sequence[RewardSource] | None,
        weights: Sequence[float] | None = None,
        *,
        has_reward_role: bool = False,
        processing_classes: Any = None,
        device: Any = None,
    ):
        listed: list[Any] = [] if sources is None else list(sources) if isinstance(sources, list | tuple) else [sources]
        if not listed and not has_reward_role:
            raise ValueError(
                "there is nothing that scores responses: give reward_funcs, or a SharedBaseModel with a reward_adapter."
            )
        if weights is not None and len(weights) != len(listed):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(listed)} reward_funcs: give one for each. The "
                "reward role has a weight of its own, reward_role_weight."
            )
        self.weights = [1.0] * len(listed) if weights is None else [float(weight) for weight in weights]
        for i, weight in enumerate(self.weights):
            if not math.isfinite(weight):
                raise ValueError(f"reward_weights[{i}]={weight!r}: give a finite number.")
        if not isinstance(processing_classes, list | tuple):
            processing_classes = [processing_classes] * len(listed)
        if len(processing_classes) != len(listed):
            raise ValueError(
                f"reward_processing_classes has {len(processing_classes)} entries for {len(listed)} reward_funcs: give "
                "one for each, None for functions."
            )
        for source in listed:
            if not (isinstance(source, str) or callable(source)):
                raise TypeError(
                    f"reward_funcs holds {source!r}: give functions f(prompts, completions, **columns), sequence "
                    "classifiers, or their ids."
                )
        made = [
            ClassifierReward(source, tokenizer, device=device) if isinstance(source, str | torch.nn.Module) else source
            for source, tokenizer in zip(listed, processing_classes, strict=True)
        ]
        self.names = _unique([_name(source) for source in made])
        self.functions = [checked_reward(source, name) for source, name in zip(made, self.names, strict=True)]

    def __call__(self, **inputs: Any) -> Tensor:
        """(B, F) float64: what every source gives for B completions, NaN where it does not apply.

        Async functions run at the same time, on an event loop of their own, so that a notebook's loop is no obstacle.
        """
        answers: list[Any] = [None] * len(self.functions)
        waiting = [i for i, function in enumerate(self.functions) if inspect.iscoroutinefunction(function)]
        for i, function in enumerate(self.functions):
            if i not in waiting:
                answers[i] = function(**inputs)
        if waiting:

            async def wait() -> list[Any]:
                return await asyncio.gather(*(self.functions[i](**inputs) for i in waiting))

            with ThreadPoolExecutor(1) as thread:
                for i, answer in zip(waiting, thread.submit(lambda: asyncio.run(wait())).result(), strict=True):
                    answers[i] = answer
        rows = [[math.nan if reward is None else float(reward) for reward in answer] for answer in answers]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(inputs["completions"])).T


def _name(source: Any) -> str:
    while isinstance(source, functools.partial):
        source = source.func
    return getattr(source, "__name__", type(source).__name__)


def _unique(names: list[str]) -> list[str]:
    """The same names, those that stand several times numbered from the second on: f, f_2, f_3."""
    taken: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.append(candidate)
    return taken


def checked_reward(function: RewardFunction, name: str | None = None) -> RewardFunction:
    """The same reward function, sync or async, with what it returns checked.

    Args:
        function: As TRL calls it.
        name: What logs and errors call it. Default: its own.

    Returns:
        A function whose result is a list with one number, or None where it does not apply, for each completion.

    Raises (from the returned function):
        ValueError: Something that is no list of numbers, another number of rewards, or one that is NaN, infinite or no
            number; with the function's name, the sample and its completion.
        TypeError: The function does not take what it is given.
    """
    own: Any = function
    while isinstance(own, functools.partial):
        own = own.func
    called = name or _name(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        _check_signature(function, called, args, kwargs)
        return function(*args, **kwargs)

    if inspect.iscoroutinefunction(own) or inspect.iscoroutinefunction(type(own).__call__):

        @functools.wraps(function, updated=())
        async def checked_async(*args: Any, **kwargs: Any) -> Any:
            return _checked(called, await call(*args, **kwargs), kwargs["completions"])

        checked_async.__name__ = called
        return checked_async

    @functools.wraps(function, updated=())
    def checked(*args: Any, **kwargs: Any) -> Any:
        return _checked(called, call(*args, **kwargs), kwargs["completions"])

    checked.__name__ = called
    return checked


def _check_signature(function: RewardFunction, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"reward function {name!r} cannot be called with what a reward function gets ({', '.join(kwargs)}): "
            f"{error}. Define it as def {name}(prompts, completions, **kwargs)."
        ) from error


def _checked(name: str, rewards: Any, completions: list[Any]) -> list[float | None]:
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if isinstance(rewards, str | bytes | dict) or not hasattr(rewards, "__iter__"):
        raise ValueError(
            f"reward function {name!r} returned {rewards!r}, a {type(rewards).__name__}: return a list with one number "
            "for each completion."
        )
    values: list[Any] = list(rewards)
    if len(values) != len(completions):
        raise ValueError(
            f"reward function {name!r} returned {len(values)} rewards for {len(completions)} completions: return "
            "exactly one per completion."
        )
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            finite = not isinstance(value, str | bytes) and math.isfinite(value)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise ValueError(
                f"reward function {name!r} returned {value!r} for sample {i}, completion {completions[i]!r}. Return a "
                "finite number, or None where the reward does not apply."
            )
    return values


class ClassifierReward:
    """A sequence classifier with one label as a reward function; it has a tokenizer of its own.

    It reads a conversation as its own chat template renders it, and a plain response with its own end token behind it,
    as `trl.RewardTrainer` trains it.

    Args:
        model: Hub id, folder, or a loaded model.
        tokenizer: Default: the model's.
        batch_size: Sequences scored at once.
        device: Where it computes. Default: the CPU, or where a loaded model is.

    Raises:
        ValueError: More than one label.
    """

    def __init__(self, model: str | torch.nn.Module, tokenizer: Any = None, batch_size: int = 32, device: Any = None):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(model) if isinstance(model, str) else model
        config = loaded.config
        self.__name__ = str(config._name_or_path).rstrip("/").split("/")[-1] or type(loaded).__name__
        if config.num_labels != 1:
            raise ValueError(
                f"{self.__name__} has {config.num_labels} labels: a reward model has one. Pick the label's score in a "
                "reward function, --reward_funcs file.py:function."
            )
        self.encoder = TextEncoder(load_tokenizer(config._name_or_path) if tokenizer is None else tokenizer)
        self.model = loaded.eval() if device is None else loaded.eval().to(device)
        self.batch_size = batch_size
        config.get_text_config().pad_token_id = self.encoder.pad_id

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """Scores of N completions; `kwargs` are not used."""
        device = next(self.model.parameters()).device
        rows = [self.encoder.rendered_ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            part = {"input_ids": rows[start : start + self.batch_size]}
            inputs = self.encoder.tokenizer.pad(part, padding_side="right", return_tensors="pt").to(device)
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores


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
) -> tuple[Tensor, Tensor | None]:
    """Scores of sampled responses by the reward role, read where its reward models were trained to read them.

    Args:
        model: With a reward role.
        encoder: Of the model's tokenizer; adds what the chat template puts behind the end token.
        prompts: B prompts, texts or conversations.
        prompt_ids, response_ids: Their tokens, and those of a response to each, through its end token.
        max_tokens: The largest pass, padding included. Default: no limit.
        ensemble, ensemble_coef: How several reward adapters make one score (`ops.ensemble.combine_scores`).

    Returns:
        Scores (B,) float32, and the standard deviation over the adapters of an ensemble (B,), None without one.

    Raises:
        ValueError: A score that is not finite, or a sequence longer than the model's positions.
    """
    ids = [encoder.scored_ids(*row) for row in zip(prompts, prompt_ids, response_ids, strict=True)]
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
    scores, uncertainty = combine_scores(members, ensemble, ensemble_coef)
    return scores, uncertainty if members.shape[1] > 1 else None


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
        self.role_weight, self.ensemble, self.ensemble_coef = role_weight, ensemble, ensemble_coef

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
            )
            role = role.cpu()
        weights = torch.tensor(self.sources.weights, dtype=torch.float64)
        return combine(per_function, weights, role, self.role_weight).tolist()
