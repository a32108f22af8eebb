"""The tokenizer and the model of the embedded world, built in code: no file, no download."""

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .task import VOCABULARY

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)
START, END, ROLES = "<|im_start|>", "<|im_end|>", ("system", "user", "assistant")
# As Qwen2.5 writes conversations: a line break follows the end token
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = (None, "chatml")


def build_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the task's vocabulary, with <pad>, <bos>, <eos> and <unk> as ids 0 to 3.

    A word is a run of lower-case letters and a full stop is a word of its own, so that a completion may be appended to
    a prompt with or without a space between them. Decoding joins the words with single spaces: any text of the task
    comes back exactly. No special token is added by itself (as in Qwen2), so the ids of a prompt followed by those of
    a completion are the ids of the whole. Pads on the left, ready for generation.

    Args:
        template: None: no chat template. "chatml": conversations as Qwen2.5 writes them, with <|im_end|> as the end
            token and a line break, a token of its own, behind it.

    Raises:
        ValueError: an unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown: use None or 'chatml'.")
    words = (*SPECIAL_TOKENS, *VOCABULARY, *(ROLES if template else ()))
    vocabulary = {token: index for index, token in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[a-z]+"), behavior="isolated")]
    )
    if template:
        tokenizer.add_special_tokens([START, END])
        tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHATML if template else None,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END if template else EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of about 0.15 million random float32 weights: 3 layers, width 64, grouped-query attention.

    Args:
        tokenizer: sets the vocabulary size and the ids of the special tokens, in the config and the generation config.
        seed: seed of the weights; the global random state is left as it was.

    Returns:
        The model, on the CPU, with 128 positions and tied input and output embeddings.
    """
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,  # a narrow model learns much faster than from the usual 0.02
        dtype="float32",
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.update(**special)
    return model
