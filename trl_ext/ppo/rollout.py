"""One rollout batch, from prompts to advantages. Every stage is a function; the record between them is `Rollout`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trl_ext.generation.from_trl import Completions
from trl_ext.ops.advantages import gae, gae_over_actions, length_adaptive_lambda
from trl_ext.ops.kl import kl_estimate
from trl_ext.ops.masking import masked_mean_var, masked_whiten
from trl_ext.ops.packing import PackedBatch, pack
from trl_ext.ppo.config import PPOMaxConfig
from trl_ext.ppo.data import REFERENCES, reference_scores
from trl_ext.ppo.losses import explained_variance
from trl_ext.ppo.rewards import onto_actions, shape_placed, shape_scores, sigmoid_scores, token_rewards
from trl_ext.ppo.state import PPOState
from trl_ext.roles import Role, SharedBaseModel
from trl_ext.runs import check_first_kl
from trl_ext.scoring import combine, placed_by_functions, placed_by_role, role_scores
from trl_ext.text import TextEncoder, pad_ids

Reduce: TypeAlias = Callable[[Tensor], Tensor]
NOT_YET: Any = None  # what a stage has not filled in
# What a micro-batch of the update needs
UPDATE_FIELDS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "logps",
    "values",
    "advantages",
    "returns",
)
# And these where there are any: of an engine that sampled, and of a loss that asks for them
IF_THERE = ("importance", "sampler_logps", "best_weights", "action_mask")


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
    per_function: Tensor = NOT_YET  # (B, F) what each reward function gave, NaN where it does not apply
    role_scores: Tensor | None = None  # (B,) what the reward role gave; None without one
    scores: Tensor = NOT_YET  # (B,) raw sequence reward: all that scored, weighted
    uncertainty: Tensor | None = None  # (B,) standard deviation over the adapters of an ensemble; None without one
    shaped_scores: Tensor = NOT_YET  # (B,) normalised, clipped, less the penalty for a missing end
    kl: Tensor = NOT_YET  # (B, T) estimate of the KL from the reference, 0 on padding
    placed: Tensor | None = None  # (B, T) parts of the shaped score that are paid before the end; None: no such parts
    rewards: Tensor = NOT_YET  # (B, T) -beta kl, plus the shaped score on the last token or in its parts
    advantages: Tensor = NOT_YET  # (B, T)
    returns: Tensor = NOT_YET  # (B, T)
    baseline_is_critic: bool = True  # of the advantages; else it is the mean return of the batch
    explained: float = 0.0  # share of the variance of Monte-Carlo returns that the critic explains
    sampler_logps: Tensor | None = None  # (B, T) under the engine that sampled; None where the model did itself
    importance: Tensor | None = None  # (B, T) what each token counts in the policy's loss; None: 1
    best_weights: Tensor | None = None  # (B,) what each answer counts in the likelihood of the best; None: no such loss
    action_mask: Tensor | None = None  # (B, T) int, 0 on an environment's tokens too; None: there are none
    prompts: Any = NOT_YET  # list of B texts or conversations
    completions: Any = NOT_YET  # list of B texts or lists of one message

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
        prompt_ids, prompt_mask = pad_ids(prompts, pad_token_id, left=True)
        completion_ids, completion_mask = pad_ids(completions, pad_token_id, left=False)
        ends = set(eos_token_ids)
        truncated = torch.tensor([not (len(ids) and ids[-1] in ends) for ids in completions])
        tensors: Any = (prompt_ids, prompt_mask, completion_ids, completion_mask, truncated)
        return cls(*(t.to(device) for t in tensors))

    @property
    def actions(self) -> Tensor:
        """(B, T) bool: the tokens that the policy chose, which losses, KL and statistics are of."""
        return (self.completion_mask if self.action_mask is None else self.action_mask).bool()

    @classmethod
    def from_update_batch(cls, batch: Mapping[str, Any]) -> "Rollout":
        """The rows of a micro-batch."""
        fields: dict[str, Any] = {name: batch[name] for name in UPDATE_FIELDS}
        fields |= {name: batch[name] for name in IF_THERE if name in batch}
        return cls(**fields)

    def update_batch(self, count: int | None = None) -> dict[str, Tensor]:
        """What the update needs, of the first `count` rows or of all."""
        names = [*UPDATE_FIELDS, *(name for name in IF_THERE if getattr(self, name) is not None)]
        return {name: getattr(self, name)[:count] for name in names}

    def tokens(self) -> int:
        """Number of tokens of prompts and completions."""
        return int(self.prompt_mask.sum() + self.completion_mask.sum())

    def longest(self) -> int:
        """Tokens of the longest prompt and completion."""
        return int((self.prompt_mask.sum(1) + self.completion_mask.sum(1)).max())

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


def collect(
    rows: list[dict[str, Any]],
    model: SharedBaseModel,
    args: PPOMaxConfig,
    state: PPOState,
    encoder: TextEncoder,
    *,
    generate: Callable[[list[Any]], Completions],
    reward: Callable[[list[Any], list[Any], list[list[int]]], Tensor],
    reduce: Reduce,
    device: torch.device,
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    placed: Callable[[], Any] = list,
    env_mask: Callable[[], list[list[int]] | None] = lambda: None,
    warming_up: bool = False,
) -> Rollout:
    """Collect one process's rollout batch: generate -> score -> shape -> advantages.

    Args:
        rows: Of the dataset; B of them.
        model: In training mode; in evaluation the running moments are used and left as they are.
        args, state: The run's. Only `state.moments` changes here.
        encoder: Of the model's tokenizer; knows what ends a completion.
        generate: Completes prompts by the policy.
        reward: What the reward functions give for prompts, completions and their token ids, (B, F).
        reduce: Sums a small tensor over all processes.
        device: Where tensors belong.
        phase: Times "generate" and "score".
        placed: What each reward function gave to parts of completions in its last call.
        env_mask: Of the completions, 1 where the policy wrote; None: it wrote all of them.
        warming_up: Whether only the critic is trained on this batch.

    Raises:
        RuntimeError: Another role than the policy is active, or at the first rollout it is not its reference.
    """
    prompts, training = [row["prompt"] for row in rows], model.training
    if model.active_role is not Role.POLICY:
        raise RuntimeError(
            f"the {model.active_role.value} role is active where the policy should generate: something (an async "
            "reward function?) has switched it and not switched back. Use `with model.role(...)` around plain code."
        )
    # 1. Completions
    with phase("generate"):
        prompt_ids, completion_ids, completions = generate(prompts)
    rollout = Rollout.from_ids(prompt_ids, completion_ids, encoder.end_ids, encoder.pad_id, device)
    rollout.prompts, rollout.completions = prompts, completions
    rollout.action_mask = action_mask(env_mask(), rollout.completion_mask)
    if rollout.action_mask is not None:  # a completion that ends with the environment's words was not cut
        last = (rollout.completion_mask.sum(1, keepdim=True) - 1).clamp(min=0)
        rollout.truncated &= rollout.action_mask.gather(1, last).squeeze(1).bool()

    # 2. Policy, reference and critic on every token, the reward role on every sequence
    with phase("score"):
        at_a_time = args.scored_at_a_time if training else args.per_device_eval_batch_size
        score_tokens(model, rollout, at_a_time, args.temperature, with_reference=args.beta != 0)
        if model.has_role(Role.REWARD):
            rollout.role_scores, rollout.uncertainty = role_scores(
                model,
                encoder,
                prompts,
                prompt_ids,
                completion_ids,
                max_tokens=rollout.longest() * at_a_time,
                ensemble=args.reward_ensemble,
                ensemble_coef=args.reward_ensemble_coef,
                ensemble_weights=args.reward_ensemble_weights,
                as_sampled=rollout.action_mask is not None,
            )
    if training and state.rollouts == 0 and rollout.reference_logps is not None:
        check_first_kl(rollout.logps, rollout.reference_logps)

    # 3. Sequence scores: reward role and functions, weighted
    rollout.per_function = reward(prompts, completions, completion_ids)
    weights = torch.tensor(args.reward_weights or [1.0] * rollout.per_function.shape[1])
    rollout.scores = combine(rollout.per_function, weights, rollout.role_scores, args.reward_role_weight)
    parts = placed_by_functions(encoder, completion_ids, placed(), weights.tolist())
    if parts is not None:
        rollout.placed = parts.to(device)
    if rollout.role_scores is not None and args.reward_role_pays != "end":
        rollout.placed = placed_by_role(
            model,
            encoder,
            prompt_ids,
            completion_ids,
            args.reward_role_pays,
            max_tokens=rollout.longest() * at_a_time,
            ensemble=args.reward_ensemble,
            ensemble_coef=args.reward_ensemble_coef,
            ensemble_weights=args.reward_ensemble_weights,
        ) * args.reward_role_weight + (0.0 if rollout.placed is None else rollout.placed)

    # 4. Running normalisation, clip, penalty for a missing end
    mode, clip = args.reward_normalization, args.reward_clip
    scores = shaped_by_references(rollout, rows) if args.reward_sigmoid else rollout.scores
    shaped = shape_scores(scores, state.moments, mode, clip, update=training)
    if rollout.placed is not None:
        placed_shaped = shape_placed(rollout.placed, scores, state.moments, mode, clip)
        rollout.placed = placed_shaped if rollout.action_mask is None else onto_actions(placed_shaped, rollout.actions)
    rollout.shaped_scores = shaped - (args.missing_eos_penalty or 0.0) * rollout.truncated

    # 5. KL penalty on every token; GAE; whitening
    add_kl_and_rewards(rollout, estimator=args.kl_estimator, beta=state.kl.coef)
    lam: float | Tensor = args.gae_lambda
    value_lam = args.value_lambda
    if args.gae_lambda_alpha is not None:
        lam = length_adaptive_lambda(rollout.actions.sum(1), args.gae_lambda_alpha)
    if warming_up and args.critic_warmup_returns == "monte_carlo":
        value_lam = 1.0
    add_advantages(
        rollout,
        gamma=args.gamma,
        lam=lam,
        value_lam=lam if value_lam is None else value_lam,
        whiten=args.normalize_advantages,
        clip=args.advantage_clip,
        reduce=reduce,
        trust_critic=args.critic_baseline == "always",
    )
    return rollout


def action_mask(env_mask: list[list[int]] | None, completion_mask: Tensor) -> Tensor | None:
    """1 on the tokens that the policy wrote, (B, T), like `completion_mask`; None where it wrote all of them."""
    if env_mask is None or all(all(row) for row in env_mask):
        return None
    mask = torch.zeros_like(completion_mask)
    for i, row in enumerate(env_mask):
        mask[i, : len(row)] = torch.tensor(row, dtype=mask.dtype)
    return mask


def shaped_by_references(rollout: Rollout, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Scores by `rewards.sigmoid_scores`, (B,), around those in the column `reference_scores`.

    Raises:
        ValueError: A reward function has paid in parts, which have no sigmoid.
    """
    if rollout.placed is not None:
        raise ValueError(
            "reward_sigmoid=True shapes the score of a whole completion, and a reward function has paid parts of one: "
            "return one number for each completion, or set reward_sigmoid=False."
        )
    return sigmoid_scores(rollout.scores, [reference_scores(row[REFERENCES]) for row in rows])


