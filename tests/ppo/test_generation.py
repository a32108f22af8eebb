"""The rollout by each path of generation: the same run, the model as it was, and no completion that is not one."""

import pytest
import torch
from transformers import LlamaForCausalLM
from trl import RLOOTrainer

from tests.ppo import tiny
from trl_ext import PPOMaxConfig, Role

ENGINE = {"num_blocks": 24, "page_size": 8, "max_batch_tokens": 64}
CONTINUOUS = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": ENGINE}
GREEDY = {"generation_kwargs": {"do_sample": False}}
PATHS = pytest.mark.parametrize(
    "path",
    [CONTINUOUS, {"per_device_generate_batch_size": 3}, {"per_device_generate_batch_size": 1}],
    ids=["continuous batching", "three at a time", "one at a time"],
)


def weights_and_buffers(trainer):
    """A copy of each."""
    tensors = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@PATHS
def test_with_greedy_decoding_every_path_makes_the_same_run(world, tmp_path, path):
    options = {"max_steps": 3, "steps_per_generation": 2, "per_device_train_batch_size": 2, "num_iterations": 2}
    runs = []
    for chosen in ({}, path):
        trainer = tiny.trainer(world, tmp_path, **options, **GREEDY, **chosen)
        trainer.train()
        runs.append((tiny.comparable(trainer.state.log_history), tiny.role_weights(trainer.model, Role.POLICY)))
    (expected, weights), (found, found_weights) = runs
    assert len(expected) == len(found)
    for entry, other in zip(expected, found, strict=True):
        assert other == pytest.approx(entry, rel=1e-4, abs=1e-5)
    assert all(torch.allclose(weights[name], found_weights[name], atol=1e-6) for name in weights)


@pytest.mark.parametrize("dataset", [tiny.prompts, tiny.chats], ids=["plain", "conversational"])
def test_a_run_with_continuous_batching_samples_from_the_policy(world, tmp_path, dataset):
    """A sample's log-probability under the engine is tested with the roles; here a whole run is."""
    trainer = tiny.trainer(world, tmp_path, dataset=dataset(), gradient_checkpointing=True, **CONTINUOUS)
    before = {role: tiny.role_weights(trainer.model, role) for role in Role}
    trainer.train()
    first, second = tiny.rollout_entries(trainer)
    assert first["kl"] == 0.0
    assert first["ratio_mean"] == pytest.approx(1.0)
    assert second["kl"] != 0.0
    assert first["tokens_per_second/generate"] > 0
    changed = {role for role in Role if not tiny.same(before[role], tiny.role_weights(trainer.model, role))}
    assert changed == {Role.POLICY, Role.CRITIC}
    base = trainer.model.get_base_model()
    assert base.config._attn_implementation == "sdpa"
    assert base.is_gradient_checkpointing


def test_the_engine_chooses_its_sizes_by_the_rollout(world, tmp_path):
    """Left to itself it would take half of the memory for a model of a few thousand weights."""
    trainer = tiny.trainer(world, tmp_path, max_steps=1, use_transformers_continuous_batching=True)
    trainer.train()
    assert tiny.rollout_entries(trainer)[0]["peak_memory_gib"] < 2


def test_evaluation_stays_evaluation(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, eval_dataset=tiny.prompts(8), **CONTINUOUS)
    moments = trainer.ppo_state.moments.state_dict()
    metrics = trainer.evaluate()
    assert not trainer.model.training
    assert {"eval_reward", "eval_kl", "eval_completions/mean_length"} <= set(metrics)
    assert "reward" not in metrics
    assert trainer.ppo_state.rollouts == 0
    assert trainer.ppo_state.moments.state_dict() == moments
    # TRL's own leaves the model in training mode
    trainer.model.eval()
    RLOOTrainer._generate(trainer, list(tiny.prompts(2)["prompt"]))
    assert trainer.model.training


