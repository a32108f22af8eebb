"""PPOMaxTrainer from the outside: what it takes, what scores a completion, what it logs and evaluates."""

import functools
import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from tests.ppo import tiny
from trl_ext import Role, SharedBaseModel, runs
from trl_ext.ppo.rollout import Rollout

# DESIGN section 4, "Logged every step", with TRL's names where TRL has them
LOGGED = [
    "reward", "reward_std", "reward_shaped", "reward_shaped_std", "rewards/reward_role/mean",
    "rewards/reward_role/std", "kl", "kl_per_token", "beta", "policy_loss", "value_loss", "clip_fraction/policy",
    "clip_fraction/value", "ratio_mean", "ratio_max", "approx_kl", "entropy", "explained_variance", "value_mean",
    "value_std", "return_mean", "return_std", "advantage_std", "perplexity", "perplexity_reference",
    "completions/mean_length", "completions/truncated_ratio", "completions/clipped_ratio", "completions/empty",
    "grad_norm", "grad_norm/policy", "grad_norm/critic", "learning_rate", "learning_rate/policy",
    "learning_rate/critic", "loss", "num_tokens", "seconds/generate", "seconds/score", "seconds/update",
    "peak_memory_gib", "tokens_per_second/generate", "tokens_per_second/score", "tokens_per_second/update",
]  # fmt: skip


def base(world):
    return AutoModelForCausalLM.from_pretrained(world / "base")


def trained_adapter(world):
    """A `PeftModel` whose adapter is not the base."""
    return tiny.randomized(get_peft_model(base(world), tiny.lora()))


@pytest.mark.parametrize(
    ("make", "peft_config", "roles"),
    [
        pytest.param(lambda world: str(world / "base"), True, {Role.POLICY, Role.CRITIC}, id="folder, peft_config"),
        pytest.param(lambda world: str(world / "base"), False, {Role.POLICY, Role.CRITIC}, id="folder alone"),
        pytest.param(base, True, {Role.POLICY, Role.CRITIC}, id="PreTrainedModel"),
        pytest.param(trained_adapter, False, {Role.POLICY, Role.REFERENCE, Role.CRITIC}, id="PeftModel"),
        pytest.param(tiny.four_roles, False, set(Role), id="SharedBaseModel"),
    ],
)
def test_every_kind_of_model_trains_policy_and_critic_and_nothing_else(world, tmp_path, make, peft_config, roles):
    options = {"peft_config": tiny.lora()} if peft_config else {}
    trainer = tiny.trainer(world, tmp_path, model=make(world), reward_funcs=tiny.count_words, **options)
    model = trainer.model
    assert isinstance(model, SharedBaseModel)
    assert set(model.adapters.values()) == roles
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert {model.owner(name) for name in changed} == {Role.POLICY, Role.CRITIC}
    first, second = tiny.rollout_entries(trainer)
    assert first["kl"] == 0.0
    assert second["kl"] != 0.0


def test_a_peft_model_starts_from_its_adapter_and_keeps_it_as_the_reference(world, tmp_path):
    adapter = trained_adapter(world)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters() if "lora_B" in n}
    trainer = tiny.trainer(world, tmp_path, model=adapter, reward_funcs=tiny.count_words)
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    for name, tensor in start.items():
        assert torch.equal(parameters[name.replace(".default.", ".reference.")], tensor)
        assert not torch.equal(parameters[name], tensor)


# ---------------------------------------------------------------------- what scores a completion


async def count_words_later(prompts, completions, **kwargs):
    return tiny.count_words(prompts, completions)


class LengthReward:
    """A callable object with a name of its own, and None where it does not apply."""

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        return [float(len(ids)) if len(ids) > 2 else None for ids in completion_ids]


def first_rollout(trainer) -> dict:
    trainer.train()
    return tiny.rollout_entries(trainer)[0]


