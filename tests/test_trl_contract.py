"""What the trainers lean on in TRL. Red here means: TRL has changed, look at trl_ext/ppo before anything else.

Each test names a seam, an attribute or a behaviour that `trl_ext.ppo` uses without TRL promising it; the last ones are
those of `trl_ext.reward`.
"""

import ast
import inspect
import json
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_callback import ExportableState, TrainerControl
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import rloo_trainer
from trl.trainer.utils import RepeatSampler, shuffle_sequence_dict, split_tensor_dict

from trl_ext import PPOMaxConfig, PPOMaxTrainer
from trl_ext.ppo.beside import BesideTheLoop
from trl_ext.ppo.callback import PPOStateCallback
from trl_ext.ppo.completing import CompletesPrompts
from trl_ext.ppo.sets import SeveralSets
from trl_ext.ppo.state import PPOState
from trl_ext.ppo.turns import TakesTurns
from trl_ext.reward.trainer import RewardModelTrainer
from trl_ext.training import RoleTrainer

SEAMS = {
    "_generate_and_score_completions": ["inputs"],
    "_compute_loss": ["model", "inputs"],
}
PUBLIC = {"create_optimizer"}  # overridden too; documented, unlike the seams
# Overridden in `RoleTrainer`
EVERY_TRAINERS = {"_save_checkpoint", "create_model_card", "evaluate", "get_batch_samples", "save_model", "train"}
OF_SETS = {"evaluate", "log"}  # overridden in `SeveralSets`
CALLED = {
    "_generate": ["prompts"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
}


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 16)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


class Remembering(TrainerCallback, ExportableState):
    """A callback with a state."""

    def state(self):
        return {"args": {}, "attributes": {"moments": {"mean": 0.25}, "count": 3}}


class Gradients(TrainerCallback):
    """Keeps the gradient that an optimizer step is made of."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [p.grad.flatten() for p in self.trainer.model.parameters() if p.grad is not None]
        self.trainer.gradients = torch.cat(gradients).tolist()


class Recorder(RLOOTrainer):
    """The least that overrides the two seams; what passes them is kept. RLOO's own loss wants Triton in TRL 1.15."""

    def _generate_and_score_completions(self, inputs):
        prompts = [row["prompt"] for row in inputs]
        generated = self._generate(prompts)
        _, completion_ids, completions = generated
        rewards = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.seen = SimpleNamespace(inputs=inputs, prompts=prompts, generated=generated, rewards=rewards, losses=[])
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
        self._logs["advantages"].extend([0.0] * len(prompts))
        self._metrics["train"]["mine"].extend([1.0, 3.0])
        return {"row": torch.arange(len(prompts)), "matrix": torch.zeros(len(prompts), 3), "number": torch.tensor(7.0)}

    def _compute_loss(self, model, inputs):
        self.seen.losses.append(inputs)
        return sum(p.sum() for p in model.parameters() if p.requires_grad) * (1 + len(self.seen.losses) % 2)


