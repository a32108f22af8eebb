"""The online variants: when responses are sampled, from which policy, how they are scored, and resuming."""

import functools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.rrhf.ranked import chats, count_w3, ranked, trainer, tuned
from trl_ext import Role, SharedBaseModel
from trl_ext.rrhf.data import collate
from trl_ext.scoring import ClassifierReward

ALWAYS = 10_000  # steps


def prompts(rows=8, **columns):
    return Dataset.from_dict({"prompt": ranked(rows)["prompt"], **columns})


def online(world, folder, **options):
    defaults = {"reward_funcs": count_w3, "dataset": prompts(), "online_every_steps": 2, "num_online_responses": 3}
    return trainer(world, folder, **(defaults | options))


class Spy(TrainerCallback):
    """At which step how many prompts were sampled, with which weights, and what each step was trained on."""

    def __init__(self, run):
        self.run, self.sampled, self.weights, self.trained, self.saved = run, [], [], [], []
        resample, compute_loss = run.sampler.resample, run.compute_loss

        def resampled(rows, seed):
            self.sampled.append((run.state.global_step, len(rows)))
            self.weights.append(tiny.role_weights(run.model, Role.POLICY))
            return resample(rows, seed)

        def computed(model, inputs, **kwargs):
            self.trained.append(inputs["rows"])
            return compute_loss(model, inputs, **kwargs)

        run.sampler.resample, run.compute_loss = resampled, computed
        run.add_callback(self)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


