"""A reward model from preferences: a LoRA adapter with a scalar head, ready to be PPO-Max's reward role.

    trl-ext reward-model

needs nothing: it trains on noisy preferences of the embedded world and is tested against the gold reward. Real data:

    trl-ext reward-model --config reward_qlora_8b --output_dir out/rm \\
        --model_name_or_path meta-llama/Llama-3.1-8B --dataset_name Anthropic/hh-rlhf --dataset_test_split test

Every option of RewardModelConfig and of TRL's ModelConfig is a flag (`--help`); `--config x.yaml` sets defaults.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext import RewardModelConfig
from trl_ext.scripts.arguments import (
    PreferenceArguments,
    WorldArguments,
    check_model_flags,
    check_preference_flags,
    check_world_flags,
    names_of,
)
from trl_ext.scripts.configs import CONFIGS
from trl_ext.scripts.inputs import WORLD_DATA, load_preference_splits, toy_preferences
from trl_ext.scripts.models import fresh_reward_model, load_causal_base, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given, names_a_model
from trl_ext.scripts.running import (
    options_of,
    printer,
    quiet_libraries,
    show_progress,
    start_run,
    write_json,
)
from trl_ext.scripts.tables import plot_run, print_table


@dataclass
class RecipeArguments(WorldArguments, PreferenceArguments):
    """What this recipe needs beside `RewardModelConfig` and `ModelConfig`."""


def parse(arguments: list[str]) -> tuple[RecipeArguments, RewardModelConfig, ModelConfig, Given]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config.

    Raises:
        ValueError: A flag that there is not, or that this run cannot honour.
    """
    parser = FlagParser((RecipeArguments, RewardModelConfig, ModelConfig), "reward-model")
    default = None if names_a_model(arguments) else CONFIGS / "reward_toy.yaml"
    recipe, training, model_args, given = parser.parse(arguments, default)
    check_world_flags(given, model_args.model_name_or_path is None, *names_of(PreferenceArguments))
    check_model_flags(given, model_args, task="SEQ_CLS")
    if model_args.model_name_or_path is not None:
        check_preference_flags(recipe)
    return recipe, training, model_args, given


def load_inputs(recipe: Any, training: RewardModelConfig, model_args: ModelConfig) -> tuple[Any, ...]:
    """Base, tokenizer, training and test pairs: of the embedded world, or by name, the data first."""
    if model_args.model_name_or_path is None:
        from trl_ext.roles import load_base
        from trl_ext.text import load_tokenizer

        world, train, test = toy_preferences(recipe, training)
        name = str(world.base)
        return load_base(name, dtype="float32"), load_tokenizer(name), train, test
    train, test = load_preference_splits(recipe, training.seed, printer())
    tokenizer = tokenizer_of(model_args, training)
    return load_causal_base(model_args, training), tokenizer, train, test


def main(arguments: list[str] | None = None) -> None:
    """Train, test, draw, and say where everything is."""
    quiet_libraries()
    recipe, training, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext import RewardModelTrainer

    resume, show = start_run(training), printer()
    base, tokenizer, train, test = load_inputs(recipe, training, model_args)
    model = fresh_reward_model(base, model_args)
    trainer = RewardModelTrainer(model, training, train, test, processing_class=tokenizer)
    trainer.dataset_name = WORLD_DATA if model_args.model_name_or_path is None else recipe.dataset_name
    trainer.recorder.options = options_of(recipe, model_args)
    show_progress(trainer, {"loss": "loss", "accuracy": "accuracy", "margin": "margin"})
    trainer.train(resume_from_checkpoint=resume)
    show("Scoring the test pairs ...", flush=True)
    scores = trainer.score(trainer.eval_dataset)
    results = trainer.evaluate_pairs(scores=scores)
    trainer.save_model()
    if trainer.is_world_process_zero():
        keep_pairs(trainer, test, scores)
        report(trainer, scores, results)
    if training.push_to_hub:
        trainer.push_to_hub()


def keep_pairs(trainer: Any, test: Any, scores: dict[str, Any]) -> None:
    """Write test pairs and their scores down, where they are pairs, and the report and the card with them."""
    if {"chosen", "rejected"} <= set(test.column_names):
        numbers = zip(*(scores[name].tolist() for name in ("rows", "chosen", "rejected")), strict=True)
        rows = [(test[row], {"chosen_score": chosen, "rejected_score": rejected}) for row, chosen, rejected in numbers]
        trainer.recorder.scored(
            [{name: row.get(name, "") for name in ("prompt", "chosen", "rejected")} | found for row, found in rows],
            trainer.state.global_step,
        )
    trainer.recorder.write_report()
    trainer.create_model_card()


def report(trainer: Any, scores: dict[str, Any], results: dict[str, Any]) -> None:
    """Write figures and pictures, then show them and say where everything is."""
    from trl_ext.reward.metrics import result_rows
    from trl_ext.reward.pictures import write_pictures

    folder = Path(trainer.args.output_dir).resolve()
    write_json(folder / "evaluation.json", results)
    columns = {name: values for name, values in scores.items() if name not in ("rows", "sources")}
    pictures = write_pictures(folder, **columns)
    panels = {"loss": {"loss": "loss"}, "accuracy": {"accuracy": "training pairs"}}
    plot_run(trainer.state.log_history, panels, folder / "training.png")
    print_table(f"Reward model on {len(scores['rows']):,} test pairs", ("", "value"), result_rows(results))
    print(f"reward adapter   {folder}\npictures         {', '.join(path.name for path in pictures)}, training.png")
    if (folder / "report.html").is_file():
        print(f"report           {folder / 'report.html'}")
    print(f"use it with      trl-ext ppo-max ... --reward_adapter {folder}")
    print(f'load it with     AutoPeftModelForSequenceClassification.from_pretrained("{folder}", num_labels=1)')
