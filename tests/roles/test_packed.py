"""Responses packed after one prompt against each on its own: log-probabilities and gradients, by architecture."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM

from trl_ext.ops.packing import pack
from trl_ext.roles import AdapterWeights, Role, SharedBaseModel, lora_config
from trl_ext.roles.probe import can_share_prompts, column_limit

CLOSE = {"rtol": 0, "atol": 1e-4}
# GPT-Neo has no sdpa
MODELS = [
    *((name, attention) for name in ("llama", "qwen2", "gpt2", "gpt_neox") for attention in ("eager", "sdpa")),
    ("gpt_neo", "eager"),
]


def groups(k=4, rows=3, seed=5):
    """Prompts of 4, 5, 6 tokens with k responses of 1 to 4; two responses begin alike, one is there twice."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, 48, (count,), generator=generator).tolist()

    found, starts = [], []
    for i in range(rows):
        prompt = tokens(4 + i)
        responses = [tokens(1 + (i + j) % 4) for j in range(k)]
        responses[1] = [*responses[0][:1], *tokens(1)]
        responses[2] = list(responses[3])
        found.append([prompt + response for response in responses])
        starts.append([len(prompt)] * k)
    return found, starts


def policy(make_base, make_adapter, architecture, attention, **options):
    base = make_base(architecture, attn_implementation=attention, **options)
    return SharedBaseModel(base, make_adapter(base), with_critic=False)


def flat(nested):
    return [x for inner in nested for x in inner]


