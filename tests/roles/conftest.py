"""Tiny models of five architectures, built in code, and adapters for them made by plain PEFT."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_ext.roles import AdapterWeights

VOCABULARY, WIDTH, POSITIONS = 48, 16, 32
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = {
    "llama": {**ROPE, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS},
    "qwen2": {**ROPE, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS, "tie_word_embeddings": True},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS},
    "gpt_neox": {**ROPE, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False},
    "gpt_neo": {
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": POSITIONS,
    },
}


def build_base(architecture="llama", seed=0, dtype=torch.float32, **options):
    """A causal language model with random weights, in eval mode, without dropout, large enough to tell roles apart."""
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES.get(architecture, ROPE), **SPECIAL, **options})
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "resid_dropout", "embed_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in base.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return base.eval()


def build_adapter(base, seed=1, head=False, **options):
    """An adapter with random weights for this base, by PEFT alone; a head too if asked."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **options))
        weights = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
        head = torch.randn(1, base.config.hidden_size) if head else None
    return AdapterWeights(LoraConfig(**options), weights, head)


@pytest.fixture(scope="session")
def make_base():
    return build_base


@pytest.fixture(scope="session")
def make_adapter():
    return build_adapter


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def batch():
    """(ids, mask), (3, 9): prompts of 4, 2, 3 tokens padded left to 4, completions of 5, 3, 4 padded right to 5."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 5 + [0, 0], [0] + [1] * 7 + [0]])
    return torch.where(mask.bool(), ids, 0), mask


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word, w3 to w47; <pad>, <bos>, <eos> are 0, 1, 2."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=POSITIONS
    )
