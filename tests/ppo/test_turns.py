"""Completions of several turns: what an environment says is read and not trained, and what TRL's form asks for."""

import pytest
import torch

from tests import chat
from tests.ppo import tiny
from trl_ext.ppo.guard import completion_figures
from trl_ext.ppo.rewards import onto_actions
from trl_ext.ppo.rollout import action_mask
from trl_ext.ppo.turns import check_rollout
from trl_ext.text import TextEncoder

RAW = {"reward_normalization": "none", "reward_clip": None, "update_kl_target": 0.0, "guard": False}
TURNS = {"prompt_ids": [[7], [8]], "completion_ids": [[9, 1, 10, 11], [12, 1]], "logprobs": None}


def test_parts_on_an_environment_s_words_are_the_action_s_before_them():
    placed = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 0.0]])
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    assert onto_actions(placed, mask).tolist() == [[7.0, 0.0, 0.0, 8.0], [0.0, 7.0, 0.0, 0.0]]


def test_a_mask_of_ones_is_none():
    ones = torch.ones(2, 4, dtype=torch.long)
    assert action_mask(None, ones) is None
    assert action_mask([[1, 1, 1, 1], [1, 1]], ones) is None
    assert action_mask([[1, 1, 0, 1], [1, 1]], ones).tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": ...}, r"it lacks \['logprobs'\]"),
        ({"completion_ids": [[9]]}, "1 completion_ids for 2 prompts"),
        ({"turns": [1]}, "1 turns for 2 prompts"),
        ({"env_mask": [[1, 1], [1, 1]]}, "env_mask of completion 0 has 2 entries for its 4 tokens"),
        ({"env_mask": [[1, 1, 2, 1], [1, 1]]}, "env_mask of completion 0 is"),
        ({"logprobs": [[0.0] * 4, [0.0]]}, "logprobs of completion 1 has 1 entries"),
        ({"logprobs": [[0.0, float("nan"), 0.0, 0.0], [0.0] * 2]}, "logprobs of completion 0 are not finite"),
        ({"completion_ids": [[9] * 7, [1]]}, "completion 0 has 7 tokens"),
        ({"completion_ids": [[9], []]}, "completion 1 has 0 tokens"),
    ],
)
def test_what_a_rollout_lacks_is_refused(change, message):
    output = {name: column for name, column in (TURNS | change).items() if column is not ...}
    with pytest.raises(ValueError, match=message):
        check_rollout(output, 2, longest=6)


@pytest.fixture(scope="module")
def trainer(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    made = tiny.trainer(world, folder, reward_funcs=[tiny.count_words], critic_baseline="always", **RAW)
    made.model.train()
    return made


def test_two_turns_are_the_same_text_as_one_where_nothing_is_masked(trainer):
    rows = [{"prompt": prompt} for prompt in tiny.prompts(4)["prompt"]]
    plain = trainer._generate_and_score_completions(rows)

    def in_turns(prompts, owner):
        assert owner is trainer
        lengths = plain["completion_mask"].sum(1).tolist()
        ids = [row[:n] for row, n in zip(plain["completion_ids"].tolist(), lengths, strict=True)]
        ones = [[1] * len(row) for row in ids]
        starts = [
            row[-n:] for row, n in zip(plain["prompt_ids"].tolist(), plain["prompt_mask"].sum(1).tolist(), strict=True)
        ]
        return {"prompt_ids": starts, "completion_ids": ids, "logprobs": None, "env_mask": ones}

    trainer.rollout_func = in_turns
    turns = trainer._generate_and_score_completions(rows)
    trainer.rollout_func = trainer._rolled = None
    assert turns.keys() == plain.keys()
    assert all(torch.equal(turns[name], plain[name]) for name in plain)


def gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}


