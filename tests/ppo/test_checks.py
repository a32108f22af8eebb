"""Bad input is named before a model is loaded, where that is possible, and before it reaches the weights otherwise."""

import contextlib
import functools

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from tests.ppo import tiny
from trl_ext import Role
from trl_ext.ppo import trainer as trainer_module
from trl_ext.roles import shared_model
from trl_ext.scoring import checked_reward
from trl_ext.text import TextEncoder

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def no_model(monkeypatch):
    """Loading the base is an error."""

    def load_base(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(shared_model, "load_base", load_base)


def rows(*texts):
    return Dataset.from_dict({"prompt": list(texts)})


EMPTY = Dataset.from_dict({"prompt": []})
LONG = rows("w0", "w1", "w0 " * 60, "w2")
CONVERSATION = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w0 " * 59}]] * 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": Dataset.from_dict({"question": ["w0"] * 4})},
            r"train_dataset has no column 'prompt', only \['que",
        ),
        ({"dataset": rows("w0", "w1", "  ", "w2")}, r"train_dataset row 2 has an empty prompt .*filter"),
        ({"dataset": Dataset.from_dict({"prompt": [[]] * 4})}, r"train_dataset row 0 has an empty prompt"),
        ({"dataset": EMPTY}, r"train_dataset is empty"),
        ({"dataset": tiny.prompts(3)}, r"train_dataset has 3 prompts, a rollout batch takes 4 .*nothing would be"),
        ({"eval_dataset": EMPTY}, r"eval_dataset is empty"),
        ({"eval_dataset": {"hard": rows("w0", "")}}, r"eval_dataset\['hard'\] row 1 has an empty prompt"),
        ({"eval_dataset": LONG}, r"eval_dataset row 2: a prompt of 60 tokens"),
        ({"dataset": LONG}, r"row 2: a prompt of 60 tokens and max_completion_length=6 exceed .*64 .* to at most 4"),
        ({"dataset": CONVERSATION}, r"row \d: a prompt of 62 tokens"),
        ({"max_completion_length": 64}, r"max_completion_length=64 leaves no room for a prompt.*64 positions"),
        ({"reward_funcs": None}, r"nothing that scores responses: give reward_funcs, or .*reward_adapter"),
        ({"reward_weights": [1.0, 2.0]}, r"reward_weights has 2 numbers for 1 reward_funcs"),
        ({"processing_class": tiny.tiny_tokenizer(eos_token=None)}, r"no eos_token.*tokenizer.eos_token ="),
        ({"ptx_coef": 0.1}, r"ptx_coef=0.1 and ptx_dataset go together"),
        ({"ptx_dataset": tiny.texts()}, r"ptx_coef=0.0 and ptx_dataset go together"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(world, tmp_path, no_model, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny.trainer(world, tmp_path, **{"model": str(world / "base"), "reward_funcs": tiny.count_words} | options)


def test_the_guard_of_these_tests_guards(world, tmp_path, no_model):
    with pytest.raises(AssertionError, match="the model was loaded first"):
        tiny.trainer(world, tmp_path, model=str(world / "base"), reward_funcs=tiny.count_words)


def test_a_dataset_that_is_none_of_ours_is_a_type_error(world, tmp_path, no_model):
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset"):
        tiny.trainer(world, tmp_path, model=str(world / "base"), reward_funcs=tiny.count_words, dataset=["w0"])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [(Dataset.from_dict({"question": ["w0"]}), r"\['question'\]: it needs 'text'"), (tiny.texts(0), "empty")],
)
def test_a_bad_ptx_dataset_is_named(world, tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(world, tmp_path, ptx_dataset=dataset, ptx_coef=0.1)


def test_the_longest_prompt_that_fits_is_fine(world, tmp_path):
    dataset = rows("w0", "w1 " * 58, "w2", "w3")
    trainer = tiny.trainer(world, tmp_path, dataset=dataset, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_every_prompt_is_measured_not_only_the_longest_texts(world, tmp_path, no_model):
    # 20 prompts of one word that is long, and between them one of 60 short words
    texts = ["x" * 500] * 20
    texts[7] = "w0 " * 60
    options = {"model": str(world / "base"), "reward_funcs": tiny.count_words, "dataset": rows(*texts)}
    with pytest.raises(ValueError, match=r"train_dataset row 7: a prompt of 60 tokens .*as do 1 of 20 rows"):
        tiny.trainer(world, tmp_path, **options)


def test_prompts_are_measured_once_however_often_they_are_checked(world, tmp_path, monkeypatch):
    measured, lengths = [], TextEncoder.prompt_lengths
    count = lambda self, prompts, desc=None: measured.append(len(prompts)) or lengths(self, prompts, desc)  # noqa: E731
    monkeypatch.setattr(TextEncoder, "prompt_lengths", count)
    dataset = rows(*(f"w{i % 12} w0 w1 w2 w3 w{i % 7}" for i in range(9)))
    for _ in range(2):
        tiny.trainer(world, tmp_path, dataset=dataset)
    assert measured == [9]


def test_what_the_template_writes_behind_the_end_needs_room_where_it_is_scored(world, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(" <end> ", " <end> " + "w11 " * 3)
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w0 " * 51}]] * 4})  # 57 tokens of 64
    options = {"processing_class": tokenizer, "dataset": dataset}
    with pytest.raises(ValueError, match=r"a prompt of 57 tokens .*to at most 4, or drop prompts of more than 55"):
        tiny.trainer(world, tmp_path, **options)
    tiny.trainer(world, tmp_path, model=str(world / "base"), reward_funcs=tiny.count_words, **options)


def test_a_pad_token_is_made_from_eos_and_pads_on_the_left(world, tmp_path):
    tokenizer = tiny.tiny_tokenizer(pad_token=None)
    tokenizer.padding_side = "right"
    tiny.trainer(world, tmp_path, processing_class=tokenizer, max_steps=1).train()
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "left")


# ---------------------------------------------------------------------- reward functions


def too_few(prompts, completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def with_value(value):
    def third_is_odd(prompts, completions, **kwargs):
        return [0.0, 1.0, value, 2.0]

    return third_is_odd


async def later(prompts, completions, **kwargs):
    return [0.0, NAN, 1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (too_few, "'too_few' returned 3 rewards for 4 completions"),
        (with_value(NAN), "'third_is_odd' returned nan for sample 2, completion '"),
        (with_value(-INF), "'third_is_odd' returned -inf for sample 2"),
        (with_value("good"), "'third_is_odd' returned 'good' for sample 2"),
        (later, "'later' returned nan for sample 1"),
        (functools.partial(too_few), "'too_few' returned 3 rewards"),
        (lambda prompts, completions, **kwargs: [None] * 4, r"every reward function returned None for the samples \[0"),
    ],
    ids=["too few", "nan", "inf", "text", "async", "partial", "none"],
)
def test_what_a_reward_function_returns_is_checked(world, tmp_path, function, message):
    trainer = tiny.trainer(world, tmp_path, model=str(world / "base"), reward_funcs=function)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rewards_may_be_a_tensor_or_an_array():
    function = checked_reward(lambda completions: torch.tensor([1.0, 2.0]))
    assert function(completions=["a", "b"]) == [1.0, 2.0]
    assert checked_reward(functools.partial(tiny.count_words)).__name__ == "count_words"


def test_nan_from_a_reward_model_is_an_error_and_not_a_reward_that_does_not_apply(world, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(world / "classifier")
    classifier.score.weight.data[:] = NAN
    trainer = tiny.trainer(world, tmp_path, reward_funcs=[classifier, tiny.count_words])
    with pytest.raises(ValueError, match=r"'classifier' returned nan for sample 0"):
        trainer.train()


def test_a_role_that_was_left_switched_is_found_before_it_generates(world, tmp_path):
    def careless(completions, **kwargs):
        trainer.model.role(Role.REWARD).__enter__()
        return [1.0] * len(completions)

    trainer = tiny.trainer(world, tmp_path, model=tiny.four_roles(world), reward_funcs=careless, max_steps=3)
    with pytest.raises(RuntimeError, match=r"the reward role is active where the policy should generate"):
        trainer.train()


# ---------------------------------------------------------------------- while it runs


def test_a_warm_up_as_long_as_the_epochs_is_found_where_they_are_counted(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, max_steps=-1, num_train_epochs=2, critic_warmup_steps=4)
    with pytest.raises(ValueError, match=r"critic_warmup_steps=4 takes all of the 4 optimizer steps"):
        trainer.train()


class Break(TrainerCallback):
    """Puts NaN into a trained weight with the second optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = NAN


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_broken_weights_are_neither_saved_nor_called_the_end(world, tmp_path, strategy):
    options = {"save_strategy": strategy, "save_steps": 1, "max_steps": 2, "callbacks": [Break()]}
    options["update_kl_target"] = 0.0  # else the step is taken back
    trainer = tiny.trainer(world, tmp_path, **options)
    message = r"after step 2 1 trained weights \(.*\) are not finite"
    with pytest.raises(RuntimeError, match=message) as error:
        trainer.train()
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == (["checkpoint-1"] if strategy == "steps" else [])
    assert ("checkpoint-1." if saved else "no checkpoint yet") in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(world, tmp_path, monkeypatch):
    value_loss = trainer_module.value_loss
    trainer = tiny.trainer(world, tmp_path, max_steps=5, save_strategy="steps", save_steps=1)

    def broken(*args, **kwargs):
        loss, stats = value_loss(*args, **kwargs)
        return loss * (NAN if trainer.state.global_step == 2 else 1.0), stats

    monkeypatch.setattr(trainer_module, "value_loss", broken)
    message = r"(?s)non-finite loss at step 2: \{'value_loss': nan\}.*last good checkpoint is .*checkpoint-2\."
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    saved = shared_model.SharedBaseModel.from_pretrained(
        str(world / "base"), policy_adapter=tmp_path / "checkpoint-2", critic_adapter=tmp_path / "checkpoint-2/critic"
    )
    for role in (Role.POLICY, Role.CRITIC):
        assert tiny.same(tiny.role_weights(saved, role), tiny.role_weights(trainer.model, role))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path)
    head = trainer.model.heads["critic"].weight
    head.register_hook(lambda gradient: gradient * NAN)
    before = {role: tiny.role_weights(trainer.model, role) for role in Role}
    with pytest.raises(RuntimeError, match=r"non-finite gradient norm at step 0: .*'critic': nan.*no checkpoint yet"):
        trainer.train()
    assert all(tiny.same(before[role], tiny.role_weights(trainer.model, role)) for role in Role)


def test_a_policy_that_is_not_its_reference_is_found_before_the_first_update(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path)
    name = next(n for n, p in trainer.model.named_parameters() if ".default." in n)
    trainer.model.get_parameter(name).data.add_(0.1)
    with pytest.raises(RuntimeError, match=r"before the first update .*reference's by up to .*disable_dropout=False"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("disable_dropout", [True, False])
def test_dropout_that_is_left_on_is_found_before_the_first_update(world, tmp_path, disable_dropout):
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    model = tiny.randomized(get_peft_model(base, tiny.lora(lora_dropout=0.5)))
    options = {"reward_funcs": tiny.count_words, "disable_dropout": disable_dropout}
    trainer = tiny.trainer(world, tmp_path, model=model, **options)
    with contextlib.nullcontext() if disable_dropout else pytest.raises(RuntimeError, match="Is dropout on"):
        trainer.train()
    assert trainer.state.global_step == (2 if disable_dropout else 0)


def test_dropout_that_is_no_module_is_switched_off(world, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(world / "base", attention_dropout=0.5)
    assert base.config.attention_dropout == 0.5
    trainer = tiny.trainer(world, tmp_path, model=base, reward_funcs=tiny.count_words, peft_config=tiny.lora())
    trainer.train()
    assert trainer.state.global_step == 2


def test_sampling_that_is_off_policy_is_warned_about(world, tmp_path):
    with pytest.warns(UserWarning, match="top_p, top_k, repetition_penalty change the distribution"):
        tiny.trainer(world, tmp_path, top_p=0.9, top_k=5, repetition_penalty=1.1)


class Interrupt(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_train_again_after_an_interrupt_starts_with_a_fresh_rollout(world, tmp_path):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(list(prompts))
        return tiny.count_words(prompts, completions)

    trainer = tiny.trainer(
        world, tmp_path, reward_funcs=reward, gradient_accumulation_steps=2, max_steps=1, callbacks=[Interrupt()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert len(seen) == 2


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_before_the_base_is_loaded(world, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["w98", "w99"])
    options = {"model": str(world / "base"), "reward_funcs": tiny.count_words, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="the tokenizer has 2 tokens beyond the model's 18 embeddings, first 'w98'"):
        tiny.trainer(world, tmp_path, **options)
