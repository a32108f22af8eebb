"""A reward model from preferences: a LoRA adapter with a scalar head, ready to be PPO-Max's reward role.

    accelerate launch recipes/reward_model.py

needs nothing: it trains on noisy preferences of the embedded world and is tested against the gold reward. Real data:

    accelerate launch recipes/reward_model.py --config recipes/configs/reward_qlora_8b.yaml --output_dir out/rm \
        --model_name_or_path meta-llama/Llama-3.1-8B --dataset_name Anthropic/hh-rlhf --dataset_test_split test

Every option of RewardModelConfig and of TRL's ModelConfig is a flag (`--help`); `--config x.yaml` sets defaults.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from common import ProgressWithMetrics, plot_run, print_table
from reward_common import PreferenceArguments, load_reward_base, load_splits, toy_preferences

CONFIGS = Path(__file__).parent / "configs"


def parse(arguments: list[str]) -> tuple[Any, Any, Any]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config."""
    from trl import ModelConfig, TrlParser

    from trl_ext import RewardModelConfig

    if not any(flag.split("=")[0] in ("--config", "--model_name_or_path", "-h", "--help") for flag in arguments):
        arguments = ["--config", str(CONFIGS / "reward_toy.yaml"), *arguments]
    parser = TrlParser((PreferenceArguments, RewardModelConfig, ModelConfig))
    parser.description = __doc__
    return parser.parse_args_and_config(arguments)


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    recipe, training, model_args = parse(sys.argv[1:] if arguments is None else arguments)
    from accelerate import PartialState
    from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
    from transformers.trainer_utils import get_last_checkpoint

    from trl_ext import RewardModelTrainer
    from trl_ext.reward.metrics import result_rows
    from trl_ext.reward.pictures import write_pictures

    show = print if PartialState().is_main_process else (lambda *_, **__: None)
    toy = model_args.model_name_or_path is None
    if toy:
        world, train, test = toy_preferences(recipe, training.seed, Path(training.output_dir))
        name = str(world.base)
        model = load_reward_base(model_args, training, name, dtype="float32")
    else:
        train, test = load_splits(recipe, training.seed, show)
        name = model_args.model_name_or_path
        model = load_reward_base(model_args, training)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=training.trust_remote_code)
    trainer = RewardModelTrainer(model, training, train, test, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressWithMetrics({"loss": "loss", "accuracy": "accuracy", "margin": "margin"}))

    resume: Any = training.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "1", "yes"):
        resume = get_last_checkpoint(training.output_dir)
    trainer.train(resume_from_checkpoint=resume or None)
    show("Scoring the test pairs ...", flush=True)
    scores = trainer.score(trainer.eval_dataset)
    results = trainer.evaluate_pairs(scores=scores)
    trainer.save_model()

    if trainer.is_world_process_zero():
        folder = Path(training.output_dir).resolve()
        print_table(f"Reward model on {len(scores['rows']):,} test pairs", ("", "value"), result_rows(results))
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1))
        del scores["rows"]
        pictures = write_pictures(folder, **scores)
        panels = {"loss": {"loss": "loss"}, "accuracy": {"accuracy": "training pairs"}}
        plot_run(trainer.state.log_history, panels, folder / "training.png")
        print(f"reward adapter   {folder}\npictures         {', '.join(path.name for path in pictures)}, training.png")
        print(f"use it with      recipes/ppo_max.py --reward_adapter {folder}")
        print(f'load it with     AutoPeftModelForSequenceClassification.from_pretrained("{folder}", num_labels=1)')
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
