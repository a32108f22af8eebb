"""A reward model in training: packed scores against one sequence at a time, its LM head, reset, save and load."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CodeGenConfig, CodeGenForCausalLM

from trl_ext.ops.packing import pack
from trl_ext.roles import RewardModel, RewardScale, Role, SharedBaseModel, column_limit, load_base
from trl_ext.roles.reward_model import sequence_classifier

CLOSE = {"rtol": 0, "atol": 1e-5}
MODELS = ("llama", "gpt2", "gpt_neox", "gpt_neo")
GROUPS = [  # prompts of 2 and 4 tokens; three responses and two
    [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 11]],
    [[12, 13, 14, 15, 16, 17], [12, 13, 14, 15, 18, 19, 20]],
]
STARTS = [[2] * 3, [4] * 2]
SEQUENCES = [ids for group in GROUPS for ids in group]


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options)


def randomized(model, seed=1):
    """As training leaves it: LoRA's B and the head are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if "lora_" in name else 1.0
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model


def make(base, **options):
    return randomized(RewardModel(base, config(**options))).eval()


@pytest.fixture(params=MODELS)
def model(request, make_base):
    return make(make_base(request.param, **({"window_size": 32} if request.param == "gpt_neo" else {})))


@pytest.fixture
def llama(make_base, tmp_path):
    """On a base that lies in a folder, as `AutoPeft` classes need it."""
    make_base("llama").save_pretrained(tmp_path / "base")
    return make(load_base(str(tmp_path / "base")))


def packed(model, **options):
    return pack(GROUPS, STARTS, 0, max_columns=column_limit(model.backbone), **options)


def alone(classifier):
    """Each sequence by itself through a plain classifier, no padding."""
    return torch.stack([classifier(input_ids=torch.tensor([ids])).logits[0, 0] for ids in SEQUENCES])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- scores and log-probabilities


def test_packed_scores_and_their_gradients_are_those_of_the_plain_classifier(model):
    parts = packed(model)
    assert any(part.segments is not None for part in parts), "prompts are shared"
    scores, expected = model(parts=parts)["scores"], alone(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores, expected, **CLOSE)
    weights = torch.tensor([1.0, -2.0, 3.0, -1.0, 0.5])
    together, one_by_one = (gradients(model, (values * weights).sum()) for values in (scores, expected))
    assert together.keys() == one_by_one.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in one_by_one.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", MODELS)
