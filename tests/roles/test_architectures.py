"""Every architecture of transformers that can be built small: our log-probabilities are its own, or it is refused."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from trl_ext.ops.packing import pack
from trl_ext.roles import RewardModel, Role, SharedBaseModel, can_share_prompts, column_limit, disable_dropout
from trl_ext.roles.probe import language_head

WIDTH = 16
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "vocab_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
FALCON = {"head_dim": None, "num_kv_heads": 1}
DECODER = {"is_decoder": True}

EQUAL = {
    "llama": {}, "mistral": {}, "ministral": {}, "mixtral": {}, "arcee": {}, "smollm3": {}, "seed_oss": {}, "cwm": {},
    "qwen2": {}, "qwen2_moe": {"shared_expert_intermediate_size": 24}, "qwen3": {}, "qwen3_moe": {},
    "qwen3_5_text": {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                     "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
    "gemma": {}, "gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {"final_logit_softcapping": 2.0},
    "vaultgemma": {"final_logit_softcapping": 2.0}, "nanochat": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "num_hidden_layers": 3}, "xlstm": {"output_logit_soft_cap": 2.0},
    "phi": {}, "phi3": {}, "phimoe": {}, "gpt2": {}, "gpt_bigcode": {}, "gptj": {}, "gpt_neox": {}, "gpt_oss": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8}, "openai-gpt": {},
    "codegen": {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 4},
    "bloom": {}, "mpt": {}, "opt": {}, "biogpt": {}, "xglm": {},
    "falcon": FALCON | {"alibi": False}, "falcon alibi": FALCON | {"alibi": True},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1,
                  "mamba_chunk_size": 8, "lm_head_multiplier": 0.3},
    "falcon_mamba": {}, "mamba": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 2},
    "lfm2": {}, "nemotron": {}, "persimmon": {}, "stablelm": {},
    "starcoder2": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": {}, "helium": {}, "apertus": {}, "exaone4": {},
    "ernie4_5": {}, "glm": {}, "glm4": {}, "hunyuan_v1_dense": {}, "minimax": {}, "jetmoe": {}, "doge": {},
    "granite": {"logits_scaling": 3.0}, "granitemoe": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3}, "cohere2": {"logit_scale": 0.3},
    "minicpm3": MLA | {"dim_model_base": 8}, "deepseek_v2": MLA, "deepseek_v3": MLA | {"n_group": 1, "topk_group": 1},
    "bert-generation": DECODER,
}  # fmt: skip
HEADS_WITH_A_DENSE_LAYER = dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "roformer"), DECODER) | {
    "modernbert-decoder": {}
}


def build(name, seed=0, scale=0.1, **options):
    """A causal language model of this type with random weights, in eval mode; the name's first word is the type."""
    kind = name.split()[0]
    known = AutoConfig.for_model(kind)
    wanted = {**SMALL, **options}
    kept = {k: v for k, v in wanted.items() if v is not None and (k in options or hasattr(known, k))}
    config = AutoConfig.for_model(kind, **kept)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(config)
        for parameter in base.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter))
    return base.eval()


