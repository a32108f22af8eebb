"""Tokenizers with chat templates of every kind: the small ones of the suite, and those that TRL ships."""

import re
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# The token that ends a turn in each family's template, which is its eos; longer names first where they nest
END = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",  # it writes no end: the header of the next turn stops generation
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}
PICTURES = ("idefics3", "llava_next", "smolvlm")  # their messages hold lists of parts, which RewardTrainer gets too
SPECIAL = re.compile(r"<[|｜][^<>\s'\"]+?[|｜]>|<(?:start|end)_of_turn>|<bos>|<turn\|>|<\|turn>")  # noqa: RUF001


def tokenizer_of(template: str, eos: str, **options) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each marker of the template."""
    marks = sorted({*SPECIAL.findall(template), eos, "<pad>", "<bos>"})
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"eos_token": eos, "pad_token": "<pad>", "bos_token": "<bos>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def shipped() -> list[str]:
    """Names of the templates that the installed TRL ships for conversations of texts."""
    names = [path.stem for path in sorted(TEMPLATES.glob("*.jinja"))]
    return [name for name in names if not name.endswith("_training") and not name.startswith(PICTURES)]


def shipped_tokenizer(name: str, **options) -> PreTrainedTokenizerFast:
    eos = next(end for family, end in END.items() if name.startswith(family))
    return tokenizer_of((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), eos, **options)