def test_an_environment_s_tokens_change_no_gradient(trainer):
    rollout = tiny.random_rollout(rows=4)
    mask = rollout.completion_mask.clone()
    mask[:, 1] = 0
    rollout.action_mask = mask
    batch = rollout.update_batch() | {"num_tokens": mask.sum().float()}
    expected = gradients(trainer, batch)
    other = {name: batch[name].clone() for name in ("logps", "values", "advantages", "returns")}
    for tensor in other.values():
        tensor[:, 1] = float("nan")
    found = gradients(trainer, batch | other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    trained = gradients(trainer, {name: x for name, x in batch.items() if name != "action_mask"})
    assert any(not torch.equal(expected[name], trained[name]) for name in expected)


def test_the_entropy_bonus_is_of_the_policy_s_tokens(trainer, monkeypatch):
    rollout = tiny.random_rollout(rows=4)
    rollout.action_mask = rollout.completion_mask.clone()
    rollout.action_mask[:, 1] = 0
    batch = rollout.update_batch() | {"num_tokens": rollout.action_mask.sum().float()}
    without = trainer._compute_loss(trainer.model, batch)
    monkeypatch.setattr(trainer.args, "entropy_coef", 0.1)
    entropy = torch.full(rollout.completion_mask.shape, 2.0)
    entropy[:, 1] = float("nan")
    taken = trainer._pass
    monkeypatch.setattr(trainer, "_pass", lambda *given: taken(*given) | {"entropy": entropy})
    with_bonus = trainer._compute_loss(trainer.model, batch)
    assert (without - with_bonus).item() == pytest.approx(0.1 * 2.0, rel=1e-5)


def test_what_the_guard_watches_is_the_policy_s_own():
    rollout = tiny.random_rollout(rows=4)
    rollout.completions = ["the environment says much"] * 4
    rollout.action_mask = torch.zeros_like(rollout.completion_mask)
    rollout.action_mask[:, 0] = 1
    figures = completion_figures(rollout, lambda x: x)
    assert (figures["tokens"], figures["completions/ended_at_once"]) == (1.0, 1.0)
    assert figures["completions/distinct_2"] == 0.0


def test_a_conversation_of_several_turns_is_never_rendered_as_one_message():
    tokenizer = chat.shipped_tokenizer("qwen3")  # writes an empty block of reasoning before the last answer
    encoder, user = TextEncoder(tokenizer), [{"role": "user", "content": "Hi"}]
    said = tokenizer("No.<|im_end|>Why?<|im_end|>Yes", add_special_tokens=False)["input_ids"]
    prompt_ids = encoder.prompt_ids(user)
    given = (user, prompt_ids, [*said, tokenizer.eos_token_id])
    assert encoder.scored_ids(*given, as_sampled=True)[: len(prompt_ids) + len(said)] == [*prompt_ids, *said]
    assert encoder.scored_ids(*given)[: len(prompt_ids) + len(said)] != [*prompt_ids, *said]


def test_a_run_in_two_turns_trains_and_counts_the_policy_s_tokens(world, tmp_path):
    """The policy says w1, the environment answers w9, and w2 and the end are the policy's again; the words are paid."""
    seen = []

    def paid(prompts, completions, completion_ids, said, **kwargs):
        seen.append((completions[0], said[0]))
        return [{"tokens": [(0, 1, 0.25), (0, 2, 0.5)]} for _ in completions]

    def in_turns(prompts, trainer):
        first, answers, texts = trainer.complete(prompts)
        assert len(answers) == len(texts) == len(prompts)
        return {
            "prompt_ids": first,
            "completion_ids": [[7, 15, 8, 1]] * len(prompts),
            "logprobs": [[-1.0, 0.0, [-2.0], -3.0]] * len(prompts),  # of an engine each may be a list
            "env_mask": [[1, 0, 1, 1]] * len(prompts),
            "said": ["w9"] * len(prompts),
        }

    trainer = tiny.trainer(world, tmp_path, reward_funcs=[paid], reward_weights=[1.0], rollout_func=in_turns, **RAW)
    batches = []
    made = trainer._generate_and_score_completions

    def keep(inputs):
        batches.append(made(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = keep
    trainer.train()
    assert seen[0] == ("w1 w9 w2", "w9")
    batch = batches[0]
    assert batch["action_mask"].tolist() == [[1, 0, 1, 1]] * 4
    assert batch["sampler_logps"].tolist() == [[-1.0, 0.0, -2.0, -3.0]] * 4
    assert float(batch["num_tokens"]) == 12.0
    assert not batch["advantages"][:, 1].any()
    assert not batch["returns"][:, 1].any()
    entry = tiny.rollout_entries(trainer)[0]
    assert entry["rewards/paid/mean"] == 0.75
    assert entry["completions/truncated_ratio"] == 0.0


def test_a_server_does_not_take_turns(tmp_path):
    with pytest.raises(ValueError, match="rollout_func and vllm_server_url"):
        tiny.trainer(
            None, tmp_path, model="nowhere/at-all", rollout_func=lambda *_: {}, vllm_server_url="http://localhost:8000"
        )
