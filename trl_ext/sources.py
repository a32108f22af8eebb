"""Reward functions, sync or async, and sequence classifiers: what gives a number for a response beside the reward role.

Only a function's `None` means that a reward does not apply to a response. NaN, from whatever it comes, is an error.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext.text import Prompt, TextEncoder, message_text
from trl_ext.token_rewards import FORMS, PlacedReward, read_reward

LOAD_OPTIONS = ("dtype", "attn_implementation", "trust_remote_code")

RewardFunction: TypeAlias = Callable[..., Any]
RewardSource: TypeAlias = str | torch.nn.Module | RewardFunction  # a classifier's id, a classifier, a function


class RewardSources:
    """Reward functions and classifiers, as functions that are checked at every call, with weights and unique names.

    Args:
        sources: Functions `f(prompts, completions, completion_ids, **columns)` with one number, None, or rewards of
            parts (`token_rewards`) for each completion, sync or async; sequence classifiers with one label or their
            ids; in a list or alone; None.
        weights: One for each. Default: 1 each.
        has_reward_role: Whether a reward role scores too: then there need not be a source.
        processing_classes: Tokenizers of the classifiers, one entry for each source (None: the classifier's own).
        device: Where classifiers compute. Default: the CPU.
        load_options: Of a base's `from_pretrained`; those of `LOAD_OPTIONS` hold for classifiers given by id too.

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
        load_options: Mapping[str, Any] | None = None,
    ):
        listed: list[Any] = [] if sources is None else list(sources) if isinstance(sources, list | tuple) else [sources]
        if not listed and not has_reward_role:
            raise ValueError(
                "there is nothing that scores responses: give reward_funcs, or a SharedBaseModel with a reward_adapter."
            )
        if weights is not None and not isinstance(weights, list | tuple):
            raise ValueError(f"reward_weights={weights!r} must be a list with one number for each of reward_funcs.")
        if weights is not None and len(weights) != len(listed):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(listed)} reward_funcs: give one for each. The "
                "reward role has a weight of its own, reward_role_weight."
            )
        for i, weight in enumerate(weights or []):
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"reward_weights[{i}]={weight!r}: give a finite number.")
        self.weights = [1.0] * len(listed) if weights is None else [float(weight) for weight in weights]
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
        options = {name: value for name, value in (load_options or {}).items() if name in LOAD_OPTIONS}
        made = [
            ClassifierReward(source, tokenizer, device=device, **options)
            if isinstance(source, str | torch.nn.Module)
            else source
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
        self.take_placed()  # a sum is all that is wanted here
        rows = [[math.nan if reward is None else float(reward) for reward in answer] for answer in answers]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(inputs["completions"])).T

    def take_placed(self) -> list[list[PlacedReward | None] | None]:
        """For each function what its last call gave to parts of completions, once; None where it gave numbers alone."""
        taken = [function.placed for function in self.functions]  # type: ignore[attr-defined]
        for function in self.functions:
            function.placed = None  # type: ignore[attr-defined]
        return taken


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
        A function whose result is a list with one number, or None where it does not apply, for each completion: the
        sum of what its parts got. The parts of its last call are its attribute `placed`.

    Raises (from the returned function):
        ValueError: Something that is no list of rewards, another number of them, or one that is NaN, infinite, of
            another length than its completion or no reward; with the function's name, the sample and its completion.
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
            rewards, checked_async.placed = _checked(called, await call(*args, **kwargs), kwargs)  # type: ignore
            return rewards

        checked_async.__name__, checked_async.placed = called, None  # type: ignore[attr-defined]
        return checked_async

    @functools.wraps(function, updated=())
    def checked(*args: Any, **kwargs: Any) -> Any:
        rewards, checked.placed = _checked(called, call(*args, **kwargs), kwargs)  # type: ignore[attr-defined]
        return rewards

    checked.__name__, checked.placed = called, None  # type: ignore[attr-defined]
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


def _checked(
    name: str, rewards: Any, given: Mapping[str, Any]
) -> tuple[list[float | None], list[PlacedReward | None] | None]:
    """A number or None for each completion, and what its parts got; None where no completion has such parts."""
    completions: list[Any] = given["completions"]
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
    ids = given.get("completion_ids")
    placed: list[PlacedReward | None] = [None] * len(values)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            read = read_reward(value, None if ids is None else len(ids[i]), len(message_text(completions[i])))
        except ValueError as error:
            raise ValueError(
                f"reward function {name!r} returned {value!r} for sample {i}, completion {completions[i]!r}: {error}. "
                f"{FORMS[0].upper()}{FORMS[1:]}."
            ) from error
        if isinstance(read, PlacedReward):
            values[i], placed[i] = read.total, read
    return values, None if not any(placed) else placed


class ClassifierReward:
    """A sequence classifier with one label as a reward function; it has a tokenizer of its own.

    It reads a conversation as its own chat template renders it, without options of the policy's, and a plain response
    with its own end token behind it, as `trl.RewardTrainer` trains it.

    Args:
        model: Hub id, folder, or a loaded model.
        tokenizer: Default: the model's.
        batch_size: Sequences scored at once.
        device: Where it computes. Default: the CPU, or where a loaded model is.
        load_options: Of `from_pretrained`, for an id or a folder.

    Raises:
        ValueError: More than one label.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        tokenizer: Any = None,
        batch_size: int = 32,
        device: Any = None,
        **load_options: Any,
    ):
        loaded: Any = _load_classifier(model, load_options) if isinstance(model, str) else model
        config = loaded.config
        self.__name__ = str(config._name_or_path).rstrip("/").split("/")[-1] or type(loaded).__name__
        if config.num_labels != 1:
            raise ValueError(
                f"{self.__name__} has {config.num_labels} labels: a reward model has one. Pick the label's score in a "
                "reward function, --reward_funcs file.py:function."
            )
        if tokenizer is None:
            source, trusted = model if isinstance(model, str) else config._name_or_path, "trust_remote_code"
            tokenizer = AutoTokenizer.from_pretrained(source, **{trusted: load_options.get(trusted, False)})
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        # An encoder (BERT) has no end token, or its tokenizer writes one itself: it reads a plain text as it is
        ends_itself = tokenizer.eos_token_id is None or tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
        self.encoder = None if ends_itself else TextEncoder(tokenizer)
        self.model = loaded.eval() if device is None else loaded.eval().to(device)
        self.batch_size = batch_size
        config.get_text_config().pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """Scores of N completions; `kwargs` are not used."""
        device = next(self.model.parameters()).device
        rows = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            part = {"input_ids": rows[start : start + self.batch_size]}
            inputs = self.tokenizer.pad(part, padding_side="right", return_tensors="pt").to(device)
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _ids(self, prompt: Prompt, completion: Any) -> list[int]:
        if self.encoder is not None:
            return self.encoder.rendered_ids(prompt, completion)
        if isinstance(prompt, str):
            return self.tokenizer(prompt + completion)["input_ids"]
        text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _load_classifier(name: str, options: dict[str, Any]) -> Any:
    """A sequence classifier; of an adapter's folder, which has no configuration of a model, one with one label."""
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=options.get("trust_remote_code", False))
    except (OSError, ValueError):
        options = {**options, "num_labels": 1}
    return AutoModelForSequenceClassification.from_pretrained(name, **options)
