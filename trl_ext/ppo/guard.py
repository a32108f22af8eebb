"""Watches a run of PPO for the ways in which it goes wrong without a word, says so, and acts.

Every rollout batch is compared with the first ones, in which the policy is still its start. What is seen is an alarm: a
metric, a line in the log, an alert of the tracker. Where an alarm stays, the guard raises beta, then steps back to the
last good policy with its critic and optimizer, then stops the run.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from trl_ext.ops.kl import FIRST, TOGETHER
from trl_ext.ppo.config import GUARD_ACTS
from trl_ext.ppo.rollout import Reduce, Rollout

LOGGER = logging.getLogger(__name__)
START = FIRST  # rollout batches that the later ones are compared with
LASTING = 2  # rollout batches in a row that show a fault before it is an alarm
PATIENCE = 3  # rollout batches that an act is given to help before the next one, if each is of enough completions
ENOUGH = TOGETHER  # completions whose mean is compared; of smaller rollout batches several are taken together
ERRORS = 3  # standard errors by which a mean of few completions must differ, beside its limit
QUIET = 6  # rollout batches without an alarm after which acts begin anew
SNAPSHOT_EVERY = 3  # rollout batches between two good policies that are kept
FACTOR = 2.0  # of beta, when it is raised; and by which a policy goes slower after a step back
AT_ONCE = 2  # tokens of a completion that ended at once
KEPT = (  # of a rollout batch's figures, beside each reward's own
    "entropy",
    "completions/distinct_2",
    "tokens",
    "tokens_std",
    "completions/truncated_ratio",
    "completions/ended_at_once",
    "reward_uncertainty",
    "kl",
    "reward",
    "reward_std",
    "samples",
)
DONE = {"raise_beta": "beta is doubled", "step_back": "back to the last good policy", "stop": "the run is stopped"}


@torch.no_grad()
def completion_figures(rollout: Rollout, reduce: Reduce) -> dict[str, float]:
    """What shows a policy that has collapsed, over all processes.

        distinct-2 = different pairs of neighbouring words / all of them, in the rollout batch of a process

    where a text without spaces, and one of several turns, counts by tokens, the policy's own; share that ended at once,
    mean and standard deviation of the tokens, number of completions.

    Source: Li et al. 2016, arXiv 1510.03055, section 5.

    Args:
        rollout: With its completions, as ids and as texts or messages.
        reduce: Sums a small tensor over all processes.
    """
    mask = rollout.actions
    lengths = mask.sum(1)
    ids, texts = rollout.completion_ids.tolist(), rollout.completions
    if rollout.action_mask is not None:  # the policy's own tokens, and not the environment's words between them
        ids = [row[own].tolist() for row, own in zip(rollout.completion_ids, mask, strict=True)]
        texts = [""] * len(ids)
    different = distinct_pairs(texts, ids, lengths.tolist())
    sums = [1.0, different, float(len(mask)), float((lengths <= AT_ONCE).sum())]
    sums += [float(lengths.sum()), float(lengths.square().sum())]
    processes, distinct, rows, at_once, tokens, squares = reduce(torch.tensor(sums, device=mask.device)).tolist()
    return {
        "completions/distinct_2": distinct / processes,
        "completions/ended_at_once": at_once / rows,
        "tokens": tokens / rows,
        "tokens_std": math.sqrt(max(squares / rows - (tokens / rows) ** 2, 0.0)),
        "samples": rows,
    }


def distinct_pairs(completions: Sequence[Any], ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Share of different ones among pairs of neighbouring words, of tokens where a text has no spaces."""
    pairs: list[tuple[Any, Any]] = []
    for completion, row, length in zip(completions, ids, lengths, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        words: Sequence[Any] = text.split()
        units = words if len(words) > 1 else row[:length]
        pairs += pairwise(units)
    return len(set(pairs)) / max(len(pairs), 1)


# ---------------------------------------------------------------------- what is watched


@dataclass(frozen=True)
class Fault:
    """One way in which a run goes wrong.

    Attributes:
        name: Of the alarm; its metric is `guard/<name>`.
        means: What it usually is, and what to do.
        lasting: Rollout batches in a row that show it before it is an alarm.
        acts: Whether the guard acts; else what is named in `means` has been done already.
        broken: The reward itself is broken: no policy can help, so the run steps back and stops.
    """

    name: str
    means: str
    lasting: int = LASTING
    acts: bool = True
    broken: bool = False


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("entropy_low", "the policy has become certain of one answer. Lower update_kl_target or raise beta"),
        Fault("entropy_high", "the policy drifts towards noise. Lower update_kl_target, or raise beta"),
        Fault("repetition", "the policy repeats itself, usually because the reward pays for it. Look at the samples"),
        Fault("length_short", "completions shrink, usually because the reward pays for it. Look at the samples"),
        Fault("length_limit", "nearly all completions are cut. Set missing_eos_penalty"),
        Fault("ended_at_once", "the policy ends before it has said anything: the reward pays for it"),
        Fault("kl_high", "the policy runs away from its reference. Lower update_kl_target, or raise beta"),
        Fault("reward_hacking", "what is trained on rises, what is only watched falls. Lower kl_target"),
        Fault("uncertainty_high", "the reward models disagree: the policy has left what they know. Raise beta"),
        Fault("reward_jump", "the reward changed from one batch to the next: look at its source", broken=True),
        Fault(
            "policy_step_too_long",
            "the learning rate is far too high; the step was shortened and the rate lowered. Lower learning_rate",
            lasting=1,
            acts=False,
        ),
        Fault(
            "critic_step_too_long",
            "the critic's rate is far too high; its step was shortened. Lower critic_learning_rate",
            lasting=1,
            acts=False,
        ),
        Fault(
            "critic_useless",
            "the critic explains nothing of the returns, and the batch mean is the baseline. Look at the value loss "
            "and critic_learning_rate",
            lasting=10,
            acts=False,
        ),
    )
}