@torch.no_grad()
def score_tokens(
    model: SharedBaseModel, rollout: Rollout, batch_size: int, temperature: float, *, with_reference: bool
) -> None:
    """Fill `logps`, `entropy`, `values`, and `reference_logps` if asked.

    The critic reads prompt and completion as they were sampled, and values the state before each sampled token, where
    the policy chose. What a chat template writes behind the end token, on which the reward role reads its score, is no
    action of the policy: it has no value, no advantage, and is in no pass here.

    In passes over sequences of like length, each of at most `batch_size` times the tokens of the longest one. Each role
    has its own: rows of several adapters in one pass were slower (docs/results/memory.md).
    """
    roles = (Role.POLICY, Role.REFERENCE, Role.CRITIC) if with_reference else (Role.POLICY, Role.CRITIC)
    parts = rollout.parts(max_tokens=batch_size * rollout.longest())
    outputs = model(
        parts=parts, roles=roles, temperature=temperature, entropy="values", shape=tuple(rollout.completion_ids.shape)
    )
    for name in ("logps", "entropy", "values", *(("reference_logps",) if with_reference else ())):
        setattr(rollout, name, outputs[name].float())


def add_kl_and_rewards(rollout: Rollout, *, estimator: str, beta: float) -> None:
    """Fill `kl` and `rewards` from `shaped_scores`: the penalty on every token, the score on the last one."""
    mask = rollout.actions
    if rollout.reference_logps is None:
        rollout.kl = torch.zeros_like(rollout.logps)
    else:
        rollout.kl = torch.where(mask, kl_estimate(rollout.logps, rollout.reference_logps, estimator), 0.0)
    rollout.rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, beta, rollout.placed)


