"""Gradient checkpointing under which the recomputation in backward sees the role that was active in forward."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from trl_ext.roles.role import Role, RoleSwitch


class RoleCheckpointing:
    """Both of transformers' names for switching checkpointing on. Mixed into `SharedBaseModel`."""

    if TYPE_CHECKING:
        active_role: Role

        def get_base_model(self) -> Any: ...
        def role(self, role: Role) -> RoleSwitch: ...

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Checkpoint so that the recomputation in backward sees the role that was active in forward.

        Plain checkpointing recomputes under whatever adapter is active when backward runs: gradients are wrong and
        nothing says so. The checkpoint's `context_fn` records the role; it lives here and not in the training
        arguments, which are serialised.

        Raises:
            ValueError: `use_reentrant=True`, which has no `context_fn`.
        """
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            raise ValueError(
                "gradient checkpointing with use_reentrant=True recomputes under the wrong role. Set "
                "use_reentrant=False, or gradient_checkpointing=False."
            )
        # `Trainer` takes these two out of its arguments itself, TRL does not.
        options |= {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        base = self.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({**kwargs, "context_fn": self._checkpoint_contexts}, **options)
        base.disable_input_require_grads()  # only reentrant checkpointing needs a gradient at the embeddings

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The name of `activation_checkpointing_enable` before transformers 5.20, still called by TRL."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self.role(self.active_role)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: non-reentrant checkpointing needs no gradient at the embeddings, and TRL asks for it."""
