"""What the update does with a rollout: every flag, the critic's warm-up, the KL's control, gradients, PPO-ptx."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, get_scheduler

from tests.ppo import tiny
from trl_ext import PPOMaxTrainer, Role, SharedBaseModel
from trl_ext.ppo.data import PTXBatches, ptx_batches
from trl_ext.text import TextEncoder

# Three rollouts of two passes: long enough for everything that acts on the next rollout only
RUN = {"num_iterations": 2, "max_steps": 8}
FLAGS = [
    {"reward_normalization": "scale"},
    {"reward_normalization": "none"},
    {"reward_clip": 0.1},
    {"reward_clip": None},
    {"reward_role_weight": -1.0},
    {"missing_eos_penalty": 1.0},
    {"beta": 0.0},
    {"beta": 0.5},
    {"kl_estimator": "k2"},
    {"kl_estimator": "k3"},
    {"kl_control": "fixed"},
    {"kl_control": "penalty"},
    {"kl_target": 1e-4},
    {"kl_control": "adaptive", "kl_horizon": 8.0},
    {"gamma": 0.9},
    {"gae_lambda": 0.5},
    {"normalize_advantages": False},
    {"advantage_clip": 0.5},
    {"epsilon": 0.01},
    {"epsilon_high": 0.01},
    {"value_clip": None},
    {"vf_coef": 0.1},
    {"entropy_coef": 0.1},
    {"ptx_coef": 0.1},
    {"critic_learning_rate": 1e-3},
    {"critic_warmup_steps": 2},
    {"max_grad_norm": 0.1},
    {"temperature": 0.7},
]


class Weights(TrainerCallback):
    """The weights of a role before the first step and after each."""

    def __init__(self):
        self.of = {Role.POLICY: [], Role.CRITIC: []}

    def _take(self, model):
        for role, weights in self.of.items():
            weights.append(tiny.role_weights(model, role))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._take(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._take(model)

    def moved(self, role) -> list[bool]:
        return [not tiny.same(a, b) for a, b in zip(self.of[role], self.of[role][1:], strict=False)]


def trained(world, folder, **options):
    if options.get("ptx_coef"):
        options["ptx_dataset"] = tiny.texts()
    trainer = tiny.trainer(world, folder, **RUN | options)
    trainer.train()
    return trainer


def weights_of(trainer) -> dict:
    return {f"{role}.{name}": w for role in Role for name, w in tiny.role_weights(trainer.model, role).items()}


@pytest.fixture(scope="module")
def default_weights(world, tmp_path_factory):
    return weights_of(trained(world, tmp_path_factory.mktemp("default")))


def test_the_same_run_twice_ends_with_the_same_bits(world, tmp_path, default_weights):
    assert tiny.same(weights_of(trained(world, tmp_path)), default_weights)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: " ".join(f"{k}={v}" for k, v in flag.items()))
def test_each_flag_works_alone_and_is_not_ignored(world, tmp_path, default_weights, flag):
    trainer = trained(world, tmp_path, **flag)
    for entry in trainer.state.log_history:
        assert all(math.isfinite(value) for value in entry.values())
    assert not tiny.same(weights_of(trainer), default_weights)


def test_all_tricks_together(world, tmp_path):
    options = {"reward_normalization": "norm", "missing_eos_penalty": 1.0, "kl_estimator": "k3", "gamma": 0.99}
    options |= {"advantage_clip": 2.0, "epsilon_high": 0.3, "entropy_coef": 0.01, "ptx_coef": 0.1, "vf_coef": 0.5}
    options |= {"critic_warmup_steps": 2, "critic_warmup_explained_variance": 0.9, "reward_funcs": tiny.count_words}
    options |= {"gradient_checkpointing": True, "num_generations": 2, "steps_per_generation": 2}
    trainer = trained(world, tmp_path, **options)
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


def test_the_penalty_for_a_missing_end_is_exact(world, tmp_path):
    plain, penalised = (trained(world, tmp_path, max_steps=1, **o) for o in ({}, {"missing_eos_penalty": 0.7}))
    plain, penalised = tiny.rollout_entries(plain)[0], tiny.rollout_entries(penalised)[0]
    assert 0 < plain["completions/truncated_ratio"] < 1
    expected = plain["reward_shaped"] - 0.7 * plain["completions/truncated_ratio"]
    assert penalised["reward_shaped"] == pytest.approx(expected, abs=1e-6)
    assert penalised["reward"] == plain["reward"]


def test_the_entropy_bonus_raises_entropy_and_ptx_lowers_its_own_loss(world, tmp_path):
    far = {"update_kl_target": 0.0}
    plain, bonus = (trained(world, tmp_path, entropy_coef=coef, beta=0.0, **far) for coef in (0.0, 5.0))
    assert tiny.rollout_entries(bonus)[-1]["entropy"] > tiny.rollout_entries(plain)[-1]["entropy"] + 0.02
    entries = tiny.rollout_entries(trained(world, tmp_path, ptx_coef=10.0, max_steps=12, **far))
    assert entries[-1]["ptx_loss"] < entries[0]["ptx_loss"] - 0.2


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_the_first_update_of_a_rollout_sees_the_policy_that_sampled_it(world, tmp_path, options):
    trainer = trained(world, tmp_path, num_iterations=1, max_steps=3, **options)
    for entry in tiny.rollout_entries(trainer):
        assert (entry["ratio_mean"], entry["ratio_max"]) == pytest.approx((1.0, 1.0), abs=1e-5)
        assert entry["approx_kl"] == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------------- warm-up

# As long as was asked, every step of it whole: neither a good critic nor a long step changes the rates
WARMUP = {"critic_warmup_explained_variance": None, "update_kl_target": 0.0}


def test_warm_up_leaves_the_policy_alone_to_the_last_bit_while_the_critic_learns(world, tmp_path):
    weights = Weights()
    options = WARMUP | {"critic_warmup_steps": 3, "max_steps": 6, "weight_decay": 0.1, "beta": 0.1}
    trainer = trained(world, tmp_path, callbacks=[weights], **options)
    assert weights.moved(Role.POLICY) == [False] * 3 + [True] * 3
    assert weights.moved(Role.CRITIC) == [True] * 6
    entries = tiny.rollout_entries(trainer)
    assert [entry["kl"] for entry in entries[:2]] == [0.0, 0.0]
    assert [entry["beta"] for entry in entries] == [0.1] * 3  # a KL of 0 that nothing has moved says nothing


@pytest.mark.parametrize(("threshold", "moved"), [(-1e9, [True] * 6), (1.0, [False] * 4 + [True] * 2)])
def test_warm_up_ends_early_when_the_critic_explains_enough(world, tmp_path, threshold, moved):
    weights = Weights()
    options = WARMUP | {"critic_warmup_steps": 4, "critic_warmup_explained_variance": threshold, "max_steps": 6}
    trained(world, tmp_path, callbacks=[weights], **options)
    assert weights.moved(Role.POLICY) == moved


def rates(trainer, role) -> list[float]:
    return [entry[f"learning_rate/{role}"] for entry in trainer.state.log_history[:-1]]


def factors(name, steps, warmup):
    """A schedule of transformers, alone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup, steps)
    return [scheduler.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3, 0.5])
