"""How much memory a PPO run needs, from the model's configuration alone: no weights are loaded."""

from trl_ext.memory.plan import MemoryPlan, Phase, plan_memory
from trl_ext.memory.search import TooSmallError, advice, choose_batches, explain, largest_batches, largest_fit
from trl_ext.memory.sharded import Shares, on_cards, shares
from trl_ext.memory.size import card_bytes, format_gib, parse_size
from trl_ext.memory.trace import LiveBytes, Tracer
from trl_ext.memory.weights import Setup, Weights, count_weights, load_config, tensor_bytes

__all__ = [
    "LiveBytes",
    "MemoryPlan",
    "Phase",
    "Setup",
    "Shares",
    "TooSmallError",
    "Tracer",
    "Weights",
    "advice",
    "card_bytes",
    "choose_batches",
    "count_weights",
    "explain",
    "format_gib",
    "largest_batches",
    "largest_fit",
    "load_config",
    "on_cards",
    "parse_size",
    "plan_memory",
    "shares",
    "tensor_bytes",
]
