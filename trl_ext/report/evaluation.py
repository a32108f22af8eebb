"""A policy on held-out prompts: reward, KL from its reference, perplexity, length and variety of what it writes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from trl_ext.generation.seeded import generate_responses, prompt_generator
from trl_ext.generation.vllm import VLLMEngine
from trl_ext.ops.packing import pack
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


def distinct_2(texts: list[str]) -> float:
    """Different pairs of words / pairs of words, over all texts together (Li et al. 2016)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)


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
    encoder = tokenizer
    if not isinstance(tokenizer, TextEncoder):
        encoder = TextEncoder(tokenizer, end_token_ids(tokenizer, model.generation_config))
    rows = []
    for row in prompts:
        columns = {name: value for name, value in row.items() if name != "prompt"}
        rows.append(AnsweredPrompt(row["prompt"], encoder.prompt_ids(row["prompt"]), columns))
    per_call = max(1, batch_size // best_of)
    for i in tqdm(range(0, len(rows), per_call), desc="evaluating", leave=False):
        part = rows[i : i + per_call]
        groups = generate_responses(
            model,
            [row.prompt_ids for row in part],
            [prompt_generator(seed, i + j) for j in range(len(part))],
            best_of,
            max_new_tokens,
            eos_token_ids=encoder.end_ids,
            pad_token_id=encoder.pad_id,
            engine=engine,
        )
        flat = [(row, ids) for row, group in zip(part, groups, strict=True) for ids in group]
        scores = scorer(flat)
        for j, (row, group) in enumerate(zip(part, groups, strict=True)):
            own = scores[j * best_of : (j + 1) * best_of]
            best = max(range(best_of), key=own.__getitem__)
            row.response_ids, row.score = group[best], own[best]
    ids = [row.response_ids for row in rows]
    texts = [text.strip() for text in encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    metrics = {"reward": sum(row.score for row in rows) / len(rows)}
    metrics["reward_std"] = float(torch.tensor([row.score for row in rows]).std()) if len(rows) > 1 else 0.0
    if gold is not None:
        completions = [encoder.completion(row.prompt, text) for row, text in zip(rows, texts, strict=True)]
        values = torch.tensor(gold(prompts=[row.prompt for row in rows], completions=completions))
        for row, value in zip(rows, values.tolist(), strict=True):
            row.gold = value
        metrics |= {"gold": float(values.mean()), "gold_std": float(values.std()) if len(rows) > 1 else 0.0}
    metrics |= likelihoods(model, encoder.pad_id, rows, batch_size)
    if best_of > 1:
        metrics["kl"] = math.log(best_of) - (best_of - 1) / best_of
    metrics["length"] = sum(map(len, ids)) / len(ids)
    metrics["truncated"] = sum(not encoder.ended(sequence) for sequence in ids) / len(ids)
    metrics["distinct_2"] = distinct_2(texts)
    keep([_sample(row, text, encoder, best_of) for row, text in zip(rows, texts, strict=True)])
    return metrics, texts


def _sample(row: AnsweredPrompt, text: str, encoder: TextEncoder, best_of: int) -> dict[str, Any]:
    sample = {"prompt": row.prompt, "completion": text, "reward": row.score, "tokens": len(row.response_ids)}
    sample |= {"truncated": not encoder.ended(row.response_ids), "nll": row.nll, "reference_nll": row.reference_nll}
    if best_of == 1:  # the best of several has no estimate of its own
        sample["kl"] = row.reference_nll - row.nll
    return sample if row.gold is None else sample | {"rewards": {"reward": row.score, "gold": row.gold}}


@torch.no_grad()
def likelihoods(model: SharedBaseModel, pad_id: int, rows: list[AnsweredPrompt], batch_size: int) -> dict[str, float]:
    """KL(policy, reference) of the responses, the plain estimate, and their perplexity under both.

    Each row gets its own log-likelihoods.
    """
    was_training = model.training
    model.eval()
    policy = reference = tokens = 0.0
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        groups, starts = (
            [[[*row.prompt_ids, *row.response_ids]] for row in part],
            [[len(row.prompt_ids)] for row in part],
        )
        parts = [each.to(model.input_device) for each in pack(groups, starts, pad_id, share=False)]
        outputs = model(parts=parts, roles=(Role.POLICY, Role.REFERENCE))
        sums = [-outputs[name].sum(1) for name in ("logps", "reference_logps")]
        for row, nll, reference_nll in zip(part, *(each.tolist() for each in sums), strict=True):
            row.nll, row.reference_nll = nll, reference_nll
        policy += float(outputs["logps"].sum())
        reference += float(outputs["reference_logps"].sum())
        tokens += float(outputs["mask"].sum())
    model.train(was_training)
    return {
        "kl": (policy - reference) / len(rows),
        "perplexity": math.exp(-policy / tokens),
        "perplexity_reference": math.exp(-reference / tokens),
    }
