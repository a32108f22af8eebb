"""A reward model trained by `trl.RewardTrainer` with LoRA goes in and out of a shared model bit by bit."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from trl_ext.roles import Role, SharedBaseModel, read_adapter

TRAINED = ("llama", "qwen2", "gpt2", "gpt_neox")


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, make_base, tokenizer, tmp_path_factory):
    """Folders of a base and of a reward adapter that RewardTrainer has trained for three steps."""
    folder = tmp_path_factory.mktemp(request.param)
    make_base(request.param).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    words = [" ".join(f"w{i}" for i in torch.randint(3, 48, (8,), generator=generator)) for _ in range(12)]
    torch.manual_seed(0)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1),
        args=RewardConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"chosen": words[:6], "rejected": words[6:]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model(str(folder / "reward"))
    return folder


@pytest.fixture
def right_padded():
    ids = torch.randint(3, 48, (4, 10), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(10) < torch.tensor([[10], [6], [1], [3]])).long()
    return ids * mask, mask


@torch.no_grad()
def plain_scores(folder, ids, mask):
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model.config.pad_token_id = model.get_base_model().config.pad_token_id = 0
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_scores_are_those_of_plain_peft_to_the_last_bit(trained, right_padded):
    expected = plain_scores(trained / "reward", *right_padded)
    model = SharedBaseModel.from_pretrained(str(trained / "base"), reward_adapter=trained / "reward")
    assert expected.std() > 0.01
    assert torch.equal(model.score(*right_padded), expected)


def test_training_moved_adapter_and_head(trained):
    adapter = read_adapter(trained / "reward")
    moved = [key for key, value in adapter.weights.items() if "lora_B" in key and value.any()]
    assert moved
    assert adapter.head.abs().max() > 0
    assert adapter.config.task_type == "CAUSAL_LM"
    assert adapter.config.modules_to_save is None


def test_saved_again_it_loads_in_plain_peft_with_equal_scores(trained, right_padded, tmp_path):
    expected = plain_scores(trained / "reward", *right_padded)
    model = SharedBaseModel.from_pretrained(str(trained / "base"), reward_adapter=trained / "reward")
    for role in (Role.REWARD, Role.CRITIC):  # the critic starts as its copy
        model.save_adapter(role, tmp_path / role.value)
        assert files(tmp_path / role.value) == {"adapter_config.json", "adapter_model.safetensors"}
        assert torch.equal(plain_scores(tmp_path / role.value, *right_padded), expected)
    again = SharedBaseModel.from_pretrained(str(trained / "base"), reward_adapter=tmp_path / "reward")
    assert torch.equal(again.score(*right_padded), expected)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_policy_loads_in_plain_peft_with_equal_weights_and_logits(trained, right_padded, tmp_path, task_type):
    ids, mask = right_padded
    config = LoraConfig(r=4, target_modules="all-linear", task_type=task_type)
    model = SharedBaseModel.from_pretrained(str(trained / "base"), peft_config=config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(std=0.1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        bare = AutoModelForCausalLM.from_pretrained(trained / "base")(input_ids=ids, attention_mask=mask).logits
    model.save_adapter(Role.POLICY, tmp_path / "policy")
    assert files(tmp_path / "policy") == {"adapter_config.json", "adapter_model.safetensors"}
    written = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(trained / "base")
    assert written["modules_to_save"] is None
    assert written["inference_mode"]
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    with torch.no_grad():
        actual = plain(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(actual, bare, atol=1e-2)
    own = dict(model.named_parameters())
    loaded = {name: p for name, p in plain.named_parameters() if "lora_" in name}
    assert loaded
    assert all(torch.equal(own[name], p) for name, p in loaded.items())
