"""A shared base whose weights are split over the processes by `fully_shard` (FSDP2): what the roles' passes must mind.

Every pass gathers the weights of one layer after the other, and all processes take part. So all processes must take
the same number of passes, in the same order: `same_number_of_passes` adds passes over one token of padding where a
process has fewer. And weights may only be read inside a call that gathers them: `gather_in_calls` and `with_weights`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from trl_ext.ops.packing import PackedBatch

Result = TypeVar("Result")
GATHERING_METHODS = ("score_parts", "score_members", "values", "hidden_states")  # those that are no `forward`
CALL = "_call_with_weights"


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold a part each of this model's weights."""
    return isinstance(model, FSDPModule)


def gather_in_calls(model: Any) -> None:
    """Let the methods of a sharded model that run passes gather its weights, as its `forward` does; once is enough.

    Args:
        model: `SharedBaseModel`, after `accelerator.prepare`. Any other than a sharded one is left as it is.
    """
    if not is_sharded(model):
        return
    head = model.language_head.layer
    if CALL in vars(head):
        return
    for name in GATHERING_METHODS:
        register_fsdp_forward_method(model, name)
    setattr(head, CALL, _call)
    register_fsdp_forward_method(head, CALL)


def _call(*args: Any, function: Callable[..., Result]) -> Result:
    return function(*args)


def with_weights(layer: nn.Module, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, in which the weights of a layer can be read although the layer itself is not called.

    Args:
        layer: Sharded or not.
        function: Reads the layer's weights.
        args: Tensors that the gradient flows back to must be among them, not inside `function`.
    """
    call = vars(layer).get(CALL)
    return function(*args) if call is None else call(*args, function=function)


def same_number_of_passes(model: nn.Module, parts: list[PackedBatch]) -> list[PackedBatch]:
    """The parts, and behind them as many empty ones as the process with the most parts has more; each is a pass.

    An empty part is one token of padding with no sequence and no response: it adds nothing to any result, and zeros to
    the gradients.

    Args:
        model: If it is not sharded, the parts are returned as they are.
        parts: Of this process. Every process calls this.
    """
    if not is_sharded(model):
        return parts
    device = parts[0].input_ids.device
    count = torch.tensor(len(parts), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return parts + [_empty_part(device)] * (int(count) - len(parts))


def _empty_part(device: torch.device) -> PackedBatch:
    token, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(0, dtype=torch.long, device=device)
    return PackedBatch(token, token, token + 1, none, none, none, none, none, none)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together again, for which every process must ask; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors taken together, a scalar in float32; sharded ones by one sum over the processes."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(own_part(t).float()) for t in tensors]))
    if isinstance(tensors[0], DTensor):
        square = norm.square()
        dist.all_reduce(square, group=tensors[0].device_mesh.get_group())
        norm = square.sqrt()
    return norm


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def drop_gathered(model: nn.Module) -> None:
    """Let the next pass gather weights anew: after one without backward the outermost still are, and may be old."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_weights(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Weights by name, put together again and on the CPU; every process must ask, and all get them.

    Args:
        model: Sharded.
        wanted: Whether a parameter of this name is.
    """
    drop_gathered(model)
    return {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if wanted(name)}
