"""The plan: what each phase of an iteration holds on the card, and whether that fits."""

from dataclasses import dataclass

from trl_ext.memory.size import format_gib
from trl_ext.memory.trace import Tracer
from trl_ext.memory.weights import Setup, Weights
from trl_ext.ops.logprobs import CHUNK_ELEMENTS, CHUNK_ROWS
from trl_ext.ops.packing import SCORED_PER_TRAINED

PHASES = ("load", "generate", "score", "update")
# Outside of PyTorch's allocator: CUDA context, kernels and the libraries' workspaces. A stated constant, not measured.
CONTEXT_BYTES = 512 * 2**20
# Of what comes and goes within a phase, lost to blocks that do not fit together. A stated constant, not measured.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Phase:
    """Bytes on the card at the peak of a phase; together they are what the phase needs.

    Attributes:
        base, adapters, heads: The weights.
        optimizer: States of it, those in paged memory too, since they come to the card when it steps.
        gradients: Of the trained adapters and the critic's head.
        copy: Of these weights as they were before the update, which the control of its size may go back to.
        kept: Activations kept for backward, of policy and critic together; while generating, the KV cache.
        working: What comes and goes beside that: one layer, dequantised weights, a tile of logits.
        fragmentation, context: `FRAGMENTATION` of kept and working; `CONTEXT_BYTES`.
        paged: The part of `optimizer` in paged memory.
    """

    base: int
    adapters: int
    heads: int
    optimizer: int = 0
    gradients: int = 0
    copy: int = 0
    kept: int = 0
    working: int = 0
    fragmentation: int = 0
    context: int = CONTEXT_BYTES
    paged: int = 0

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        weights = self.base + self.adapters + self.heads
        return weights + self.optimizer - self.paged + self.gradients + self.copy + self.kept + self.working

    @property
    def needed(self) -> int:
        """What the card must have."""
        return self.allocated + self.paged + self.fragmentation + self.context


@dataclass(frozen=True)
class MemoryPlan:
    """Phases of one iteration with these batch sizes, on one device.

    Attributes:
        train_batch, score_batch, generate_batch: Sequences in a micro-batch of the update, in one of the scoring, and
            generated at a time.
        logits_tile: Bytes of the largest (tokens, vocabulary) piece of score and update, part of their `working`.
    """

    setup: Setup
    weights: Weights
    train_batch: int
    score_batch: int
    generate_batch: int
    phases: dict[str, Phase]
    logits_tile: int

    @property
    def needed(self) -> int:
        """Of the phase that needs most."""
        return max(phase.needed for phase in self.phases.values())

    @property
    def allocated(self) -> int:
        """Predicted `peak_memory_gib` of a run, in bytes."""
        return max(phase.allocated for phase in self.phases.values())

    def fits(self, card: int) -> bool:
        """Whether every phase fits into a card of this many bytes."""
        return self.needed <= card

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Column titles and rows in GiB, a column for each phase."""
        weights, passing = ("base", "adapters", "heads"), ("kept", "working", "fragmentation")
        names = (*weights, "optimizer", "gradients", "copy", *passing, "context")
        labels = {
            "copy": "copy before the update",
            "kept": "KV cache / activations kept",
            "working": "working memory",
            "context": "CUDA context",
        }
        rows = [
            (labels.get(name, name), *(format_gib(getattr(phase, name)) for phase in self.phases.values()))
            for name in names
        ]
        rows.append(("allocated by PyTorch", *(format_gib(phase.allocated) for phase in self.phases.values())))
        rows.append(("needed", *(format_gib(phase.needed) for phase in self.phases.values())))
        return ("GiB", *self.phases), rows

    def text(self) -> str:
        """The table in plain text."""
        titles, rows = self.table()
        lines = [titles, *rows]
        width = max(len(line[0]) for line in lines)
        return "\n".join(line[0].ljust(width) + "".join(cell.rjust(10) for cell in line[1:]) for line in lines)


def logits_tile(setup: Setup, vocabulary: int, tokens: int) -> int:
    """Bytes of one chunk of `ops.logprobs` with entropy: logits in `dtype`, and two float32 buffers."""
    rows = min(tokens, max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary))
    return rows * vocabulary * (setup.dtype.itemsize + 8)


def phase_of(name: str, tracer: Tracer, weights: Weights, batch: int) -> Phase:
    """One phase with so many sequences at a time."""
    setup = tracer.setup
    kept, peak = 0.0, 0.0
    if name == "load":
        peak = weights.largest_bytes
    elif name == "generate":
        start, end = tracer.prefill(batch), tracer.decode(batch)
        # Sampling: logits as computed, then float32 logits, scores and probabilities
        logits = batch * tracer.config.get_text_config().vocab_size * (setup.dtype.itemsize + 12)
        kept, peak = (start.kept, start.peak) if start.peak > end.peak + logits else (end.kept, end.peak + logits)
    elif name == "score":
        peak = tracer.score(batch).peak
    else:
        traced = tracer.update(batch)
        kept, peak = traced.kept, traced.peak
    with_states = name != "load"
    return Phase(
        base=weights.base_bytes,
        adapters=sum(weights.adapter_bytes.values()),
        heads=weights.head_bytes,
        optimizer=weights.optimizer_bytes * with_states,
        gradients=weights.gradient_bytes * (name == "update"),
        copy=weights.trained_bytes * (name == "update" and setup.holds_updates),
        kept=round(kept),
        working=round(peak - kept),
        fragmentation=round(FRAGMENTATION * peak),
        paged=weights.paged_bytes * with_states,
    )


def plan_memory(
    tracer: Tracer,
    weights: Weights,
    train_batch: int,
    rollout_batch: int | None = None,
    score_batch: int | None = None,
    generate_batch: int | None = None,
) -> MemoryPlan:
    """Plan an iteration.

    Args:
        tracer, weights: Of the model and setup: `Tracer(config, setup)`, `count_weights(config, setup)`.
        train_batch: `per_device_train_batch_size`.
        rollout_batch: Sequences in a rollout batch of one process. Default: `train_batch`.
        score_batch: `per_device_score_batch_size`. Default: as the trainer's.
        generate_batch: `per_device_generate_batch_size`. Default: the rollout batch.

    Raises:
        ValueError: A batch below 1, or sequences longer than the model's positions.
    """
    rollout_batch = train_batch if rollout_batch is None else rollout_batch
    score_batch = min(SCORED_PER_TRAINED * train_batch if score_batch is None else score_batch, rollout_batch)
    generate_batch = rollout_batch if generate_batch is None else min(generate_batch, rollout_batch)
    batches = {"load": 1, "generate": generate_batch, "score": score_batch, "update": train_batch}
    for name, batch in batches.items():
        if batch < 1:
            raise ValueError(f"the batch of phase {name} is {batch}: it must be at least 1.")
    setup = tracer.setup
    text = tracer.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    length = setup.prompt_length + setup.completion_length
    if isinstance(positions, int) and length > positions:
        raise ValueError(
            f"max_prompt_length={setup.prompt_length} and max_completion_length={setup.completion_length} exceed the "
            f"model's {positions} positions. Lower one of them."
        )
    return MemoryPlan(
        setup=setup,
        weights=weights,
        train_batch=train_batch,
        score_batch=score_batch,
        generate_batch=generate_batch,
        phases={name: phase_of(name, tracer, weights, batches[name]) for name in PHASES},
        logits_tile=logits_tile(setup, text.vocab_size, max(train_batch, score_batch) * setup.completion_length),
    )