def test_an_empty_completion_of_the_engine_is_counted_where_trl_raises(world, tmp_path, monkeypatch):
    trainer = tiny.trainer(world, tmp_path, max_steps=1, **CONTINUOUS)
    original = LlamaForCausalLM.generate_batch

    def generate_batch(self, *args, **kwargs):
        results = original(self, *args, **kwargs)
        list(results.values())[1].generated_tokens = []
        return results

    monkeypatch.setattr(LlamaForCausalLM, "generate_batch", generate_batch)
    prompts = list(tiny.prompts(3)["prompt"])
    with pytest.raises(IndexError):
        trainer._generate(prompts)
    _, completion_ids, completions = trainer.complete(prompts)
    assert [ids == [] for ids in completion_ids] == [False, True, False]
    assert completions[1] == ""
    assert "generate_batch" not in vars(trainer.model)
    trainer.train()
    assert tiny.rollout_entries(trainer)[0]["completions/empty"] == 1


def test_nothing_is_cast_to_the_precision_of_training(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, bf16=True, max_steps=1, **CONTINUOUS)
    before = weights_and_buffers(trainer)
    trainer.complete(list(tiny.prompts(4)["prompt"]))
    after = weights_and_buffers(trainer)
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert trainer.args.bf16
    trainer.train()
    assert {tensor.dtype for tensor in weights_and_buffers(trainer).values()} == {torch.float32}
    # TRL's own casts adapters, heads and rotary frequencies, for good
    RLOOTrainer._generate(trainer, list(tiny.prompts(2)["prompt"]))
    assert {tensor.dtype for tensor in weights_and_buffers(trainer).values()} == {torch.bfloat16}


def test_precision_and_mode_come_back_after_an_error(world, tmp_path, monkeypatch):
    trainer = tiny.trainer(world, tmp_path, bf16=True, **CONTINUOUS)
    trainer.model.eval()

    def forward(*args, **kwargs):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(trainer.model.get_base_model(), "forward", forward)
    with pytest.raises(RuntimeError, match="lost 4 of 4 completions"):
        trainer.complete(list(tiny.prompts(4)["prompt"]))
    assert (trainer.args.bf16, trainer.args.fp16, trainer.model.training) == (True, False, False)
    assert trainer.model.rows_at_a_time is None


def test_no_call_of_generate_is_larger_than_asked(world, tmp_path, monkeypatch):
    trainer = tiny.trainer(world, tmp_path, max_steps=1, per_device_generate_batch_size=3, eval_dataset=tiny.prompts(4))
    sizes, original = [], LlamaForCausalLM.generate

    def generate(self, *args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    trainer.train()
    trainer.evaluate()
    assert sizes == [3, 1, 3, 1]


def test_a_base_that_continuous_batching_cannot_serve_is_refused_at_the_start(world, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has an attention of its own"):
        tiny.trainer(world, tmp_path, **CONTINUOUS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 does not go with .*: set it to 1"),
        ({"cache_implementation": "static"}, "cache_implementation='static' does not go with"),
        (
            {"generation_kwargs": {"min_length": 3, "do_sample": False}},
            r"generation_kwargs=\['min_length'\].*no others than do_sample",
        ),
        ({"per_device_generate_batch_size": 4}, "per_device_generate_batch_size=4 .*'max_requests_per_batch'"),
        ({"transformers_continuous_batching_config": {"seed": 1}}, r"config\['seed'\]=1 .*same random numbers"),
    ],
)
def test_what_continuous_batching_would_leave_out_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, use_transformers_continuous_batching=True, **options)
    if "seed" not in str(options):
        assert isinstance(tiny.config(tmp_path, **options), PPOMaxConfig)


def test_what_continuous_batching_applies_is_accepted(tmp_path):
    options = {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7, "max_completion_length": 3}
    tiny.config(tmp_path, generation_kwargs={"do_sample": False}, **options, **CONTINUOUS)


@pytest.mark.parametrize("rows", [0, -1, 1.5])
def test_a_generate_batch_is_a_whole_number(tmp_path, rows):
    with pytest.raises(ValueError, match=f"per_device_generate_batch_size={rows} must be a whole number"):
        tiny.config(tmp_path, per_device_generate_batch_size=rows)
