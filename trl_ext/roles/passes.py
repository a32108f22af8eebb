"""Forward passes by role: log-probabilities, values, scores. Functions over the switch and what hangs on it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trl_ext.ops.packing import PackedBatch, by_sequence, in_order
from trl_ext.roles.backbone import hidden_states, packed_hidden_states
from trl_ext.roles.role import Role
from trl_ext.roles.sharding import same_number_of_passes
from trl_ext.roles.switch import SwitchedModel

OUTPUTS = {Role.POLICY: "logps", Role.REFERENCE: "reference_logps", Role.CRITIC: "values"}


def run_roles(
    model: SwitchedModel,
    parts: list[PackedBatch],
    roles: tuple[Role, ...],
    *,
    temperature: float = 1.0,
    entropy: str | None = None,
    shape: tuple[int, int] | None = None,
    ptx: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One pass of each role over packed responses; see `SharedBaseModel.forward` for arguments and results.

    Raises:
        ValueError: The reward role, or an `entropy` that is no choice.
    """
    if Role.REWARD in roles or entropy not in (None, "values", "gradient"):
        raise ValueError(
            f"roles={roles}, entropy={entropy!r}: use `score_parts` for the reward role; entropy is None, 'values' "
            "or 'gradient'."
        )
    parts = same_number_of_passes(model, parts)
    outputs: dict[str, Tensor] = {}
    for role in roles:
        wanted = entropy if role is Role.POLICY else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and role is not Role.REFERENCE):
            per_token, entropies = _run_role(model, parts, role, temperature, wanted)
        outputs[OUTPUTS[role]], outputs["mask"] = by_sequence(parts, per_token, shape)
        if wanted is not None:
            outputs["entropy"], _ = by_sequence(parts, entropies, shape)
    if ptx is not None:
        outputs["ptx_loss"] = language_model_loss(model, ptx["input_ids"], ptx["attention_mask"])
    return outputs


def _run_role(
    model: SwitchedModel, parts: list[PackedBatch], role: Role, temperature: float, entropy: str | None
) -> tuple[list[Tensor], list[Any]]:
    """For each part, (m,) each: values of the critic, else log-probabilities; and entropies, None if not asked for."""
    per_token, entropies = [], []
    with model.role(role):
        for part in parts:
            hidden = packed_hidden_states(model.backbone, part).index_select(0, part.sources)
            if role is Role.CRITIC:
                per_token.append(model.heads["critic"](hidden))
                continue
            logps, nats = model.language_head.logprobs(
                hidden, part.targets, temperature, entropy is not None, entropy == "gradient"
            )
            per_token.append(logps)
            entropies.append(nats)
    return per_token, entropies


def language_model_loss(model: SwitchedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L), (B, L) -> scalar: minus the policy's mean log-probability of all real tokens but a row's first."""
    with model.role(Role.POLICY):
        hidden = hidden_states(model.backbone, input_ids, attention_mask)[:, :-1]
    mask = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    logps, _ = model.language_head.logprobs(hidden[mask], input_ids[:, 1:][mask])
    return -logps.mean()


# ---------------------------------------------------------------------- scores and values


def score_members(model: SwitchedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B, K) float32: each reward adapter's head on the last real token."""
    _check_batch(input_ids, attention_mask)
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * columns).argmax(-1)
    rows = torch.arange(len(last), device=last.device)
    return _by_each_member(model, lambda: hidden_states(model.backbone, input_ids, attention_mask)[rows, last])


def score_parts(model: SwitchedModel, parts: list[PackedBatch]) -> Tensor:
    """N packed sequences -> (N, K) float32: each reward adapter's head on the token that `ends` names."""

    parts = same_number_of_passes(model, parts)

    def scored_states() -> Tensor:
        states = (packed_hidden_states(model.backbone, part).index_select(0, part.ends) for part in parts)
        return in_order(parts, list(states))

    return _by_each_member(model, scored_states)


def score_response_tokens(model: SwitchedModel, parts: list[PackedBatch], shape: tuple[int, int]) -> Tensor:
    """N packed sequences -> (N, T, K): each reward adapter's head on the token before each response token."""
    parts = same_number_of_passes(model, parts)

    def states() -> Tensor:
        return torch.cat([packed_hidden_states(model.backbone, part).index_select(0, part.sources) for part in parts])

    members = _by_each_member(model, states).unbind(-1)
    return torch.stack([by_sequence(parts, [scores], shape)[0] for scores in members], dim=-1)


def _by_each_member(model: SwitchedModel, scored_states: Callable[[], Tensor]) -> Tensor:
    """(N, K): the head of each reward adapter on the (N, H) that `scored_states` computes under it, normalised."""
    scores = []
    with model.role(Role.REWARD):
        for name in model.reward_adapters():
            model.activate(Role.REWARD, name)
            score = model.heads[name](scored_states())
            scale = model.reward_scales.get(name)
            scores.append(score if scale is None else (score - scale.mean) / scale.std)
    return torch.stack(scores, dim=-1)


def values(model: SwitchedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B, T) float32: the critic's value after each token."""
    _check_batch(input_ids, attention_mask)
    with model.role(Role.CRITIC):
        return model.heads["critic"](hidden_states(model.backbone, input_ids, attention_mask))


def _check_batch(input_ids: Tensor, attention_mask: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must both be (B, T)."
        )
    empty = (attention_mask.sum(-1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty} of attention_mask have no 1: there is no token to score.")