def shared(base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of Conv1D
        kind = base.config.model_type
        targets = ["in_proj"] if "mamba" in kind or kind == "falcon_h1" else "all-linear"
        targets = ["q_proj"] if kind == "phimoe" else targets  # PEFT takes its router for a linear layer
        return SharedBaseModel(base, LoraConfig(r=1, target_modules=targets), with_critic=False)


@torch.no_grad()
def own_logps(base, ids, start):
    mask = torch.ones(1, len(ids), dtype=torch.long)
    logits = base(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits
    return F.log_softmax(logits[0, start - 1 : -1].float(), -1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


@pytest.mark.filterwarnings("ignore:.*cannot compute the responses to a prompt in one sequence")
@pytest.mark.parametrize("name", EQUAL)
def test_log_probabilities_are_the_models_own(name):
    base = build(name, **EQUAL[name])
    sequences = [[[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 13, 14]], [[20, 21, 22, 23]]]
    starts = [[3, 3], [2]]
    expected = [
        own_logps(base, ids, start)
        for group, firsts in zip(sequences, starts, strict=True)
        for ids, start in zip(group, firsts, strict=True)
    ]
    model = shared(base)
    share, columns = can_share_prompts(model.backbone), column_limit(model.backbone)
    with torch.no_grad():
        outputs = model(parts=pack(sequences, starts, 0, share=share, max_columns=columns), roles=(Role.POLICY,))
    for row, mask, own in zip(outputs["logps"], outputs["mask"], expected, strict=True):
        torch.testing.assert_close(row[mask], own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", HEADS_WITH_A_DENSE_LAYER)
def test_a_head_that_does_more_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"model type '{name}': .* nats .*Use another base"):
        shared(build(name, **HEADS_WITH_A_DENSE_LAYER[name]))


@pytest.mark.parametrize("name", ["bert", "roberta", "big_bird"])
def test_an_encoder_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"model type '{name}': its tokens see later ones.*is_decoder=True"):
        shared(build(name))


def test_a_reward_model_finds_the_same_head():
    model = RewardModel(build("minicpm3", **EQUAL["minicpm3"]), LoraConfig(r=1, target_modules="all-linear"))
    assert model.language_head.factor == 0.5
    assert RewardModel(build("gemma2", final_logit_softcapping=2.0)).language_head.cap == 2.0
    with pytest.raises(ValueError, match="model type 'bert'"):
        RewardModel(build("bert"))


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma"])
def test_a_cap_that_weak_logits_do_not_show_is_kept(name):
    base = build(name, scale=0.0, num_hidden_layers=3)
    for parameter in base.parameters():
        parameter.data.mul_(1e-3)
    assert language_head(base).cap == 30.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "hyperclovax", "granite", "gemma2", "cohere"])
def test_16_bits_are_close_enough(name, dtype):
    base = build(name, **EQUAL[name])
    exact = language_head(base)
    found = language_head(base.to(dtype))
    assert (found.factor, found.cap) == (exact.factor, exact.cap)


def test_a_trial_leaves_no_trace():
    base = build("opt")
    base.train()
    base.model.decoder.layers[0].eval()
    modes = [module.training for module in base.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    language_head(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        can_share_prompts(base.base_model)
    disable_dropout(base)
    assert [module.training for module in base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize(
    "weight", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_weights_that_are_not_finite_are_named(weight):
    base = build("llama", tie_word_embeddings=False)
    base.get_parameter(weight).data[-1, -1] = float("nan")
    with pytest.raises(ValueError, match=rf"1 of its weights are NaN or infinite, first '{weight}'"):
        shared(base)


def test_packing_falls_back_where_a_model_raises():
    backbone = build("falcon", **EQUAL["falcon alibi"]).base_model
    with pytest.warns(UserWarning, match=r"FalconModel cannot compute the responses .*one sequence: \w+Error"):
        assert not can_share_prompts(backbone)


DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3},
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "layerdrop": 0.3},
    "xglm": {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "falcon": FALCON | {"alibi": False, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.3},
    "persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_that_is_no_module_is_switched_off(name):
    model = shared(build(name, **DROPOUT[name]))
    ids = torch.arange(3, 15)[None]

    def passes():
        model.train()
        with torch.no_grad():
            return [model(input_ids=ids).logits for _ in range(2)]

    assert not torch.equal(*passes())
    disable_dropout(model)
    first, second = passes()
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, first, rtol=0, atol=1e-5)


def test_noise_that_stays_is_refused_with_what_to_set():
    base = build("llama")
    forward = base.model.layers[0].mlp.forward
    base.model.layers[0].mlp.forward = lambda x: F.dropout(forward(x), 0.5, base.model.training)
    with pytest.raises(ValueError, match=r"model type 'llama': two passes.*model_init_kwargs=\{'attention_dropout'"):
        disable_dropout(base)