def watch(seen: dict[str, float], history: Sequence[dict[str, float]], limits: "Limits") -> dict[str, str]:
    """Compare a rollout batch with the first ones.

    Args:
        seen: Figures of this batch: the logged metrics.
        history: Those of the batches before, the first first.
        limits: Of this run.

    Returns:
        Name of each fault that it shows, with the figures.
    """
    faults: dict[str, str] = {}
    first, now = history[:START], [*history[START:], seen][-batches(seen) :]
    if len(first) == START and len(now) == batches(seen):
        faults |= _changes(first, now)
    kl = _mean(now, "kl")
    if limits.kl_target is not None and kl is not None and kl > 1.75 * limits.kl_target:
        faults["kl_high"] = f"KL {kl:.3g}, its target {limits.kl_target:.3g}"
    faults |= _jump(seen, history) | _hacking(seen, history, limits)
    for role in ("policy", "critic"):
        share = seen.get(f"step/shortened/{role}", 1.0)
        if share < 0.02:
            faults[f"{role}_step_too_long"] = f"a step of the {role} was shortened to {share:.2g} of its length"
    explained = seen.get("explained_variance/monte_carlo", seen["explained_variance"])  # what the baseline goes by
    if len(history) >= START and explained <= 0:
        faults["critic_useless"] = f"explained variance {explained:.2g}"
    return faults


def batches(seen: dict[str, float]) -> int:
    """Rollout batches whose means are taken together, so that they are of enough completions."""
    return min(max(math.ceil(ENOUGH / seen["samples"]), 1), 2 * START)


def _mean(rows: Sequence[dict[str, float]], key: str) -> float | None:
    """None where a row does not have it."""
    return sum(row[key] for row in rows) / len(rows) if all(key in row for row in rows) else None