def length(completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def none_for_the_first(completions, **columns):
    return [None] + [1.0] * (len(completions) - 1)


def rloo(folder, cls=RLOOTrainer, adapter=True, **options):
    options = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "temperature": 0.7,
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "reward_weights": [1.0, 0.5],
        "gradient_checkpointing": False,
        **options,
    }
    model = tiny_model()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return cls(
        model=model,
        reward_funcs=[length, none_for_the_first],
        args=RLOOConfig(output_dir=str(folder), **options),
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3", "w4", "w5 w6 w7", "w8"], "column": [1, 2, 3, 4]}),
        processing_class=tokenizer(),
        callbacks=[Remembering()],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """RLOO after one optimizer step of two micro-batches, and a checkpoint."""
    trainer = rloo(
        tmp_path_factory.mktemp("rloo"),
        Recorder,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        log_completions=True,
        max_grad_norm=0.0,
        logging_steps=1,
    )
    trainer.add_callback(Gradients(trainer))
    trainer.train()
    return trainer


# ------------------------------------------------------------------ signatures


@pytest.mark.parametrize(("name", "parameters"), (SEAMS | CALLED).items())
def test_the_seams_have_the_signatures_that_we_override_and_call(name, parameters):
    assert list(inspect.signature(getattr(RLOOTrainer, name)).parameters) == ["self", *parameters]


@pytest.mark.parametrize("name", [*SEAMS, *sorted(PUBLIC | EVERY_TRAINERS | OF_SETS)])
def test_ours_have_the_same_signatures(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (PPOMaxTrainer, RLOOTrainer))
    assert list(ours) == list(theirs)


def test_only_the_constructor_and_the_two_seams_are_overridden():
    """TRL removed its own subclasses of these trainers because they overrode more, and "drift was silent"."""
    inherited = {name for base in RLOOTrainer.__mro__ for name, value in vars(base).items() if callable(value)}
    own = {name for name, value in vars(PPOMaxTrainer).items() if callable(value) or isinstance(value, property)}
    assert own & inherited == {"__init__", *SEAMS, *PUBLIC}
    assert PPOMaxTrainer.__bases__ == (
        RoleTrainer,
        SeveralSets,
        BesideTheLoop,
        TakesTurns,
        CompletesPrompts,
        RLOOTrainer,
    )
    for part in (BesideTheLoop, TakesTurns, CompletesPrompts):
        assert not {name for name, value in vars(part).items() if callable(value)} & inherited
    assert {name for name, value in vars(SeveralSets).items() if callable(value)} & inherited == OF_SETS
    above = {name for name, value in vars(RoleTrainer).items() if callable(value)} & inherited
    assert above == EVERY_TRAINERS
    assert RoleTrainer.__bases__ == (Trainer,)
    assert RLOOTrainer.__mro__[-2] is Trainer


def test_the_constructor_takes_what_ours_passes_on():
    theirs = inspect.signature(RLOOTrainer.__init__).parameters
    ours = inspect.signature(PPOMaxTrainer.__init__).parameters
    assert set(ours) - set(theirs) == {"ptx_dataset", "rollout_func"}
    assert set(theirs) <= set(ours)
    assert list(ours)[: len(theirs)] == list(theirs), "positional arguments must mean the same"


# ------------------------------------------------------------------ configuration


def test_the_last_thing_that_the_configuration_checks_is_the_number_of_generations():
    """PPOMaxConfig catches this one error; whatever came after the check would be skipped without a word."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(RLOOConfig.__post_init__))).body
    last = function.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "self.num_generations < 2"
    assert [type(node) for node in last.body] == [ast.Raise]
    assert "at least 2 generations" in ast.unparse(last)
    with pytest.raises(ValueError, match="at least 2 generations"):
        RLOOConfig(output_dir="out", num_generations=1, bf16=False, use_cpu=True, report_to="none")


def test_one_generation_is_fine_for_ppo_and_everything_before_the_check_was_done():
    config = PPOMaxConfig(output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=3, use_cpu=True)
    assert (config.num_generations, config.steps_per_generation, config.generation_batch_size) == (1, 3, 6)


def test_the_names_that_carry_over_have_the_meaning_that_they_had():
    config = RLOOConfig(output_dir="out", per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none")
    for name in ("beta", "epsilon", "epsilon_high", "num_iterations", "steps_per_generation", "reward_weights",
                 "max_completion_length", "temperature", "generation_batch_size", "disable_dropout", "log_completions",
                 "reward_clip_range", "sync_ref_model", "use_vllm", "router_aux_loss_coef", "num_generations_eval",
                 "shuffle_dataset", "model_init_kwargs", "top_p", "top_k", "min_p", "repetition_penalty"):  # fmt: skip
        assert hasattr(config, name), name
    assert config.beta == 0.05
    assert config.num_iterations == 1


# ------------------------------------------------------------------ generation

ENGINE = {"num_blocks": 8, "page_size": 8, "max_batch_tokens": 32}


def test_continuous_batching_casts_the_model_by_the_arguments_and_leaves_it_in_training_mode(tmp_path):
    """`generation.complete` hides the two arguments and puts the mode back."""
    trainer = rloo(
        tmp_path,
        Recorder,
        bf16=True,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=ENGINE,
    )
    trainer.model.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.args, "bf16", False)
        trainer._generate(["w3 w4", "w5"])
    assert trainer.model.training
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    assert torch.bfloat16 not in {tensor.dtype for tensor in tensors}
    trainer._generate(["w3 w4", "w5"])
    assert {tensor.dtype for tensor in [*trainer.model.parameters(), *trainer.model.buffers()]} == {torch.bfloat16}
    source = inspect.getsource(RLOOTrainer)
    assert source.count("args.bf16") == source.count("args.fp16") == 1


def test_vllm_is_sent_the_base_with_the_adapter_merged_and_all_that_is_no_lora():
    """The reason that `use_vllm` is refused. Once TRL sends adapters instead, look at `PPOMaxConfig` again."""
    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    sync.model.heads = torch.nn.ModuleDict({"critic": torch.nn.Linear(16, 1, bias=False)})
    sync._dist = SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False)
    base = sync.model.get_base_model().model.layers[0].self_attn.q_proj
    before = base.get_base_layer().weight.clone()
    sent = {name: tensor.clone() for name, tensor in sync._iter_named_params()}
    assert "heads.critic.weight" in sent
    assert not any("lora" in name for name in sent)
    merged = before + base.get_delta_weight("default")
    assert torch.allclose(sent["model.layers.0.self_attn.q_proj.weight"], merged, atol=1e-6)


def test_a_vllm_object_of_ones_own_is_asked_for_weights_once_a_step_and_for_completions(tmp_path):
    """What `generation.vllm.VLLMGeneration` stands in for; its log-probabilities are dropped."""
    trainer, asked = rloo(tmp_path), []

    class Own:
        def sync_weights(self):
            asked.append("weights")

        def generate(self, prompts, images, num_generations, profiler):
            asked.append((images, num_generations))
            with profiler:
                return prompts, [[2, 1]] * len(prompts), [[-0.1, -0.2]] * len(prompts), None

    trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step = Own(), True, -1
    for _ in range(2):
        prompt_ids, completion_ids, _ = trainer._generate(["w3 w4", "w5"])
    assert asked == ["weights", (None, 2), (None, 2)]
    assert completion_ids == [[2, 1]] * 2
    assert [len(ids) for ids in prompt_ids] == [2, 1]
    trainer._last_loaded_step = -1
    trainer._generate(["w3 w4"])
    assert asked[-2:] == ["weights", (None, 2)]


# ------------------------------------------------------------------ construction


def test_a_frozen_copy_of_the_policy_is_added_as_ref(tmp_path):
    """`SharedBaseModel.protected` takes it out again: four roles need no fifth adapter."""
    trainer = rloo(tmp_path)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    own = dict(trainer.model.named_parameters())
    copies = {name for name in own if ".ref." in name}
    assert copies
    assert all(torch.equal(own[name], own[name.replace(".ref.", ".default.")]) for name in copies)


def test_without_an_adapter_of_ours_the_model_is_wrapped_by_trl_only_if_asked(tmp_path):
    trainer = rloo(tmp_path, adapter=False, beta=0.0)
    assert not isinstance(trainer.model, PeftModel)


def test_an_optimizer_set_after_the_constructor_is_kept(tmp_path):
    """PPO's groups by role are made after `super().__init__`."""
    trainer = rloo(tmp_path)
    assert trainer.optimizer is None
    trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=0.5)
    mine = trainer.optimizer
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    assert trainer.optimizer is mine


