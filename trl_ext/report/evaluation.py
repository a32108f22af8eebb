"""A policy on held-out prompts: reward, KL from its reference, perplexity, length and variety of what it writes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from trl_ext.generation.seeded import generate_responses, prompt_generator
from trl_ext.generation.vllm import VLLMEngine
from trl_ext.ops.packing import pack
from trl_ext.report.samples import distinct_2
from trl_ext.roles import Role, SharedBaseModel
from trl_ext.text import TextEncoder, end_token_ids

LABELS = {
    "gold": "gold reward",
    "reward": "reward",
    "kl": "KL from the reference, nats a response",
    "perplexity_reference": "perplexity of responses under the reference",
    "perplexity": "perplexity under the policy itself",
    "length": "response length, tokens",
    "truncated": "share cut by the length limit",
    "distinct_2": "distinct-2",
}


@dataclass(slots=True)
class AnsweredPrompt:
    """A prompt of the evaluation and the response that stands for the policy."""

    prompt: Any
    prompt_ids: list[int]
    columns: dict[str, Any]
    response_ids: list[int] = field(default_factory=list)
    score: float = 0.0
    gold: float | None = None
    nll: float = 0.0  # of the response under the policy, nats
    reference_nll: float = 0.0


def evaluate_policy(
    model: SharedBaseModel,
    tokenizer: Any,
    prompts: Dataset,
    scorer: Callable[[list[Any]], list[float]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    gold: Any = None,
    best_of: int = 1,
    batch_size: int = 64,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    engine: VLLMEngine | None = None,
) -> tuple[dict[str, float], list[str]]:
    """One response to each prompt, at temperature 1, and what can be said of them.

    Args:
        model: Policy and reference.
        tokenizer: The model's, or a `TextEncoder` of it.
        prompts: Column `prompt`; other columns reach the reward functions.
        scorer: The reward, a `ResponseScorer`.
        gold: A TRL reward function that nobody trains on, where there is one.
        best_of: So many responses are sampled and the best one by the reward is taken. The KL given is then
            log n - (n - 1) / n, the bound that holds where no two rewards are equal (Beirami et al. 2024, arXiv
            2401.01879).
        keep: Takes the samples, as `RunRecorder.evaluated` does.
        seed: Each prompt has its own numbers: two policies differ by themselves alone.
        engine: A vLLM server that samples in place of the model.

    Returns:
        Metrics by the keys of `LABELS`, and the responses' texts.
    """
    encoder = encoder_of(model, tokenizer)
    options: Any = {"max_new_tokens": max_new_tokens, "seed": seed, "gold": gold, "batch_size": batch_size}
    rows = answered(model, encoder, prompts, scorer, best_of=best_of, engine=engine, **options)
    keep(sample_lines(rows, encoder, best_of))
    return figures_of(rows, encoder, best_of), texts_of(rows, encoder)


def encoder_of(model: SharedBaseModel, tokenizer: Any) -> TextEncoder:
    """A tokenizer as the `TextEncoder` that knows what ends a response of the model; one is returned as it is."""
    if isinstance(tokenizer, TextEncoder):
        return tokenizer
    return TextEncoder(tokenizer, end_token_ids(tokenizer, model.generation_config))


def answered(
    model: SharedBaseModel,
    encoder: TextEncoder,
    prompts: Dataset,
    scorer: Callable[[list[Any]], list[float]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    gold: Any = None,
    best_of: int = 1,
    batch_size: int = 64,
    engine: VLLMEngine | None = None,
    role: Role = Role.POLICY,
    indices: Sequence[int] | None = None,
    name: str = "evaluating",
) -> list[AnsweredPrompt]:
    """Prompts with the response of a role to each, its score and its log-likelihoods; arguments as `evaluate_policy`.

    Args:
        role: Policy or reference, whose responses these are. Of the reference's own, both log-likelihoods are its own.
        indices: Rows of `prompts` that are answered, as those of one process of several. A row's random numbers come
            from the seed and its place in `prompts`. Default: all.
        name: Of the progress bar.
    """
    rows, chosen = [], list(range(len(prompts)) if indices is None else indices)
    for i in chosen:
        columns = {name: value for name, value in prompts[i].items() if name != "prompt"}
        rows.append(AnsweredPrompt(prompts[i]["prompt"], encoder.prompt_ids(prompts[i]["prompt"]), columns))
    per_call = max(1, batch_size // best_of)
    for i in tqdm(range(0, len(rows), per_call), desc=name, leave=False):
        part = rows[i : i + per_call]
        groups = generate_responses(
            model,
            [row.prompt_ids for row in part],
            [prompt_generator(seed, place) for place in chosen[i : i + per_call]],
            best_of,
            max_new_tokens,
            eos_token_ids=encoder.end_ids,
            pad_token_id=encoder.pad_id,
            role=role,
            engine=engine,
        )
        flat = [(row, ids) for row, group in zip(part, groups, strict=True) for ids in group]
        scores = scorer(flat)
        for j, (row, group) in enumerate(zip(part, groups, strict=True)):
            own = scores[j * best_of : (j + 1) * best_of]
            best = max(range(best_of), key=own.__getitem__)
            row.response_ids, row.score = group[best], own[best]
    if gold is not None and rows:
        pairs = zip(rows, texts_of(rows, encoder), strict=True)
        completions = [encoder.completion(row.prompt, text) for row, text in pairs]
        values = gold(prompts=[row.prompt for row in rows], completions=completions)
        for row, value in zip(rows, values, strict=True):
            row.gold = float(value)
    likelihoods(model, encoder.pad_id, rows, batch_size, role)
    return rows


def texts_of(rows: Sequence[AnsweredPrompt], encoder: TextEncoder) -> list[str]:
    """The responses as texts."""
    decoded = encoder.tokenizer.batch_decode([row.response_ids for row in rows], skip_special_tokens=True)
    return [text.strip() for text in decoded]


def figures_of(rows: Sequence[AnsweredPrompt], encoder: TextEncoder, best_of: int = 1) -> dict[str, float]:
    """What can be said of all responses together, by the keys of `LABELS`."""
    metrics = _mean_and_std("reward", [row.score for row in rows])
    golds = [row.gold for row in rows if row.gold is not None]
    metrics |= _mean_and_std("gold", golds) if golds else {}
    tokens = sum(len(row.response_ids) for row in rows)
    policy, reference = (sum(getattr(row, name) for row in rows) for name in ("nll", "reference_nll"))
    metrics["kl"] = (reference - policy) / len(rows)
    metrics |= {"perplexity": math.exp(policy / tokens), "perplexity_reference": math.exp(reference / tokens)}
    if best_of > 1:
        metrics["kl"] = math.log(best_of) - (best_of - 1) / best_of
    metrics["length"] = tokens / len(rows)
    metrics["truncated"] = sum(not encoder.ended(row.response_ids) for row in rows) / len(rows)
    metrics["distinct_2"] = distinct_2(texts_of(rows, encoder))
    return metrics


def _mean_and_std(name: str, values: list[float]) -> dict[str, float]:
    std = float(torch.tensor(values).std()) if len(values) > 1 else 0.0
    return {name: sum(values) / len(values), f"{name}_std": std}


def sample_lines(rows: Sequence[AnsweredPrompt], encoder: TextEncoder, best_of: int = 1) -> list[dict[str, Any]]:
    """The rows as `samples.jsonl` has them."""
    return [_sample(row, text, encoder, best_of) for row, text in zip(rows, texts_of(rows, encoder), strict=True)]


def _sample(row: AnsweredPrompt, text: str, encoder: TextEncoder, best_of: int) -> dict[str, Any]:
    sample = {"prompt": row.prompt, "completion": text, "reward": row.score, "tokens": len(row.response_ids)}
    sample |= {"truncated": not encoder.ended(row.response_ids), "nll": row.nll, "reference_nll": row.reference_nll}
    if best_of == 1:  # the best of several has no estimate of its own
        sample["kl"] = row.reference_nll - row.nll
    return sample if row.gold is None else sample | {"rewards": {"reward": row.score, "gold": row.gold}}


@torch.no_grad()
def likelihoods(
    model: SharedBaseModel, pad_id: int, rows: Sequence[AnsweredPrompt], batch_size: int, role: Role = Role.POLICY
) -> None:
    """Give each row the log-likelihoods of its response, under `role` and under the reference."""
    was_training = model.training
    model.eval()
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        groups, starts = (
            [[[*row.prompt_ids, *row.response_ids]] for row in part],
            [[len(row.prompt_ids)] for row in part],
        )
        parts = [each.to(model.input_device) for each in pack(groups, starts, pad_id, share=False)]
        outputs = model(parts=parts, roles=tuple({role: None, Role.REFERENCE: None}))
        name = "logps" if role is Role.POLICY else "reference_logps"
        sums = [-outputs[each].sum(1) for each in (name, "reference_logps")]
        for row, nll, reference_nll in zip(part, *(each.tolist() for each in sums), strict=True):
            row.nll, row.reference_nll = nll, reference_nll
    model.train(was_training)