def _changes(first: Sequence[dict[str, float]], now: Sequence[dict[str, float]]) -> dict[str, str]:
    """What the policy does now that it did not do at the start."""
    faults: dict[str, str] = {}

    def compare(name: str, key: str, wrong: Callable[[float, float], bool], what: str) -> None:
        start, value = _mean(first, key), _mean(now, key)
        if start is not None and value is not None and wrong(value, start):
            faults[name] = f"{what} {value:.3g}, at the start {start:.3g}"

    def error(variance: Callable[[dict[str, float]], float]) -> float:
        """`ERRORS` standard errors of the difference of two means, their variances not the same (Welch)."""
        parts = (sum(variance(row) / row["samples"] for row in rows) / len(rows) ** 2 for rows in (first, now))
        return ERRORS * math.sqrt(sum(parts))

    shorter = error(lambda row: row.get("tokens_std", 0.0) ** 2)
    at_once = error(lambda row: row["completions/ended_at_once"] * (1 - row["completions/ended_at_once"]))
    compare("entropy_low", "entropy", lambda now, start: now < 0.25 * start, "entropy")
    compare("entropy_high", "entropy", lambda now, start: now > 1.75 * start + 0.25, "entropy")
    compare("repetition", "completions/distinct_2", lambda now, start: now < 0.6 * start, "distinct-2")
    compare("length_short", "tokens", lambda now, start: now < min(0.4 * start, start - shorter), "tokens a completion")
    compare("length_limit", "completions/truncated_ratio", lambda now, start: start < 0.5 and now > 0.95, "share cut")
    compare(
        "ended_at_once",
        "completions/ended_at_once",
        lambda now, start: now > start + max(0.25, at_once),
        "share ended at once",
    )
    compare("uncertainty_high", "reward_uncertainty", lambda now, start: now > 2.5 * start, "disagreement")
    return faults


def _jump(seen: dict[str, float], history: Sequence[dict[str, float]]) -> dict[str, str]:
    """A fall of the mean reward that no update of a bounded size makes, and a spread of another order.

    A rise is none: a policy that has found something may learn it at once.
    """
    sound = [row for row in history if not row.get("jumped")]
    if len(sound) < START:
        return {}
    before = sum(row["reward"] for row in sound[-START:]) / START
    recent = sum(row["reward_std"] for row in sound[-START:]) / START
    # Rewards whose spread has become small may be rare and far apart: one of a few may make a whole batch.
    spread = max(row["reward_std"] for row in sound)
    error = max(recent, seen["reward_std"]) * math.sqrt(1 / seen["samples"] + 1 / (START * seen["samples"]))
    if before - seen["reward"] > max(1.5 * recent, 0.5 * spread, 7 * error) > 0:
        return {"reward_jump": f"reward {seen['reward']:.3g}, in the last batches {before:.3g} (spread {recent:.2g})"}
    if spread > 0 and seen["reward_std"] > 20 * spread:
        return {"reward_jump": f"spread of the reward {seen['reward_std']:.3g}, until now at most {spread:.3g}"}
    return {}


def _hacking(seen: dict[str, float], history: Sequence[dict[str, float]], limits: "Limits") -> dict[str, str]:
    """Whether the reward has risen, and one that is only watched has fallen, each by three standard errors."""
    rows = [*history, seen]
    if len(rows) < 2 * START:
        return {}
    first, last = rows[:START], rows[-START:]

    def change(mean: str, std: str) -> tuple[float, float, float]:
        before, now = (sum(row[mean] for row in part) / START for part in (first, last))
        spread = sum(row[std] ** 2 / row["samples"] for row in (*first, *last)) / START
        return before, now, (now - before) / math.sqrt(spread) if spread > 0 else 0.0

    if change("reward", "reward_std")[2] < 3:
        return {}
    for name in limits.watched:
        keys = f"rewards/{name}/mean", f"rewards/{name}/std"
        if all(math.isfinite(row.get(key, math.nan)) for row in (*first, *last) for key in keys):
            before, now, errors = change(*keys)
            if errors < -3:
                return {"reward_hacking": f"the reward has risen and {name} has fallen from {before:.3g} to {now:.3g}"}
    return {}


@dataclass
class Limits:
    """What a run aims at.

    Attributes:
        kl_target: Nats a sequence; None where nothing holds the KL.
        watched: Names of rewards that are measured and not trained on.
    """

    kl_target: float | None = None
    watched: tuple[str, ...] = ()