def test_the_policys_learning_rate_follows_its_schedule_from_its_own_first_step_on(world, tmp_path, name, warmup):
    options = {"lr_scheduler_type": name, "warmup_steps": warmup, "max_steps": 10, "critic_learning_rate": 0.02}
    trainer = trained(world, tmp_path, critic_warmup_steps=4, **WARMUP | options)
    steps = [math.ceil(warmup * total) if warmup < 1 else warmup for total in (6, 10)]
    own, whole_run = factors(name, 6, steps[0]), factors(name, 10, steps[1])
    assert rates(trainer, "policy")[4:] == pytest.approx([1e-2 * factor for factor in own])
    assert rates(trainer, "critic") == pytest.approx([2e-2 * factor for factor in whole_run])
    assert warmup == 0 or rates(trainer, "policy")[4] == 0.0


def test_the_schedule_starts_with_the_policy_where_the_critic_is_ready_early(world, tmp_path):
    options = WARMUP | {"critic_warmup_steps": 5, "critic_warmup_explained_variance": -1e9, "warmup_steps": 2}
    early = trained(world, tmp_path, **options)
    assert early.ppo_state.policy_start == 0
    assert rates(early, "policy")[1:] == pytest.approx([1e-2 * factor for factor in factors("linear", 8, 2)[1:]])


