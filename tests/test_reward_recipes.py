"""The recipes of reward models, run for real at tiny size: world, strength, evaluation, and the pipeline to PPO-Max."""

import importlib
import json
from pathlib import Path

import pytest
from datasets import load_from_disk
from peft import AutoPeftModelForSequenceClassification

from tests.processes import Done, run_script

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TINY = ["--world_scale=0.03", "--max_steps=4", "--logging_steps=1", "--warmup_steps=0"]


def launch(recipe: str, *arguments: str) -> Done:
    return run_script(RECIPES / recipe, *arguments, COLUMNS="160")


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    out = tmp_path_factory.mktemp("reward")
    return out, launch("reward_model.py", f"--output_dir={out}", *TINY)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversational pairs in a file, one of which cannot be used."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"one {time} the small {animal} went to the river ."}],
            "chosen": [{"role": "assistant", "content": "she helped a frog . then she went home ."}],
            "rejected": [{"role": "assistant", "content": "she bit a frog ."}],
        }
        for time in ("morning", "day", "evening", "night")
        for animal in ("fox", "bear", "crow", "hen", "cat", "dog", "goat", "pig")
    ]
    rows.append(rows[0] | {"rejected": rows[0]["chosen"]})
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def chat_base(reward_run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The world's base with a chat template, so that conversations can be put to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, folder = next((reward_run[0] / "world").glob("world-*/base")), tmp_path_factory.mktemp("chat_base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_without_arguments_a_reward_model_is_trained_tested_and_drawn(reward_run) -> None:
    out, result = reward_run
    assert result.returncode == 0, result.stderr[-3000:]
    for wanted in ("accuracy", "calibration", "longer", "reward adapter", "--reward_adapter"):
        assert wanted in result.stdout
    for name in ("calibration.png", "reward_against_length.png", "training.png"):
        assert (out / name).stat().st_size > 5000
    assert 0 <= json.loads((out / "evaluation.json").read_text())["accuracy"] <= 1
    assert "## Evaluation" in (out / "README.md").read_text()
    assert json.loads((out / "reward_scale.json").read_text())["std"] > 0


def test_the_saved_adapter_is_a_standard_classifier(reward_run) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(reward_run[0], num_labels=1)
    assert model.config.num_labels == 1


@pytest.mark.slow
def test_strength_is_measured_and_written_and_members_are_not_trained_twice(reward_run, tmp_path: Path) -> None:
    (tmp_path / "world").symlink_to(reward_run[0] / "world")
    arguments = [f"--output_dir={tmp_path}", *TINY, "--members=2", "--policy=flip", "--share=0.25"]
    first = launch("preference_strength.py", *arguments)
    assert first.returncode == 0, first.stderr[-3000:]
    dataset = load_from_disk(str(tmp_path / "dataset"))
    assert {"strength_mean", "strength_std", "suspected"} <= set(dataset.column_names)
    assert sum(dataset["suspected"]) == round(0.25 * len(dataset))
    weights = tmp_path / "member_2" / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    second = launch("preference_strength.py", *arguments)
    assert second.returncode == 0, second.stderr[-3000:]
    assert weights.stat().st_mtime_ns == written
    assert load_from_disk(str(tmp_path / "dataset"))["strength_mean"] == dataset["strength_mean"]


@pytest.mark.slow
def test_real_data_adapters_are_evaluated_alone_and_together(reward_run, chat_base, preferences, tmp_path) -> None:
    adapters = []
    for seed in (0, 1):
        adapters.append(str(tmp_path / f"rm{seed}"))
        result = launch(
            "reward_model.py",
            *[f"--output_dir={adapters[-1]}", f"--model_name_or_path={chat_base}", f"--dataset_name={preferences}"],
            *["--max_steps=2", f"--seed={seed}", "--use_cpu", "--gradient_checkpointing=false", "--report_to=none"],
            *["--per_device_train_batch_size=8", "--lora_r=4", "--learning_rate=1e-3"],
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "chosen equals rejected" in result.stdout
    result = launch(
        "evaluate_reward.py",
        *["--reward_adapter", *adapters, f"--dataset_name={preferences}", f"--output_dir={tmp_path / 'evaluation'}"],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for wanted in ("ensemble of 2", "agreement of the two models", "expected calibration error"):
        assert wanted in result.stdout
    assert (tmp_path / "evaluation" / "calibration.png").stat().st_size > 5000


@pytest.mark.slow
def test_where_a_reward_model_is_trained_and_where_it_is_evaluated_the_figures_are_the_same(
    chat_base, preferences, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    for name, part in (("train", rows[:16]), ("test", rows[16:32])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    result = launch(
        "reward_model.py",
        *[f"--output_dir={tmp_path / 'rm'}", f"--model_name_or_path={chat_base}", f"--dataset_name={tmp_path}"],
        *["--max_steps=4", "--use_cpu", "--gradient_checkpointing=false", "--report_to=none", "--bf16=false"],
        *["--per_device_train_batch_size=8", "--learning_rate=1e-2", "--dataset_test_split=test"],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    evaluation = ["--reward_adapter", str(tmp_path / "rm"), f"--output_dir={tmp_path / 'evaluation'}"]
    result = launch("evaluate_reward.py", *evaluation, f"--dataset_name={tmp_path / 'test.jsonl'}")
    assert result.returncode == 0, result.stderr[-3000:]
    trained = json.loads((tmp_path / "rm" / "evaluation.json").read_text())
    evaluated = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())[str(tmp_path / "rm")]
    names = [name for name, value in trained.items() if isinstance(value, float) and value == value]
    assert "expected_calibration_error" in names
    assert {name: trained[name] for name in names} == {n: pytest.approx(evaluated[n], abs=1e-4) for n in names}


@pytest.mark.slow
def test_the_whole_pipeline(chat_base, preferences, tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text(
        "use_cpu: true\ngradient_checkpointing: false\nreport_to: none\nsave_strategy: 'no'\nmax_steps: 2\n"
        "per_device_train_batch_size: 8\nlearning_rate: 1.0e-3\ndisable_tqdm: true\n"
    )
    result = launch(
        "pipeline.py",
        *["--config", "pipeline_tinychat", f"--output_dir={tmp_path / 'out'}"],
        *[f"--model_name_or_path={chat_base}", f"--dataset_name={preferences}", f"--dataset_test_name={preferences}"],
        *["--deduplicate=false", f"--reward_config={tmp_path / 'reward.yaml'}", "--members=3", "--judged_prompts=8"],
        *["--max_steps=4", "--per_device_train_batch_size=4", "--steps_per_generation=2", "--max_completion_length=8"],
        *["--logging_steps=1", "--critic_warmup_steps=1"],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    judgement = json.loads((tmp_path / "out" / "judgement.json").read_text())
    assert judgement["prompts"] == 8
    assert len(judgement["each_judge"]) == 2
    assert 0 <= judgement["ensemble_prefers_tuned"] <= 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("reward_model", ["--model_name_or_path=x"], "--dataset_name is missing"),
        ("preference_strength", ["--policy=guess"], "--policy guess is unknown"),
        ("preference_strength", ["--members=1"], "at least 2"),
        ("evaluate_reward", [], "--reward_adapter is missing"),
        ("pipeline", ["--output_dir=x"], "--model_name_or_path is missing"),
    ],
)
def test_bad_flags_say_what_to_change(
    recipe: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if recipe == "evaluate_reward" or "--output_dir=x" in arguments else [f"--output_dir={tmp_path}"]
    with pytest.raises((ValueError, SystemExit)) as error:
        importlib.import_module(f"trl_ext.scripts.{recipe}").main([*arguments, *output])
    assert message in f"{error.value} {capsys.readouterr().err}"
