"""What the trainers lean on in TRL. Red here means: TRL has changed, look at trl_ext/ppo before anything else.

Each test names a seam, an attribute or a behaviour that `trl_ext.ppo` uses without TRL promising it; the last ones are
those of `trl_ext.reward`.
"""

import ast
import inspect
import json
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_callback import ExportableState, TrainerControl
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import rloo_trainer
from trl.trainer.utils import RepeatSampler, shuffle_sequence_dict, split_tensor_dict

from trl_ext import PPOMaxConfig, PPOMaxTrainer
from trl_ext.ppo.callback import PPOStateCallback
from trl_ext.ppo.sets import SeveralSets
from trl_ext.ppo.state import PPOState
from trl_ext.reward.trainer import RewardModelTrainer
from trl_ext.training import RoleTrainer

SEAMS = {
    "_generate_and_score_completions": ["inputs"],
    "_compute_loss": ["model", "inputs"],
}
PUBLIC = {
    "create_model_card",
    "create_optimizer",
}  # overridden too; documented, unlike the seams
# Overridden in `RoleTrainer`
EVERY_TRAINERS = {"_save_checkpoint", "evaluate", "get_batch_samples", "save_model", "train"}
