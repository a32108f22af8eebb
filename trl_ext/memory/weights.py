"""Bytes that stay on the device: base, adapters, heads, optimizer states; counted on the meta device, exactly."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from trl_ext.roles import AdapterWeights, Role, SharedBaseModel, lora_config, quantization_method

# bitsandbytes: elements per quantisation constant; constants per constant of the second quantisation
NF4_BLOCK, NESTED_BLOCK, ADAM_BLOCK = 64, 256, 256
# bitsandbytes: smaller tensors keep 32-bit states; smaller ones than the second stay on the card when paged
ADAM_8BIT_FROM, ADAM_PAGED_FROM = 4096, 100_000
OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")
ALL_ROLES = (Role.POLICY, Role.REFERENCE, Role.REWARD, Role.CRITIC)


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a run, apart from its batch sizes.

    Attributes:
        load_in_4bit, double_quant: NF4 or FP4 through bitsandbytes, its constants quantised too.
        dtype: Of the base's weights, or of what is left unquantised and what a 4-bit base computes in.
        autocast: Training under autocast to `dtype`, as with `bf16` or `fp16`.
        adapters: Roles that have an adapter. Without `Role.REFERENCE` the reference is the bare base.
        lora: `peft.LoraConfig` of all of them. Default: rank 16 on every linear layer.
        trained_dtype, frozen_dtype: Of the adapters of policy and critic, and of reference and reward.
        optim: One of `OPTIMIZERS`.
        checkpointing: Gradient checkpointing.
        holds_updates: Whether the size of updates is held (`update_kl_target` is not 0).
        prompt_length, completion_length: Tokens.
        attention: `attn_implementation`.
    """

    load_in_4bit: bool = False
    double_quant: bool = True
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    adapters: tuple[Role, ...] = ALL_ROLES
    lora: Any = field(default_factory=lora_config)
    trained_dtype: torch.dtype = torch.float32
    frozen_dtype: torch.dtype = torch.float32
    optim: str = "paged_adamw_8bit"
    checkpointing: bool = True
    holds_updates: bool = True
    prompt_length: int = 512
    completion_length: int = 512
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim={self.optim!r} is not in the plan: use one of {', '.join(OPTIMIZERS)}.")
        if not {Role.POLICY, Role.CRITIC} <= set(self.adapters):
            raise ValueError(
                f"adapters={[r.value for r in self.adapters]} must hold policy and critic: PPO trains both."
            )
        for name in ("prompt_length", "completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 token.")


@dataclass(frozen=True)
class Weights:
    """What `count_weights` finds. All `..._bytes` are on the device.

    Attributes:
        parameters: Of the base, a tied head counted once.
        quantised: Linear layers that NF4 takes; `linear`: all of them; `adapted`: those that LoRA hits.
        base_bytes: The base, its quantisation constants and its buffers.
        adapter_bytes: Of each role that has one; `head_bytes`: the float32 heads of reward and critic.
        trained: Elements of each trained tensor, adapters and the critic's head.
        trained_bytes, gradient_bytes, optimizer_bytes: Of these.
        paged_bytes: The part of `optimizer_bytes` in paged memory, which torch's allocator does not count.
        largest_bytes: The largest tensor before quantisation, which loading holds beside the base.
    """

    parameters: int
    linear: int
    quantised: int
    adapted: int
    base_bytes: int
    adapter_bytes: dict[Role, int]
    head_bytes: int
    trained: tuple[int, ...]
    trained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    largest_bytes: int

    @property
    def resident_bytes(self) -> int:
        """Base, adapters and heads: what is there in every phase."""
        return self.base_bytes + sum(self.adapter_bytes.values()) + self.head_bytes


def load_config(model_name_or_path: str, **kwargs: Any) -> Any:
    """The model's configuration.

    Raises:
        ValueError: There is none, transformers does not know it, or the base is quantised already.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model_name_or_path={model_name_or_path!r} has no configuration that transformers knows: "
            f"{str(error)[:200]} Give a Hub id, or a folder with a config.json, of a causal language model; upgrade "
            "transformers for a new one."
        ) from error
    method = quantization_method(config)
    if method is not None:
        raise ValueError(
            f"model_name_or_path={model_name_or_path!r} is quantised already ({method}): the plan knows 16 and 32 "
            "bits, and 4 bits by bitsandbytes. Give the unquantised model and load_in_4bit."
        )
    return config


def meta_model(config: Any, setup: Setup) -> PreTrainedModel:
    """The base on the meta device: shapes without memory.

    Raises:
        ValueError: Not a causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=setup.dtype, attn_implementation=setup.attention)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{type(config).__name__} cannot be built as a causal language model: {str(error)[:200]} Give one, and an "
            "attention that is installed (sdpa, eager)."
        ) from error


