"""The model card of a published RRHF policy."""

from collections.abc import Sequence
from dataclasses import replace

from trl_ext.report.cards import CardFacts, CardKind, loading, whole_card

OFFLINE = CardKind(
    pipeline_tag="text-generation",
    tags=("rrhf", "rlhf", "lora", "trl", "trl_ext"),
    matters=(
        "learning_rate",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "rank_coef",
        "sft_coef",
        "length_penalty",
        "beta",
    ),
    columns=("step", "loss", "rank_loss", "sft_loss", "ranking_accuracy", "perplexity_best"),
    required="rank_loss",
)
ONLINE = replace(
    OFFLINE,
    matters=(*OFFLINE.matters, "temperature", "max_completion_length", "num_online_responses"),
    columns=("step", "loss", "reward", "reward_best", "kl", "ranking_accuracy", "perplexity_best"),
    required="reward",
)


def model_card(facts: CardFacts, others: Sequence[str], sources: Sequence[str]) -> str:
    """Markdown with a Hub header: base, method, before and after, options, the course of the run, samples, limits.

    Args:
        facts: Of the run.
        others: Names of the adapters saved beside the policy.
        sources: What has given rewards online, in words.
    """
    online = facts.args.online
    body = [
        f"A LoRA adapter on `{facts.base_name}`, trained with trl_ext by RRHF "
        f"([arXiv 2304.05302](https://huggingface.co/papers/2304.05302)) on responses "
        f"{'sampled from the current policy and ' if online else ''}ranked by a reward.",
        "",
        *loading(facts),
        *(["", f"Beside the policy: {', '.join(f'`{name}/`' for name in others)}."] if others else []),
    ]
    reward = "; ".join(sources) if online else "the column `scores` of the data"
    return whole_card(facts, ONLINE if online else OFFLINE, body, reward or "none")
