"""Model cards: a header that the Hub takes, figures with intervals, samples as text, and nothing of the machine."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.ppo import tiny
from tests.report.made import write_run
from trl_ext import PPOMaxConfig
from trl_ext.report.cards import CardFacts, CardKind, changed_options, fenced, whole_card, write_card

KIND = CardKind("text-generation", ("ppo",), ("learning_rate", "beta"), ("step", "reward"), "reward")


def config(folder: Path, **options) -> PPOMaxConfig:
    return PPOMaxConfig(str(folder), use_cpu=True, report_to="none", **options)


def card_of(folder: Path, **facts) -> str:
    """The card of a run that no model made, with hostile texts."""
    (folder / "learning_curve.png").touch()
    history = [{"step": i, "reward": float(i)} for i in range(3)]
    facts = {"base": "someone/base-1b", "facts": {"rows of train_dataset": 5000}} | facts
    return whole_card(
        CardFacts(config(folder), history=history, folder=folder, **facts),
        KIND,
        ["What it is."],
        "`gold_reward`, weight 1",
    )


def test_an_option_that_is_switched_off_by_null_is_named(tmp_path) -> None:
    args = config(tmp_path, reward_clip=None)
    assert changed_options(args)["reward_clip"] == "null"
    assert "reward_clip" not in changed_options(config(tmp_path))


def test_settings_of_the_machine_are_no_options(tmp_path) -> None:
    args = config(tmp_path, save_steps=7, logging_steps=3, per_device_score_batch_size=2, dataloader_num_workers=1)
    assert not {"save_steps", "logging_steps", "per_device_score_batch_size", "use_cpu"} & set(changed_options(args))
    assert changed_options(config(tmp_path, max_steps=9))["max_steps"] == 9


def test_a_card_is_the_readme_of_its_folder(tmp_path) -> None:
    write_card(tmp_path / "new", "# a card\n")
    assert (tmp_path / "new" / "README.md").read_text() == "# a card\n"


def test_the_header_is_one_that_the_hub_reads(tmp_path) -> None:
    folder = write_run(tmp_path / "my-policy", hostile=True)
    text = card_of(folder, dataset_name="someone/prompts", tags=["ppo", "mine"])
    data = ModelCard(text).data
    assert data.base_model == "someone/base-1b"
    assert data.datasets == ["someone/prompts"]
    assert data.tags == ["ppo", "mine"]
    assert data.pipeline_tag == "text-generation"
    results = {result.metric_type: result for result in data.eval_results}
    assert {"reward", "kl_from_the_reference", "perplexity_under_the_policy"} <= set(results)
    assert results["reward"].dataset_type == "someone/prompts"
    row = re.search(r"^\| reward \| [^|]* \| ([\d.]+) \(", text, re.MULTILINE)
    assert row
    assert results["reward"].metric_value == pytest.approx(float(row[1]), rel=1e-3)


def test_it_has_what_a_reader_looks_for(tmp_path) -> None:
    text = card_of(write_run(tmp_path / "my-policy"))
    for part in ("## Before and after", "## How it was trained", "## Samples", "## Limits", "![learning curve]"):
        assert part in text
    assert "95 % bootstrap intervals" in text
    assert "* Reward: `gold_reward`, weight 1" in text
    assert "* Seed: 42" in text
    assert "5,000 rows" in text
    assert "trl_ext 0" in text
    assert "| `beta` | 0.05 | default |" in text
    assert text.count("Prompt:") == 5


def test_hostile_samples_stay_inside_their_fences(tmp_path) -> None:
    text = card_of(write_run(tmp_path / "run", hostile=True))
    body = text.split("## Samples")[1].split("## Limits")[0]
    fence, outside = None, []
    for line in body.split("\n"):
        mark = re.fullmatch(r"(`{3,})(text)?", line)
        if mark and fence is None:
            fence = mark[1]
        elif line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert not [line for line in outside if "script" in line or "INST" in line]
    assert body.count("[INST]") >= 5


def test_a_text_with_fences_of_its_own_gets_longer_ones() -> None:
    assert fenced("a\n````\nb") == ["`````text", "a", "````", "b", "`````"]


def test_no_folder_of_the_machine_is_named(tmp_path) -> None:
    folder = write_run(tmp_path / "run")
    base = tmp_path / "models" / "my-base"
    base.mkdir(parents=True)
    text = card_of(folder, base=str(base), dataset_name=str(tmp_path / "prompts.jsonl"))
    assert str(tmp_path) not in text
    assert "`my-base`" in text
    assert "`prompts.jsonl`" in text
    assert ModelCard(text).data.base_model is None
    assert ModelCard(text).data.datasets is None


def test_without_an_evaluation_it_says_so(tmp_path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "samples.jsonl").unlink()
    text = card_of(folder)
    assert "has not been evaluated on held-out prompts" in text
    assert ModelCard(text).data.eval_results is None


def test_the_card_of_a_real_run_has_its_figures(world, tmp_path) -> None:
    options = {"reward_funcs": tiny.count_words, "eval_dataset": tiny.prompts(10), "eval_on_start": True}
    trainer = tiny.trainer(world, tmp_path / "policy", write_report=True, **options)
    trainer.dataset_name = "someone/prompts"
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "policy" / "README.md").read_text()
    assert str(world) not in text
    assert str(tmp_path) not in text
    assert "`count_words`, weight 1" in text
    assert "a reward adapter on the same base" in text
    assert text.count("Prompt:") == 5
    assert "![learning curve](learning_curve.png)" in text
    assert "[report.html](report.html)" in text
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    history = [entry for entry in trainer.state.log_history if "eval_completions/mean_length" in entry]
    assert len(history) == 2
    assert {"reward", "count_words", "reward_role", "length"} <= set(results)


def test_files_of_another_run_are_not_taken_for_its_own(world, tmp_path) -> None:
    write_run(tmp_path / "policy")
    trainer = tiny.trainer(world, tmp_path / "policy")
    trainer.create_model_card()
    assert "has not been evaluated" in (tmp_path / "policy" / "README.md").read_text()