def test_the_attributes_that_we_read(trained):
    assert trained._tokenizer.pad_token_id == 0
    assert trained.eos_token_ids == [1]
    assert trained.temperature == 0.7
    assert (trained.epsilon_low, trained.epsilon_high) == (0.1, 0.3)
    assert trained.beta == 0.05
    assert trained.num_iterations == 1
    assert trained.reward_weights.tolist() == [1.0, 0.5]
    assert trained.reward_func_names == ["length", "none_for_the_first"]
    assert trained.log_completions is True
    assert trained._metrics["train"].default_factory is list
    assert trained._metrics["eval"].default_factory is list
    assert trained._step == 2, "micro-batches, not optimizer steps"
    assert trained.state.global_step == 1
    assert {"prompt", "completion", "rewards", "advantages"} <= trained._logs.keys()
    assert len(trained._logs["prompt"]) == len(trained._logs["advantages"]) == 4


def test_the_loss_is_averaged_over_accumulated_micro_batches_by_trainer(trained):
    """Our denominator, tokens of the rollout batch / micro-batches, is right only then."""
    assert PPOMaxTrainer.loss_is_scaled_for_ga is False
    assert not RLOOTrainer.loss_is_scaled_for_ga, "None before TRL 1.15, which says it by another attribute"
    assert trained.gradients == pytest.approx([1.5] * len(trained.gradients)), "the mean of 2 and 1, not their sum"


