"""What can be found wrong before a model is loaded, and what reward functions may return."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset

LONGEST_TO_CHECK = 16


def check_inputs(
    args: Any, tokenizer: Any, positions: int | None, train_dataset: Any, eval_dataset: Any, ptx_dataset: Any
) -> None:
    """Everything about a run's data that can be wrong without a model.

    Raises:
        ValueError: What is wrong, and what to change.
    """
    check_tokenizer(tokenizer)
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for part_name, part in _parts(dataset, name):
            check_prompts(part, part_name)
            check_lengths(part, part_name, tokenizer, args.max_completion_length, positions)
    wanted = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < wanted:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, a rollout batch takes {wanted} (generation_batch_size / "
            "num_generations): nothing would be trained. Give more prompts, or lower steps_per_generation or "
            "per_device_train_batch_size."
        )
    if (args.ptx_coef > 0) != (ptx_dataset is not None):
        raise ValueError(f"ptx_coef={args.ptx_coef} and ptx_dataset go together: give both, or neither.")


def _parts(dataset: Any, name: str) -> list[tuple[str, Any]]:
    """Several evaluation sets come as a dict."""
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", part) for key, part in dataset.items()]
    return [(name, dataset)]


def check_prompts(dataset: Any, name: str) -> None:
    """A dataset of prompts: a column `prompt`, at least one row, no empty prompt.

    Raises:
        ValueError: What is missing, by dataset and row.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt', only {dataset.column_names}. Rename one: "
            "dataset.rename_column('your_column', 'prompt')."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: give at least one prompt.")
    for row, prompt in enumerate(dataset["prompt"]):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(
                f"{name} row {row} has an empty prompt ({prompt!r}). Drop such rows: "
                "dataset.filter(lambda row: row['prompt'])."
            )


def check_lengths(dataset: Any, name: str, tokenizer: Any, max_completion_length: int, positions: int | None) -> None:
    """The longest prompts (by characters) and a whole completion must fit the model's positions.

    Raises:
        ValueError: By how much they do not, and for which row.
    """
    if positions is None:
        return
    if max_completion_length >= positions:
        raise ValueError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt: the model has {positions} "
            "positions. Lower max_completion_length."
        )
    if not isinstance(dataset, Dataset):
        return
    sizes = [len(p) if isinstance(p, str) else sum(len(str(m.get("content"))) for m in p) for p in dataset["prompt"]]
    for row in sorted(range(len(sizes)), key=sizes.__getitem__)[-LONGEST_TO_CHECK:]:
        prompt = dataset[row]["prompt"]
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) + max_completion_length > positions:
            raise ValueError(
                f"{name} row {row}: a prompt of {len(ids)} tokens and max_completion_length={max_completion_length} "
                f"exceed the model's {positions} positions. Lower max_completion_length to at most "
                f"{positions - len(ids)}, or drop prompts of that length."
            )


def check_tokenizer(tokenizer: Any) -> None:
    """A tokenizer needs an end-of-sequence token; a missing pad token is replaced by it.

    Raises:
        ValueError: No eos token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, so no completion can end. Set it: tokenizer.eos_token = '...', with a "
            "token that your SFT data ends with."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def checked_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same reward function, sync or async, with what it returns checked.

    One number per completion; `None` where it does not apply, as in TRL.

    Raises (from the returned function):
        ValueError: Another number of rewards, or one that is NaN, infinite or no number; with the function's name,
            the sample and its completion.
    """
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)

    def check(rewards: Any, completions: list[Any]) -> Any:
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        if len(rewards) != len(completions):
            raise ValueError(
                f"reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions: return "
                "exactly one per completion."
            )
        for i, reward in enumerate(rewards):
            if reward is None:
                continue
            try:
                finite = math.isfinite(reward)
            except TypeError:
                finite = False
            if not finite:
                raise ValueError(
                    f"reward function {name!r} returned {reward!r} for sample {i}, completion {completions[i]!r}. "
                    "Return a finite number, or None where the reward does not apply."
                )
        return rewards

    if inspect.iscoroutinefunction(named) or inspect.iscoroutinefunction(type(named).__call__):

        @functools.wraps(function, updated=())
        async def checked_async(*args: Any, **kwargs: Any) -> Any:
            return check(await function(*args, **kwargs), kwargs["completions"])

        checked_async.__name__ = name
        return checked_async

    @functools.wraps(function, updated=())
    def checked(*args: Any, **kwargs: Any) -> Any:
        return check(function(*args, **kwargs), kwargs["completions"])

    checked.__name__ = name
    return checked


def reward_list(reward_funcs: Any, weights: list[float] | None, has_reward_role: bool) -> list[Any]:
    """Reward functions as a list, each function checked; none is fine when the model scores by itself.

    Raises:
        ValueError: Neither reward functions nor a reward role, or not one weight per function.
    """
    funcs = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if not funcs and not has_reward_role:
        raise ValueError(
            "there is nothing to train against: give reward_funcs, or a SharedBaseModel with a reward_adapter."
        )
    if weights is not None and len(weights) != len(funcs):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers for {len(funcs)} reward_funcs: give one for each. The reward "
            "role has a weight of its own, reward_role_weight."
        )
    return [f if isinstance(f, str | torch.nn.Module) else checked_reward(f) for f in funcs]
