"""Policy, reference, reward and critic as LoRA adapters on one frozen base. Only this folder imports PEFT."""

from trl_ext.roles.adapters import AdapterWeights, RewardScale, lora_config, read_adapter
from trl_ext.roles.backbone import packed_hidden_states
from trl_ext.roles.base import check_vocabulary, load_base, load_base_config, max_positions, quantization_method
from trl_ext.roles.build import shared_base_model, swap_policy, tuned_policy
from trl_ext.roles.heads import LMHead, ScalarHead
from trl_ext.roles.probe import can_share_prompts, column_limit, disable_dropout
from trl_ext.roles.reward_model import RewardModel
from trl_ext.roles.role import Role
from trl_ext.roles.shared_model import SharedBaseModel

__all__ = [
    "AdapterWeights",
    "LMHead",
    "RewardModel",
    "RewardScale",
    "Role",
    "ScalarHead",
    "SharedBaseModel",
    "can_share_prompts",
    "check_vocabulary",
    "column_limit",
    "disable_dropout",
    "load_base",
    "load_base_config",
    "lora_config",
    "max_positions",
    "packed_hidden_states",
    "quantization_method",
    "read_adapter",
    "shared_base_model",
    "swap_policy",
    "tuned_policy",
]