# ------------------------------------------------------------------ the loop


def test_generation_returns_three_lists(trained):
    prompt_ids, completion_ids, completions = trained.seen.generated
    assert len(trained.seen.prompts) == len(prompt_ids) == len(completion_ids) == len(completions) == 4
    assert all(isinstance(ids, list) and isinstance(ids[0], int) for ids in prompt_ids)
    assert trained.seen.prompts == [row["prompt"] for row in trained.seen.inputs]
    assert [trained._tokenizer.decode(ids) for ids in prompt_ids] == trained.seen.prompts
    for ids in completion_ids:
        assert isinstance(ids, list)
        assert 1 <= len(ids) <= 4
        assert 1 not in ids[:-1], "a completion ends with its first end-of-sequence token, which is kept"
    assert all(isinstance(text, str) for text in completions)


def test_the_other_columns_of_the_dataset_reach_the_rollout(trained):
    assert {"prompt", "column"} <= trained.seen.inputs[0].keys()


def test_rewards_are_a_column_for_each_function_with_nan_for_none(trained):
    rewards = trained.seen.rewards
    assert rewards.shape == (4, 2)
    assert rewards[:, 0].tolist() == [len(ids) for ids in trained.seen.generated[1]]
    assert rewards[:, 1].isnan().tolist() == [True, False, False, False]


def test_rewards_are_those_of_all_processes(trained, monkeypatch):
    """Each process must take its own rows: here `gather` is that of two processes."""
    monkeypatch.setattr(rloo_trainer, "gather", lambda x: torch.cat([x, x + 1]))
    ids = [[2], [3, 4]]
    rows = [{"prompt": "w2"}, {"prompt": "w3"}]
    rewards = RLOOTrainer._calculate_rewards(trained, rows, ["w2", "w3"], ["w2", "w3 w4"], ids)
    assert rewards.shape == (4, 2)
    assert rewards[:, 0].tolist() == [1.0, 2.0, 2.0, 3.0]


def test_the_rollout_comes_back_in_micro_batches(trained):
    """One call of the first seam; then one call of the second for each micro-batch."""
    assert [batch["row"].shape for batch in trained.seen.losses] == [(2,), (2,)]
    assert [batch["matrix"].shape for batch in trained.seen.losses] == [(2, 3), (2, 3)]
    assert [batch["number"].item() for batch in trained.seen.losses] == [7.0, 7.0]
    assert sorted(row for batch in trained.seen.losses for row in batch["row"].tolist()) == [0, 1, 2, 3]