# ---------------------------------------------------------------------- what is done


@dataclass
class GuardState:
    """What the guard remembers; part of the checkpoint.

    Attributes:
        history: Figures of the first batches and of the last ones.
        lasting: Batches in a row that have shown each fault.
        level: Acts that have been taken in this trouble.
        waited: Batches since the last act.
        quiet: Batches since the last alarm.
        raised: Every alarm: its step, name and figures, and what was done.
        stopped: Why the run was stopped; None while it goes on.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    lasting: dict[str, int] = field(default_factory=dict)
    level: int = 0
    waited: int = 0
    quiet: int = 0
    raised: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None


class PolicyGuard:
    """Raises alarms and decides what is done; the trainer does it.

    All processes see the same figures and decide alike.

    Args:
        acts: Of `GUARD_ACTS`, those that are allowed; alarms are raised in any case.
        limits: What the run aims at.
        alert: Tells a tracker: (title, text).
    """

    def __init__(self, acts: Sequence[str], limits: Limits, alert: Callable[[str, str], None] = lambda *_: None):
        self.acts, self.limits, self.alert = tuple(acts), limits, alert
        self.state = GuardState()
        self.sound = False  # whether the last batch showed no fault: the policy that made it is a good one

    def observe(self, figures: dict[str, float], step: int) -> tuple[str | None, dict[str, float]]:
        """Look at one rollout batch.

        Args:
            figures: Its logged metrics, and what `completion_figures` says of it.
            step: Optimizer steps so far.

        Returns:
            What is to be done, one of `GUARD_ACTS` or None; and metrics, `guard/<name>` 1 for each alarm that is on.
        """
        state = self.state
        faults = watch(figures, state.history, self.limits)
        self._remember(figures, faults)
        state.lasting = {name: state.lasting.get(name, 0) + 1 for name in faults}
        on = [FAULTS[name] for name, count in state.lasting.items() if count >= FAULTS[name].lasting]
        self.sound = not any(FAULTS[name].acts for name in faults)
        act = self._decide(on, PATIENCE + batches(figures) - 1)
        for fault in on:
            if state.lasting[fault.name] == fault.lasting or act is not None:
                self._tell(fault, faults[fault.name], act if fault.acts else None, step)
        if act == "stop":
            state.stopped = "; ".join(f"{fault.name}: {faults[fault.name]}" for fault in on if fault.acts)
        return act, {f"guard/{fault.name}": 1.0 for fault in on}

    def _remember(self, figures: dict[str, float], faults: dict[str, str]) -> None:
        state = self.state
        kept = {k: float(v) for k, v in figures.items() if k in KEPT or k.startswith("rewards/")}
        state.history.append(kept | {"jumped": float("reward_jump" in faults)})
        if len(state.history) > 3 * START:  # the first ones, and enough of the last
            del state.history[START]

    def _decide(self, on: list[Fault], patience: int) -> str | None:
        state = self.state
        acting = [fault for fault in on if fault.acts]
        if not acting:
            state.quiet += 1
            if state.quiet >= QUIET:
                state.level = 0
            return None
        state.quiet = 0
        state.waited += 1
        if state.level > 0 and state.waited < patience:
            return None
        if any(fault.broken for fault in acting):
            state.level = len(GUARD_ACTS) - 1
        while state.level < len(GUARD_ACTS):
            act = GUARD_ACTS[state.level]
            state.level += 1
            if act in self.acts:
                state.waited = 0
                return act
        return None

    def _tell(self, fault: Fault, figures: str, act: str | None, step: int) -> None:
        text = f"{figures}: {fault.means}." + (f" Now: {DONE[act]}." if act else "")
        self.state.raised.append({"step": step, "alarm": fault.name, "seen": figures, "act": act})
        LOGGER.warning("guard, step %d: %s. %s", step, fault.name, text)
        self.alert(fault.name, text)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self.state)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.state = GuardState(**saved)