def rows_of(run):
    return collate(list(run.train_dataset))["rows"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"online_every_steps": 2}, [(0, 8), (2, 8), (4, 8), (6, 4)]),
        ({"online_every_steps": 1}, [(i, 4) for i in range(7)]),
        ({"online_every_steps": 3}, [(0, 8), (2, 4), (3, 4), (4, 8), (6, 4)]),  # a pass has 2 steps
        ({"online_every_steps": None, "online_every_pass": True}, [(0, 8), (2, 8), (4, 8), (6, 4)]),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, [(0, 8), (2, 8), (4, 8), (6, 4)]),
    ],
)
def test_the_moments_and_the_policy_that_samples(world, tmp_path, options, expected):
    run = online(world, tmp_path, max_steps=7, **options)
    spy = Spy(run)
    run.train()
    assert spy.sampled == expected
    for before, after in zip(spy.weights, spy.weights[1:], strict=False):
        assert not tiny.same(before, after)  # each time the policy as it is then
    micro_steps = 7 * run.args.gradient_accumulation_steps
    assert len(spy.trained) == micro_steps
    assert sum(len(rows) for rows in spy.trained) == 7 * 4
    assert all(len(row.response_ids) == len(row.scores) == 3 for rows in spy.trained for row in rows)
    per_pass = [str(row.prompt) for rows in spy.trained[: micro_steps * 2 // 7] for row in rows]
    assert sorted(per_pass) == sorted(prompts()["prompt"])  # a pass is a pass over all prompts


def test_samples_are_the_policys_and_end_at_eos(world, tmp_path):
    run = online(world, tmp_path, temperature=1e-4)
    new, _ = run.sampler.resample(rows_of(run), seed=1)
    model = run.model.eval()
    for row in new:
        ids, greedy = list(row.prompt_ids), []
        while len(greedy) < 6:
            with torch.no_grad(), model.role(Role.POLICY):
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            greedy.append(token)
            if token in (1, 5):  # <eos>, and <end>, which the base's generation config names
                break
        # no randomness is left: every sample is the greedy response
        assert row.response_ids == [greedy] * 3
    warm, _ = online(world, tmp_path).sampler.resample(rows_of(run), seed=1)
    for response in (ids for row in warm for ids in row.response_ids):
        assert 1 <= len(response) <= 6
        assert not {1, 5} & set(response[:-1])


def test_a_seed_gives_the_same_samples_and_leaves_the_random_state_alone(world, tmp_path):
    run = online(world, tmp_path)
    rows = rows_of(run)
    run.model.train()
    state = torch.get_rng_state()
    first, again, other = (run.sampler.resample(rows, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert run.model.training
    assert [r.response_ids for r in first] == [r.response_ids for r in again]
    assert [r.response_ids for r in first] != [r.response_ids for r in other]
    assert all(not row.response_ids for row in rows)  # left as they were


def test_scores_are_those_of_functions_and_reward_role(world, tmp_path):
    seen = []

    def by_label(prompts, completions, completion_ids, label, **kwargs):
        seen.append((prompts, completions, completion_ids, label))
        return [None if x % 2 else float(x) for x in label]

    run = online(
        world,
        tmp_path,
        model=tuned(world, reward=True),
        dataset=prompts(label=list(range(8))),
        reward_funcs=[count_w3, by_label],
        reward_weights=[2.0, 10.0],
        reward_role_weight=0.5,
        generation_batch_size=7,
    )
    new, _ = run.sampler.resample(rows_of(run), seed=1)
    assert max(len(completions) for _, completions, _, _ in seen) == 7
    decode = functools.partial(run.processing_class.decode, skip_special_tokens=True)
    for label, row in enumerate(new):
        for ids, score in zip(row.response_ids, row.scores, strict=True):
            sequence = torch.tensor([run.encoder.scored_ids(row.prompt, row.prompt_ids, ids)])
            role = run.model.eval().score(sequence, torch.ones_like(sequence)).item()
            expected = 2 * count_w3(None, [decode(ids)])[0] + (0 if label % 2 else 10 * label) + 0.5 * role
            assert score == pytest.approx(expected, abs=1e-4)


def test_conversations_are_scored_as_messages(world, tmp_path):
    def last_message(completions, **kwargs):
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return count_w3(None, completions)

    dataset = chats().remove_columns(["responses", "scores"])
    run = online(world, tmp_path, dataset=dataset, reward_funcs=last_message)
    run.train()
    assert run.state.log_history[0]["reward"] < 1


def test_the_datasets_best_response_can_stay(world, tmp_path):
    run = online(world, tmp_path, dataset=ranked(), online_keep_best=True)
    rows = rows_of(run)
    new, metrics = run.sampler.resample(rows, seed=1)
    for old, row in zip(rows, new, strict=True):
        assert len(row.response_ids) == 4
        assert row.response_ids[3] == old.response_ids[old.scores.index(max(old.scores))]
        text = run.processing_class.decode(row.response_ids[3], skip_special_tokens=True)
        assert row.scores[3] == count_w3(None, [text])[0]  # on the scorer's scale
    samples = [score for row in new for score in row.scores[:3]]
    assert metrics["reward"] == pytest.approx((sum(samples), 24))
    dropped, _ = online(world, tmp_path, dataset=ranked()).sampler.resample(rows, seed=1)
    assert all(len(row.response_ids) == 3 for row in dropped)


def test_metrics_of_the_samples_by_hand(world, tmp_path, monkeypatch):
    run = online(world, tmp_path)
    samples = [[[6, 1], [6, 1], [1]], [[6, 7, 8, 9, 10, 11], [9, 1], [9, 9, 1]]]
    monkeypatch.setattr(run.sampler, "_sample", lambda prompts, seed: samples)
    _, metrics = run.sampler.resample(rows_of(run)[:2], seed=1)
    found = {name: total / count for name, (total, count) in metrics.items()}
    # token 9 is w3; words 6 to 11 are w0 to w5
    rewards = [[-0.1, -0.1, 0.0], [1 - 0.6, 1 - 0.1, 2 - 0.2]]
    flat = [r for group in rewards for r in group]
    assert found["reward"] == pytest.approx(sum(flat) / 6)
    assert found["reward_best"] == pytest.approx((0.0 + 1.8) / 2)
    assert found["reward_spread"] == pytest.approx((0.1 + 1.4) / 2)
    assert found["completions/mean_length"] == pytest.approx((2 + 2 + 1 + 6 + 2 + 3) / 6)
    assert found["completions/truncated_ratio"] == pytest.approx(1 / 6)
    assert found["completions/empty_ratio"] == pytest.approx(1 / 6)
    assert found["completions/duplicate_ratio"] == pytest.approx((1 / 3 + 0) / 2)


def test_it_learns_what_the_scorer_likes(world, tmp_path):
    run = online(
        world,
        tmp_path,
        max_steps=30,
        online_every_steps=1,
        num_online_responses=6,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        sft_token_mean=True,
    )
    run.train()
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    assert len(rewards) == 30
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1


class KilledError(Exception):
    pass


class RaiseAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KilledError


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"online_every_steps": 2, "save_steps": 1}, [2, 4, 6]),
        ({"online_every_steps": 3, "save_steps": 3, "dataset": prompts(20)}, [3, 5]),
        ({"online_every_steps": None, "online_every_pass": True, "save_steps": 1}, [2, 4, 6]),
        ({"online_every_steps": ALWAYS, "save_steps": 3}, [4, 6]),
    ],
)
def test_checkpoints_wait_for_the_next_sampling_and_resume_exactly(world, tmp_path, options, saved):
    options = {"max_steps": 6, "save_strategy": "steps", "beta": 0.1, "learning_rate": 3e-3} | options
    if "dataset" in options:
        options["max_steps"] = 5
    whole = online(world, tmp_path / "whole", **options)
    spy = Spy(whole)
    whole.train()
    assert spy.saved == saved
    with pytest.raises(KilledError):
        online(world, tmp_path / "killed", callbacks=[RaiseAfterSave()], **options).train()
    torch.manual_seed(12345)
    resumed = online(world, tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same(*(tiny.role_weights(run.model, Role.POLICY) for run in (whole, resumed)))
    histories = [tiny.comparable(run.state.log_history[:-1]) for run in (whole, resumed)]
    assert histories[0] == histories[1]


def test_trainings_after_one_another_do_not_share_samples(world, tmp_path):
    run = online(world, tmp_path, max_steps=1, online_every_steps=ALWAYS)
    spy = Spy(run)
    run.sampled_batches.append("left over from a run that was interrupted")
    run.train()
    assert spy.sampled == [(0, 4)]


def test_prompts_must_leave_room_for_a_response(world, tmp_path):
    with pytest.raises(ValueError, match="leaves 5 of max_length=8 for a response, which needs 6"):
        online(world, tmp_path, max_length=8)


def test_what_the_template_puts_behind_a_sample_needs_room_too(world, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(" <end> ", " <end> w11 w11 ")
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1 " * 20}]] * 4})
    options = {"dataset": data, "processing_class": tokenizer, "model": tuned(world, reward=True), "reward_funcs": None}
    with pytest.raises(ValueError, match="leaves 5 of max_length=32 for a response, which needs 6"):
        online(world, tmp_path, max_length=32, **options)
    online(world, tmp_path, max_length=33, **options)


def test_the_card_shows_the_course_of_the_reward(world, tmp_path):
    run = online(world, tmp_path)
    run.train()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "sampled from the current policy" in text
    assert "| step | loss | reward |" in text


def test_a_run_without_a_scorer_is_refused_and_so_is_a_response_that_nothing_scores(world, tmp_path):
    with pytest.raises(ValueError, match="nothing that scores responses"):
        online(world, tmp_path, reward_funcs=None)
    run = online(world, tmp_path, reward_funcs=lambda completions, **kwargs: [None] * len(completions))
    with pytest.raises(ValueError, match="every reward function returned None"):
        run.train()


async def count_later(prompts, completions, **kwargs):
    return [value + 1 for value in count_w3(prompts, completions)]


def test_async_functions_and_reward_models_score(world, tmp_path):
    run = online(world, tmp_path, reward_funcs=[count_later, str(world / "classifier")], reward_weights=[2.0, 1.0])
    new, _ = run.sampler.resample(rows_of(run), seed=1)
    classifier = ClassifierReward(str(world / "classifier"))
    for row in new:
        texts = run.encoder.tokenizer.batch_decode(row.response_ids, skip_special_tokens=True)
        counted, judged = count_w3([], texts), classifier([row.prompt] * len(texts), texts)
        expected = [2 * (count + 1) + score for count, score in zip(counted, judged, strict=True)]
        assert row.scores == pytest.approx(expected, abs=1e-4)
    run.train()
    assert run.state.global_step == 2


def test_the_best_checkpoint_exists_and_comes_back(world, tmp_path):
    """Evaluations wait for the same border as saves: otherwise the best step would have no checkpoint."""
    run = online(
        world,
        tmp_path,
        eval_dataset=ranked(4),
        max_steps=6,
        online_every_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="ranking_accuracy",
        dataset=prompts(16),
    )
    run.train()
    evaluated = [entry["step"] for entry in run.state.log_history if "eval_ranking_accuracy" in entry]
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert evaluated == saved
    best = Path(run.state.best_model_checkpoint)
    assert best.is_dir()
    kept = SharedBaseModel.from_pretrained(str(world / "base"), policy_adapter=best, with_critic=False)
    assert tiny.same(tiny.role_weights(run.model, Role.POLICY), tiny.role_weights(kept, Role.POLICY))