def separate_logps(model, sequences, starts):
    """Of each sequence alone, by the model's own logits."""
    found = []
    for ids, start in zip(sequences, starts, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        found.append(F.log_softmax(logits, -1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "checkpointed"])
@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_log_probabilities_and_gradients_are_those_of_separate_sequences(
    make_base, make_adapter, architecture, attention, training
):
    options = {"window_size": 24} if architecture == "gpt_neo" else {}
    model = policy(make_base, make_adapter, architecture, attention, **options)
    assert model.get_base_model().config._attn_implementation == attention
    if training:
        model.train()
        model.gradient_checkpointing_enable()
    sequences, starts = groups()
    limit = column_limit(model.get_base_model().base_model)
    parts = pack(sequences, starts, 0, max_columns=limit)
    assert any(part.segments is not None for part in parts)
    outputs = model(parts=parts, roles=(Role.POLICY,))
    logps, mask = outputs["logps"], outputs["mask"]
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    (logps * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    alone = separate_logps(model, flat(sequences), flat(starts))
    for i, expected in enumerate(alone):
        torch.testing.assert_close(logps[i][mask[i]], expected, **CLOSE)
    torch.stack([(row * weights[i, : len(row)]).sum() for i, row in enumerate(alone)]).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert packed.keys() == expected.keys()
    assert max(grad.abs().max() for grad in expected.values()) > 0.1
    for name, grad in expected.items():
        torch.testing.assert_close(packed[name], grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


def test_one_response_does_not_see_another(make_base, make_adapter):
    model = policy(make_base, make_adapter, "llama", "sdpa")
    sequences, starts = groups(rows=1)
    changed = [[list(ids) for ids in sequences[0]]]
    changed[0][3][-1] = 47 - changed[0][3][-1] % 40
    with torch.no_grad():
        first, second = (
            model(parts=pack(rows, starts, 0), roles=(Role.POLICY,))["logps"] for rows in (sequences, changed)
        )
    torch.testing.assert_close(first[:3], second[:3], rtol=0, atol=1e-6)
    assert (first[3] - second[3]).abs().max() > 0.01


def test_roles_are_those_asked_for_and_the_reference_has_no_gradient(make_base, make_adapter):
    model = policy(make_base, make_adapter, "llama", "sdpa")
    parts = pack(*groups(), 0)
    both = model(parts=parts, roles=(Role.POLICY, Role.REFERENCE))
    assert set(both) == {"logps", "reference_logps", "mask"}
    assert both["logps"].requires_grad
    assert not both["reference_logps"].requires_grad
    assert torch.equal(both["logps"], both["reference_logps"])  # the policy starts there
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.3)
        moved = model(parts=parts, roles=(Role.POLICY, Role.REFERENCE))
    assert torch.equal(moved["reference_logps"], both["reference_logps"])
    assert not torch.allclose(moved["logps"], both["logps"], atol=0.01)
    with pytest.raises(ValueError, match="use `score_parts`"):
        model(parts=parts, roles=(Role.REWARD,))
    with pytest.raises(ValueError, match="need both"):
        model(torch.ones(1, 2, dtype=torch.long), roles=(Role.POLICY,))
    with pytest.raises(ValueError, match="entropy=True"):
        model(parts=parts, roles=(Role.POLICY,), entropy=True)


def test_the_temperature_divides_the_logits(make_base, make_adapter):
    model = policy(make_base, make_adapter, "llama", "sdpa")
    ids = [3, 4, 5, 6]
    parts = pack([[ids, [3, 4, 7]]], [[2, 2]], 0)
    with torch.no_grad():
        logps = model(parts=parts, roles=(Role.POLICY,), temperature=0.5)["logps"][0]
        logits = model(input_ids=torch.tensor([ids])).logits[0, 1:-1] / 0.5
    expected = F.log_softmax(logits, -1).gather(1, torch.tensor(ids[2:])[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, **CLOSE)


@pytest.mark.parametrize(("architecture", "attention"), MODELS)
def test_models_that_can_say_so_without_a_warning(make_base, architecture, attention):
    backbone = make_base(architecture, attn_implementation=attention).base_model
    backbone.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_share_prompts(backbone)
    assert backbone.training


def test_windows_limit_the_columns(make_base):
    # every other layer of GPT-Neo sees 8 columns; without those, its buffers have as many columns as positions
    assert column_limit(make_base("gpt_neo").base_model) == 8
    assert column_limit(make_base("gpt_neo", attention_types=[[["global"], 2]]).base_model) == 32
    assert column_limit(make_base("mistral", sliding_window=12).base_model) == 12
    assert column_limit(make_base("qwen2", sliding_window=12, use_sliding_window=False).base_model) is None
    assert column_limit(make_base("llama").base_model) is None


@pytest.mark.parametrize(
    ("architecture", "window"), [("gpt_neo", {}), ("mistral", {"sliding_window": 8, "num_key_value_heads": 1})]
)
def test_rows_wider_than_the_window_are_not_shared(make_base, make_adapter, architecture, window):
    model = policy(make_base, make_adapter, architecture, "eager", **window)
    sequences, starts = groups()
    sequences[0] = [ids[:6] for ids in sequences[0][:2]]  # the one group that fits into 8 columns
    starts[0] = [4, 4]
    parts = pack(sequences, starts, 0, max_columns=column_limit(model.get_base_model().base_model))
    assert sum(int((part.segments > 1).any(1).sum()) for part in parts if part.segments is not None) == 1
    with torch.no_grad():
        outputs = model(parts=parts, roles=(Role.POLICY,))
        alone = separate_logps(model, flat(sequences), flat(starts))
    for i, expected in enumerate(alone):
        torch.testing.assert_close(outputs["logps"][i][outputs["mask"][i]], expected, **CLOSE)


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2)).eval()


def test_a_model_without_positions_warns_and_is_run_one_by_one():
    base = bloom()
    backbone = base.base_model
    assert column_limit(backbone) == 0
    with pytest.warns(UserWarning, match="BloomModel cannot compute the responses to a prompt in one sequence"):
        assert not can_share_prompts(backbone)
    model = SharedBaseModel(base, lora_config(r=2), with_critic=False)
    sequences, starts = groups()
    with torch.no_grad():
        outputs = model(parts=pack(sequences, starts, 0, share=False), roles=(Role.POLICY,))
        alone = separate_logps(model, flat(sequences), flat(starts))
    for i, expected in enumerate(alone):
        torch.testing.assert_close(outputs["logps"][i][outputs["mask"][i]], expected, **CLOSE)


def test_a_model_that_computes_something_else_is_found_out(make_base, monkeypatch):
    """Positions and mask are taken, but the mask is not heeded: only the trial can tell."""
    backbone = make_base("llama", attn_implementation="sdpa").base_model
    forward = backbone.forward

    def blind(input_ids=None, position_ids=None, attention_mask=None, use_cache=None):
        causal = attention_mask if attention_mask.ndim == 2 else None
        return forward(input_ids=input_ids, position_ids=position_ids, attention_mask=causal, use_cache=use_cache)

    monkeypatch.setattr(backbone, "forward", blind)
    with pytest.warns(UserWarning, match="packed hidden states differ from separate ones"):
        assert not can_share_prompts(backbone)


def test_bfloat16_is_close(make_base, make_adapter):
    base = make_base("llama", dtype=torch.bfloat16)
    adapter = make_adapter(base)
    model = SharedBaseModel(base, AdapterWeights(adapter.config, adapter.weights), with_critic=False)
    assert can_share_prompts(model.get_base_model().base_model)
    sequences, starts = groups()
    with torch.no_grad():
        shared, alone = (
            model(parts=pack(sequences, starts, 0, share=share), roles=(Role.POLICY,))["logps"]
            for share in (True, False)
        )
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, alone, rtol=0, atol=0.1)
