"""One rollout batch, from token ids to advantages. Every stage is a function; the record between them is `Rollout`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.ops.advantages import gae
from trl_ext.ops.ensemble import combine_scores
from trl_ext.ops.kl import kl_estimate
from trl_ext.ops.masking import masked_whiten
from trl_ext.ops.packing import PackedBatch, pack
from trl_ext.ppo.rewards import token_rewards
from trl_ext.roles import Role, SharedBaseModel

Reduce = Callable[[Tensor], Tensor]
NOT_YET: Any = None  # what a stage has not filled in


@dataclass
class Rollout:
    """What the policy did with one batch of prompts. B sequences, P prompt columns, T completion columns.

    Masks come from lengths, never from token ids, so that a pad token that is also eos is trained.
    """

    prompt_ids: Tensor  # (B, P) int, padded left
    prompt_mask: Tensor  # (B, P) int
    completion_ids: Tensor  # (B, T) int, padded right
    completion_mask: Tensor  # (B, T) int
    truncated: Tensor = NOT_YET  # (B,) bool, cut by the length limit: no end-of-sequence token
    logps: Tensor = NOT_YET  # (B, T) of the sampled tokens under the policy that sampled them
    entropy: Tensor = NOT_YET  # (B, T) nats
    reference_logps: Tensor | None = None  # (B, T) under the reference; None when beta is 0
    values: Tensor = NOT_YET  # (B, T) of the state before each token
    scores: Tensor = NOT_YET  # (B,) raw sequence reward
    uncertainty: Tensor | None = None  # (B,) standard deviation over the adapters of an ensemble; None without one
    shaped_scores: Tensor = NOT_YET  # (B,) normalised, clipped, less the penalty for a missing end
    kl: Tensor = NOT_YET  # (B, T) estimate of the KL from the reference, 0 on padding
    rewards: Tensor = NOT_YET  # (B, T) -beta kl, plus the shaped score on the last token
    advantages: Tensor = NOT_YET  # (B, T)
    returns: Tensor = NOT_YET  # (B, T)

    @classmethod
    def from_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        device: torch.device | str = "cpu",
    ) -> "Rollout":
        """Pad lists of token ids. A completion may be empty: its row is masked out everywhere.

        Raises:
            ValueError: A prompt without tokens, or another number of completions than prompts.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions: generation lost some.")
        empty = [i for i, ids in enumerate(prompts) if len(ids) == 0]
        if empty:
            raise ValueError(f"prompts {empty} of this batch have no token: remove empty prompts from the dataset.")
        prompt_ids, prompt_mask = _pad(prompts, pad_token_id, left=True)
        completion_ids, completion_mask = _pad(completions, pad_token_id, left=False)
        ends = set(eos_token_ids)
        truncated = torch.tensor([not (len(ids) and ids[-1] in ends) for ids in completions])
        tensors = (prompt_ids, prompt_mask, completion_ids, completion_mask, truncated)
        return cls(*(t.to(device) for t in tensors))

    def parts(self, max_tokens: int | None = None) -> list[PackedBatch]:
        """The sequences without padding between prompt and completion, those of like length together.

        Args:
            max_tokens: The largest pass, padding included. Default: no limit.
        """
        prompts, completions = self.prompt_mask.sum(1).tolist(), self.completion_mask.sum(1).tolist()
        end = self.prompt_ids.shape[1]
        rows = zip(torch.cat([self.prompt_ids, self.completion_ids], dim=1).tolist(), prompts, completions, strict=True)
        sequences = [[row[end - prompt : end + completion]] for row, prompt, completion in rows]
        parts = pack(sequences, [[n] for n in prompts], pad_token_id=0, share=False, max_tokens=max_tokens)
        device = self.prompt_ids.device
        return [part.to(device) for part in parts]


def _pad(rows: Sequence[Sequence[int]], pad_token_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return ids, mask


@torch.no_grad()
def score_with_roles(
    model: SharedBaseModel,
    rollout: Rollout,
    *,
    batch_size: int,
    temperature: float,
    with_reference: bool,
    ensemble: str = "mean",
    ensemble_coef: float = 0.5,
) -> None:
    """Fill `logps`, `entropy`, `values`, `reference_logps`, and with a reward role `scores` (and `uncertainty`).

    In passes over sequences of like length, each of at most `batch_size` times the tokens of the longest one. Each role
    has its own: rows of several adapters in one pass were slower (docs/memory.md, "One pass, several roles").
    """
    roles = (Role.POLICY, Role.REFERENCE, Role.CRITIC) if with_reference else (Role.POLICY, Role.CRITIC)
    lengths = rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)
    parts = rollout.parts(max_tokens=batch_size * int(lengths.max()))
    outputs = model(
        parts=parts, roles=roles, temperature=temperature, entropy="values", shape=tuple(rollout.completion_ids.shape)
    )
    for name in ("logps", "entropy", "values", *(("reference_logps",) if with_reference else ())):
        setattr(rollout, name, outputs[name].float())
    if not model.has_role(Role.REWARD):
        rollout.scores = None  # type: ignore[assignment]
        return
    members = model.score_parts(parts)
    rollout.scores, uncertainty = combine_scores(members, ensemble, ensemble_coef)
    rollout.uncertainty = uncertainty if members.shape[1] > 1 else None


def add_kl_and_rewards(rollout: Rollout, *, estimator: str, beta: float) -> None:
    """Fill `kl` and `rewards` from `shaped_scores`: the penalty on every token, the score on the last one."""
    mask = rollout.completion_mask.bool()
    if rollout.reference_logps is None:
        rollout.kl = torch.zeros_like(rollout.logps)
    else:
        rollout.kl = torch.where(mask, kl_estimate(rollout.logps, rollout.reference_logps, estimator), 0.0)
    rollout.rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, beta)


def add_advantages(
    rollout: Rollout,
    *,
    gamma: float,
    lam: float,
    value_lam: float,
    whiten: bool,
    clip: float | None,
    reduce: Reduce | None = None,
) -> None:
    """Fill `advantages` and `returns` by GAE; advantages whitened over the batch of all processes, then clipped."""
    mask = rollout.completion_mask.bool()
    advantages, rollout.returns = gae(rollout.rewards, rollout.values, mask, gamma, lam)
    if value_lam != lam:
        _, rollout.returns = gae(rollout.rewards, rollout.values, mask, gamma, value_lam)
    if whiten:
        advantages = masked_whiten(advantages, mask, reduce=reduce)
    rollout.advantages = advantages if clip is None else advantages.clamp(-clip, clip)
