"""The four roles."""

from enum import StrEnum


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
