"""A Llama whose heads are too narrow for an engine, as one of the same function with wider heads.

The rotary embedding turns dimension i of a head of width d with d / 2 + i, by theta ** (-2 i / d). In a head of twice
the width the even ones of these have the same frequencies: the old dimensions go there, and zeros between them. The
attention divides by the square root of the width, which the queries make up for.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.ppo import tiny


def widened(source: Path, target: Path) -> Path:
    """Write the model with heads of twice the width, and its tokenizer, into `target`."""
    model = LlamaForCausalLM.from_pretrained(source, dtype="float32")
    old = model.config
    config = LlamaConfig(**old.to_dict() | {"head_dim": 2 * old.head_dim})
    wide, half = LlamaForCausalLM(config), old.head_dim // 2
    places = torch.cat([2 * torch.arange(half), old.head_dim + 2 * torch.arange(half)])
    weights = model.state_dict()
    for name, weight in list(weights.items()):
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            heads = weight.shape[0] // old.head_dim
            new = torch.zeros(heads, 2 * old.head_dim, weight.shape[1])
            new[:, places] = weight.view(heads, old.head_dim, -1) * (2**0.5 if kind == "q_proj" else 1.0)
            weights[name] = new.flatten(0, 1)
        elif kind == "o_proj":
            heads = weight.shape[1] // old.head_dim
            new = torch.zeros(weight.shape[0], heads, 2 * old.head_dim)
            new[:, :, places] = weight.view(-1, heads, old.head_dim)
            weights[name] = new.flatten(1)
    wide.load_state_dict(weights)
    wide.generation_config = model.generation_config
    wide.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def wide_base(folder: Path, dtype: torch.dtype) -> Path:
    """A Llama of random numbers with heads as wide as the engine's attention takes them, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.1}
    config = tiny.tiny_config(**sizes | {"head_dim": 32})
    config.num_key_value_heads = 4
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder
