"""The Python on README and the pages is run, with models of a few thousand weights in place of those that it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.ppo import tiny
from tests.reward.runs import pairs
from tests.snippets import blocks
from trl_ext import PPOMaxConfig, PPOMaxTrainer, SharedBaseModel

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"max_steps": 1, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "write_report": False}
SMALL |= {"save_strategy": "no", "disable_tqdm": True}
PPO = SMALL | {"per_device_train_batch_size": 2, "max_completion_length": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.build(tmp_path_factory.mktemp("snippets"))
    tiny.tiny_tokenizer().save_pretrained(folder / "policy")
    return folder


@pytest.fixture
def names(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a page names -> what stands in for it; the folder is an empty one, and nothing is uploaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SharedBaseModel, "push_adapter_to_hub", lambda *_, **__: None)
    pairs().to_json(tmp_path / "pairs.jsonl")
    return {
        "Qwen/Qwen2.5-0.5B-Instruct": str(world / "base"),
        "meta-llama/Llama-3.1-8B": str(world / "base"),
        '"base"': f'"{world / "base"}"',
        '"sft"': f'"{world / "policy"}"',
        '"rm"': f'"{world / "reward"}"',
        '["rm_1", "rm_2", "rm_3"]': f'["{world / "reward"}"] * 2',
        "me/llama-sft": str(world / "policy"),
        "me/llama-rm": str(world / "reward"),
        "out/policy": str(world / "policy"),
        '"Anthropic/hh-rlhf", split="train"': f'"{tmp_path / "pairs.jsonl"}"',
        'PPOMaxConfig(output_dir="out"': 'PPOMaxConfig(output_dir="out", **PPO',
        'RRHFConfig("out"': 'RRHFConfig("out", **SMALL',
        'RewardModelConfig("out/rm"': 'RewardModelConfig("out/rm", **SMALL',
    }


def pieces(page: str) -> list[str]:
    return [block.text for block in blocks((ROOT / page).read_text()) if block.kind == "python"]


def run(code: str, names: dict[str, str], **given: Any) -> dict[str, Any]:
    """Run a piece; returns its names."""
    for name, stand_in in names.items():
        code = code.replace(name, stand_in)
    scope = {"PPO": PPO, "SMALL": SMALL, **given}
    exec(compile(code, "snippet", "exec"), scope)
    return scope


def test_from_grpo_to_ppo(names, tmp_path: Path) -> None:
    run(pieces("README.md")[0], names)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_full_four(names) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = run(pieces("README.md")[1].replace("bfloat16", "float32"), names, prompts=tiny.prompts())["trainer"]
    assert trainer.state.global_step == 1
    assert trainer.model.is_loaded_in_4bit


def test_a_reward_function_with_a_column() -> None:
    code = pieces("docs/data.md")[0]
    assert run(code, {})["correct"](["so 4", "no"], answer=["4", "5"]) == [1.0, 0.0]


@pytest.mark.slow
def test_a_reward_model_and_an_ensemble(names, tmp_path: Path) -> None:
    ids = torch.tensor([[6, 7, 1]])
    train, ensemble = pieces("docs/reward.md")
    run(train, names)
    assert (tmp_path / "out" / "rm" / "adapter_model.safetensors").is_file()
    run(ensemble, names, SharedBaseModel=SharedBaseModel, input_ids=ids, attention_mask=torch.ones_like(ids))


def test_roles(names, tmp_path: Path) -> None:
    ids = torch.tensor([[6, 7, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    del names["out/policy"]  # here a policy is saved to it
    run(pieces("docs/roles.md")[0], names, inputs=batch | {"max_new_tokens": 2}, **batch)
    assert (tmp_path / "out" / "policy" / "adapter_config.json").is_file()


def test_rrhf_and_its_policy_as_a_reward(names, tmp_path: Path) -> None:
    train, judge = pieces("docs/rrhf.md")
    run(train, names)
    preferences = Dataset.from_dict({"prompt": ["w1"], "chosen": ["w2"], "rejected": ["w3"]})
    scope = run(judge, names, preferences=preferences)
    assert len(scope["chosen"]) == 1


def test_migrating(names) -> None:
    was_and_is, function = pieces("docs/migrating.md")
    given = {"SharedBaseModel": SharedBaseModel, "PPOMaxTrainer": PPOMaxTrainer, "prompts": tiny.prompts()}
    new = was_and_is.split("# is\n")[1].replace('PPOMaxConfig("out")', 'PPOMaxConfig("out", **PPO)')
    run(new, names, PPOMaxConfig=PPOMaxConfig, **given)
    assert run(function, {}, my_score=lambda p, c: len(c))["reward"](["a"], ["bc"]) == [2]


def test_the_prompts_of_the_tutorial(names, tmp_path: Path) -> None:
    run(pieces("docs/tutorial.md")[0], names)
    assert (tmp_path / "prompts.jsonl").read_text().count('{"prompt":') == len(pairs())


def test_the_policy_of_the_tutorial_is_merged_without_this_package(names, tmp_path: Path) -> None:
    run(re.sub(r', dtype="bfloat16"', "", pieces("docs/tutorial.md")[-1]), names)
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
