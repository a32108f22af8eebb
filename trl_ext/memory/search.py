"""The largest batches that fit, and what to change where nothing does."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from trl_ext.memory.plan import MemoryPlan, phase_of, plan_memory
from trl_ext.memory.size import format_gib
from trl_ext.memory.trace import Tracer
from trl_ext.memory.weights import Setup, Weights, count_weights
from trl_ext.ops.packing import SCORED_PER_TRAINED

POWERS_OF_TWO = tuple(2**i for i in range(9))  # 1 to 256


class TooSmallError(ValueError):
    """A card on which not even the smallest batch fits; the message holds the plan and what to change."""


def largest_fit(phase: str, tracer: Tracer, weights: Weights, card: int, candidates: Iterable[int]) -> int:
    """The largest of the batch sizes with which a phase fits into `card` bytes; 0 if none does."""
    best = 0
    for batch in sorted(candidates):
        if phase_of(phase, tracer, weights, batch).needed > card:
            break
        best = batch
    return best


def largest_batches(tracer: Tracer, weights: Weights, card: int) -> dict[str, int]:
    """For generate, score and update the largest power of two, up to 256, that fits; 0 where 1 does not."""
    return {
        phase: largest_fit(phase, tracer, weights, card, POWERS_OF_TWO) for phase in ("generate", "score", "update")
    }


def advice(config: Any, plan: MemoryPlan) -> list[tuple[str, int]]:
    """Changes of options, each alone, and the bytes that it takes off the phase that needs most; the best first.

    A change of a phase other than that one saves nothing and is left out.
    """
    setup, train, score, generate = plan.setup, plan.train_batch, plan.score_batch, plan.generate_batch
    half = max(setup.completion_length // 2, 1)
    changes: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = []
    same = (train, score, generate)
    if not setup.load_in_4bit:
        changes.append(("load_in_4bit: true", {"load_in_4bit": True}, same))
    elif not setup.double_quant:
        changes.append(("use_bnb_nested_quant: true", {"double_quant": True}, same))
    if not setup.checkpointing:
        changes.append(("gradient_checkpointing: true", {"checkpointing": True}, same))
    if setup.optim != "paged_adamw_8bit":
        changes.append(("optim: paged_adamw_8bit", {"optim": "paged_adamw_8bit"}, same))
    if getattr(setup.lora, "r", 1) > 8:
        lora = copy.deepcopy(setup.lora)
        lora.r = 8
        changes.append(("lora_r: 8", {"lora": lora}, same))
    changes.append((f"max_completion_length: {half}", {"completion_length": half}, same))
    if train > 1:
        name = "per_device_train_batch_size: 1, with more gradient_accumulation_steps and steps_per_generation"
        changes.append((name, {}, (1, min(score, SCORED_PER_TRAINED), generate)))
    if score > 1:
        changes.append((f"per_device_score_batch_size: {score // 2}", {}, (train, score // 2, generate)))
    if generate > 1:
        name = f"per_device_generate_batch_size: {max(generate // 2, 1)}"
        changes.append((name, {}, (train, score, max(generate // 2, 1))))
    worst = max(plan.phases, key=lambda phase: plan.phases[phase].needed)
    found = []
    for name, options, batches in changes:
        changed = replace(setup, **options)
        batch = dict(zip(("update", "score", "generate"), batches, strict=True)).get(worst, 1)
        needed = phase_of(worst, Tracer(config, changed), count_weights(config, changed), batch).needed
        if needed < plan.needed:
            found.append((name, plan.needed - needed))
    return sorted(found, key=lambda change: -change[1])


def explain(config: Any, plan: MemoryPlan, card: int) -> str:
    """Why a plan does not fit, and what to change."""
    short = format_gib(plan.needed - card)
    lines = [f"the card has {format_gib(card)} GiB and {short} GiB are missing:", plan.text(), "What would help:"]
    lines += [f"  {name}: {format_gib(saved)} GiB less" for name, saved in advice(config, plan)]
    return "\n".join([*lines, "  a smaller model, or a larger card"])


def choose_batches(
    config: Any,
    setup: Setup,
    card: int,
    optimizer_batch: int,
    rollout_batch: int,
    score_batch: int | None = None,
    generate_batch: int | None = None,
) -> tuple[MemoryPlan, int]:
    """Micro-batches for a card, with the batches that learning depends on left as they are.

    Args:
        config: Of the model.
        setup: Of the run.
        card: Bytes.
        optimizer_batch: Sequences in an optimizer step, of one process; the micro-batch will divide it.
        rollout_batch: Sequences in a rollout batch, of one process.
        score_batch, generate_batch: At most so many of them at a time. Default: as `plan_memory`.

    Returns:
        (the plan, whose `train_batch`, `score_batch` and `generate_batch` are the options `per_device_*_batch_size` of
        `PPOMaxConfig`; the evaluation batch).

    Raises:
        TooSmallError: Not even batches of 1 fit.
    """
    tracer, weights = Tracer(config, setup), count_weights(config, setup)
    divisors = [size for size in range(1, optimizer_batch + 1) if optimizer_batch % size == 0]
    train = max(largest_fit("update", tracer, weights, card, divisors), 1)
    scored = largest_fit("score", tracer, weights, card, POWERS_OF_TWO)
    generated = largest_fit("generate", tracer, weights, card, [*POWERS_OF_TWO, rollout_batch])
    score = max(min(score_batch or SCORED_PER_TRAINED * train, scored), 1)
    generate = max(min(generate_batch or rollout_batch, generated), 1)
    plan = plan_memory(tracer, weights, train, rollout_batch, score, generate)
    if not plan.fits(card):
        raise TooSmallError(explain(config, plan, card))
    return plan, min(scored, generated, POWERS_OF_TWO[-1])
