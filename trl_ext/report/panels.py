"""The curves of a report: which metrics each shows, what it is, and where it is healthy (docs/tuning.md)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Band = tuple[float | None, float | None]
START = 5  # logged values that a range "as at the start" is measured on, as the guard does


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: Above it.
        series: Metric -> label.
        caption: What is shown.
        healthy: Where it should be, in words; empty where there is no such range.
        line: A value that is aimed at, from the configuration.
        band: The range where it should be, from the configuration and the first series' values.
        evaluated: Metrics of evaluations, drawn as points; metric -> label.
        zero: Whether the axis begins at 0.
        stacked: Whether the series are parts of a whole.
    """

    title: str
    series: Mapping[str, str]
    caption: str
    healthy: str = ""
    line: Callable[[Mapping[str, Any]], float | None] = lambda configuration: None
    band: Callable[[Mapping[str, Any], Sequence[float]], Band | None] = lambda configuration, values: None
    evaluated: Mapping[str, str] = field(default_factory=dict)
    zero: bool = False
    stacked: bool = False


def _held(configuration: Mapping[str, Any]) -> float | None:
    """The KL that is aimed at; None where nothing holds it."""
    if configuration.get("kl_control") in (None, "fixed") or not configuration.get("beta"):
        return None
    return configuration.get("kl_target")


def _around(low: float | None, high: float | None) -> Callable[[Mapping[str, Any], Sequence[float]], Band | None]:
    """A range of multiples of the mean of the first values."""

    def band(configuration: Mapping[str, Any], values: Sequence[float]) -> Band | None:
        if len(values) <= START:
            return None
        start = sum(values[:START]) / START
        return (None if low is None else low * start, None if high is None else high * start)

    return band


def _near_target(configuration: Mapping[str, Any], values: Sequence[float]) -> Band | None:
    target = _held(configuration)
    return None if target is None else (target * 2 / 3, target * 4 / 3)


PPO = (
    Panel(
        "Reward",
        {"reward": "reward"},
        "Mean raw reward of the completions of a rollout batch; points are evaluations on held-out prompts.",
        "Rises, then flattens as the KL reaches its target.",
        evaluated={"eval_reward": "held-out prompts"},
    ),
    Panel(
        "KL from the reference",
        {"kl": "KL"},
        "How far the policy is from where it started: nats a completion. The dashed line is the target.",
        "Climbs to the target and stays within a third of it, or below it where the diversity is held.",
        line=_held,
        band=_near_target,
        evaluated={"eval_kl": "held-out prompts"},
        zero=True,
    ),
    Panel(
        "Beta",
        {"beta": "beta"},
        "The price of a nat of KL in the reward.",
        "Rises with the KL, then wanders. At 1 and more the reward fights the reference: look at samples.",
        zero=True,
    ),
    Panel(
        "Size of an update",
        {"update_kl": "update"},
        "KL between the policy that sampled a rollout batch and the policy after it, in nats. The dashed line is the "
        "target, before the learning-rate schedule lowers it.",
        "About the target. Far below it for long: the reward gives no gradient.",
        line=lambda configuration: configuration.get("update_kl_target") or None,
        zero=True,
    ),
    Panel(
        "Entropy",
        {"entropy": "entropy"},
        "Nats a token: how undecided the policy is.",
        "Within a third of its start. Falling to 0: one answer; rising: noise.",
        band=_around(2 / 3, 4 / 3),
        zero=True,
    ),
    Panel(
        "Length",
        {"completions/mean_length": "tokens"},
        "Mean number of tokens of a completion. The dashed line is the limit, `max_completion_length`.",
        "Follows what the reward wants. Shrinking to a few tokens: the reward pays for it.",
        line=lambda configuration: configuration.get("max_completion_length"),
        evaluated={"eval_completions/mean_length": "held-out prompts"},
        zero=True,
    ),
    Panel(
        "Share cut by the length limit",
        {"completions/truncated_ratio": "cut"},
        "Share of completions without an end token.",
        "Low, and not rising. High: `missing_eos_penalty` teaches an answer to end.",
        zero=True,
    ),
    Panel(
        "Variety",
        {"completions/distinct_2": "distinct-2"},
        "Different pairs of neighbouring words among all pairs, in a rollout batch.",
        "At least 0.8 of its start. Falling: repetition.",
        band=_around(0.8, None),
        zero=True,
    ),
    Panel(
        "Perplexity",
        {"perplexity": "under the policy", "perplexity_reference": "under the reference"},
        "Of the sampled completions: how surprising a token is, to the policy and to its start.",
        "Under the reference it rises with the KL. Both falling towards 1: one answer.",
        zero=True,
    ),
    Panel(
        "Explained variance",
        {"explained_variance": "critic"},
        "Share of the variance of the returns that the critic explains.",
        "Above 0 after the warm-up, 0.3 to 0.8 later. Around 0: see `critic_learning_rate`.",
        band=lambda configuration, values: (0.3, 0.8),
    ),
    Panel(
        "Losses",
        {"policy_loss": "policy", "value_loss": "value"},
        "Of policy and critic, token means.",
        "The value loss falls, then follows the spread of the returns. The policy loss says little.",
    ),
    Panel(
        "Share of tokens clipped",
        {"clip_fraction/policy": "policy", "clip_fraction/value": "value"},
        "Tokens whose ratio, or value, had left the clip range.",
        "Policy 0 to 0.1: steps are small. 0.3 and more: `num_iterations` is too high.",
        band=lambda configuration, values: (None, 0.1),
        zero=True,
    ),
)

