"""Flags are whole, known and honoured, or refused by name."""

from pathlib import Path

import pytest

from trl_ext.scripts import (
    evaluate_reward,
    pipeline,
    plan_memory,
    ppo_max,
    preference_strength,
    reward_model,
    rrhf,
    sample_responses,
)
from trl_ext.scripts.models import fresh_adapter, load_policy

OUT = "--output_dir=x"
MODEL = ["--model_name_or_path=m", "--dataset_name=d"]
POLICY = [*MODEL, OUT, "--reward_funcs=f"]
SAMPLES = [*MODEL, "--output=x.jsonl", "--reward_funcs=f"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        # Abbreviated and unknown
        (ppo_max, ["--learning_rat=1"], "--learning_rat=1: no such option; did you mean --learning_rate"),
        (rrhf, ["--online_every_step", "2"], "--online_every_step: no such option; did you mean --online_every_steps"),
        (plan_memory, [*MODEL[:1], "--max_completion=5"], "did you mean --max_completion_length"),
        (ppo_max, ["stray"], "stray: no flag takes this"),
        (ppo_max, ["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        # LoRA beside an adapter that brings its own
        (ppo_max, [*POLICY, "--policy_adapter=a", "--lora_r=8"], "--lora_r: the policy starts at --policy_adapter a"),
        (rrhf, [*POLICY, "--policy_adapter=a", "--lora-alpha=8"], "--lora-alpha: the policy starts at"),
        (sample_responses, [*SAMPLES, "--lora_r=8"], "--lora_r: nothing is trained here"),
        (sample_responses, [*SAMPLES, "--use_peft"], "--use_peft: nothing is trained here"),
        (ppo_max, [*POLICY, "--lora_task_type=SEQ_CLS"], "--lora_task_type: adapters made here"),
        (evaluate_reward, ["--reward_adapter=a", "--dataset_name=d", "--lora_r=8"], "--lora_r: nothing is trained"),
        # 4 bits
        (ppo_max, [*POLICY, "--use_bnb_nested_quant"], "--use_bnb_nested_quant: only a base in 4 bits"),
        (reward_model, [*MODEL, OUT, "--bnb_4bit_quant_type=fp4"], "--bnb_4bit_quant_type: only a base in 4 bits"),
        # The embedded world and one's own model
        (ppo_max, ["--load_in_4bit"], "--load_in_4bit: without --model_name_or_path"),
        (ppo_max, ["--dataset_name=d", "--lora_r=4"], "--dataset_name, --lora_r: without --model_name_or_path"),
        (rrhf, ["--reward_funcs=f"], "--reward_funcs: without --model_name_or_path"),
        (reward_model, ["--dataset_test_split=test"], "--dataset_test_split: without --model_name_or_path"),
        (preference_strength, ["--deduplicate=false"], "--deduplicate: without --model_name_or_path"),
        (ppo_max, [*POLICY, "--world_scale=2"], "--world_scale: of the embedded world"),
        (rrhf, [*POLICY, "--world_seed=2"], "--world_seed: of the embedded world"),
        (pipeline, [*MODEL, OUT, "--world_seed=2"], "--world_seed=2: no such option"),
        # Rewards
        (ppo_max, [*POLICY, "--reward_role_weight=2"], "--reward_role_weight: there is no reward role"),
        (rrhf, [*POLICY, "--reward_role_weight=2"], "--reward_role_weight: there is no reward role"),
        (sample_responses, [*SAMPLES, "--ensemble=min"], "--ensemble: there is no reward role"),
        (ppo_max, [*MODEL, OUT, "--reward_adapter=a", "--reward_weights=2"], "--reward_weights: there are no reward"),
        (pipeline, [*MODEL, OUT, "--reward_weights=2"], "--reward_weights: the first reward adapter scores"),
        # Options of what does not happen
        (ppo_max, [*POLICY, "--gpu=24GB"], "--gpu: only --auto_batch"),
        (ppo_max, [*POLICY, "--ptx_dataset_name=t"], "--ptx_dataset_name: texts are used with --ptx_coef"),
        (ppo_max, [*POLICY, "--ptx_coef=0.1"], "needs texts"),
        (pipeline, [*MODEL, OUT, "--ptx_coef=0.1"], "has no texts"),
        (pipeline, [*MODEL, OUT, "--vllm_one_copy"], "--vllm_one_copy: only trl-ext ppo-max has it"),
        (ppo_max, ["--vllm_one_copy"], "--vllm_one_copy: the embedded world has no place for it"),
        (ppo_max, [*POLICY, "--auto_batch", "--vllm_one_copy"], "--auto_batch does not know"),
        (rrhf, [*POLICY, "--num_online_responses=3"], "--num_online_responses: for responses that are sampled online"),
        (rrhf, [*POLICY, "--online_every_pass", "--sampling_seed=3"], "--sampling_seed: responses are sampled online"),
        (preference_strength, ["--share=0.1", "--threshold=1"], "--threshold: --share 0.1 says"),
        (preference_strength, ["--normalize_rewards"], "--normalize_rewards: strengths are of raw scores"),
        # Counts
        (rrhf, [*POLICY, "--max_prompts=0"], "--max_prompts 0"),
        (pipeline, [*MODEL, OUT, "--judged_prompts=0"], "--judged_prompts 0"),
        (evaluate_reward, ["--reward_adapter=a", "--dataset_name=d", "--batch_size=0"], "--batch_size 0"),
    ],
)
def test_a_flag_that_cannot_be_honoured_is_refused_by_name(recipe, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe.parse(arguments)
    assert message in str(error.value)


def test_a_value_of_the_wrong_kind_names_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ppo_max.parse([*POLICY, "--learning_rate=fast"])
    assert "--learning_rate" in capsys.readouterr().err


def test_a_key_of_a_config_file_that_there_is_not_is_named_with_its_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: x\nkl_targt: 5\n")
    with pytest.raises(ValueError, match=r"kl_targt in .*run\.yaml: no such option; did you mean --kl_target"):
        ppo_max.parse([*POLICY, f"--config={config}"])
    with pytest.raises(ValueError, match="kl_targt"):
        plan_memory.parse([*MODEL[:1], f"--config={config}"])
    config.write_text("- a list\n")
    with pytest.raises(ValueError, match="must hold lines"):
        ppo_max.parse([*POLICY, "--config", str(config)])


def test_what_a_config_file_sets_counts_as_given_and_flags_come_first(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: x\nlora_r: 4\nlora_alpha: 8\n")
    _, _, model_args, given = ppo_max.parse([*POLICY, f"--config={config}", "--lora_alpha=9"])
    assert (model_args.lora_r, model_args.lora_alpha) == (4, 9)
    assert given["lora_r"] == f"lora_r in {config}"
    assert given["lora_alpha"] == "--lora_alpha"
    with pytest.raises(ValueError, match=r"lora_r in .*run\.yaml"):
        ppo_max.parse([*POLICY, f"--config={config}", "--policy_adapter=a"])


def test_a_plan_passes_over_what_only_a_run_needs(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: x\nlearning_rate: 1.0e-4\neval_prompts: 4\nmax_completion_length: 7\n")
    plan, _, _ = plan_memory.parse([*MODEL[:1], f"--config={config}"])
    assert plan.max_completion_length == 7


def test_a_flag_of_lora_makes_a_fresh_adapter_of_that_rank() -> None:
    for recipe in (ppo_max, rrhf):
        *_, model_args, given = recipe.parse([*POLICY, "--lora_r=3"])
        config = fresh_adapter(given, model_args)
        assert (config.r, config.target_modules, config.task_type) == (3, "all-linear", "CAUSAL_LM")
        *_, model_args, given = recipe.parse(POLICY)
        assert fresh_adapter(given, model_args) is None


def test_every_flag_about_the_base_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl_ext.scripts.models as models

    seen = {}
    monkeypatch.setattr(models.SharedBaseModel, "from_pretrained", lambda name, **options: seen.update(options))
    flags = ["--model_revision=r", "--attn_implementation=eager", "--dtype=float16", "--trust_remote_code", "--use_cpu"]
    flags += ["--load_in_4bit", "--bnb_4bit_quant_type=fp4", "--use_bnb_nested_quant"]
    recipe, training, model_args, given = ppo_max.parse([*POLICY, *flags])
    training.model_init_kwargs = {"low_cpu_mem_usage": True}
    load_policy(given, recipe, model_args, training)
    assert {k: seen[k] for k in ("revision", "attn_implementation", "dtype", "trust_remote_code")} == {
        "revision": "r", "attn_implementation": "eager", "dtype": "float16", "trust_remote_code": True,
    }  # fmt: skip
    assert seen["low_cpu_mem_usage"] is True
    quantization = seen["quantization_config"]
    assert (quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant) == ("fp4", True)
