"""PPOMaxConfig: the defaults of PPO-Max, and errors that name the field, its value and what to do."""

import dataclasses

import pytest
import trl
import yaml

from trl_ext import PPOMaxConfig
from trl_ext.ops.kl import AdaptiveKL

# DESIGN section 4, the column "default"
DEFAULTS = {
    "reward_normalization": "norm",
    "reward_clip": 0.8,
    "missing_eos_penalty": None,
    "beta": 0.05,
    "kl_estimator": "k1",
    "kl_control": "pi",
    "kl_target": 6.0,
    "update_kl_target": 6.0 / 64,
    "diversity_target": 0.85,
    "policy_objective": "clip",
    "learning_rate": 1e-4,
    "critic_baseline": "explained",
    "critic_warmup_steps": None,
    "critic_warmup_explained_variance": 0.2,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "normalize_advantages": True,
    "advantage_clip": None,
    "epsilon": 0.2,
    "epsilon_high": None,
    "value_clip": 0.2,
    "vf_coef": 1.0,
    "max_grad_norm": 1.0,
    "ptx_coef": 0.0,
    "entropy_coef": 0.0,
    "num_generations": 1,
    "reward_role_weight": 1.0,
    "bf16": False,  # on a CPU
    "disable_dropout": True,
}


def make(tmp_path, **options):
    return PPOMaxConfig(**{"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True} | options)


def test_the_defaults_are_those_of_ppo_max(tmp_path):
    config = make(tmp_path)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.num_iterations > 1


def test_the_critic_warms_up_for_five_rollouts_and_at_most_a_tenth_of_the_run(tmp_path):
    # 3 optimizer steps a pass, 2 passes: 6 steps an update
    config = make(tmp_path, gradient_accumulation_steps=4, steps_per_generation=12)
    assert config.steps_per_update == 6
    # whole rollouts: a tenth of 59 steps is none, of 60 one, of 300 five
    assert [config.warmup_of_critic(steps) for steps in (1, 59, 60, 299, 300, 10_000)] == [0, 0, 6, 24, 30, 30]
    assert make(tmp_path, critic_warmup_steps=7).warmup_of_critic(10) == 7


def test_an_update_may_cover_a_sixty_fourth_of_the_target_of_the_run(tmp_path):
    assert make(tmp_path, kl_target=16.0).update_kl_target == 0.25
    assert make(tmp_path, update_kl_target=0.0).update_kl_target == 0.0


def test_deepspeed_steps_by_itself_and_the_size_of_updates_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(trl.RLOOConfig, "__post_init__", lambda self: None)  # which wants deepspeed itself
    monkeypatch.setattr(PPOMaxConfig, "process_index", 0)
    options = {"generation_batch_size": 8, "steps_per_generation": 1}
    with pytest.warns(UserWarning, match=r"Under DeepSpeed .*update_kl_target=0") as warned:
        assert make(tmp_path, **options).update_kl_target == 0.0
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"update_kl_target=0.1 does not go with DeepSpeed.*FSDP2"):
        make(tmp_path, **options, update_kl_target=0.1)
    assert make(tmp_path, **options, update_kl_target=0.0).update_kl_target == 0.0


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("per_device_score_batch_size", 1.5, "whole number of at least 1"),
        ("per_device_score_batch_size", 0, "whole number of at least 1"),
        ("reward_clip", -0.8, "above 0; null .None. switches it off"),
        ("reward_clip", 0, "above 0; null .None. switches it off"),
        ("value_clip", 0.0, "above 0; null .None. switches it off"),
        ("advantage_clip", float("nan"), "above 0"),
        ("kl_target", 0.0, "above 0"),
        ("kl_horizon", -1.0, "above 0"),
        ("temperature", 0.0, "above 0"),
        ("max_completion_length", 0, "whole number of at least 1"),
        ("max_completion_length", None, "whole number of at least 1"),
        ("beta", -0.1, "at least 0"),
        ("beta", "high", "at least 0"),
        ("vf_coef", -1.0, "at least 0"),
        ("entropy_coef", float("inf"), "at least 0"),
        ("ptx_coef", -1.0, "at least 0"),
        ("missing_eos_penalty", -1.0, "at least 0"),
        ("critic_learning_rate", -1e-5, "at least 0"),
        ("critic_warmup_steps", -1, "at least 0"),
        ("epsilon", -0.2, "between 0 and 1"),
        ("epsilon", 1.2, "between 0 and 1"),
        ("beta", True, "a number of at least 0"),
        ("ptx_max_length", 1, "whole number of at least 2"),
        ("reward_role_weight", float("nan"), "a finite number"),
        ("gamma", 1.1, "between 0 and 1"),
        ("gae_lambda", -0.1, "between 0 and 1"),
        ("value_lambda", 1.5, "between 0 and 1"),
        ("reward_normalization", "whiten", "one of norm, scale, none"),
        ("kl_control", "linear", "one of pi, fixed, adaptive, penalty"),
        ("kl_estimator", "k4", "one of k1, k2, k3"),
        ("policy_objective", "trpo", "one of clip, kl_penalty"),
        ("critic_baseline", "never", "one of explained, always"),
        ("update_kl_target", -0.1, "at least 0"),
        ("kl_penalty_coef", 0.0, "above 0"),
        ("critic_warmup_explained_variance", 1.5, "at most 1"),
        ("reward_clip_range", (-1.0, 1.0), "use reward_clip"),
        ("mask_truncated_completions", True, "use missing_eos_penalty"),
        ("sync_ref_model", True, "the reference is the frozen starting policy"),
        ("use_vllm", True, "merging its adapter into the base that all roles share.*set vllm_server_url"),
        ("vllm_server_host", "h", "is one of use_vllm.*see vllm_server_url"),
        ("vllm_server_url", "localhost:8000", "must be the address of a server alone: http://localhost:8000"),
        ("vllm_server_url", "http://h:1/v1", "must be the address of a server alone"),
        ("vllm_server_url", "http://[", "must be the address of a server alone"),
        ("vllm_adapter_dir", "x", "does nothing without vllm_server_url"),
        ("vllm_importance_sampling_correction", False, "does nothing without vllm_server_url"),
        ("router_aux_loss_coef", 0.1, "not supported"),
        ("use_liger_kernel", True, "replaces the forward passes"),
        ("restore_callback_states_from_checkpoint", True, "restored without it"),
    ],
)
def test_an_error_names_the_field_the_value_and_the_remedy(tmp_path, name, value, remedy):
    with pytest.raises(ValueError) as error:
        make(tmp_path, **{name: value})
    assert f"{name}={value!r}" in str(error.value)
    error.match(remedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, r"'use_reentrant': True.* set it to False"),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            r"steps_per_generation=3 must be a multiple of ",
        ),
        ({"per_device_train_batch_size": 3, "num_generations": 2}, r"\(3\) must be divisible by num_generations \(2\)"),
        (
            {"per_device_train_batch_size": 4, "generation_batch_size": 6},
            r"generation_batch_size \(6\) must be divisible",
        ),
        ({"num_generations": 0}, "num_generations=0"),
        ({"update_kl_target": 3.0, "kl_target": 2.0}, r"update_kl_target=3 is above kl_target=2: .*Lower it"),
        (
            {"policy_objective": "kl_penalty", "update_kl_target": 0.0},
            "policy_objective='kl_penalty'.*update_kl_target is 0: set a target, or policy_objective='clip'",
        ),
        (
            {"kl_horizon": 640.0},
            "kl_horizon=640 is that of kl_control='adaptive', and kl_control is 'pi': leave it out",
        ),
        (
            {"diversity_target": 0.8, "kl_control": "fixed"},
            "diversity_target=0.8 moves beta, and beta=0.05 with kl_control='fixed' stays: leave it out",
        ),
        ({"diversity_target": 0.8, "beta": 0.0}, "diversity_target=0.8 moves beta, and beta=0 "),
        ({"kl_penalty_coef": 2.0}, "kl_penalty_coef=2 does nothing with policy_objective='clip'"),
        ({"policy_objective": "kl_penalty", "epsilon": 0.1}, "epsilon=0.1 does nothing with policy_objective"),
        ({"policy_objective": "kl_penalty", "epsilon_high": 0.3}, "epsilon_high=0.3 does nothing with policy_obj"),
        ({"critic_warmup_steps": 5, "max_steps": 5}, r"critic_warmup_steps=5 takes all of the 5 optimizer steps"),
        (
            {"critic_warmup_steps": 5, "warmup_steps": 5, "max_steps": 10},
            r"warms the learning rate up for 5 optimizer steps, and the policy has 5 after critic_warmup_steps=5",
        ),
        (
            {"per_device_train_batch_size": 8, "steps_per_generation": 4, "kl_horizon": 6.4, "kl_control": "adaptive"},
            r"kl_horizon=6.4 is too short for rollout batches of 32 samples: .*must be above 6.4",
        ),
        (
            {"vllm_server_url": "http://h:1", "generation_kwargs": {"do_sample": False}},
            "generation_kwargs={'do_sample': False} does not go with vllm_server_url",
        ),
        (
            {"vllm_server_url": "http://h:1", "per_device_generate_batch_size": 2},
            "per_device_generate_batch_size=2 does not go with vllm_server_url: the server batches by itself",
        ),
        (
            {"vllm_server_url": "http://h:1", "use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True does not go with vllm_server_url",
        ),
        ({"generation_kwargs": {"temperature": 0.5}}, r"'temperature': 0.5.*use the field temperature"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, r"use the field max_completion_length"),
        ({"generation_kwargs": {"tempurature": 0.5}}, r"'tempurature': 0.5.*has no such option"),
        ({"generation_kwargs": {"eos_token_id": 5}}, r"'eos_token_id': 5.*the tokenizer's eos_token"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_the_shortest_horizon_that_is_no_error_is_none_in_a_run(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "steps_per_generation": 4, "kl_control": "adaptive"}
    config = make(tmp_path, **sizes, kl_horizon=6.5)
    controller = AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
    assert controller.update(0.0, config.generation_batch_size) > 0
    make(tmp_path, **sizes, kl_horizon=6.4, beta=0.0)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"generation_kwargs": {"do_sample": False}}, "do_sample"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2, "use_cache": True}, "top_k": 5}, "top_k, no_repeat"),
        ({"generation_kwargs": {"use_cache": True}}, None),
        ({}, None),
    ],
)
def test_what_changes_the_distribution_is_warned_about(tmp_path, recwarn, options, warned):
    make(tmp_path, **options).warn_about_off_policy_sampling()
    messages = [str(w.message) for w in recwarn if "off-policy" in str(w.message)]
    assert len(messages) == (warned is not None)
    assert all(warned in message for message in messages)


