"""The stages in one process: what is refused before a model loads, and a run that is killed and goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.ppo import tiny
from trl_ext.data import ConversionReport
from trl_ext.feedback.labels import LabelFile
from trl_ext.runs import RunStoppedError
from trl_ext.scripts import rlhf, rlhf_facts, rlhf_rounds, rlhf_stages, rlhf_summary
from trl_ext.scripts.arguments import PromptArguments
from trl_ext.scripts.inputs import load_prompts

OWN = ["--model_name_or_path=m", "--output_dir=x", "--use_cpu", "--preferences=p.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--members=1"], "--members 1: must be at least 2"),
        (["--rounds=0"], "--rounds 0: must be at least 1"),
        (["--rounds=2", "--random_share=1"], "--random_share 1.0"),
        (["--rounds=2", "--choose=best"], "--choose best is unknown"),
        (["--judge=me"], "--judge me is unknown"),
        (["--labels_per_round=9"], "--labels_per_round: labels are given between rounds, and there is one"),
        (["--preferences=p.jsonl"], "--preferences: without --model_name_or_path"),
        (["--judge=endpoint"], "--judge_model is missing"),
        (["--judge=endpoint", "--judge_model=m", "--judge_api_key_env=NO_KEY"], "NO_KEY is not set"),
        (["--judge=local", "--judge_model=m", "--judge_base_url=u"], "--judge_base_url: of an endpoint"),
        (["--judge_model=m"], "--judge_model: no model judges"),
        (["--label_port=1"], "--label_port: no people are asked"),
        (["--ptx_coef=1"], "--ptx_coef 1.0"),
        (["--vllm_one_copy=true"], "--vllm_one_copy: only trl-ext ppo-max has it"),
        (["--resume_from_checkpoint=true"], "goes on by itself"),
        (["--reward_weights", "1"], "--reward_weights: reward models score"),
        ([*OWN], "give --sft_dataset"),
        ([*OWN, "--sft_dataset=d", "--policy_adapter=a"], "give --sft_dataset"),
        ([*OWN, "--policy_adapter=a", "--sft_config=c"], "--sft_config: with --policy_adapter"),
        ([*OWN, "--sft_dataset=d", "--rounds=2", "--labels_from=gold"], "only the embedded world has a gold reward"),
        ([*OWN, "--sft_dataset=d", "--prompts_test=t"], "--prompts_test: without --prompts"),
        ([*OWN, "--sft_dataset=d", "--world_pairs=99"], "--world_pairs: of the embedded world"),
        ([*OWN[:3], "--sft_dataset=d"], "--preferences is missing"),
    ],
)
def test_what_cannot_be_honoured_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        rlhf.parse(flags)


def test_the_world_has_its_own_configurations_and_a_run_of_ones_own_others():
    recipe, training, *_ = rlhf.parse([])
    assert (recipe.sft_config, recipe.reward_config, recipe.labels_from) == ("sft_toy", "reward_rlhf_toy", "gold")
    assert training.use_cpu
    recipe, *_ = rlhf.parse([*OWN, "--sft_dataset=d"])
    assert (recipe.sft_config, recipe.labels_from) == ("sft", "people")


def test_a_configuration_with_a_wrong_key_is_named(tmp_path: Path):
    (tmp_path / "s.yaml").write_text("learning_rat: 1\n")
    training = rlhf.parse([])[1]
    with pytest.raises(ValueError, match=r"learning_rat in .*s\.yaml: no such option of SFTConfig"):
        rlhf_stages.sft_arguments(str(tmp_path / "s.yaml"), training, tmp_path)


def test_a_stage_that_was_made_of_something_else_is_an_error(tmp_path: Path):
    assert not rlhf_facts.done(tmp_path, {"seed": 1})
    rlhf_facts.finish(tmp_path, {"seed": 1, "path": Path("a"), "options": {"lr": 1, "steps": 2}})
    assert rlhf_facts.done(tmp_path, {"seed": 1, "path": Path("a"), "options": {"lr": 1, "steps": 2}})
    with pytest.raises(ValueError, match=r"was made with other settings \(options: lr, seed\)"):
        rlhf_facts.done(tmp_path, {"seed": 2, "path": Path("a"), "options": {"lr": 3, "steps": 2}})


def test_a_stage_that_was_begun_with_something_else_or_nobody_knows_what_is_an_error(tmp_path: Path):
    rlhf_facts.begin(tmp_path / "a", {"seed": 1})
    rlhf_facts.begin(tmp_path / "a", {"seed": 1})
    with pytest.raises(ValueError, match=r"a was begun with other settings \(seed\)"):
        rlhf_facts.begin(tmp_path / "a", {"seed": 2})
    (tmp_path / "b" / "member_1" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"b holds member_1/checkpoint-3, and no begun\.json"):
        rlhf_facts.begin(tmp_path / "b", {"seed": 1})


class Killed(BaseException):
    pass


def killed(*args, **kwargs):
    raise Killed


def rows(count: int, answer: str = "good") -> Dataset:
    names = {"prompt": "p", "chosen": answer, "rejected": "bad"}
    return Dataset.from_list([{name: f"{text} {i}" for name, text in names.items()} for i in range(count)])


def work_of(folder: Path, *flags: str, **parts) -> rlhf_stages.Work:
    """A run in the embedded world without a base."""
    recipe, training, model_args, given = rlhf.parse([f"--output_dir={folder}", "--seed=3", *flags])
    nothing = dict.fromkeys(("base", "tokenizer", "encoder"), MagicMock())
    data = {"demonstrations": rows(4), "preferences": rows(6), "test_pairs": rows(2, "test")}
    data |= {name: Dataset.from_dict({"prompt": [f"{name} {i}" for i in range(4)]}) for name in ("prompts", "held_out")}
    return rlhf_stages.Work(recipe, training, model_args, given, folder, **nothing | data | {"show": print} | parts)


def test_a_stage_that_was_killed_does_not_go_on_with_other_data_or_options(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rlhf_stages, "train_ensemble", killed)
    monkeypatch.setattr(rlhf_stages, "fresh_reward_model", MagicMock())
    with pytest.raises(Killed):
        rlhf_stages.run_rewards(work_of(tmp_path), 1, {"start": rows(6)}, [])
    with pytest.raises(Killed):
        rlhf_stages.run_rewards(work_of(tmp_path), 1, {"start": rows(6)}, [])
    with pytest.raises(ValueError, match=r"round_1/reward was begun with other settings \(content of preferences\)"):
        rlhf_stages.run_rewards(work_of(tmp_path), 1, {"start": rows(6, "other")}, [])

    monkeypatch.setattr(trl, "SFTTrainer", killed)
    with pytest.raises(Killed):
        rlhf_stages.run_sft(work_of(tmp_path))
    with pytest.raises(ValueError, match=r"sft was begun with other settings \(content of sft_dataset, rows"):
        rlhf_stages.run_sft(work_of(tmp_path, demonstrations=rows(5)))
    with pytest.raises(ValueError, match=r"sft was begun with other settings \(options: .*learning_rate"):
        rlhf_stages.run_sft(work_of(tmp_path, "--sft_config=sft"))


def test_sft_goes_on_at_a_checkpoint_that_is_whole(tmp_path: Path, capsys):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.zeros(2)}, folder / "adapter_model.safetensors")
        for name in ("adapter_config.json", "trainer_state.json"):
            (folder / name).write_text("{}")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({}, folder / name)
    work = work_of(tmp_path)
    assert rlhf_stages.sft_checkpoint(work, tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert rlhf_stages.sft_checkpoint(work, tmp_path) == str(tmp_path / "checkpoint-5")
    assert "checkpoint-10 was passed over: trainer_state.json is missing" in capsys.readouterr().out


def test_reward_models_hang_on_the_pairs_that_test_them(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rlhf_stages, "train_ensemble", killed)
    monkeypatch.setattr(rlhf_stages, "fresh_reward_model", MagicMock())
    with pytest.raises(Killed):
        rlhf_stages.run_rewards(work_of(tmp_path), 1, {"start": rows(6)}, [])
    with pytest.raises(ValueError, match=r"other settings \(content of test_pairs\)"):
        rlhf_stages.run_rewards(work_of(tmp_path, test_pairs=rows(2, "new")), 1, {"start": rows(6)}, [])


@pytest.mark.parametrize("flag", ["--lora_dropout=0.3", "--use_rslora", "--lora_target_modules=q_proj", "--lora_r=3"])
def test_no_flag_of_the_model_is_dropped_when_the_command_runs_again(tmp_path: Path, flag):
    facts = rlhf_facts.model_facts(work_of(tmp_path))
    assert len(rlhf_facts.differing_facts(facts, rlhf_facts.model_facts(work_of(tmp_path, flag)))) == 1


def test_an_adapter_is_another_one_by_its_weights_its_scaling_or_its_scale(tmp_path: Path):
    def digest(weight: float = 0, alpha: int = 8, std: float | None = None, task: str = "CAUSAL_LM") -> str:
        save_file({"w": torch.tensor([weight])}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha, "task_type": task}))
        (tmp_path / "reward_scale.json").unlink(missing_ok=True)
        if std is not None:
            (tmp_path / "reward_scale.json").write_text(json.dumps({"mean": 0.0, "std": std, "count": 4}))
        return rlhf_facts.digest(tmp_path)

    assert digest() == digest(task="SEQ_CLS")
    assert len({digest(), digest(1), digest(alpha=9), digest(std=1.0), digest(std=2.0)}) == 5
    assert rlhf_facts.digest(Path("me/adapter")) == "me/adapter"


def test_a_round_is_measured_anew_on_other_held_out_prompts(tmp_path: Path, monkeypatch):
    asked = []

    def answer(work, policy, prompts, path, count):
        asked.append((prompts["prompt"][:], path.name))
        return [{"prompt": prompt, "responses": ["she fell ."]} for prompt in prompts["prompt"]]

    monkeypatch.setattr(rlhf_rounds, "answer", answer)
    monkeypatch.setattr(rlhf_rounds, "member_scores", lambda *parts: (torch.ones(len(parts[3]), 3), None))
    (tmp_path / "round_1").mkdir()
    others = Dataset.from_dict({"prompt": ["q"]})
    for number, parts in enumerate(({}, {}, {"held_out": others}), start=1):
        found = rlhf_rounds.measure(work_of(tmp_path, **parts), 1, Path("me/policy"), [Path("me/reward")])
        assert found["length"] == len("she fell .")
        assert len(asked) == (1, 1, 2)[number - 1]
    assert asked[1][0] == ["q"]
    assert asked[0][1] != asked[1][1], "a file of answers is of its prompts"


def choices(count: int) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(row=lambda i=i: {"prompt": f"q {i}", "answer_a": f"a {i}", "answer_b": f"b {i}"} | BY)
        for i in range(count)
    ]


BY = {"chosen_by": "random"}
ROUNDS = ("--rounds=2", "--choose=random", "--random_share=0.25")


def test_preferences_of_a_round_stay_as_they_were_written(tmp_path: Path, monkeypatch):
    def some_fail(work, pairs, folder):
        file = LabelFile(folder, "gold", [pair.id for pair in pairs])
        for pair in pairs[:-2]:  # as where an endpoint gave no verdict
            file.label(pair.id, "a")

    def all_answer(work, pairs, folder):
        file = LabelFile(folder, "gold", [pair.id for pair in pairs])
        for pair in pairs[-2:]:
            file.label(pair.id, "b")

    monkeypatch.setattr(rlhf_rounds, "choose", lambda *parts: choices(10))
    monkeypatch.setattr(rlhf_rounds, "accuracy_on", lambda *parts: {"pairs": len(parts[2])})
    found = []
    for give in (some_fail, all_answer):
        monkeypatch.setattr(rlhf_rounds, "give_labels", give)
        found.append(rlhf_rounds.label_round(work_of(tmp_path, *ROUNDS), 2, Path("p"), [], {}).to_list())
    assert found[0] == found[1]
    assert len(found[0]) == 6  # of 8 labels a fourth is held out
    with pytest.raises(ValueError, match=r"round_2 was made with other settings \(temperature\)"):
        rlhf_rounds.label_round(work_of(tmp_path, *ROUNDS, "--temperature=0.7"), 2, Path("p"), [], {})


def test_labels_of_two_sources_are_not_mixed(tmp_path: Path):
    def recipe(source: str, **more) -> SimpleNamespace:
        judge = {"judge": "endpoint", "judge_model": "m", "judge_base_url": None, "judge_prompt": "helpful"}
        return SimpleNamespace(labels_from=source, **judge | more)

    folder = tmp_path / "pairs.labels"
    rlhf_rounds.begin_labels(recipe("judge"), folder)
    rlhf_rounds.begin_labels(recipe("judge"), folder)
    with pytest.raises(ValueError, match=r"pairs.labels was begun with other settings \(.*labels_from\)"):
        rlhf_rounds.begin_labels(recipe("people"), folder)
    for name, value in (("judge_model", "other"), ("judge_prompt", "harmless"), ("judge", "local")):
        with pytest.raises(ValueError, match=rf"other settings \({name}\)"):
            rlhf_rounds.begin_labels(recipe("judge", **{name: value}), folder)
    old = tmp_path / "old.labels"
    old.mkdir()
    (old / "gold.jsonl").touch()
    for source in ("judge", "people"):
        with pytest.raises(ValueError, match=f"holds labels of gold, and --labels_from is {source}"):
            rlhf_rounds.begin_labels(recipe(source), old)
    rlhf_rounds.begin_labels(recipe("gold"), old)


def test_pairs_of_earlier_rounds_and_test_pairs_are_not_chosen_again(tmp_path: Path, monkeypatch):
    from trl_ext.feedback.pairs import make_pair, unordered, write_rows

    held, tested = ({"prompt": "q", "answer_a": text, "answer_b": "b"} for text in ("a", "c"))
    write_rows(tmp_path / "round_2" / "pairs.jsonl", [held])
    test_pairs = Dataset.from_list([{"prompt": "q", "chosen": "c", "rejected": "b"}])
    seen = []
    monkeypatch.setattr(rlhf_rounds, "answer", lambda *parts: [])
    monkeypatch.setattr("trl_ext.feedback.choose.make_candidates", lambda rows, taken: seen.append(taken) or killed())
    with pytest.raises(Killed):
        rlhf_rounds.choose(work_of(tmp_path, test_pairs=test_pairs), 3, Path("p"), [], {"start": rows(2)})
    assert {unordered(make_pair(row)) for row in (held, tested, rows(2)[0])} <= seen[0]


@pytest.mark.parametrize("flags", [(), ("--top_p=0.9",)])
def test_answers_are_sampled_as_the_rollouts_are_and_any_of_their_characters_is_read(tmp_path, monkeypatch, flags):
    told, path = [], tmp_path / "answers.jsonl"

    def sample(model, encoder, prompts, path, args, *rest):
        told.append(args)
        lines = [{"index": i, "prompt": "p", "responses": [f"a{end}b"]} for i, end in enumerate(ENDS)]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    monkeypatch.setattr("trl_ext.SharedBaseModel", MagicMock())
    monkeypatch.setattr("trl_ext.roles.read_adapter", MagicMock())
    monkeypatch.setattr("trl_ext.rrhf.sample_responses", sample)
    found = rlhf_rounds.answer(work_of(tmp_path, *flags), Path("p"), [], path, 3)
    assert [row["responses"][0] for row in found] == [f"a{end}b" for end in ENDS]
    assert told[0].counts == ({"nucleus": 3} if flags else {"temperature": 3})
    assert not flags or told[0].sampling_top_p == 0.9


ENDS = ("\u2028", "\u2029", "\x85", "\x1c", "\n")


def test_reward_models_read_pairs_as_long_as_the_run_allows_with_its_memory(tmp_path: Path):
    flags = [*OWN, "--sft_dataset=d", "--max_prompt_length=700", "--max_completion_length=300"]
    recipe, training, *_ = rlhf.parse([*flags, '--chat_template_kwargs={"a": 1}'])
    settings = rlhf_stages.reward_settings(recipe, training)
    assert (recipe.reward_config, settings["max_length"], settings["gradient_checkpointing"]) == ("reward", 1000, True)
    assert settings["chat_template_kwargs"] == {"a": 1}
    assert rlhf_stages.reward_arguments("reward", **settings | {"output_dir": str(tmp_path)}).max_length == 1000
    recipe.reward_config, training.gradient_checkpointing = "reward_qlora_8b", False
    settings = rlhf_stages.reward_settings(recipe, training)
    assert (settings["max_length"], settings["gradient_checkpointing"]) == (1024, True), "the file's own"
    assert not {"load_in_4bit", "lora_r"} & set(settings)


def test_rows_that_a_reward_model_drops_are_counted_on_the_console(tmp_path: Path, monkeypatch, capsys):
    class Trainer:
        def __init__(self, model, args, train, test, processing_class):
            self.reports = {"train_dataset": ConversionReport("pairs", rows_read=len(train), rows_kept=len(train) - 2)}
            self.evaluate_pairs, self.save_model = lambda: {"accuracy": 0.5}, MagicMock()
            self.create_model_card, self.state = MagicMock(), SimpleNamespace(log_history=[{"loss": 0.5}])

    def ensemble(model, args, seeds, make, starts):
        return (make(model, args) for _ in seeds)

    monkeypatch.setattr("trl_ext.RewardModelTrainer", Trainer)
    for name, value in (("train_ensemble", ensemble), ("show_progress", MagicMock())):
        monkeypatch.setattr(rlhf_stages, name, value)
    monkeypatch.setattr(rlhf_stages, "fresh_reward_model", MagicMock())
    rlhf_stages.run_rewards(work_of(tmp_path), 1, {"start": rows(6)}, [])
    assert capsys.readouterr().out.count("pairs: 6 rows read, 4 kept") == 1


def test_options_of_the_chat_template_reach_sft(tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(trl, "SFTTrainer", lambda **parts: seen.append(parts["train_dataset"]) or killed())
    with pytest.raises(Killed):
        rlhf_stages.run_sft(work_of(tmp_path, '--chat_template_kwargs={"enable_thinking": false}'))
    assert seen[0]["chat_template_kwargs"][:] == [{"enable_thinking": False}] * 4


def test_a_policy_that_the_guard_stopped_is_said_to_be_one_and_evaluate_finds_its_prompts(
    tmp_path: Path, monkeypatch, capsys
):
    trainer = MagicMock()
    trainer.train.side_effect = RunStoppedError("the KL is too large")
    trainer.save_model.side_effect = lambda: (tmp_path / "round_1" / "ppo").mkdir(parents=True)
    monkeypatch.setattr("trl_ext.PPOMaxTrainer", lambda *parts, **named: trainer)
    monkeypatch.setattr("trl_ext.SharedBaseModel", MagicMock())
    monkeypatch.setattr("trl_ext.roles.read_adapter", MagicMock())
    monkeypatch.setattr(rlhf_stages, "show_progress", MagicMock())
    work = work_of(tmp_path, base=MagicMock(name_or_path="base"))
    for _ in range(2):
        policy = rlhf_stages.run_ppo(work, 1, Path("me/sft"), None, [Path("me/a"), Path("me/b")])
        said = capsys.readouterr().out
        assert "ended before its last step: the KL is too large" in said
    assert trainer.train.call_count == 1, "it is done all the same"
    assert json.loads((policy / "stage.json").read_text())["ended_early"] == "the KL is too large"

    monkeypatch.setattr(rlhf_rounds, "answer", lambda *parts: [{"prompt": "p", "responses": ["she fell ."]}])
    monkeypatch.setattr(rlhf_rounds, "member_scores", lambda *parts: (torch.ones(len(parts[3]), 2), None))
    (tmp_path / "round_1" / "reward").mkdir()
    (tmp_path / "round_1" / "reward" / "accuracy.json").write_text("[0.5]")
    rlhf_rounds.report(work, [rlhf_rounds.measure(work, 1, policy, [Path("me/a"), Path("me/b")])])
    assert json.loads((tmp_path / "rounds.json").read_text())[0]["ended_early"] == "the KL is too large"
    assert "PPO-Max of round 1 ended before its last step: the KL is too large" in capsys.readouterr().out

    options = trainer.recorder.options
    assert options["model_name_or_path"] == "base"
    recipe = PromptArguments(options["dataset_name"], dataset_test_name=options["dataset_test_name"])
    train, test = load_prompts(recipe, print)
    assert (train["prompt"][:], test["prompt"][:]) == (work.prompts["prompt"][:], work.held_out["prompt"][:])


def run(folder: Path, *flags: str) -> None:
    sft, reward = folder.parent / "sft.yaml", folder.parent / "reward.yaml"
    small = "per_device_train_batch_size: 8\nlearning_rate: 1.0e-2\nmax_steps: 1\nmax_length: 64\nsave_strategy: 'no'\n"
    sft.write_text(small + "gradient_checkpointing: true\n")
    reward.write_text(small)
    rlhf.main(
        [
            *[f"--output_dir={folder}", f"--sft_config={sft}", f"--reward_config={reward}", "--use_cpu"],
            *["--world_scale=0.02", "--world_pairs=24", "--rounds=2", "--labels_per_round=10", "--sampled_prompts=16"],
            *["--judged_prompts=8", "--report_to=none", "--bf16=false", "--gradient_checkpointing=true"],
            *["--save_strategy=no", "--disable_tqdm=true", "--max_steps=2", "--per_device_train_batch_size=4"],
            *["--steps_per_generation=2", "--max_completion_length=12", "--logging_steps=1"],
            *["--critic_warmup_steps=0", "--write_report=false", *flags],
        ]
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_at_its_stage_and_repeats_none(tmp_path: Path, monkeypatch, capsys):
    folder, loads = tmp_path / "out", []
    load, ppo = AutoModelForCausalLM.from_pretrained, rlhf_stages.run_ppo
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))

    def killed_in_round_two(work, number, *parts):
        if number == 2:
            raise Killed
        return ppo(work, number, *parts)

    monkeypatch.setattr(rlhf_stages, "run_ppo", killed_in_round_two)
    with pytest.raises(Killed):
        run(folder)
    assert len(loads) == 1, "the base is loaded once for all stages"
    labels = (folder / "round_2" / "pairs.labels" / "gold.jsonl").read_bytes()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("**/adapter_model.safetensors")}
    monkeypatch.setattr(rlhf_stages, "run_ppo", ppo)
    capsys.readouterr()
    run(folder)
    shown = capsys.readouterr().out
    assert "SFT is there." in shown
    assert "Round 1: the policy is there." in shown
    assert "Round 2: reward models are there." in shown
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (folder / "round_2" / "pairs.labels" / "gold.jsonl").read_bytes() == labels
    course = json.loads((folder / "rounds.json").read_text())
    assert [found["round"] for found in course] == [1, 2]
    assert course[1]["before"]["pairs"] == 2  # a fifth of ten labels is held out
    assert (folder / "round_2" / "reward" / "member_3" / "adapter_model.safetensors").is_file()
    result = json.loads((folder / "judge" / "result.json").read_text())
    assert result["judged"] == 8
    assert {"gold_a", "gold_b"} <= set(result)
    assert "[report](round_2/ppo/" not in (folder / "README.md").read_text(), "--write_report=false"
    for place, title in (("sft", "out, SFT"), ("round_2/ppo", "out, policy of round 2")):
        card = (folder / place / "README.md").read_text()
        assert f"# {title}" in card
        assert "More Information Needed" not in card
        assert str(folder) not in card
    with pytest.raises(ValueError, match="round_1/ppo was made with other settings"):
        run(folder, "--beta=0.2")


def test_the_page_of_a_run_says_how_good_it_is_and_where_everything_lies(tmp_path: Path):
    work = work_of(tmp_path)
    policy = tmp_path / "round_2" / "ppo"
    policy.mkdir(parents=True)
    (policy / "report.html").write_text("")
    figures = {"accuracy": [0.6, 0.8], "proxy": 0.5, "judge": 0.25, "spread": 0.1, "length": 9.0, "gold": -0.1}
    course = [{"round": 1, **figures}, {"round": 2, **figures, "before": {"ensemble": 0.45}, "ended_early": "why"}]
    judged = {"judge": "adapter", "judged": 1000, "rate": 0.75, "interval": (0.5, 1.0)}
    places = {"SFT policy": Path("me/sft"), "round 2, policy": policy}
    page = rlhf_summary.write_summary(work, course, places, judged).read_text()
    assert "| 1 | 0.700 | - | 0.500 | 0.250 | 0.100 | 9.000 | -0.100 |\n| 2 | 0.700 | 0.450 |" in page
    assert "Round 2 ended early: why" in page
    assert "By the last reward model, which PPO never saw, on 1,000 held-out prompts" in page
    assert page.endswith("    trl-ext red-team --policy round_2/ppo\n")
    assert "0.750 (0.500 to 1.000)" in page
    assert "* SFT policy: `me/sft`\n* round 2, policy: `round_2/ppo`: [report](round_2/ppo/report.html)\n" in page
    del course[0]["gold"]
    assert "gold" not in rlhf_summary.write_summary(work, course[:1], places, None).read_text()


def test_the_base_computes_as_before_when_a_trainer_is_done_with_it():
    class Base:
        def forward(self):
            return "plain"

        def activation_checkpointing_disable(self):
            self.checkpointing = False

        def requires_grad_(self, on):
            self.trained = on

    base = Base()
    with rlhf_stages.lent(base):
        base.forward = lambda: "fused"
        assert base.forward() == "fused"
    assert base.forward() == "plain"
    assert not base.trained


def test_the_reader_of_the_world_prefers_what_is_better_most_of_the_time_and_says_the_same_again():
    from trl_ext.feedback.pairs import make_pair

    row = {"answer_a": " she helped a frog . she felt happy and kind . then she went home .", "answer_b": " she bit ."}
    said = [rlhf_rounds.reader(make_pair({"prompt": f"p{i}", **row}), 0) for i in range(50)]
    assert said.count("a") > 45
    assert said == [rlhf_rounds.reader(make_pair({"prompt": f"p{i}", **row}), 0) for i in range(50)]


def test_pairs_drawn_at_random_are_held_out():
    rows = [{"chosen_by": "random" if i % 5 == 0 else "information", "i": i} for i in range(10)]
    kept, tested = rlhf_rounds.held_apart(rows, SimpleNamespace(choose="information", random_share=0.2))
    assert [row["i"] for row in tested] == [0, 5]
    assert len(kept) == 8
    rows = [{"chosen_by": "random", "i": i} for i in range(10)]
    kept, tested = rlhf_rounds.held_apart(rows, SimpleNamespace(choose="random", random_share=0.2))
    assert ([row["i"] for row in tested], len(kept)) == ([0, 1], 8)


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [True, False])
def test_a_run_on_data_of_ones_own(tmp_path: Path, four_bit):
    world, out = tiny.build(tmp_path / "world"), tmp_path / "out"
    asked = [[{"role": "user", "content": f"w{i % 12} w{i // 12}"}] for i in range(40)]
    said = [[{"role": "assistant", "content": f"w{i % 7} w3"}] for i in range(40)]
    other = [[{"role": "assistant", "content": f"w{i % 5} w{i % 3}"}] for i in range(40)]
    files = {
        "sft": [{"prompt": p, "completion": a} for p, a in zip(asked, said, strict=True)],
        "pairs": [
            {"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(asked, said, other, strict=True) if a != b
        ],
        "prompts": [{"prompt": p} for p in asked],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = "per_device_train_batch_size: 8\nmax_steps: 1\nmax_length: 64\nsave_strategy: 'no'\n"
    for name in ("sft", "reward"):
        (tmp_path / f"{name}.yaml").write_text(small)
    rlhf.main(
        [
            *[f"--model_name_or_path={world / 'base'}", f"--output_dir={out}", "--use_cpu", "--bf16=false"],
            *[f"--sft_dataset={tmp_path / 'sft.jsonl'}", f"--preferences={tmp_path / 'pairs.jsonl'}"],
            *[f"--prompts={tmp_path / 'prompts.jsonl'}", f"--sft_config={tmp_path / 'sft.yaml'}"],
            *[f"--reward_config={tmp_path / 'reward.yaml'}", f"--load_in_4bit={str(four_bit).lower()}", "--members=2"],
            *["--report_to=none", "--gradient_checkpointing=false", "--save_strategy=no", "--disable_tqdm=true"],
            *[
                "--max_steps=2",
                "--per_device_train_batch_size=4",
                "--steps_per_generation=2",
                "--critic_warmup_steps=0",
            ],
            *[
                "--max_completion_length=6",
                "--logging_steps=1",
                "--write_report=false",
                "--judged_prompts=4",
                "--lora_r=4",
            ],
        ]
    )
    result = json.loads((out / "judge" / "result.json").read_text())
    assert result["judged"] == 4
    assert json.loads((out / "sft" / "adapter_config.json").read_text())["r"] == 4
    assert (out / "round_1" / "ppo" / "critic" / "adapter_model.safetensors").is_file()