RRHF = (
    Panel(
        "Reward of sampled responses",
        {"reward": "mean", "reward_best": "best of a prompt"},
        "Responses that the policy has sampled online.",
        "Rises.",
    ),
    Panel(
        "Ranking accuracy",
        {"ranking_accuracy": "pairs"},
        "Share of pairs of responses that the policy's own score ranks as the reward does.",
        "Rises above 0.5. Near 1 on training prompts and lower on held-out ones: overfitting.",
        evaluated={"eval_ranking_accuracy": "held-out prompts"},
    ),
    Panel(
        "Losses",
        {"rank_loss": "ranking", "sft_loss": "best response"},
        "The two terms of the loss, before their weights.",
        "Both fall; the ranking loss may end near 0.",
    ),
    Panel(
        "Perplexity of the best response",
        {"perplexity_best": "best response"},
        "Under the policy.",
        "Falls towards a plateau. Towards 1: the responses are learned by heart.",
        zero=True,
    ),
    Panel("KL from the reference", {"kl": "KL"}, "Nats a response.", "Small, and not running away.", zero=True),
)

REWARD = (
    Panel(
        "Accuracy",
        {"accuracy": "training pairs"},
        "Share of pairs whose preferred response scores higher.",
        "Rises above 0.5; 0.65 to 0.75 is usual on human preferences. Held-out well below training: overfitting.",
        evaluated={"eval_accuracy": "held-out pairs"},
    ),
    Panel(
        "Loss",
        {"loss": "training"},
        "The whole loss of the configuration.",
        "Falls below 0.69, that of a coin. Held-out rising: stop earlier.",
        evaluated={"eval_loss": "held-out pairs"},
    ),
    Panel(
        "Margin",
        {"margin": "margin"},
        "Mean difference of the scores of preferred and rejected response.",
        "Rises, and flattens. Growing without an end: the learning rate is too high.",
        evaluated={"eval_margin": "held-out pairs"},
    ),
    Panel(
        "Scores",
        {"min_reward": "smallest", "mean_reward": "mean", "max_reward": "largest"},
        "Of the responses of a batch, before any normalisation.",
        "The spread grows; the mean has no meaning of its own.",
    ),
)

COMMON = (
    Panel(
        "Gradient norm",
        {"grad_norm/policy": "policy", "grad_norm/critic": "critic", "grad_norm": "all"},
        "Before clipping.",
        "No trend upwards. Single peaks are clipped.",
        zero=True,
    ),
    Panel(
        "Learning rate",
        {"learning_rate/policy": "policy", "learning_rate/critic": "critic", "learning_rate": "all"},
        "As the optimizer used it.",
        zero=True,
    ),
    Panel(
        "Seconds by phase",
        {"seconds/generate": "generate", "seconds/score": "score", "seconds/update": "update"},
        "Of a rollout batch, on the main process.",
        zero=True,
        stacked=True,
    ),
    Panel(
        "Memory",
        {"peak_memory_gib": "measured peak", "memory/predicted_gib": "planned"},
        "GiB: allocated on the card, or resident on a CPU.",
        "Flat after the first rollout batches.",
        zero=True,
    ),
)
PARTS_OF_ALL = {"grad_norm": "grad_norm/", "learning_rate": "learning_rate/"}


def panels_of(method: str, names: set[str], configuration: Mapping[str, Any]) -> list[Panel]:
    """The panels of which a run has logged anything, in their order.

    Args:
        method: As `run.json` names it; of another one the common panels are shown, and those whose metrics it has.
        names: Of the logged metrics.
        configuration: Of the run.
    """
    own = {"PPO-Max": PPO, "RRHF": RRHF, "Reward": REWARD}.get(method, PPO)
    found = []
    for panel in (*own, *watched_rewards(names, configuration), *COMMON):
        series = {name: label for name, label in panel.series.items() if name in names}
        for whole, part in PARTS_OF_ALL.items():
            if whole in series and any(name.startswith(part) for name in series):
                del series[whole]
        evaluated = {name: label for name, label in panel.evaluated.items() if name in names}
        if series or evaluated:
            found.append(replace(panel, series=series, evaluated=evaluated))
    return found


def watched_rewards(names: set[str], configuration: Mapping[str, Any]) -> list[Panel]:
    """A panel of every source of the reward, where there are several."""
    parts = {
        name: name.split("/")[1] for name in sorted(names) if name.startswith("rewards/") and name.endswith("/mean")
    }
    if len(parts) < 2 and not configuration.get("reward_weights"):
        return []
    caption = "Mean of each source of the reward. One of weight 0 is only watched."
    healthy = "All rise. One that is only watched falls while the reward rises: the reward is exploited."
    evaluated = {f"eval_{name}": f"{label}, held-out prompts" for name, label in parts.items()}
    return [Panel("Each reward", parts, caption, healthy, evaluated=evaluated)] if parts else []
