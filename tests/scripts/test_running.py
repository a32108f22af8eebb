"""Around a training: the output folder, resuming, seeds, tables."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trl_ext.scripts import pipeline, ppo_max, preference_strength, reward_model, rrhf, sample_responses
from trl_ext.scripts.command import work
from trl_ext.scripts.running import (
    EvaluationAtStart,
    ProgressWithMetrics,
    SeededEvaluation,
    checkpoint_to_resume,
    first_evaluation,
    seeded,
    start_run,
    write_json,
)
from trl_ext.scripts.tables import before_and_after, print_pairs, print_table


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (ppo_max, []),
        (rrhf, []),
        (reward_model, []),
        (sample_responses, ["--model_name_or_path=m", "--dataset_name=d", "--reward_funcs=f"]),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_out_first(recipe, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    flag = "--output" if recipe is sample_responses else "--output_dir"
    with pytest.raises(ValueError, match=rf"{flag}.* cannot be written"):
        recipe.main([*flags, f"{flag}={tmp_path / 'file' / 'out'}"])


def test_an_interrupt_ends_a_recipe_with_130_and_without_a_traceback(monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    modules = (ppo_max, rrhf, reward_model, pipeline, preference_strength)
    names = ("ppo-max", "rrhf", "reward-model", "pipeline", "preference-strength")
    for name, recipe in zip(names, modules, strict=True):
        monkeypatch.setattr(recipe, "parse", interrupted)
        with pytest.raises(SystemExit) as ended:
            work(name, [])
        assert ended.value.code == 130
        assert ended.value.__suppress_context__


def test_a_bar_says_what_it_is_of(capsys) -> None:
    bars, state = ProgressWithMetrics({"reward": "reward"}), SimpleNamespace(max_steps=4, is_world_process_zero=True)
    bars.on_train_begin(None, state, None)
    for _ in range(2):
        bars.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    assert (bars.training_bar.desc, bars.prediction_bar.desc) == ("training: ", "evaluating: ")
    bars.on_evaluate(None, state, None)
    bars.on_train_end(None, state, None)


def run_of(folder: Path, resume=None) -> SimpleNamespace:
    return SimpleNamespace(output_dir=str(folder), seed=3, resume_from_checkpoint=resume)


def test_resuming_is_a_folder_or_whatever_the_trainer_finds(tmp_path: Path) -> None:
    for wanted in (None, "", "false", "0"):
        assert checkpoint_to_resume(run_of(tmp_path, wanted)) is None
    assert checkpoint_to_resume(run_of(tmp_path / "not there", "true")) is True
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint_to_resume(run_of(tmp_path, str(tmp_path / "checkpoint-9")))
    (tmp_path / "checkpoint-2").mkdir()
    assert checkpoint_to_resume(run_of(tmp_path, str(tmp_path / "checkpoint-2"))) == str(tmp_path / "checkpoint-2")


def test_the_first_evaluation_is_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted, step, expected in ((True, 0, True), (True, 4, False), (False, 0, False)):
        args = SimpleNamespace(eval_on_start=wanted)
        EvaluationAtStart().on_train_begin(args, SimpleNamespace(global_step=step), None)
        assert args.eval_on_start is expected
    assert capsys.readouterr().out.count("before training") == 1


def test_a_result_is_whole_or_not_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_the_seed_governs_what_is_made_after_the_start(tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        torch.rand(7)
        start_run(run_of(tmp_path))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert list(tmp_path.iterdir()) == []  # the trial file is gone


def test_every_evaluation_draws_the_same_numbers_and_leaves_those_of_training_alone() -> None:
    class Drawing:
        args = SimpleNamespace(seed=5, process_index=0)

        def evaluate(self):
            return torch.rand(2)

    class Trainer(SeededEvaluation, Drawing):
        pass

    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = Trainer().evaluate()
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(Trainer().evaluate(), first)
    with seeded(5):
        assert torch.equal(torch.rand(2), first)


def test_the_first_evaluation_is_that_of_step_0() -> None:
    history = [{"loss": 1.0, "step": 1}, {"eval_reward": 2.0, "step": 5}]
    assert first_evaluation(history, "eval_reward") == {}
    start = {"eval_reward": 1.0, "step": 0}
    assert first_evaluation([start, *history], "eval_reward") == start


def test_square_brackets_and_colons_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[INST] x[i] [/INST] [/b] :smile:"
    print_table(text, ("[a]", "[/b]"), [(text, text)])
    print_pairs([text, [{"role": "user", "content": text}]], [text] * 2, [text] * 2, "answer [/x]")
    printed = capsys.readouterr().out
    assert printed.count("[/INST]") >= 3
    assert printed.count("[/b] :smile:") >= 3


def test_a_value_that_is_missing_is_a_dash() -> None:
    rows = before_and_after([("reward", "r", "r_std"), ("KL", "k", "")], {"r": 1.0}, {"r": 2.0, "r_std": 0.5, "k": 3.0})
    assert rows == [("reward", "1.000", "2.000 ± 0.500"), ("KL", "-", "3.000")]
