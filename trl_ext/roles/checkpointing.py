"""Gradient checkpointing under which the recomputation in backward sees the role that was active in forward."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from trl_ext.roles.switch import SwitchedModel


def enable_checkpointing(model: SwitchedModel, checkpointing_kwargs: dict[str, Any] | None, **options: Any) -> None:
    """Checkpoint so that the recomputation in backward sees the role that was active in forward.

    Plain checkpointing recomputes under whatever adapter is active when backward runs: gradients are wrong and nothing
    says so. The checkpoint's `context_fn` records the role; it is set on the model and not in the training arguments,
    which are serialised.

    Args:
        model: Whose base is checkpointed.
        checkpointing_kwargs, options: As `activation_checkpointing_enable` of transformers takes them.

    Raises:
        ValueError: `use_reentrant=True`, which has no `context_fn`.
    """
    kwargs = {"use_reentrant": False, **(checkpointing_kwargs or {})}
    if kwargs["use_reentrant"]:
        raise ValueError(
            "gradient checkpointing with use_reentrant=True recomputes under the wrong role. Set "
            "use_reentrant=False, or gradient_checkpointing=False."
        )

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), model.role(model.active_role)

    # `Trainer` takes these two out of its arguments itself, TRL does not.
    options |= {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    base = model.get_base_model()
    base.activation_checkpointing_enable({**kwargs, "context_fn": contexts}, **options)
    base.disable_input_require_grads()  # only reentrant checkpointing needs a gradient at the embeddings