def test_what_is_added_to_the_metrics_is_logged_as_its_mean(trained):
    assert trained.state.log_history[0]["mine"] == 2.0


def test_a_number_passes_the_shuffle_and_the_split_whole():
    """`num_tokens`, the denominator of the whole rollout batch, is a 0-dim tensor beside the (B, T) ones."""
    batch = {"x": torch.arange(4), "y": torch.arange(4)[:, None] * 10, "n": torch.tensor(7.0), "none": None}
    shuffled = shuffle_sequence_dict(batch)
    assert torch.equal(shuffled["y"][:, 0], shuffled["x"] * 10)
    assert sorted(shuffled["x"].tolist()) == [0, 1, 2, 3]
    parts = split_tensor_dict(shuffled, 2)
    assert [part["x"].tolist() for part in parts] == [shuffled["x"][:2].tolist(), shuffled["x"][2:].tolist()]
    assert [part["n"].item() for part in parts] == [7.0, 7.0]
    assert [part["none"] for part in parts] == [None, None]


def test_the_loop_uses_those_two():
    assert rloo_trainer.shuffle_sequence_dict is shuffle_sequence_dict
    assert rloo_trainer.split_tensor_dict is split_tensor_dict


# ------------------------------------------------------------------ order of the prompts


def test_the_order_of_prompts_hangs_on_the_samplers_generator(trained):
    """A resumed run finds an epoch's order again by seeding it."""
    sampler = trained._get_train_sampler()
    assert isinstance(sampler, RepeatSampler)
    assert isinstance(sampler.generator, torch.Generator)
    orders = []
    for seed in (5, 6, 5):
        sampler.generator.manual_seed(seed)
        orders.append(list(sampler))
    assert orders[0] == orders[2]
    assert len({tuple(order) for order in (list(sampler) for _ in range(8))}) > 1


def test_the_sampler_is_reached_through_the_dataloader(trained):
    """By the path that `PPOStateCallback.on_epoch_begin` goes: the generator is seeded with seed + epoch."""
    loader = trained.get_train_dataloader()
    callback = PPOStateCallback(PPOState.of_run(PPOMaxConfig(output_dir="out", use_cpu=True)))
    firsts = []
    for epoch in (0.0, 1.0, 1.0):
        callback.on_epoch_begin(trained.args, SimpleNamespace(epoch=epoch), None, train_dataloader=loader)
        firsts.append([[row["prompt"] for row in batch] for batch in loader])
    assert firsts[1] == firsts[2]
    for seed in range(20, 40):  # some other seed gives another order: the seed is what decides
        callback.on_epoch_begin(SimpleNamespace(seed=seed), SimpleNamespace(epoch=0.0), None, train_dataloader=loader)
        if [[row["prompt"] for row in batch] for batch in loader] != firsts[1]:
            break
    else:
        pytest.fail("the generator of the sampler was not reached")


def test_one_prompt_may_be_sampled_once():
    sampler = RepeatSampler(["a", "b", "c", "d"], mini_repeat_count=1, batch_size=2, repeat_count=2, seed=0)
    order = list(sampler)
    assert order[:2] == order[2:4]
    assert order[4:6] == order[6:8]
    assert sorted({*order}) == [0, 1, 2, 3]


# ------------------------------------------------------------------ state in checkpoints


def test_the_state_of_a_callback_is_in_the_checkpoint(trained):
    folder = f"{trained.args.output_dir}/checkpoint-1"
    with open(f"{folder}/trainer_state.json", encoding="utf-8") as file:
        written = json.load(file)
    assert written["stateful_callbacks"]["Remembering"] == Remembering().state()
    state = TrainerState.load_from_json(f"{folder}/trainer_state.json")
    assert state.stateful_callbacks["Remembering"]["attributes"] == {"moments": {"mean": 0.25}, "count": 3}


