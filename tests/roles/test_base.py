"""What a base must be before anything is put on it."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BitsAndBytesConfig, LlamaModel

from trl_ext.roles import SharedBaseModel, check_vocabulary, load_base


def test_a_checkpoint_without_an_lm_head_is_refused(make_base, tmp_path):
    base = make_base(tie_word_embeddings=False)
    LlamaModel.from_pretrained(None, config=base.config, state_dict=base.model.state_dict()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for 1 parameters of LlamaForCausalLM, first 'lm_head.weight'"):
        load_base(str(tmp_path))


def test_a_tied_lm_head_needs_no_weights(make_base, batch, tmp_path):
    base = make_base("qwen2")
    base.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_base(str(tmp_path))(*batch).logits, base(*batch).logits)


def test_a_checkpoint_that_lacks_a_layer_is_refused(make_base, tmp_path):
    make_base().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"first 'model.layers.1.mlp.up_proj.weight': they would be random"):
        load_base(str(tmp_path))


def test_an_encoder_is_refused(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=48, **size)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertLMHeadModel.*random"):
        load_base(str(tmp_path))


def test_a_4_bit_base_passes_its_trials(make_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    for dtype in ("float32", "bfloat16"):
        make_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = SharedBaseModel(load_base(str(tmp_path), quantization_config=quantization, dtype=dtype))
        assert (model.language_head.factor, model.language_head.cap) == (1.0, None)


def test_every_token_needs_an_embedding(make_base, tokenizer):
    config = make_base().config
    check_vocabulary(config, tokenizer)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["w48"])
    with pytest.raises(ValueError, match=r"1 tokens beyond the model's 48 embeddings, first 'w48' with id 48"):
        check_vocabulary(config, larger)
    with_image = copy.deepcopy(tokenizer)
    with_image.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with_image.image_token = "<image>"
    check_vocabulary(config, with_image)