def test_a_schedule_of_the_users_own_is_left_as_it_is(world, tmp_path):
    model = tiny.four_roles(world)
    optimizer = torch.optim.SGD(model.parameter_groups({Role.POLICY: 0.5, Role.CRITIC: 0.25}))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    args = tiny.config(tmp_path, **RUN | WARMUP | {"critic_warmup_steps": 4})
    own = {"args": args, "train_dataset": tiny.prompts(), "optimizers": (optimizer, scheduler)}
    trainer = PPOMaxTrainer(model=model, **own)
    trainer.train()
    assert rates(trainer, "policy") == pytest.approx([0.5 / (1 + step) for step in range(8)])


# ---------------------------------------------------------------------- KL


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_reference_computes_only_where_beta_is_not_zero(world, tmp_path, monkeypatch, beta):
    asked, forward = set(), SharedBaseModel.forward

    def record(self, *args, roles=(), **kwargs):
        asked.update(roles)
        return forward(self, *args, roles=roles or None, **kwargs)

    monkeypatch.setattr(SharedBaseModel, "forward", record)
    trainer = trained(world, tmp_path, beta=beta, max_steps=2)
    assert asked == {Role.POLICY, Role.CRITIC} | ({Role.REFERENCE} if beta else set())
    entry = tiny.rollout_entries(trainer)[0]
    assert ("kl" in entry) == (beta != 0)
    assert entry["beta"] == beta


def bounded(x, size):
    return min(max(x, -size), size)


@pytest.mark.parametrize("target", [1e-4, 0.5, 100.0])
@pytest.mark.parametrize("control", ["pi", "fixed", "adaptive", "penalty"])
def test_beta_moves_as_its_controller_says(world, tmp_path, control, target):
    options = {"kl_control": control, "kl_target": target, "max_steps": 8}
    options |= {"kl_horizon": 16.0} if control == "adaptive" else {}
    trainer = trained(world, tmp_path, **options, update_kl_target=0.0, guard=False)
    entries = tiny.rollout_entries(trainer)
    betas, kls = [entry["beta"] for entry in entries], [entry["kl"] for entry in entries]
    expected = [0.05]
    for last, kl in zip([0.0, *kls], kls[:-1], strict=False):
        penalty = 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
        factor = {
            "pi": math.exp(0.1 * bounded(kl / target - 1, 1) + 1.5 * bounded((kl - last) / target, 1)),
            "fixed": 1.0,
            "penalty": penalty,
            "adaptive": 1 + bounded(kl / target - 1, 0.2) * 4 / 16.0,
        }[control]
        expected.append(expected[-1] * factor)
    assert betas == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------- gradients

# The rollout is not the model's own: ratios far from 1, which the default clip would cut to a gradient of 0
OPEN = {"epsilon": 0.9, "value_clip": 5.0, "max_grad_norm": 1e9, "entropy_coef": 0.1, "max_steps": 20}


def whole(world, folder, **options):
    trainer = tiny.trainer(world, folder, **OPEN | {"per_device_train_batch_size": 8} | options)
    return tiny.gradients(trainer, tiny.random_rollout())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_accumulated_micro_batches_have_the_gradient_of_one_batch(world, tmp_path, checkpointing):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    options |= {"gradient_checkpointing": checkpointing}
    parts = tiny.gradients(tiny.trainer(world, tmp_path, **OPEN | options), tiny.random_rollout())
    for name, gradient in whole(world, tmp_path).items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-6)