@pytest.mark.parametrize("num_generations", [1, 2, 4])
def test_one_completion_per_prompt_is_enough_and_more_are_fine(tmp_path, num_generations):
    config = make(tmp_path, per_device_train_batch_size=4, num_generations=num_generations)
    assert config.num_generations == num_generations


def test_each_trick_can_be_switched_off(tmp_path):
    off = {"reward_clip": None, "value_clip": None, "advantage_clip": None, "critic_warmup_steps": 0, "beta": 0.0}
    config = make(tmp_path, **off, reward_normalization="none", kl_control="fixed", normalize_advantages=False)
    assert {name: getattr(config, name) for name in off} == off


def test_the_horizon_is_20_rollout_batches_in_samples(tmp_path):
    sizes = {"per_device_train_batch_size": 4, "steps_per_generation": 8, "kl_control": "adaptive"}
    assert make(tmp_path, **sizes).kl_horizon == 20 * 4 * 8
    assert make(tmp_path, **sizes, kl_horizon=10_000.0).kl_horizon == 10_000.0


def test_the_critic_learns_three_times_as_fast(tmp_path):
    assert make(tmp_path, learning_rate=2e-5).critic_learning_rate == pytest.approx(6e-5)
    assert make(tmp_path, learning_rate=2e-5, critic_learning_rate=1e-6).critic_learning_rate == 1e-6
    assert make(tmp_path, critic_learning_rate=0.0).critic_learning_rate == 0.0


