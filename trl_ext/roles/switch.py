"""Several adapters on one frozen base, and the one switch between them.

PEFT's own switches (`set_adapter`, `disable_adapter`) also change `requires_grad`: activating one adapter freezes the
others, so a trainer that scores with the reference adapter in between stops training its critic without a word. The
switch here changes which adapter computes, and nothing else. It leans on two attributes of PEFT's layers,
`_active_adapter` and `_disable_adapters`, which `tests/test_peft_contract.py` pins.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from trl_ext.roles.adapters import AdapterWeights, RewardScale, causal_config, check_equal
from trl_ext.roles.base import keep_trainable
from trl_ext.roles.folding import fold
from trl_ext.roles.heads import ScalarHead
from trl_ext.roles.identity import record_of
from trl_ext.roles.probe import language_head
from trl_ext.roles.role import TRAINED, Role
from trl_ext.roles.sharding import shared_out


class SwitchedModel(PeftModelForCausalLM):
    """A frozen base with an adapter for each role, and what passes, folders and generation need to know of it.

    Args:
        base: Causal language model. It is frozen here.
        policy: LoRA configuration of the policy's adapter, which is there from the start.

    Attributes:
        active_role: The role whose adapter computes.
        heads: Scalar heads by the name of the adapter that they belong to.
        reward_scales: Of the reward adapters that brought one, by name.
        language_head: `LMHead` of the base.
        base_record: What adapters remember of the base.
        lora_layers: Every layer with adapters.

    Raises:
        TypeError: `base` has no language-model head.
    """

    def __init__(self, base: PreTrainedModel, policy: LoraConfig):
        base.requires_grad_(False)
        keep_trainable(base)
        head, record = language_head(base), record_of(base)
        super().__init__(base, causal_config(policy, base.name_or_path or ""))
        self.language_head, self.base_record = head, record
        self.active_role = Role.POLICY
        self.heads: Any = nn.ModuleDict()
        self.reward_scales: dict[str, RewardScale] = {}
        self.lora_layers: list[BaseTunerLayer] = []
        self._adapters = {Role.POLICY.adapter_name: Role.POLICY}

    # ------------------------------------------------------------------ what there is

    @property
    def adapters(self) -> Mapping[str, Role]:
        """Every adapter's role by its name; of an ensemble the first one comes first."""
        return MappingProxyType(self._adapters)

    def get_base_model(self) -> Any:
        """The base with its LM head, under the active adapter: the model of transformers that was given."""
        return super().get_base_model()

    @property
    def backbone(self) -> Any:
        """The base without its LM head, under the active adapter."""
        return self.get_base_model().base_model

    @property
    def input_device(self) -> torch.device:
        """Where input ids belong."""
        return self.get_base_model().get_input_embeddings().weight.device

    def adapter_name(self, role: Role) -> str | None:
        """The role's adapter, the first one of an ensemble; None for a reference that is the bare base."""
        return next((name for name, owner in self._adapters.items() if owner is role), None)

    def reward_adapters(self) -> list[str]:
        """Names of the reward role's adapters: none, one, or an ensemble."""
        return [name for name, role in self._adapters.items() if role is Role.REWARD]

    def has_role(self, role: Role) -> bool:
        """The reference is always there: as an adapter, or as the bare base under a fresh policy."""
        return role == Role.REFERENCE or self.adapter_name(Role(role)) is not None

    def owner(self, parameter_name: str) -> Role | None:
        """The role that a parameter belongs to, as adapter or as head; None for those of the base."""
        parts = parameter_name.split(".")
        if parts[0] == "heads":
            return self._adapters[parts[1]]
        if not any(part.startswith("lora_") for part in parts):
            return None
        return next((role for name, role in self._adapters.items() if name in parts), None)

    def parameter_groups(self, learning_rates: dict[Role, float], weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimizer groups, one per trained role: its adapter, and its head if it has one."""
        groups = []
        for role in (role for role in TRAINED if self.adapter_name(role) is not None):
            parameters = [p for name, p in self.named_parameters() if self.owner(name) is role and p.requires_grad]
            options = {"lr": learning_rates[role], "weight_decay": weight_decay, "role": role.value}
            groups.append({"params": parameters, **options})
        return groups

    def freeze_attention(self, role: Role) -> None:
        """Let a role's adapter in the attention layers stay as it is; the rest of it, and its head, are trained.

        Attention layers are those with "attn" or "attention" in the names that the architecture gives them.

        Raises:
            ValueError: The role's adapter has nothing there, or nothing anywhere else: only its head would be left.
        """
        own = {n: p for n, p in self.named_parameters() if self.owner(n) is role and not n.startswith("heads.")}
        frozen = [name for name in own if re.search("attn|attention", name.lower())]
        if not frozen or len(frozen) == len(own):
            modules = sorted({name.split(".lora_")[0].split(".")[-1] for name in own})
            where = "in no attention layer" if not frozen else "in attention layers alone"
            raise ValueError(
                f"the {role.value} adapter lies {where} ({', '.join(modules)}): its attention cannot be frozen beside "
                "others that are trained. Use an adapter with target_modules='all-linear', or leave it trained."
            )
        for name in frozen:
            own[name].requires_grad_(False)

    # ------------------------------------------------------------------ the switch

    def role(self, role: Role) -> "RoleSwitch":
        """`with model.role(Role.CRITIC): ...` computes with that role's adapter; gradients flags are not touched.

        Raises:
            ValueError: The model has no such role.
        """
        if not self.has_role(Role(role)):
            raise ValueError(
                f"this model has no {Role(role).value} role. Give it a {Role(role).value}_adapter in "
                "SharedBaseModel.from_pretrained."
            )
        return RoleSwitch(self, Role(role))

    def activate(self, role: Role, adapter: str | None = None) -> None:
        """Compute with the role's adapter from now on; `adapter` names one of an ensemble. See `role`."""
        name = adapter or self.adapter_name(role)
        for layer in self.lora_layers:
            if name is not None:
                layer._active_adapter = [name]
            layer._disable_adapters = name is None
        self.active_role = role

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Switch to the role whose adapter has this name, without PEFT's changes to `requires_grad`.

        Raises:
            ValueError: No role's adapter has it.
        """
        if adapter_name not in self._adapters:
            raise ValueError(f"no role has an adapter named {adapter_name!r}: use one of {', '.join(self._adapters)}.")
        self.activate(self._adapters[adapter_name], adapter_name)

    def disable_adapter(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Refused: PEFT's version freezes the critic when it returns.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("use `with model.role(Role.REFERENCE)`: disable_adapter would freeze the other roles.")

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: every role would compute on the merged base, and taking the adapter out again leaves rounding in it.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "merge_adapter would change the base that all roles share, and unmerging would not bring it back: it "
            "rounds, and quantises a 4-bit base anew. To merge the policy, save it, load it with "
            "AutoPeftModelForCausalLM, and call merge_and_unload there."
        )

    # ------------------------------------------------------------------ adapters put on and kept

    def add_role(
        self, role: Role, adapter: AdapterWeights, name: str | None = None, head: torch.Tensor | None = None
    ) -> None:
        """Put a role's adapter on the base, and a scalar head if it has one; `prepare_adapters` comes after the last.

        Args:
            role: Reward and critic get a head.
            adapter: Its weights, or none for a fresh one.
            name: Of the adapter. Default: the role's.
            head: (1, H), or None for zeros.
        """
        name = name or role.adapter_name
        base = self.get_base_model()
        super().add_adapter(name, causal_config(adapter.config, base.name_or_path))
        self._adapters[name] = role
        if adapter.weights is not None:
            self.set_weights(name, adapter.weights)
        if role in (Role.REWARD, Role.CRITIC):
            made = ScalarHead(base.config.get_text_config().hidden_size, head)
            self.heads[name] = made.to(next(base.parameters()).device)

    def set_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Give an adapter its weights.

        Raises:
            ValueError: They have other names or shapes than the adapter's.
            RuntimeError: The adapter does not have them afterwards.
        """
        own = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
        wrong = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
        if wrong:
            raise ValueError(
                f"the {self._adapters[name].value} adapter does not fit the base: {len(wrong)} weights differ in name "
                f"or shape, first {wrong[0]!r}. It was trained on another base or with other target_modules."
            )
        weights = {key: shared_out(value, own[key]) for key, value in weights.items()}
        set_peft_model_state_dict(self, weights, adapter_name=name)
        own = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
        check_equal(own, weights, f"the {self._adapters[name].value} adapter")

    def prepare_adapters(self) -> None:
        """Let policy and critic be trained and nothing else, and find the layers that the switch acts on.

        Raises:
            ValueError: An adapter lies on the LM head or the embeddings.
        """
        self.lora_layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.lora_layers:
            fold(layer)
        head = self.get_base_model().get_output_embeddings()
        if any(m is head or isinstance(m.get_base_layer(), nn.Embedding) for m in self.lora_layers):
            raise ValueError(
                "target_modules puts an adapter on the LM head or the embeddings, which all roles share and whose "
                "log-probabilities are computed without it. Name other modules, or 'all-linear', which leaves them out."
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.owner(name) in TRAINED)
        self.activate(self.active_role)

    @contextmanager
    def adapters_kept(self) -> Iterator[None]:
        """Undo what a library does to the adapters inside the block: adapters added, weights cast, gradients set.

        `RLOOTrainer.__init__` adds a copy of the policy named "ref" and casts what is trainable to bfloat16 on a
        4-bit base; after that the policy would no longer equal its reference.
        """
        kept = {p: p.data for name, p in self.named_parameters() if self.owner(name) is not None}
        try:
            yield
        finally:  # after an error too: the same model may be given again
            for foreign in set(self.peft_config) - set(self._adapters):
                self.delete_adapter(foreign)
            for parameter, data in kept.items():
                parameter.data = data.to(parameter.device)
            self.prepare_adapters()


class RoleSwitch:
    """Context manager that makes a role compute and restores the previous one, also when an error leaves it."""

    def __init__(self, model: SwitchedModel, role: Role):
        self.model, self.role_to_use = model, role
        self.previous: list[Role] = []  # one for each time it has been entered

    def __enter__(self) -> SwitchedModel:
        self.previous.append(self.model.active_role)
        self.model.activate(self.role_to_use)
        return self.model

    def __exit__(self, *error: object) -> None:
        self.model.activate(self.previous.pop())