def test_a_callback_added_after_the_constructor_is_saved_and_sees_the_old_state_first(tmp_path):
    """Ours is added after `super().__init__`, and reads the checkpoint's state in `on_train_begin`."""
    trainer = rloo(tmp_path / "first", Recorder, save_strategy="steps", save_steps=1)

    class Late(Remembering):
        def on_train_begin(self, args, state, control, **kwargs):
            self.found = (state.global_step, (state.stateful_callbacks or {}).get("Late"))

    trainer.add_callback(Late())
    trainer.train()
    again, late = rloo(tmp_path / "second", Recorder, max_steps=2), Late()
    again.add_callback(late)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert late.found == (1, Late().state())


def test_save_and_evaluate_wait_where_a_callback_says_so():
    """`PPOStateCallback.on_step_end` moves both to the end of a rollout batch by these two flags."""
    control = TrainerControl()
    assert (control.should_save, control.should_evaluate) == (False, False)
    assert "on_pre_optimizer_step" in vars(TrainerCallback)


# ------------------------------------------------------------------ reward models


class OwnLoss(RewardTrainer):
    """The least that RewardModelTrainer does: rows of its own, batches of its own, a loss and metrics of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append(inputs)
        mode = "train" if self.model.training else "eval"
        self._total_train_tokens += 5
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._metrics[mode]["mine"].extend([1.0, 3.0, 5.0])
        loss = sum(p.sum() for p in model.parameters())
        return (loss, {"logits": torch.zeros(len(inputs["rows"]), 2)}) if return_outputs else loss


def test_the_reward_trainer_takes_tokenised_rows_a_collator_and_a_loss_of_our_own(tmp_path):
    config = tiny_model().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    rows = Dataset.from_list([{"ids": [[2, 3], [2, 4, 5]], "chosen_ids": [2, 3], "rejected_ids": [2, 4, 5]}] * 4)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "logging_steps": 1}
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = OwnLoss(
        model=model,
        args=RewardConfig(str(tmp_path), remove_unused_columns=False, gradient_checkpointing=False, **options),
        data_collator=lambda batch: {"rows": torch.arange(len(batch)), "nested": [{"ids": batch[0]["ids"]}]},
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer(),
    )
    trainer.seen = []
    assert trainer.train_dataset[0] == rows[0], "rows with chosen_ids and rejected_ids are not tokenised again"
    assert trainer._metrics["train"].default_factory is trainer._metrics["eval"].default_factory is list
    assert trainer._total_train_tokens == 0
    trainer.train()
    assert trainer.seen[0]["nested"] == [{"ids": [[2, 3], [2, 4, 5]]}], "what the collator makes reaches the loss whole"
    logged = trainer.state.log_history[:2]
    assert [entry["mine"] for entry in logged] == [3.0, 3.0], "the mean of what was added since the last entry"
    assert [entry["num_tokens"] for entry in logged] == [5, 10]
    metrics = trainer.evaluate()
    assert metrics["eval_mine"] == 3.0, "evaluation goes through compute_loss, which is asked for its outputs"
    assert len(trainer.seen) == 2 + 2


@pytest.mark.parametrize("name", ["compute_loss", "evaluate", "log", "create_model_card", "get_batch_samples"])
def test_what_our_reward_trainer_overrides_or_calls_has_its_signature(name):
    ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in (RewardModelTrainer, RewardTrainer))
    assert ours == theirs


def test_the_reward_trainer_overrides_nothing_private():
    inherited = {
        name for base in RewardModelTrainer.__mro__[1:] for name, value in vars(base).items() if callable(value)
    }
    own = {name for name, value in vars(RewardModelTrainer).items() if callable(value)}
    assert own & inherited == {
        "__init__",
        "compute_loss",
        "evaluate",
    }
    assert RewardModelTrainer.loss_is_scaled_for_ga is False
    assert not RewardTrainer.loss_is_scaled_for_ga