def test_every_field_of_ours_has_a_help_text():
    inherited = {field.name for field in dataclasses.fields(trl.RLOOConfig)}
    own = [field for field in dataclasses.fields(PPOMaxConfig) if field.name not in inherited]
    assert len(own) > 15
    assert [field.name for field in own if not field.metadata.get("help")] == []


def test_a_config_survives_a_copy(tmp_path):
    config = make(tmp_path, per_device_train_batch_size=4)
    assert dataclasses.replace(config, generation_batch_size=None).kl_horizon == config.kl_horizon
    assert config.to_dict()["kl_target"] == 6.0


def test_the_command_line_and_yaml_know_every_field(tmp_path):
    path = tmp_path / "config.yaml"
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "reward_clip": None, "beta": 0.1}
    path.write_text(yaml.safe_dump(options))
    parser = trl.TrlParser(PPOMaxConfig)
    (config,) = parser.parse_args_and_config(["--config", str(path), "--kl_control", "penalty", "--kl_target", "3"])
    assert (config.reward_clip, config.beta, config.kl_control, config.kl_target) == (None, 0.1, "penalty", 3.0)
    assert config.value_clip == 0.2


def test_help_renders(capsys):
    with pytest.raises(SystemExit) as ended:
        trl.TrlParser(PPOMaxConfig).parse_args_and_config(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--kl_horizon", "--critic_warmup_explained_variance", "--reward_clip", "--ptx_coef"):
        assert name in printed
