"""Policy, reference, reward and critic as LoRA adapters on one frozen base, and the one switch between them.

PEFT's own switches (`set_adapter`, `disable_adapter`) also change `requires_grad`: activating one adapter freezes the
others, so a trainer that scores with the reference adapter in between stops training its critic without a word. The
switch here changes which adapter computes, and nothing else. It leans on two attributes of PEFT's layers,
`_active_adapter` and `_disable_adapters`, which `tests/test_peft_contract.py` pins.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from trl_ext.roles.adapters import (
    AdapterWeights,
    RewardScale,
    causal_config,
    check_adapter_fits,
    check_lora_config,
    checked_adapter_dtype,
    lora_config,
    read_adapter,
)
from trl_ext.roles.base import keep_trainable, load_base, load_base_config
from trl_ext.roles.checkpointing import RoleCheckpointing
from trl_ext.roles.folders import RoleFolders
from trl_ext.roles.folding import fold
from trl_ext.roles.generation import RoleGeneration
from trl_ext.roles.heads import ScalarHead
from trl_ext.roles.passes import RolePasses
from trl_ext.roles.role import TRAINED, Role, RoleSwitch


class SharedBaseModel(RolePasses, RoleGeneration, RoleFolders, RoleCheckpointing, PeftModelForCausalLM):  # type: ignore[misc]
    """One frozen base with an adapter per role; a `PeftModel` whose "default" adapter is the policy.

    Args:
        base (`PreTrainedModel`): Causal language model. It is frozen here.
        policy (`AdapterWeights` or `LoraConfig`, *optional*): A trained adapter: the policy starts there and the
            reference is a frozen copy. Or the configuration of a fresh one: the reference is the bare base, no adapter.
            Default: `lora_config()`.
        reward (`AdapterWeights` or a list of them, *optional*): Adapter and head of a reward model, or of several: an
            ensemble, all on the one base. Without it there is no reward role.
        critic (`AdapterWeights`, *optional*): Where the critic starts. Default: a copy of (the first) `reward` and its
            head, on the scale that the reward is normalised to, or a fresh adapter like the policy's with a zero head.
        with_critic (`bool`): False leaves the critic out, for methods without one.
        adapter_dtype (`str` or `torch.dtype`): Of every role's adapter: float32, or bfloat16 for half the memory,
            in which updates below 1/256 of a weight are lost. Heads are float32 always.

    Raises:
        TypeError: `base` has no language-model head.
        ValueError: An adapter that cannot be switched on a shared base, or that does not fit this one.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        policy: AdapterWeights | LoraConfig | None = None,
        reward: AdapterWeights | Sequence[AdapterWeights] | None = None,
        critic: AdapterWeights | None = None,
        with_critic: bool = True,
        adapter_dtype: str | torch.dtype = torch.float32,
    ):
        adapter_dtype = checked_adapter_dtype(adapter_dtype)
        if base.get_output_embeddings() is None:
            raise TypeError(f"the base must be a causal language model, {type(base).__name__} has no LM head.")
        if not isinstance(policy, AdapterWeights):
            policy = AdapterWeights(check_lora_config(policy or lora_config(), "peft_config", fresh=True))
        rewards = [reward] if isinstance(reward, AdapterWeights) else list(reward or [])
        base_name = base.name_or_path or ""
        given = [(Role.POLICY, policy), *((Role.REWARD, adapter) for adapter in rewards), (Role.CRITIC, critic)]
        for role, adapter in given:
            if adapter is not None:
                check_adapter_fits(adapter, base.config, base_name, f"{role.value} adapter", role is Role.REWARD)
        base.requires_grad_(False)
        keep_trainable(base)
        super().__init__(base, causal_config(policy.config, base_name))
        hidden_size = base.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict()
        self.model_card: Callable[[], str] | None = None
        self.active_role = Role.POLICY
        self._roles = {Role.POLICY: Role.POLICY.adapter_name}  # each role's adapter, the first one of an ensemble
        self._adapters = {Role.POLICY.adapter_name: Role.POLICY}  # every adapter's role
        self.reward_scales: dict[str, RewardScale] = {}  # of the reward adapters that brought one
        self._lora_layers: list[BaseTunerLayer] = []
        if policy.weights is not None:
            self._load_weights(Role.POLICY.adapter_name, policy.weights)
            self._add_role(Role.REFERENCE, policy)
        for i, adapter in enumerate(rewards):
            name = Role.REWARD.adapter_name if i == 0 else f"{Role.REWARD.adapter_name}_{i + 1}"
            self._add_role(Role.REWARD, adapter, name)
            self.heads[name] = ScalarHead(hidden_size, adapter.head)
            if adapter.scale is not None:
                self.reward_scales[name] = adapter.scale
        if with_critic:
            start = critic or (rewards[0] if rewards else AdapterWeights(policy.config))
            self._add_role(Role.CRITIC, start)
            self.heads[Role.CRITIC.value] = ScalarHead(hidden_size, start.scaled_head())
        self.heads.to(next(base.parameters()).device)
        self._index_layers()
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            self.activation_checkpointing_enable()

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        *,
        policy_adapter: str | Path | None = None,
        reward_adapter: str | Path | Sequence[str | Path] | None = None,
        critic_adapter: str | Path | None = None,
        peft_config: LoraConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        dtype: str | torch.dtype = "auto",
        with_critic: bool = True,
        adapter_dtype: str | torch.dtype = torch.float32,
        **model_init_kwargs: Any,
    ) -> "SharedBaseModel":
        """Load the base once and the roles' adapters onto it; each adapter is a folder or a Hub id.

        Adapters are read and checked against the base's configuration before its weights are loaded.

        Args:
            model_name_or_path: The base.
            policy_adapter: Where the policy starts (an SFT adapter) and what the reference stays at. Without it the
                policy is fresh, made from `peft_config`, and the reference is the base itself.
            reward_adapter: Made by `RewardModelTrainer` or `trl.RewardTrainer` with LoRA, or any PEFT SEQ_CLS adapter
                with one label; several make an ensemble.
            critic_adapter: Where the critic starts. Default: the reward adapter, else fresh.
            peft_config: LoRA configuration of a fresh policy (and of the critic, if that is fresh).
            quantization_config: For a base in 4 bits.
            dtype, model_init_kwargs: See `load_base`.
            with_critic: False leaves the critic out, for methods without one.
            adapter_dtype: float32 or bfloat16, of the adapters.

        Raises:
            ValueError: `policy_adapter` and `peft_config` together, or an adapter that does not fit.
        """
        if policy_adapter is not None and peft_config is not None:
            raise ValueError(
                "policy_adapter and peft_config were both given: an adapter brings its own configuration. Drop "
                "peft_config to go on from the adapter, or policy_adapter to start a fresh one."
            )
        checked_adapter_dtype(adapter_dtype)
        base_config = load_base_config(model_name_or_path, **model_init_kwargs)
        several = isinstance(reward_adapter, Sequence) and not isinstance(reward_adapter, str)
        rewards: Any = reward_adapter if several else [reward_adapter]
        paths = [("policy", policy_adapter), *(("reward", path) for path in rewards), ("critic", critic_adapter)]
        adapters: dict[str, list[AdapterWeights]] = {"policy": [], "reward": [], "critic": []}
        for name, path in paths:
            if path is not None:
                adapter = read_adapter(path, f"{name}_adapter")
                named = f"{name}_adapter ({path})"
                check_adapter_fits(adapter, base_config, model_name_or_path, named, name == "reward")
                adapters[name].append(adapter)
        if peft_config is not None:
            check_lora_config(peft_config, "peft_config", fresh=True)
        base = load_base(model_name_or_path, quantization_config=quantization_config, dtype=dtype, **model_init_kwargs)
        policy, critic = (next(iter(adapters[name]), None) for name in ("policy", "critic"))
        return cls(base, policy or peft_config, adapters["reward"], critic, with_critic, adapter_dtype)

    @classmethod
    def from_peft(cls, model: PeftModel, with_critic: bool = True) -> "SharedBaseModel":
        """Take over a `PeftModel`: its "default" adapter, unmerged, is where policy and reference start."""
        if "default" not in model.peft_config:
            raise ValueError(
                f"the model's adapters are {sorted(model.peft_config)}, the policy is the one named 'default'. Load it "
                "with adapter_name='default'."
            )
        if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
            raise ValueError("the model's adapter is merged into its base: call model.unmerge_adapter() first.")
        config = check_lora_config(model.peft_config["default"], "the model's adapter")
        weights = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        weights = {key: value.detach().clone() for key, value in weights.items()}
        return cls(model.unload(), AdapterWeights(copy.deepcopy(config), weights), with_critic=with_critic)

    def _add_role(self, role: Role, adapter: AdapterWeights, name: str | None = None) -> None:
        name = name or role.adapter_name
        super().add_adapter(name, causal_config(adapter.config, self.get_base_model().name_or_path))
        self._roles.setdefault(role, name)
        self._adapters[name] = role
        if adapter.weights is not None:
            self._load_weights(name, adapter.weights)

    def _load_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        own = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
        wrong = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
        if wrong:
            raise ValueError(
                f"the {self._adapters[name].value} adapter does not fit the base: {len(wrong)} weights differ in name "
                f"or shape, first {wrong[0]!r}. It was trained on another base or with other target_modules."
            )
        set_peft_model_state_dict(self, weights, adapter_name=name)

    def _index_layers(self) -> None:
        self._lora_layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._lora_layers:
            fold(layer)
        lm_head = self.get_base_model().get_output_embeddings()
        if any(m is lm_head or isinstance(m.get_base_layer(), nn.Embedding) for m in self._lora_layers):
            raise ValueError(
                "target_modules puts an adapter on the LM head or the embeddings, which all roles share and whose "
                "log-probabilities are computed without it. Name other modules, or 'all-linear', which leaves them out."
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._owner(name) in TRAINED)
        self._activate(self.active_role)

    def _owner(self, parameter_name: str) -> Role | None:
        parts = parameter_name.split(".")
        if parts[0] == "heads":
            return self._adapters[parts[1]]
        if not any(part.startswith("lora_") for part in parts):
            return None
        return next((role for name, role in self._adapters.items() if name in parts), None)

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Undo what a library does to the adapters inside the block: adapters added, weights cast, gradients set.

        `RLOOTrainer.__init__` adds a copy of the policy named "ref" and casts what is trainable to bfloat16 on a
        4-bit base; after that the policy would no longer equal its reference.
        """
        kept = {p: p.data for name, p in self.named_parameters() if self._owner(name) is not None}
        try:
            yield
        finally:  # after an error too: the same model may be given again
            for foreign in set(self.peft_config) - set(self._adapters):
                self.delete_adapter(foreign)
            for parameter, data in kept.items():
                parameter.data = data.to(parameter.device)
            self._index_layers()

    # ------------------------------------------------------------------ the switch

    def has_role(self, role: Role) -> bool:
        """The reference is always there: as an adapter, or as the bare base under a fresh policy."""
        return role in self._roles or role == Role.REFERENCE

    def role(self, role: Role) -> RoleSwitch:
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

    def _activate(self, role: Role, name: str | None = None) -> None:
        name = name or self._roles.get(role)
        for layer in self._lora_layers:
            if name is not None:
                layer._active_adapter = [name]
            layer._disable_adapters = name is None
        self.active_role = role

    def reward_adapters(self) -> list[str]:
        """Names of the reward role's adapters: none, one, or an ensemble."""
        return [name for name, role in self._adapters.items() if role is Role.REWARD]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Switch to the role whose adapter has this name, without PEFT's changes to `requires_grad`.

        Raises:
            ValueError: No role's adapter has it.
        """
        if adapter_name not in self._adapters:
            raise ValueError(f"no role has an adapter named {adapter_name!r}: use one of {', '.join(self._adapters)}.")
        self._activate(self._adapters[adapter_name], adapter_name)

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

    # ------------------------------------------------------------------ training

    def parameter_groups(self, learning_rates: dict[Role, float], weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimizer groups, one per trained role: its adapter, and its head if it has one."""
        groups = []
        for role in (role for role in TRAINED if role in self._roles):
            parameters = [p for name, p in self.named_parameters() if self._owner(name) is role]
            options = {"lr": learning_rates[role], "weight_decay": weight_decay, "role": role.value}
            groups.append({"params": parameters, **options})
        return groups