def add_advantages(
    rollout: Rollout,
    *,
    gamma: float,
    lam: float | Tensor,
    value_lam: float | Tensor,
    whiten: bool,
    clip: float | None,
    reduce: Reduce | None = None,
    trust_critic: bool = True,
) -> None:
    """Fill `advantages`, `returns`, `explained` and `baseline_is_critic`.

    Advantages are whitened over all processes, then clipped. They are GAE's with the critic as the baseline. A critic
    that explains nothing adds its error to them instead of taking variance away: unless it is trusted whatever it does,
    advantages are then

        A_t = G_t - mean(G)        G_t = sum_{s >= t} gamma^{s - t} r_s

    the mean over the tokens of the batch. What decides is the share of the variance of G, which owes the critic
    nothing, that the critic explains. GAE's own returns hold values of the critic, which explains itself in them: with
    a small lambda and long responses most of them, whatever the rewards are.

    Source: Pan et al. 2026, EVPO (arXiv 2604.19485): a critic lowers the variance of the advantages where its explained
    variance is above 0, and raises it elsewhere.
    """
    mask, estimate = rollout.actions, gae if rollout.action_mask is None else gae_over_actions
    advantages, rollout.returns = estimate(rollout.rewards, rollout.values, mask, gamma, lam)
    if not (value_lam is lam or (isinstance(lam, float | int) and value_lam == lam)):
        _, rollout.returns = estimate(rollout.rewards, rollout.values, mask, gamma, value_lam)
    sums, _ = estimate(rollout.rewards, torch.zeros_like(rollout.values), mask, gamma, 1.0)
    rollout.explained = float(explained_variance(rollout.values, sums, mask, reduce=reduce))
    rollout.baseline_is_critic = trust_critic or rollout.explained > 0
    if not rollout.baseline_is_critic:
        advantages = torch.where(mask, sums - masked_mean_var(sums, mask, reduce)[0], 0)
    if whiten:
        advantages = masked_whiten(advantages, mask, reduce=reduce)
    rollout.advantages = advantages if clip is None else advantages.clamp(-clip, clip)
