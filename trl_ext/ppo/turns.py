"""Completions of several turns: a `rollout_func` in the form that TRL's `GRPOTrainer` takes.

    rollout_func(prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs", "env_mask", ...}

A completion holds the turns of the policy and what an environment said between them; `env_mask` is 1 where the policy
wrote. The environment's tokens are read by every role and trained by none: losses, KL, whitening, statistics and the
steps' distances leave them out, and GAE goes from the end of a turn to the start of the next. Further lists, one entry
a completion, reach the reward functions under their names.

`logprobs` are those of the tokens under what sampled them, for `policy_objective="dis"`, or None.
`trainer.complete(prompts)` and `trainer.model.generate` sample from the policy inside it.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from transformers import Trainer

from trl_ext.generation.from_trl import Completions
from trl_ext.ppo.completing import beside
from trl_ext.ppo.rollout import Rollout

RolloutFunction: TypeAlias = Callable[[list[Any], Any], dict[str, Any]]
REQUIRED = ("prompt_ids", "completion_ids", "logprobs")


def check_rollout(output: Any, prompts: int, longest: int) -> dict[str, Any]:
    """What a `rollout_func` returned for so many prompts, checked.

    Raises:
        ValueError: What is missing or of another length, by name and completion.
    """
    missing = sorted(set(REQUIRED) - set(output if isinstance(output, dict) else ()))
    if missing:
        raise ValueError(f"rollout_func must return a dictionary with {', '.join(REQUIRED)}; it lacks {missing}.")
    for name, column in output.items():
        if column is not None and len(column) != prompts:
            raise ValueError(f"rollout_func returned {len(column)} {name} for {prompts} prompts: return one for each.")
    lengths = [len(ids) for ids in output["completion_ids"]]
    for name in ("logprobs", "env_mask"):
        for i, row in enumerate(output.get(name) or ()):
            if len(row) != lengths[i]:
                raise ValueError(
                    f"rollout_func: {name} of completion {i} has {len(row)} entries for its {lengths[i]} tokens: give "
                    "one for each token, those of the environment included."
                )
    for i, row in enumerate(output["logprobs"] or ()):
        own = (output.get("env_mask") or {i: [1] * len(row)})[i]
        given = [_number(x) for x, mine in zip(row, own, strict=True) if mine]
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in given):
            raise ValueError(
                f"rollout_func: logprobs of completion {i} are not finite where the policy wrote: {given}."
            )
    for i, row in enumerate(output.get("env_mask") or ()):
        if any(entry not in (0, 1) for entry in row):
            raise ValueError(f"rollout_func: env_mask of completion {i} is {row}: 1 where the policy wrote, else 0.")
    for i, length in enumerate(lengths):
        if not 0 < length <= longest:
            raise ValueError(
                f"rollout_func: completion {i} has {length} tokens, its turns and the environment's together; it needs "
                f"one at least and max_completion_length={longest} at most. Raise that, or end sooner."
            )
    return output


def _number(logprob: Any) -> Any:
    """Of an engine each may be a list, of which the first is that of the token."""
    return logprob[0] if isinstance(logprob, list | tuple) else logprob


class Rolled:
    """What has completed the prompts already, where TRL has a vLLM server: it then counts, decodes and logs."""

    of_training = False
    empty: frozenset[int] = frozenset()

    def __init__(self, completion_ids: list[list[int]]):
        self.completion_ids = completion_ids

    def sync_weights(self) -> None:
        """Nothing: the policy is where the function sampled."""

    def generate(self, prompts: list[list[int]], **options: Any) -> tuple[Any, list[list[int]], None, None]:
        """Prompts as they came, the completions, and no log-probabilities."""
        return prompts, [list(ids) for ids in self.completion_ids], None, None


class TakesTurns(Trainer):
    """The part of `PPOMaxTrainer` that completes prompts by a `rollout_func`; before what completes them else."""

    args: Any
    vllm_generation: Any
    use_vllm: bool
    rollout_func: RolloutFunction | None = None
    _rolled: dict[str, Any] | None = None  # what it returned last
    _rolling = False  # inside it completions are the policy's own

    def _complete(self, prompts: list[Any]) -> Completions:
        if self.rollout_func is None or self._rolling:
            return super()._complete(prompts)  # type: ignore[misc]
        self._rolling = True
        engine, use_vllm = self.vllm_generation, self.use_vllm
        try:
            output = check_rollout(
                self.rollout_func(list(prompts), self), len(prompts), self.args.max_completion_length
            )
            self.vllm_generation, self.use_vllm = Rolled(output["completion_ids"]), True
            _, completion_ids, completions = super()._complete(prompts)  # type: ignore[misc]
        finally:
            self._rolling, self.vllm_generation, self.use_vllm = False, engine, use_vllm
        self._rolled = output
        return [list(ids) for ids in output["prompt_ids"]], completion_ids, completions

    def compare_with_sampler(self, rollout: Rollout) -> dict[str, float]:
        """As that of `CompletesPrompts`; `logprobs` of a `rollout_func` are `sampler_logps`, which "dis" reads."""
        given = None if self._rolled is None else self._rolled["logprobs"]
        if given is not None:
            rollout.sampler_logps = beside(rollout, [list(map(_number, row)) for row in given])
        return super().compare_with_sampler(rollout)  # type: ignore[misc]

    def env_mask(self) -> list[list[int]] | None:
        """That of the last completions; None where the policy wrote all of them."""
        return None if self._rolled is None else self._rolled.get("env_mask")

    def with_extra_fields(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the dataset with what else a `rollout_func` returned, for reward functions."""
        if self._rolled is None:
            return inputs
        extra = {k: v for k, v in self._rolled.items() if k not in (*REQUIRED, "env_mask")}
        return [row | {name: column[i] for name, column in extra.items()} for i, row in enumerate(inputs)]