def with_roles(base: PreTrainedModel, setup: Setup) -> SharedBaseModel:
    """The base with the roles' adapters and heads; no reference adapter, which would compute like the policy's."""
    reward = None
    if Role.REWARD in setup.adapters:
        head = torch.zeros(1, base.config.get_text_config().hidden_size)
        reward = AdapterWeights(setup.lora, None, head)
    with torch.device("meta"):
        return SharedBaseModel(base, setup.lora, reward, AdapterWeights(setup.lora))


def quantised_linears(base: PreTrainedModel) -> dict[str, Any]:
    """Name -> layer of those that transformers hands to bitsandbytes: linear layers, not the head or what it ties."""
    skip = get_keys_to_not_convert(base) + list(base._keep_in_fp32_modules or [])
    return {
        name: module
        for name, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skip)
    }


def nf4_bytes(elements: int, double_quant: bool) -> int:
    """Bytes of a 4-bit weight and its quantisation state, as bitsandbytes keeps it.

    Two elements a byte; a constant for every 64: 4 bytes, or 1 byte and 4 for every 256 of them, the 256 entries of
    their code and their float32 mean; the 16 float32 entries of the code.
    """
    blocks = math.ceil(elements / NF4_BLOCK)
    constants = 4 * blocks
    if double_quant:
        constants = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * 256 + 4
    return math.ceil(elements / 2) + constants + 4 * 16


def adamw_bytes(elements: int, optim: str) -> tuple[int, int]:
    """(bytes of the two moments of one tensor, those of them in paged memory)."""
    paged = optim.startswith("paged") and elements >= ADAM_PAGED_FROM
    if "8bit" not in optim or elements < ADAM_8BIT_FROM:
        return 8 * elements, 8 * elements * paged
    return 2 * elements + 8 * math.ceil(elements / ADAM_BLOCK), 2 * elements * paged


def count_weights(config: Any, setup: Setup) -> Weights:
    """Count the base and its roles on the meta device.

    Raises:
        ValueError: A configuration of no causal language model, or LoRA targets that a shared base cannot serve.
    """
    base = meta_model(config, setup)
    quantised = quantised_linears(base) if setup.load_in_4bit else {}
    packed = {id(module.weight): nf4_bytes(module.weight.numel(), setup.double_quant) for module in quantised.values()}
    tensors: dict[int, Tensor] = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    base_bytes = sum(packed.get(key, t.numel() * t.element_size()) for key, t in tensors.items())
    parameters = {id(p): p.numel() for p in base.parameters()}
    linear = sum(type(module) is nn.Linear or isinstance(module, Conv1D) for module in base.modules())
    largest = max(t.numel() * setup.dtype.itemsize for t in tensors.values())
    hidden = config.get_text_config().hidden_size

    # The policy stands for every role: they share a configuration
    model = with_roles(base, setup)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for name, p in model.named_parameters() if "lora_" in name and ".default." in name]
    adapted = sum("lora_A.default" in name for name, _ in model.named_parameters())
    adapters = {}
    for role in setup.adapters:
        dtype = setup.trained_dtype if role in (Role.POLICY, Role.CRITIC) else setup.frozen_dtype
        adapters[role] = sum(sizes) * dtype.itemsize
    states = [adamw_bytes(elements, setup.optim) for elements in trained]
    return Weights(
        parameters=sum(parameters.values()),
        linear=linear,
        quantised=len(quantised),
        adapted=adapted,
        base_bytes=base_bytes,
        adapter_bytes=adapters,
        head_bytes=4 * hidden * len({Role.REWARD, Role.CRITIC} & set(setup.adapters)),
        trained=tuple(trained),
        trained_bytes=2 * sum(sizes) * setup.trained_dtype.itemsize + 4 * hidden,
        gradient_bytes=sum(trained) * setup.trained_dtype.itemsize,
        optimizer_bytes=sum(total for total, _ in states),
        paged_bytes=sum(paged for _, paged in states),
        largest_bytes=largest if setup.load_in_4bit else 0,
    )


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a real model, with the quantisation states of its 4-bit layers."""
    tensors: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        tensors[tensor.data_ptr() or id(tensor)] = tensor
        state: Any = tensor.__dict__.get("quant_state")
        for part in (state, getattr(state, "state2", None)):
            for extra in vars(part).values() if part is not None else ():
                if isinstance(extra, Tensor):
                    tensors[extra.data_ptr()] = extra
    return sum(t.numel() * t.element_size() for t in tensors.values())
