"""The model card of a published policy of PPO-Max."""

from collections.abc import Sequence

from trl_ext.report.cards import CardFacts, CardKind, loading, whole_card

KIND = CardKind(
    pipeline_tag="text-generation",
    tags=("ppo", "rlhf", "lora", "trl", "trl_ext"),
    matters=(
        "learning_rate",
        "critic_learning_rate",
        "max_steps",
        "num_iterations",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "max_completion_length",
        "temperature",
        "beta",
        "kl_control",
        "kl_target",
        "update_kl_target",
        "reward_normalization",
        "reward_clip",
        "gae_lambda",
        "epsilon",
    ),
    columns=("step", "reward", "kl", "beta", "perplexity", "completions/mean_length", "explained_variance"),
    required="reward",
)


def model_card(facts: CardFacts, others: Sequence[str], sources: Sequence[str]) -> str:
    """Markdown with a Hub header: base, method, before and after, options, the course of the run, samples, limits.

    Args:
        facts: Of the run.
        others: Names of the adapters saved beside the policy.
        sources: What has given rewards, in words.
    """
    body = [
        f"A LoRA adapter on `{facts.base_name}`, trained by PPO-Max "
        "([arXiv 2307.04964](https://huggingface.co/papers/2307.04964)) with trl_ext.",
        "",
        *loading(facts),
        "",
        f"Beside the policy: {', '.join(f'`{name}/`' for name in others)}.",
    ]
    return whole_card(facts, KIND, body, "; ".join(sources) or "none")