def test_imitation_is_by_the_bases_own_head_with_the_adapter_on(make_base, architecture, tied):
    base = make_base(architecture, tie_word_embeddings=tied)
    assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) == tied
    before = copy.deepcopy(base)
    model = make(base)
    wanted = torch.tensor([True, False, False, True, False])

    def full(causal):
        found = []
        for ids, start in [(SEQUENCES[0], 2), (SEQUENCES[3], 4)]:
            logps = F.log_softmax(causal(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1], -1)
            found.append(logps.gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
        return torch.cat(found)

    outputs = model(parts=packed(model), lm_of=wanted)
    # `base` is the model that was given: its layers carry the adapter now, and its head is the one it came with
    expected = full(base)
    torch.testing.assert_close(outputs["logps"].sort().values, expected.sort().values, **CLOSE)
    assert (full(before) - expected).abs().max() > 0.01
    packed_gradients, full_gradients = (gradients(model, x.mean()) for x in (outputs["logps"], expected))
    assert not any("lm_head" in name or "embed" in name for name in packed_gradients), "the head stays frozen"
    for name, gradient in full_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_sharing_prompts_changes_nothing(model):
    wanted = torch.ones(5, dtype=torch.bool)
    with torch.no_grad():
        together, apart = (model(parts=packed(model, share=share), lm_of=wanted) for share in (True, False))
    torch.testing.assert_close(together["scores"], apart["scores"], **CLOSE)
    torch.testing.assert_close(together["logps"].sort().values, apart["logps"].sort().values, **CLOSE)


@pytest.mark.parametrize("by", ["load_base", "transformers"])
def test_on_a_4_bit_base_gradients_after_an_evaluation_are_those_before(make_base, tmp_path, by):
    """bitsandbytes would pack the weights in eval mode, on some CPUs, and compute no gradient through them after."""
    pytest.importorskip("bitsandbytes")
    make_base("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    load = {"load_base": load_base, "transformers": AutoModelForCausalLM.from_pretrained}[by]
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = load(str(tmp_path / "base"), quantization_config=quantization)
    model = make(base) if by == "load_base" else SharedBaseModel(base)
    ids, found = torch.tensor([SEQUENCES[0]]), []
    for _ in range(2):
        model.train()
        found.append(gradients(model, model(input_ids=ids).logits.square().sum()))
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
    before, after = found
    assert any(gradient.any() for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------- what it is made of


def test_the_base_is_lent_not_copied(make_base):
    base = make_base("llama")
    own = {p.data_ptr() for p in base.parameters()}
    model = RewardModel(base, config())
    frozen = {p.data_ptr() for n, p in model.named_parameters() if not p.requires_grad and "score" not in n}
    assert frozen == own
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "score.modules_to_save" in n for n in trained)
    assert any("score" in n for n in trained)
    assert model.head_weight.shape == (1, 16)
    assert not model.head_weight.any()


def test_lora_is_on_every_linear_layer_but_the_heads(make_base):
    model = RewardModel(make_base("llama"))
    layers = {name.rsplit(".", 2)[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(layers) == 2 * 7
    assert not any("score" in name or "lm_head" in name for name in layers)


def test_a_fresh_adapter_is_the_base_and_scores_zero(make_base):
    base = make_base("llama")
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = RewardModel(base, config()).eval()
        assert torch.equal(base(input_ids=ids).logits, before)
        assert model(parts=packed(model))["scores"].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("make_model", "match"),
    [
        (lambda base: base.base_model, "LlamaModel has no LM head"),
        (lambda base: sequence_classifier(base), "no LM head"),
        (lambda base: get_peft_model(base, config(task_type="CAUSAL_LM")), "has an adapter already"),
        (
            lambda base: CodeGenForCausalLM(CodeGenConfig(vocab_size=48, n_embd=16, n_layer=1, n_head=4, rotary_dim=4)),
            "no sequence classifier for CodeGenForCausalLM",
        ),
    ],
)
def test_what_is_no_base_is_refused(make_base, make_model, match):
    with pytest.raises(TypeError, match=match):
        RewardModel(make_model(make_base("llama")), config())


def test_a_configuration_that_roles_could_not_serve_is_refused(make_base):
    with pytest.raises(ValueError, match="use_dora=True cannot be served"):
        RewardModel(make_base("llama"), config(use_dora=True))


# ---------------------------------------------------------------------- reset, save, load


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_reset_depends_on_its_seed_alone(llama):
    starts = []
    for seed in (3, 4, 3):
        randomized(llama, seed)
        llama.scale = RewardScale(1.0, 2.0, 10)
        torch.manual_seed(len(starts))
        state = torch.random.get_rng_state()
        llama.reset(seed)
        assert torch.equal(torch.random.get_rng_state(), state), "the global random state stays"
        assert llama.scale is None
        starts.append(trained_weights(llama))
    first, other, again = starts
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(first[name].any() for name in first if "lora_B" in name or "score" in name)
    drawn = [name for name in first if "lora_A" in name]
    assert all(first[name].any() and not torch.equal(first[name], other[name]) for name in drawn)


def test_saved_and_loaded_it_is_the_same(llama, tmp_path):
    llama.scale = RewardScale(-0.5, 2.0, 10)
    llama.model_card = lambda: "a card"
    llama.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "README.md").read_text() == "a card"
    weights = trained_weights(llama)
    llama.reset(0)
    llama.load(tmp_path / "saved")
    assert all(torch.equal(weights[name], p) for name, p in trained_weights(llama).items())
    assert llama.scale == RewardScale(-0.5, 2.0, 10)
    assert all(p.requires_grad for n, p in llama.named_parameters() if "lora_" in n or "modules_to_save" in n)
    llama.scale = None
    llama.save_pretrained(str(tmp_path / "saved"))
    llama.load(tmp_path / "saved")
    assert llama.scale is None, "an old scale does not stay in the folder"


@pytest.mark.parametrize(
    ("options", "match"),
    [({"r": 2}, "differ in name or shape"), ({"target_modules": ["q_proj"]}, "differ in name or shape"),
     ({"lora_alpha": 4}, "lora_alpha=4, this model has 8")],
)  # fmt: skip
def test_an_adapter_of_another_configuration_is_not_loaded(llama, tmp_path, options, match):
    other = RewardModel(load_base(llama.name_or_path), config(**options))
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=match):
        llama.load(tmp_path / "other")


def test_an_adapter_of_another_base_is_not_loaded(llama, make_base, tmp_path):
    make_base("llama", seed=5).save_pretrained(tmp_path / "elsewhere")
    RewardModel(load_base(str(tmp_path / "elsewhere")), config()).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"other: it was trained on other weights"):
        llama.load(tmp_path / "other")


def test_plain_peft_and_the_reward_role_score_the_same(llama, tmp_path):
    with torch.no_grad():
        expected = llama(parts=packed(llama))["scores"]
        llama.scale = RewardScale(0.5, 2.0, 10)
        llama.save_pretrained(str(tmp_path / "saved"))
        plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1).eval()
        torch.testing.assert_close(alone(plain), expected, **CLOSE)
    shared = SharedBaseModel.from_pretrained(llama.name_or_path, reward_adapter=tmp_path / "saved", with_critic=False)
    assert shared.has_role(Role.REWARD)
    for ids, score in zip(SEQUENCES, expected, strict=True):
        ids = torch.tensor([ids])
        normalised = shared.score(ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(normalised, (score - 0.5) / 2.0, **CLOSE)
