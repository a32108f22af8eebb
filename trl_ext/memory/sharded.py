"""The plan under FSDP2: what of a card's memory is shared out over several, and what is not."""

from dataclasses import dataclass, replace
from typing import Any

from trl_ext.memory.plan import MemoryPlan, Phase
from trl_ext.memory.weights import Setup, meta_model, nf4_bytes, quantised_linears

GATHERED_LAYERS = 2  # the one that computes, and the next, which is on its way


@dataclass(frozen=True)
class Shares:
    """Bytes of the base by what `fully_shard` does with them.

    Attributes:
        split: Shared out evenly: weights, those in 4 bits too.
        unsplit: On every card: the constants of 4-bit weights, and buffers. They are no parameters.
        layer: The largest decoder layer; it is whole on every card while it computes.
        head: The LM head (and the embeddings, if tied), whole from its first use in a pass to the end of its backward.
        layers: How many decoder layers there are.
    """

    split: int
    unsplit: int
    layer: int
    head: int
    layers: int


def shares(config: Any, setup: Setup) -> Shares:
    """Count them on the meta device."""
    base: Any = meta_model(config, setup)
    quantised = {id(layer.weight) for layer in quantised_linears(base).values()} if setup.load_in_4bit else set()

    def parameter_bytes(module: Any) -> int:
        unique = {id(p): p for p in module.parameters()}
        return sum(-(-p.numel() // 2) if k in quantised else p.numel() * p.element_size() for k, p in unique.items())

    constants = sum(
        nf4_bytes(p.numel(), setup.double_quant) - -(-p.numel() // 2) for p in base.parameters() if id(p) in quantised
    )
    names = set(base._no_split_modules or [])
    layers = [module for module in base.modules() if type(module).__name__ in names]
    return Shares(
        split=parameter_bytes(base),
        unsplit=constants + sum(buffer.numel() * buffer.element_size() for buffer in base.buffers()),
        layer=max(map(parameter_bytes, layers), default=0),
        head=parameter_bytes(base.get_output_embeddings()),
        layers=max(1, len(layers)),
    )


def on_cards(plan: MemoryPlan, found: Shares, cards: int) -> dict[str, Phase]:
    """What each card holds in every phase but loading, with the batches of the plan on each of them.

    Bytes of weights, adapters, optimizer and gradients are those of the plan / cards; beside them lie what is not
    split, and the layers and the head that are whole while they compute. Loading is left out: see docs/scale.md.

    Args:
        plan: For one card.
        found: `shares` of the same configuration and setup.
        cards: One gives the plan's own phases.

    Raises:
        ValueError: Fewer than one card.
    """
    if cards < 1:
        raise ValueError(f"cards={cards} must be at least 1.")
    phases = {name: phase for name, phase in plan.phases.items() if name != "load"}
    if cards == 1:
        return phases

    def share(size: int) -> int:
        return -(-size // cards)

    adapters = sum(plan.weights.adapter_bytes.values())
    gathered = min(GATHERED_LAYERS, found.layers) * (found.layer + adapters // found.layers) + found.head
    return {
        name: replace(
            phase,
            base=share(found.split) + found.unsplit,
            adapters=share(phase.adapters),
            optimizer=share(phase.optimizer),
            paged=share(phase.paged),
            gradients=share(phase.gradients),
            copy=share(phase.copy),
            working=phase.working + gathered,
        )
        for name, phase in phases.items()
    }
