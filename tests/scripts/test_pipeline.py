"""The pipeline's judgement, and its base, which is loaded once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_ext import SharedBaseModel
from trl_ext.scripts import pipeline
from trl_ext.text import TextEncoder, load_tokenizer
from trl_ext.toy import build_world
from trl_ext.toy.task import CREATURES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """An embedded world of conversations: a line break stands behind the end token."""
    return build_world(tmp_path_factory.mktemp("world"), scale=0.02, template="chatml")


def test_ties_are_neither_wins_nor_losses() -> None:
    before = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    tuned = torch.tensor([[2.0, 2.0], [0.0, 0.0], [1.0, 1.0], [1.5, 0.0]])
    same = torch.tensor([False, False, False, False])
    found = pipeline.judgement_of(before, tuned, same)
    # mean score: 2 > 1, 0 < 1, 1 = 1, 0.75 < 1
    assert (found["win"], found["tie"], found["loss"]) == (0.25, 0.25, 0.5)
    assert found["ensemble_prefers_tuned"] == 0.375
    assert found["each_judge"] == [0.625, 0.375]  # win, loss, tie, win; win, loss, tie, loss
    assert found["all_judges_agree"] == pytest.approx(2 / 3)  # not on the last; the third is a tie
    assert found["standard_error"] == pytest.approx((((0.625**2 + 2 * 0.375**2 + 0.125**2) / 4) ** 0.5) / 2)


def test_the_same_answer_twice_is_a_tie_whatever_rounding_says() -> None:
    before, tuned = torch.tensor([[1.0]]), torch.tensor([[1.0000001]])
    found = pipeline.judgement_of(before, tuned, torch.tensor([True]))
    assert (found["win"], found["tie"], found["loss"]) == (0.0, 1.0, 0.0)
    assert found["each_judge"] == [0.5]
    assert found["all_judges_agree"] is None


def run(folder: Path, world, *flags: str, rows=None) -> dict:
    """A run at tiny size in this process; what was judged."""
    rows = rows or [
        {
            "prompt": [{"role": "user", "content": f"one {time} the small {animal} went to the river ."}],
            "chosen": [{"role": "assistant", "content": "she helped a frog . then she went home ."}],
            "rejected": [{"role": "assistant", "content": "she bit a frog ."}],
        }
        for time in ("morning", "day", "evening", "night")
        for animal in ("fox", "bear", "crow", "hen", "cat", "dog")
    ]
    folder.mkdir(exist_ok=True)
    for name, part in (("train", rows[: len(rows) // 2]), ("test", rows[len(rows) // 2 :])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (folder / "reward.yaml").write_text(
        "use_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\nmax_steps: 1\n"
        "per_device_train_batch_size: 8\nlearning_rate: 1.0e-2\ndisable_tqdm: true\nmax_length: 64\n"
    )
    pipeline.main(
        [
            f"--model_name_or_path={world.base}",
            f"--dataset_name={folder / 'train.jsonl'}",
            f"--dataset_test_name={folder / 'test.jsonl'}",
            f"--output_dir={folder / 'out'}",
            f"--reward_config={folder / 'reward.yaml'}",
            *["--members=3", "--judged_prompts=6", "--use_cpu", "--report_to=none"],
            *["--bf16=false", "--gradient_checkpointing=false", "--save_strategy=no", "--disable_tqdm=true"],
            *["--max_steps=2", "--per_device_train_batch_size=4", "--steps_per_generation=2"],
            *["--max_completion_length=8", "--logging_steps=1", "--critic_warmup_steps=0"],
            *flags,
        ]
    )
    return json.loads((folder / "out" / "judgement.json").read_text())


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory: pytest.TempPathFactory):
    """A run that starts at the SFT adapter: its folder, its judgement, and how often a base was loaded."""
    folder, loads = tmp_path_factory.mktemp("run") / "r", []
    with pytest.MonkeyPatch.context() as patch:
        load = AutoModelForCausalLM.from_pretrained
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
        seen = {}
        scores = pipeline.judge_scores

        def record(judges, encoder, rows):
            seen.setdefault("rows", []).append(rows)
            return scores(judges, encoder, rows)

        patch.setattr(pipeline, "judge_scores", record)
        found = run(folder, world, f"--policy_adapter={world.policy_adapter}", "--lora_r=4")
    return folder, found, loads, seen["rows"]


def test_the_base_is_loaded_once_for_all_stages(judged) -> None:
    assert len(judged[2]) == 1


def test_judges_read_the_assistants_header(judged, world) -> None:
    tokenizer = load_tokenizer(str(world.base))
    header = tokenizer.convert_tokens_to_ids(["<|im_start|>", "assistant", "\n"])
    for ids in (ids for rows in judged[3] for ids in rows):
        assert any(ids[i : i + 3] == header for i in range(len(ids)))


def test_judges_read_what_the_template_puts_behind_the_end(judged, world, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(world.base))
    encoder = TextEncoder(tokenizer)
    prompt = world.train_prompts[0]["prompt"]
    ended, cut = (encoder.response_ids(prompt, "she fell .", ended) for ended in (True, False))
    seen = []

    def record(judges, encoder, rows):
        seen.append(rows[0])
        return torch.zeros(len(rows), 2)

    monkeypatch.setattr(pipeline, "answers", lambda *_: ([encoder.prompt_ids(prompt)], [ended], [cut]))
    monkeypatch.setattr(pipeline, "judge_scores", record)
    model = SharedBaseModel.from_pretrained(str(world.base), with_critic=False)
    members = [judged[0] / "out" / "reward" / f"member_{k}" for k in (2, 3)]
    found = pipeline.judge(SimpleNamespace(model=model, args=None), encoder, [prompt], members)
    assert ended[-1:] == [tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(seen[0][-3:]) == [".", "<|im_end|>", "\n"]
    assert tokenizer.convert_ids_to_tokens(seen[1][-2:]) == ["fell", "."]
    assert found["tie"] == 1


def test_win_tie_and_loss_are_written(judged) -> None:
    found = judged[1]
    assert found["prompts"] == 6
    assert found["win"] + found["tie"] + found["loss"] == pytest.approx(1)
    assert len(found["each_judge"]) == 2
    assert len(found["examples"]) == 5


def test_the_policy_starts_at_its_adapter_and_the_rank_of_the_flags_is_that_of_the_reward_models(judged) -> None:
    folder = judged[0]
    ranks = {
        name: json.loads((folder / "out" / name / "adapter_config.json").read_text())["r"]
        for name in ("", "reference", "reward", "reward/member_2")
    }
    assert ranks == {"": 16, "reference": 16, "reward": 4, "reward/member_2": 4}


@pytest.mark.slow
def test_plain_pairs_and_a_policy_that_does_not_move(judged, tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", scale=0.02)
    rows = [
        {"prompt": f"one {time} the small {animal} ran to the river .", "chosen": " she fell .", "rejected": " he ."}
        for time in ("day", "night")
        for animal in CREATURES
    ]
    still = ("--learning_rate=1e-30", "--critic_learning_rate=1e-30")
    found = run(tmp_path / "r", world, *still, f"--policy_adapter={world.policy_adapter}", rows=rows)
    assert (found["win"], found["tie"], found["loss"]) == (0.0, 1.0, 0.0)
    assert found["examples"][0]["prompt"].startswith("one night the small")


def test_the_flags_of_the_base_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl_ext.scripts.models as models

    seen = {}
    monkeypatch.setattr(models, "load_base", lambda name, **options: seen.update(options))
    flags = ["--load_in_4bit", "--model_revision=r", "--attn_implementation=eager", "--use_cpu"]
    _, training, model_args, _ = pipeline.parse(
        ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=x", *flags]
    )
    pipeline.load_causal_base(model_args, training)
    assert seen["quantization_config"].load_in_4bit
    assert (seen["revision"], seen["attn_implementation"]) == ("r", "eager")


def test_a_reward_config_with_a_wrong_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"learning_rat in .*r\.yaml: no such option; did you mean learning_rate"):
        pipeline.reward_arguments(str(tmp_path / "r.yaml"), output_dir="x")


def test_reward_models_that_are_there_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_name_or_path=m", "--dataset_name=d", f"--output_dir={tmp_path}", "--use_cpu"]
    recipe, training, *_ = pipeline.parse([*flags, "--resume_from_checkpoint=true"])
    assert pipeline.resume_of(recipe, training) is True
    (tmp_path / "reward" / "member_1").mkdir(parents=True)
    (tmp_path / "reward" / "member_1" / "adapter_model.safetensors").write_text("")
    assert pipeline.resume_of(recipe, training) is True
    printed = capsys.readouterr().out
    assert "0 of 5 reward models" in printed
    assert "1 of 5 reward models" in printed
    assert pipeline.resume_of(*pipeline.parse(flags)[:2]) is None


def test_what_was_judged_hangs_on_the_adapters_and_the_prompts(tmp_path: Path) -> None:
    flags = ["--model_name_or_path=m", "--dataset_name=d", f"--output_dir={tmp_path}", "--use_cpu", "--members=2"]
    recipe, training, *_ = pipeline.parse(flags)
    judge = tmp_path / "reward" / "member_2" / "adapter_model.safetensors"
    judge.parent.mkdir(parents=True)
    for path in (judge, tmp_path / judge.name):
        path.write_bytes(b"weights")
    judged = pipeline.judged_of(recipe, training)
    path = tmp_path / "judgement.json"
    assert pipeline.judged_before(path, judged) is None
    pipeline.write_json(path, {"win": 1.0, "judged": judged})
    assert pipeline.judged_before(path, pipeline.judged_of(recipe, training)) == {"win": 1.0, "judged": judged}
    more = pipeline.parse([*flags, "--judged_prompts=7"])[0]
    assert pipeline.judged_before(path, pipeline.judged_of(more, training)) is None
    judge.write_bytes(b"others")
    assert pipeline.judged_before(path, pipeline.judged_of(recipe, training)) is None
    path.write_text("{")
    assert pipeline.judged_before(path, judged) is None