@pytest.mark.parametrize("dataset", [tiny.prompts, tiny.chats], ids=["plain", "conversational"])
@pytest.mark.parametrize("function", [tiny.count_words, count_words_later], ids=["sync", "async"])
def test_a_function_scores_plain_and_conversational_prompts(world, tmp_path, dataset, function):
    rewards = {}

    def expected(prompts, completions, **kwargs):
        rewards.setdefault("first", tiny.count_words(prompts, completions))
        return [0.0] * len(completions)

    trainer = tiny.trainer(
        world, tmp_path, model=str(world / "base"), reward_funcs=[function, expected], dataset=dataset(), max_steps=1
    )
    entry = first_rollout(trainer)
    assert entry["reward"] == pytest.approx(sum(rewards["first"]) / 4)
    assert entry[f"rewards/{function.__name__}/mean"] == pytest.approx(entry["reward"])


@pytest.mark.parametrize("dataset", [tiny.prompts, tiny.chats], ids=["plain", "conversational"])
def test_a_classifier_scores_by_path_or_by_instance(world, tmp_path, dataset):
    path = str(world / "classifier")
    entries = []
    for reward in (path, AutoModelForSequenceClassification.from_pretrained(path)):
        options = {"model": str(world / "base"), "reward_funcs": reward, "dataset": dataset(), "max_steps": 1}
        entries.append(first_rollout(tiny.trainer(world, tmp_path, **options)))
    assert entries[0]["reward"] == entries[1]["reward"] == pytest.approx(entries[0]["rewards/classifier/mean"])
    assert entries[0]["rewards/classifier/std"] > 0.1


def test_the_reward_is_the_weighted_sum_of_all_that_scores(world, tmp_path):
    functions = [tiny.count_words, count_words_later, LengthReward(), str(world / "classifier")]
    trainer = tiny.trainer(
        world,
        tmp_path,
        reward_funcs=functions,
        reward_weights=[0.5, -2.0, 0.0, 3.0],
        reward_role_weight=0.25,
        reward_normalization="none",
        reward_clip=None,
        max_steps=1,
    )
    entry = first_rollout(trainer)
    parts = [entry[f"rewards/{name}/mean"] for name in ("count_words", "count_words_later", "classifier")]
    expected = 0.5 * parts[0] - 2.0 * parts[1] + 3.0 * parts[2] + 0.25 * entry["rewards/reward_role/mean"]
    assert entry["reward"] == pytest.approx(expected, abs=1e-5)
    assert entry["reward_shaped"] == pytest.approx(expected, abs=1e-5)
    assert entry["rewards/LengthReward/mean"] > 2  # over those to which it applies


def test_two_partials_of_one_function_have_metrics_of_their_own(world, tmp_path):
    def scaled(completions, factor, **kwargs):
        return [factor] * len(completions)

    functions = [functools.partial(scaled, factor=1.0), functools.partial(scaled, factor=3.0)]
    entry = first_rollout(tiny.trainer(world, tmp_path, reward_funcs=functions, max_steps=1, log_completions=True))
    assert (entry["rewards/scaled/mean"], entry["rewards/scaled_2/mean"]) == (1.0, 3.0)


def score_of(model, ids) -> float:
    return model.score(torch.tensor([ids]), torch.ones(1, len(ids)).long()).item()