def test_optimizer_steps_over_one_rollout_share_its_gradient(world, tmp_path):
    # 4 micro-batches, 2 to an optimizer step, 2 passes: at a learning rate of 0 the mean of the 4 steps is the whole.
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    options |= {"num_iterations": 2, "learning_rate": 1e-30, "critic_learning_rate": 0.0, "update_kl_target": 0.0}
    trainer = tiny.trainer(world, tmp_path, **OPEN | options)
    parts = tiny.gradients(trainer, tiny.random_rollout(), steps=4)
    for name, gradient in whole(world, tmp_path).items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_figure(world, tmp_path):
    off, on = (trained(world, tmp_path, gradient_checkpointing=value) for value in (False, True))
    assert on.model.get_base_model().is_gradient_checkpointing
    for x, y in zip(tiny.comparable(off.state.log_history), tiny.comparable(on.state.log_history), strict=True):
        assert x == pytest.approx(y, rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------------- PPO-ptx

PAIRS = {"prompt": ["w0 w1", "w2"], "completion": ["w3", "w4 w5"]}
MESSAGES = [[{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w3"}]]


@pytest.mark.parametrize(
    "dataset",
    [
        tiny.texts(),
        Dataset.from_dict(PAIRS),
        Dataset.from_dict({"messages": MESSAGES * 2}),
        Dataset.from_dict({"prompt": [m[:1] for m in MESSAGES], "completion": [m[1:] for m in MESSAGES]}),
    ],
    ids=["text", "prompt and completion", "messages", "conversational prompt and completion"],
)
def test_ptx_moves_the_policy_only(world, tmp_path, dataset):
    without = whole(world, tmp_path)
    with_ptx = whole(world, tmp_path, ptx_coef=0.5, ptx_dataset=dataset)
    for name, gradient in without.items():
        is_critic = ".critic." in name or name.startswith("heads")
        assert torch.equal(gradient, with_ptx[name]) == is_critic, name


def batches(dataset, **options):
    options = {"batch_size": 2, "max_length": 8, "seed": 0} | options
    return PTXBatches(dataset, TextEncoder(tiny.tiny_tokenizer()), **options)


def test_ptx_texts_end_with_eos_and_are_cut_and_padded_on_the_right():
    dataset = Dataset.from_dict({"text": ["w0 w1", "w0 w1 w2 w3 w4 w5"]})
    batch = batches(dataset, max_length=4).batch(0)
    rows = {tuple(row) for row in batch["input_ids"].tolist()}
    assert rows == {(6, 7, 1, 0), (6, 7, 8, 9)}  # words begin at 6; eos is 1, pad 0
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [3, 4]
    pair = batches(Dataset.from_dict({"prompt": ["w0 "], "completion": ["w1"]}), batch_size=1).batch(0)
    assert pair["input_ids"].tolist() == [[6, 7, 1]]


def test_ptx_shows_every_row_once_an_epoch_over_all_processes():
    own = [batches(tiny.texts(6), batch_size=1, process_index=i, num_processes=2, max_length=30) for i in (0, 1)]
    epochs = []
    for start in (0, 3):
        rows = [int(b.batch(k)["attention_mask"].sum()) for k in range(start, start + 3) for b in own]
        assert len(set(rows)) == 6  # the texts differ in length
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def test_a_trainer_cuts_orders_and_divides_its_ptx_texts_as_its_arguments_say():
    def rows(made):
        return [made.batch(k)["input_ids"].tolist() for k in range(3)]

    own = {"batch_size": 1, "max_length": 6, "seed": 3, "process_index": 1, "num_processes": 2}
    args = SimpleNamespace(per_device_train_batch_size=1, ptx_max_length=6, seed=3, process_index=1, world_size=2)
    made = rows(ptx_batches(tiny.texts(6), TextEncoder(tiny.tiny_tokenizer()), args))
    assert made == rows(batches(tiny.texts(6), **own))
    for name in own:
        other = own | {name: own[name] - 1 or own[name] + 1}
        assert made != rows(batches(tiny.texts(6), **other)), f"{name} might as well not be passed on"


def test_ptx_rows_without_a_text_are_named_at_construction():
    with pytest.raises(ValueError, match=r"ptx_dataset has 2 rows whose text is empty, \[1, 2\] among them: .*filter"):
        batches(Dataset.from_dict({"text": ["w0", "", "  ", "w1"]}))
    with pytest.raises(ValueError, match=r"1 rows whose messages is empty, \[0\]"):
        batches(Dataset.from_dict({"messages": [[], *MESSAGES]}))


def test_a_ptx_text_of_one_token_is_named_and_not_a_loss_of_nan():
    made = batches(Dataset.from_dict({"text": ["w0", "w1"]}))
    made.encoder.document_ids = lambda row: [6]
    with pytest.raises(ValueError, match=r"ptx_dataset row [01] has 1 token, of which none can be predicted"):
        made.batch(0)


def test_an_epoch_of_ptx_texts_is_ordered_once(monkeypatch):
    drawn, permutation = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(args) or permutation(*args, **kwargs))
    made = batches(tiny.texts(6))
    for index in range(6):
        made.batch(index)
    assert len(drawn) == 2
