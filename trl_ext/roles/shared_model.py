"""Policy, reference, reward and critic as LoRA adapters on one frozen base: made, run, saved and loaded."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from trl_ext.ops.packing import PackedBatch
from trl_ext.roles import folders, passes
from trl_ext.roles.adapters import (
    AdapterWeights,
    check_lora_config,
    checked_adapter_dtype,
    lora_config,
    read_adapter,
    write_adapter,
)
from trl_ext.roles.backbone import hidden_states
from trl_ext.roles.base import load_base, load_base_config
from trl_ext.roles.checkpointing import enable_checkpointing
from trl_ext.roles.generation import check_continuous_batching, continuous_batching, generate_by_rows
from trl_ext.roles.identity import check_adapter_fits, describe_base, describe_config
from trl_ext.roles.role import Role
from trl_ext.roles.sharding import is_sharded
from trl_ext.roles.switch import SwitchedModel


class SharedBaseModel(SwitchedModel):
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
        if not isinstance(policy, AdapterWeights):
            policy = AdapterWeights(check_lora_config(policy or lora_config(), "peft_config", fresh=True))
        rewards = [reward] if isinstance(reward, AdapterWeights) else list(reward or [])
        given = [(Role.POLICY, policy), *((Role.REWARD, adapter) for adapter in rewards), (Role.CRITIC, critic)]
        described = describe_base(base)
        for role, adapter in given:
            if adapter is not None:
                check_adapter_fits(adapter, described, role, f"{role.value} adapter")
        super().__init__(base, policy.config)
        self.model_card: Callable[[], str] | None = None
        self.rows_at_a_time: int | None = None
        if policy.weights is not None:
            self.set_weights(Role.POLICY.adapter_name, policy.weights)
            self.add_role(Role.REFERENCE, policy)
        for i, adapter in enumerate(rewards):
            name = Role.REWARD.adapter_name if i == 0 else f"{Role.REWARD.adapter_name}_{i + 1}"
            self.add_role(Role.REWARD, adapter, name, adapter.head)
            if adapter.scale is not None:
                self.reward_scales[name] = adapter.scale
        if with_critic:
            start = critic or (rewards[0] if rewards else AdapterWeights(policy.config))
            self.add_role(Role.CRITIC, start, head=start.scaled_head())
        self.prepare_adapters()
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
        config = load_base_config(model_name_or_path, **model_init_kwargs)
        several = isinstance(reward_adapter, Sequence) and not isinstance(reward_adapter, str)
        rewards: Any = reward_adapter if several else [reward_adapter]
        paths = [
            (Role.POLICY, policy_adapter),
            *((Role.REWARD, path) for path in rewards),
            (Role.CRITIC, critic_adapter),
        ]
        given = [(role, path, read_adapter(path, f"{role}_adapter")) for role, path in paths if path is not None]
        if given:
            without_weights = describe_config(
                config, model_name_or_path, model_init_kwargs.get("trust_remote_code", False)
            )
            for role, path, adapter in given:
                check_adapter_fits(adapter, without_weights, role, f"{role}_adapter ({path})")
        adapters = {role: [adapter for owner, _, adapter in given if owner is role] for role in Role}
        if peft_config is not None:
            check_lora_config(peft_config, "peft_config", fresh=True)
        base = load_base(model_name_or_path, quantization_config=quantization_config, dtype=dtype, **model_init_kwargs)
        policy, critic = (next(iter(adapters[role]), None) for role in (Role.POLICY, Role.CRITIC))
        return cls(base, policy or peft_config, adapters[Role.REWARD], critic, with_critic, adapter_dtype)

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

    # ------------------------------------------------------------------ passes

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, *, roles: Any = None, parts: Any = None, **kwargs: Any
    ) -> Any:
        """As a plain `PeftModel` without `parts`; else the passes of the roles over them, in this single call.

        A single call matters under DistributedDataParallel: a second forward outside the wrapped one breaks its
        bookkeeping of which gradients are ready.

        Args:
            input_ids, attention_mask: As in `PeftModelForCausalLM`, when `parts` is None.
            parts: N responses to prompts, from `ops.packing.pack`.
            roles: Subset of (Role.POLICY, Role.REFERENCE, Role.CRITIC).
            kwargs: With `parts`: `temperature`; `entropy` ("values" or "gradient", with which it can be trained);
                `shape` (N, T) of the results (default: the number of responses and the longest); and `ptx` (a batch
                with `input_ids` and `attention_mask` for the language-model loss).

        Returns:
            `dict` with the `mask` of the response tokens, (N, T), each response from column 0 on; and as asked, (N, T)
            each and zero elsewhere: `logps` of the policy, its `entropy`, `reference_logps`, the critic's `values` of
            the state before each token; `ptx_loss`, a scalar.
        """
        if (parts is None) != (roles is None):
            raise ValueError(f"roles={roles}, parts={parts}: the passes of roles need both, a plain one neither.")
        if parts is None:
            return super().forward(input_ids, attention_mask, **kwargs)
        return passes.run_roles(self, parts, tuple(map(Role, roles)), **kwargs)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B, L, H): last hidden states of the base under the active role, no LM head."""
        return hidden_states(self.backbone, input_ids, attention_mask)

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The reward role's score of each sequence: the mean over its adapters, which is one unless it is an ensemble.

        See `score_members` for arguments and errors.

        Returns:
            (B,) float32.
        """
        return self.score_members(input_ids, attention_mask).mean(-1)

    @torch.no_grad()
    def score_members(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The score of each sequence by each reward adapter: its head on the last real token.

        An adapter that was saved with the mean and standard deviation of its scores on reference responses has them
        taken off: (s - mean) / std.

        Args:
            input_ids: (B, T), padded on either side.
            attention_mask: (B, T), at least one 1 a row.

        Returns:
            (B, K) float32, K reward adapters.

        Raises:
            ValueError: No reward role, shapes that differ, or a row without a token.
        """
        return passes.score_members(self, input_ids, attention_mask)

    @torch.no_grad()
    def score_parts(self, parts: list[PackedBatch]) -> Tensor:
        """`score_members` of sequences laid out by `ops.packing.pack`, (N, K)."""
        return passes.score_parts(self, parts)

    @torch.no_grad()
    def score_response_tokens(self, parts: list[PackedBatch], shape: tuple[int, int]) -> Tensor:
        """Each reward adapter's score of the prompt and what precedes each response token, (N, T, K); 0 elsewhere.

        Args:
            parts: N responses to prompts, from `ops.packing.pack`.
            shape: (N, T).
        """
        return passes.score_response_tokens(self, parts, shape)

    @torch.no_grad()
    def values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The critic's value after each token, (B, T), (B, T) -> (B, T) float32; meaningless where the mask is 0.

        Raises:
            ValueError: Shapes that differ, or a row without a token.
        """
        return passes.values(self, input_ids, attention_mask)

    # ------------------------------------------------------------------ generation

    @contextmanager
    def generating(self, rows_at_a_time: int | None = None) -> Iterator[None]:
        """Inside the block `generate` takes so many sequences at a time; None: all at once."""
        before, self.rows_at_a_time = self.rows_at_a_time, rows_at_a_time
        try:
            yield
        finally:
            self.rows_at_a_time = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As a plain `PeftModel`, but inside `generating` so many rows at a time: see `generation.generate_by_rows`.

        Where the weights are sharded, every process goes on until the last one has its completions.

        Raises:
            RuntimeError: The reward or the critic role is active, whose adapters are not there to generate.
        """
        self.check_generates()
        if is_sharded(self):
            kwargs.setdefault("synced_gpus", True)
        if self.rows_at_a_time is None:
            return super().generate(*args, **kwargs)
        return generate_by_rows(super().generate, self.rows_at_a_time, *args, **kwargs)

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Continuous batching under the active role: see `generation.continuous_batching`, and `generate`."""
        self.check_generates()
        base = self.get_base_model()
        return continuous_batching(base, inputs, generation_config, continuous_batching_config, **kwargs)

    def check_generates(self) -> None:
        """Raise a RuntimeError if the role that is active scores and does not generate."""
        if self.active_role in (Role.REWARD, Role.CRITIC):
            raise RuntimeError(
                f"the {self.active_role.value} role is active: its adapter scores and does not generate. A reward "
                "function that enters model.role must leave it before it awaits anything: functions that overlap leave "
                "in another order than they entered. Nest role switches inside one another."
            )

    def check_continuous_batching(self) -> None:
        """Raise a ValueError if the base cannot do continuous batching."""
        check_continuous_batching(self.get_base_model())

    # ------------------------------------------------------------------ folders

    def adapter_weights(self, role: Role, state_dict: dict[str, Tensor] | None = None) -> AdapterWeights:
        """The role's adapter as it is now (the first one of an ensemble).

        Raises:
            ValueError: The role has no adapter of its own.
        """
        name = self.adapter_name(role)
        if name is None:
            raise ValueError(f"the {role.value} role has no adapter: it is the bare base, there is nothing to save.")
        return folders.adapter_weights(self, name, state_dict)

    def plain_adapter(self, role: Role) -> AdapterWeights | None:
        """The role's adapter for readers beside PEFT: see `folders.plain_adapter`. None: the role is the bare base."""
        name = self.adapter_name(role)
        return None if name is None else folders.plain_adapter(self, name)

    def save_adapter(self, role: Role, folder: str | Path) -> None:
        """Write one role as a standard PEFT folder; reward and critic as sequence classifiers with their head."""
        write_adapter(folder, self.adapter_weights(Role(role)))

    def push_adapter_to_hub(
        self, role: Role, repo_id: str, *, private: bool | None = None, token: str | None = None, **upload: Any
    ) -> str:
        """Upload one role's folder and return the commit's address; `upload` goes to `HfApi.upload_folder`."""
        return folders.push_folder(self.adapter_weights(Role(role)), repo_id, private, token, **upload)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str, state_dict: dict[str, Tensor] | None = None, is_main_process: bool = True
    ) -> None:
        """The policy in the folder itself, so that plain PEFT loads it; every other adapter in a folder of its name."""
        folders.save_roles(self, save_directory, state_dict, is_main_process)
        if is_main_process and self.model_card is not None:
            (Path(save_directory) / "README.md").write_text(self.model_card(), encoding="utf-8")

    def load_adapter(  # type: ignore[override]
        self, model_id: str, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Read one role's weights back from a folder that `save_pretrained` wrote; `Trainer` calls this on resume.

        Args:
            model_id: The folder.
            adapter_name: Of the adapter in it.
            is_trainable: Not used: the role says whether an adapter is trained.

        Raises:
            ValueError: The folder has other roles, shapes or scaling than this model.
        """
        folders.load_role(self, model_id, adapter_name)

    def load(self, folder: str | Path) -> None:
        """Go on from roles that `save_pretrained` wrote: weights, heads and scales of all of them.

        Raises:
            ValueError: The folder has other roles, shapes or scaling than this model.
            RuntimeError: A role does not equal its file afterwards; names both.
        """
        folders.load_roles(self, folder)

    # ------------------------------------------------------------------ gradient checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Checkpoint so that a role is recomputed as itself: see `checkpointing.enable_checkpointing`."""
        enable_checkpointing(self, activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The name of `activation_checkpointing_enable` before transformers 5.20, still called by TRL."""
        enable_checkpointing(self, gradient_checkpointing_kwargs, **options)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: non-reentrant checkpointing needs no gradient at the embeddings, and TRL asks for it."""