def test_a_completion_is_scored_as_the_reward_model_was_trained_and_the_suffix_is_not_trained(world, tmp_path):
    tokenizer = tiny.tiny_tokenizer()  # as ChatML does, its template writes something behind the end token
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(" <end> ", " <end> w11 ")
    options = {"dataset": tiny.chats(), "processing_class": tokenizer, "max_steps": 1}
    options |= {"reward_normalization": "none", "reward_clip": None}
    trainer = tiny.trainer(world, tmp_path, **options)
    assert sorted(trainer.eos_token_ids) == trainer.encoder.end_ids
    prompts = tiny.chats(4)["prompt"]
    prompt_ids = [trainer.encoder.prompt_ids(prompt) for prompt in prompts]
    completion_ids = [[6, 7, 5], [8, 5], [9, 10, 11, 6, 7, 8], [1]]  # the third was cut, the last ended with <eos>
    texts = [
        [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}] for ids in completion_ids
    ]
    trainer._generate = lambda given: (prompt_ids, completion_ids, texts)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    whole = [[*p, *c, *end] for p, c, end in zip(prompt_ids, completion_ids, ([17], [17], [], [17]), strict=True)]
    whole[3] = [*prompt_ids[3], 5, 17]  # the template's end in place of <eos>
    expected = sum(score_of(trainer.model, ids) for ids in whole)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged["rewards/reward_role/mean"] == pytest.approx(expected / 4, abs=1e-5)
    bare = sum(score_of(trainer.model, [*p, *c]) for p, c in zip(prompt_ids, completion_ids, strict=True))
    assert abs(bare - expected) > 1e-2, "the suffix makes a difference here"
    # The policy is trained on what it sampled, and the critic values the state before each of these tokens
    rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    assert [ids[mask.bool()].tolist() for ids, mask in rows] == completion_ids
    for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        ids = torch.tensor([[*prompt, *completion]])
        values = trainer.model.values(ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(batch["values"][i, : len(completion)], values, rtol=1e-4, atol=1e-5)


def test_options_of_the_base_are_honoured(world, tmp_path):
    options = {"model": str(world / "base"), "reward_funcs": tiny.count_words}
    trainer = tiny.trainer(world, tmp_path, model_init_kwargs={"attn_implementation": "eager"}, **options)
    assert trainer.model.get_base_model().config._attn_implementation == "eager"


def test_functions_see_the_other_columns_and_may_log(world, tmp_path):
    seen = {}

    def reward(prompts, completions, target, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
        seen.update(zip(prompts, target, strict=True))
        log_metric("share_of_targets", 0.25)
        log_metric("share_of_targets", 0.75)
        log_extra("target", target)
        return [float(len(ids)) for ids in completion_ids]

    dataset = tiny.prompts(target=[f"target {i}" for i in range(8)])
    options = {"reward_funcs": reward, "dataset": dataset, "log_completions": True}
    trainer = tiny.trainer(world, tmp_path, **options)
    trainer.train()
    assert seen == dict(zip(dataset["prompt"], dataset["target"], strict=True))
    assert [entry["share_of_targets"] for entry in tiny.rollout_entries(trainer)] == [0.5, 0.5]
    assert list(trainer._logs["extra"]["target"]) == [seen[prompt] for prompt in trainer._logs["prompt"]]


def test_log_completions_prints_what_was_scored(world, tmp_path, capsys):
    trainer = tiny.trainer(world, tmp_path, reward_funcs=tiny.count_words, log_completions=True)
    trainer.train()
    printed, logs = capsys.readouterr().out, trainer._logs
    assert "Prompt" in printed
    assert "count_words" in printed
    assert len(logs["prompt"]) == len(logs["completion"]) == len(logs["advantages"]) == 4
    assert list(logs["rewards"]["count_words"]) == [float(len(text.split())) for text in logs["completion"]]
    total = sum(logs["rewards"]["total"]) / 4
    assert total == pytest.approx(tiny.rollout_entries(trainer)[-1]["reward"])


# ---------------------------------------------------------------------- logs and evaluation


def test_everything_that_should_be_logged_is_and_is_finite(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, num_iterations=2, max_steps=4, logging_steps=4)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert [name for name in LOGGED if name not in entry] == []
    assert all(math.isfinite(value) for value in entry.values())


def test_logged_figures_agree_with_each_other(world, tmp_path):
    options = {"max_grad_norm": 1e9, "critic_learning_rate": 0.02, "update_kl_target": 0.0}
    trainer = tiny.trainer(world, tmp_path, max_steps=4, **options)
    trainer.train()
    for entry in tiny.rollout_entries(trainer):
        assert entry["kl"] == pytest.approx(entry["kl_per_token"] * entry["completions/mean_length"], abs=1e-5)
        difference = math.log(entry["perplexity_reference"]) - math.log(entry["perplexity"])
        assert entry["kl_per_token"] == pytest.approx(difference, abs=1e-5)
        assert entry["advantage_std"] == pytest.approx(1.0, abs=1e-5)
        assert entry["completions/truncated_ratio"] == entry["completions/clipped_ratio"]
        norms = math.hypot(entry["grad_norm/policy"], entry["grad_norm/critic"])
        assert entry["grad_norm"] == pytest.approx(norms, rel=1e-4)
        assert entry["learning_rate/critic"] == pytest.approx(2 * entry["learning_rate/policy"])
        assert entry["perplexity"] > 1
        assert abs(entry["reward_shaped"]) <= 0.8


@pytest.mark.parametrize(("options", "sequences"), [({}, 4), ({"per_device_score_batch_size": 1}, 1)])
def test_scoring_takes_as_many_sequences_at_a_time_as_the_option_says(world, tmp_path, options, sequences):
    trainer = tiny.trainer(world, tmp_path, max_steps=1, per_device_train_batch_size=2, **options)
    asked = []
    original = Rollout.parts

    def parts(self, max_tokens=None):
        asked.append((max_tokens, int((self.prompt_mask.sum(1) + self.completion_mask.sum(1)).max())))
        return original(self, max_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "parts", parts)
        trainer.train()
    limit, longest = asked[0]  # what comes later is the update's
    assert limit == sequences * longest


def test_the_perplexity_is_that_of_the_sampled_tokens(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, max_steps=1, temperature=0.7)
    rollout = trainer._generate_and_score_completions([{"prompt": text} for text in tiny.prompts()["prompt"]])
    logged = trainer._metrics["train"]["perplexity"][0]
    ids, mask = (
        torch.cat([rollout[f"{part}_{what}"] for part in ("prompt", "completion")], dim=1) for what in ("ids", "mask")
    )
    with torch.no_grad():
        logits = trainer.model.get_base_model()(ids, attention_mask=mask, position_ids=mask.cumsum(1) - mask).logits
    width = rollout["completion_ids"].shape[1]
    logps = (logits[:, -width - 1 : -1] / 0.7).log_softmax(-1)
    nll = -logps.gather(2, rollout["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = rollout["completion_mask"].bool()
    assert logged == pytest.approx(math.exp(nll[mask].mean().item()), rel=1e-5)


def test_the_mean_of_an_evaluation_is_over_its_rows_whatever_the_size_of_its_last_batch(world, tmp_path):
    given = []

    def count(completions, **kwargs):
        given.append([float(len(given) + i) for i in range(len(completions))])
        return given[-1]

    trainer = tiny.trainer(
        world, tmp_path, reward_funcs=count, reward_role_weight=0.0, eval_dataset=tiny.prompts(5),
        per_device_eval_batch_size=4,
    )  # fmt: skip
    figures = trainer.evaluate()
    assert [len(batch) for batch in given] == [4, 1]
    assert figures["eval_rewards/count/mean"] == pytest.approx((0 + 1 + 2 + 3 + 1) / 5)
    assert trainer.evaluate()["eval_rewards/count/mean"] == pytest.approx((2 + 3 + 4 + 5 + 3) / 5)


def test_evaluation_reports_and_leaves_the_state_as_it_was(world, tmp_path):
    trainer = tiny.trainer(
        world,
        tmp_path,
        reward_funcs=tiny.count_words,
        eval_dataset=tiny.prompts(8),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        num_iterations=2,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    wanted = [
        "reward",
        "kl",
        "perplexity",
        "perplexity_reference",
        "completions/mean_length",
        "rewards/count_words/mean",
        "beta",
    ]
    for entry in evaluations:
        assert [name for name in wanted if f"eval_{name}" not in entry] == []
        assert all(math.isfinite(value) for value in entry.values())

    state = trainer.ppo_state.state_dict()
    weights = {role: tiny.role_weights(trainer.model, role) for role in Role}
    trainer.evaluate()
    assert trainer.ppo_state.state_dict() == state
    assert all(tiny.same(weights[role], tiny.role_weights(trainer.model, role)) for role in Role)
    assert state["moments"]["count"] == 2 * 4  # the training rollouts alone


def test_the_first_evaluation_is_a_part_of_the_run_and_leaves_the_state_as_it_was(world, tmp_path):
    options = {"eval_dataset": tiny.prompts(8), "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = tiny.trainer(world, tmp_path, max_steps=4, num_iterations=2, **options)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    assert evaluations[0]["eval_kl"] == 0.0
    assert "reward" not in evaluations[0]
    assert trainer.ppo_state.rollouts == 2
    assert trainer.ppo_state.moments.state_dict()["count"] == 2 * 4


class Tracker(TrainerCallback):
    """As transformers' trackers: it knows where to log to from the beginning of training on."""

    def __init__(self):
        self.place, self.logged = "the working directory", []

    def on_train_begin(self, args, state, control, **kwargs):
        self.place = args.output_dir

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((self.place, sorted(logs)))


def test_an_evaluation_before_training_is_logged_where_training_is(world, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "get_reporting_integration_callbacks", lambda names: [Tracker])
    tracker = Tracker()
    trainer = tiny.trainer(world, tmp_path, eval_dataset=tiny.prompts(4), callbacks=[tracker], max_steps=1)
    generated, generate = [], trainer._generate
    trainer._generate = lambda prompts: generated.append(tracker.place) or generate(prompts)
    trainer.complete(tiny.prompts(1)["prompt"])
    trainer.evaluate()
    trainer.train()
    assert set(generated) == {str(tmp_path)}, "TRL logs to a tracker while it generates"
    assert "eval_loss" in tracker.logged[0][1]
    assert {place for place, _ in tracker.logged} == {str(tmp_path)}


def test_completing_prompts_beside_the_run_leaves_no_trace(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, max_steps=1)
    trainer.model.train()
    prompts = tiny.prompts(3)["prompt"]
    prompt_ids, completion_ids, completions = trainer.complete(prompts)
    assert len(prompt_ids) == len(completion_ids) == len(completions) == 3
    assert trainer.model.training
    assert not any(trainer._metrics.values())
    assert trainer.state.num_input_tokens_seen == 0


def test_evaluation_waits_for_the_end_of_the_rollout_and_takes_several_sets(world, tmp_path):
    sets = {"easy": tiny.prompts(4), "hard": tiny.chats(4)}
    options = {"eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 4, "num_iterations": 4}
    trainer = tiny.trainer(world, tmp_path, **options)
    trainer.train()
    for name in ("easy", "hard"):
        entries = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        assert [entry["step"] for entry in entries] == [4]
        assert f"eval_{name}_reward" in entries[0]


def test_the_best_checkpoint_comes_back_with_all_its_roles(world, tmp_path):
    options = {"eval_dataset": tiny.prompts(4), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    # beta falls from step to step while the KL is small: the first checkpoint is the best by this measure
    trainer = tiny.trainer(world, tmp_path, metric_for_best_model="eval_beta", greater_is_better=True, **options)
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    saved = SharedBaseModel.from_pretrained(
        str(world / "base"), policy_adapter=best, reward_adapter=best / "reward", critic_adapter=best / "critic"
    )
    for role in (Role.POLICY, Role.REWARD, Role.CRITIC):
        assert tiny.same(tiny.role_weights(saved, role), tiny.role_weights(trainer.model, role)), role


@pytest.mark.parametrize("scheduler", ["cosine_with_min_lr", "polynomial", "linear"])
def test_a_schedule_that_starts_with_the_policy_has_the_floor_that_was_asked_for(world, tmp_path, scheduler):
    kwargs = {"cosine_with_min_lr": {"min_lr": 4e-3}, "polynomial": {"lr_end": 4e-3}}.get(scheduler, {})
    options = {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": kwargs, "max_steps": 6, "learning_rate": 1e-2}
    trainer = tiny.trainer(world, tmp_path, critic_warmup_steps=2, **options)
    trainer.train()
    policy = next(i for i, g in enumerate(trainer.optimizer.param_groups) if g.get("role") == "policy")
    assert trainer.lr_scheduler.get_last_lr()[policy] == pytest.approx(4e-3 if kwargs else 0.0, abs=1e-9)


def test_dropout_that_is_no_module_is_switched_off(world, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(world / "base", attention_dropout=0.5)
    trainer = tiny.trainer(world, tmp_path, model=base, reward_funcs=tiny.count_words)
    trainer.train()
    assert trainer.state.global_step == 2


def test_several_evaluation_sets_have_names_of_their_own(world, tmp_path):
    sets = {"a": tiny.prompts(4), "b": tiny.prompts(8).select(range(4, 8))}
    trainer = tiny.trainer(world, tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_reward", "eval_b_reward", "eval_a_kl", "eval_b_completions/mean_length"} <= logged
    assert "eval_reward" not in logged
    found = trainer.evaluate(sets["a"])
    assert "eval_reward" in found
