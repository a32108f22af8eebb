"""The four roles, and the context manager that switches between them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_ext.roles.shared_model import SharedBaseModel


class Role(StrEnum):
    """What an adapter is for. The policy's adapter is PEFT's "default", so that its folder loads anywhere."""

    POLICY = "policy"
    REFERENCE = "reference"
    REWARD = "reward"
    CRITIC = "critic"

    @property
    def adapter_name(self) -> str:
        return "default" if self is Role.POLICY else self.value


TRAINED = (Role.POLICY, Role.CRITIC)


class RoleSwitch:
    """Context manager that makes a role compute and restores the previous one, also when an error leaves it."""

    def __init__(self, model: SharedBaseModel, role: Role):
        self.model, self.role_to_use = model, role
        self.previous: list[Role] = []  # one for each time it has been entered

    def __enter__(self) -> SharedBaseModel:
        self.previous.append(self.model.active_role)
        self.model._activate(self.role_to_use)
        return self.model

    def __exit__(self, *error: object) -> None:
        self.model._activate(self.previous.pop())
