"""RRHF: sample responses, score them, rank them. No critic, no rollout loop, one or two models.

    accelerate launch recipes/rrhf.py

needs nothing: it builds a small world with a known gold reward, samples four responses to each prompt from its SFT
policy, scores them by its reward adapter and tunes the policy on the ranking, on a CPU, in minutes. A real run:

    accelerate launch recipes/rrhf.py --config recipes/configs/rrhf_8b.yaml --output_dir out \
        --model_name_or_path meta-llama/Llama-3.1-8B --policy_adapter me/llama-sft --reward_adapter me/llama-rm \
        --dataset_name me/prompts

A dataset with the columns `responses` and `scores` (recipes/sample_responses.py makes one) is trained on as it is; for
one with prompts only, responses are sampled first, or during training with `--online_every_steps`,
`--online_every_pass`. Every option of RRHFConfig, SamplingConfig and of TRL's ModelConfig is a flag (`--help`).
"""

import logging
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ProgressWithMetrics, plot_run, print_table
from policy_evaluation import LABELS, evaluate_policy
from sample_responses import load_functions, load_model, show_report

from trl_ext.data import load_split

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class RecipeArguments:
    """What this recipe needs beside `RRHFConfig`, `SamplingConfig` and `ModelConfig`."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts, or prompts with responses and scores: Hub id, folder, or a file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: the first rows of the training split."}
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Train on so many prompts, from the first one on."})
    policy_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter the policy starts from and stays near. Default: a fresh one."}
    )
    reward_adapter: list[str] | None = field(
        default=None, metadata={"help": "LoRA adapters of reward models on the same base; several make an ensemble."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, path/to/file.py:function, or sequence classifiers by id."}
    )
    eval_prompts: int = field(default=256, metadata={"help": "Prompts of the evaluation before and after."})
    world_seed: int | None = field(
        default=None, metadata={"help": "Embedded world: seed of its data and models. Default: `--seed`."}
    )
    world_scale: float = field(default=1.0, metadata={"help": "Embedded world: factor on its trainings, for tests."})


def parse(arguments: list[str]) -> tuple[Any, Any, Any, Any]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config."""
    from trl import ModelConfig, TrlParser

    from trl_ext import RRHFConfig
    from trl_ext.rrhf import SamplingConfig

    if not any(flag.split("=")[0] in ("--config", "--model_name_or_path", "-h", "--help") for flag in arguments):
        arguments = ["--config", str(CONFIGS / "rrhf_toy.yaml"), *arguments]
    parser = TrlParser((RecipeArguments, RRHFConfig, SamplingConfig, ModelConfig))
    parser.description = __doc__
    return parser.parse_args_and_config(arguments)


def toy_inputs(recipe: RecipeArguments, training: Any) -> tuple[Any, list[Any], Any, Any]:
    """The embedded world: policy, reference and reward on one base, no function, its prompts."""
    from accelerate import PartialState

    from trl_ext import SharedBaseModel
    from trl_ext.toy import build_world

    seed = training.seed if recipe.world_seed is None else recipe.world_seed
    with PartialState().main_process_first():
        world = build_world(Path(training.output_dir) / "world", seed, scale=recipe.world_scale)
    model = SharedBaseModel.from_pretrained(
        str(world.base),
        policy_adapter=world.policy_adapter,
        reward_adapter=world.reward_adapter,
        dtype="float32",
        with_critic=False,
    )
    return model, [], world.train_prompts, world.eval_prompts


def real_inputs(recipe: RecipeArguments, model_args: Any, training: Any) -> tuple[Any, list[Any], Any, Any]:
    """A model by name, adapters, reward functions, and prompts.

    Raises:
        ValueError: No dataset, or nothing that scores.
    """
    if recipe.dataset_name is None:
        raise ValueError("--dataset_name is missing: a Hub id, a folder or a jsonl/gz file with a column `prompt`.")
    if not recipe.reward_adapter and not recipe.reward_funcs:
        raise ValueError("nothing scores the responses: give --reward_adapter, or --reward_funcs file.py:function.")
    functions = load_functions(recipe.reward_funcs)
    train = load_split(recipe.dataset_name, recipe.dataset_train_split, config=recipe.dataset_config)
    test = train
    if recipe.dataset_test_split is not None:
        test = load_split(recipe.dataset_name, recipe.dataset_test_split, config=recipe.dataset_config)
    return load_model(recipe, model_args), functions, train, test


def with_responses(model: Any, tokenizer: Any, train: Any, scorer: Any, parts: tuple[Any, Any, Any]) -> Any:
    """The dataset to train on: as it is if it has responses and scores, or is trained online; else sampled now."""
    from accelerate import PartialState

    from trl_ext.rrhf import load_responses, sample_responses

    recipe, training, sampling = parts
    if recipe.max_prompts is not None:
        train = train.select(range(min(recipe.max_prompts, len(train))))
    if training.online or {"responses", "scores"} <= set(train.column_names):
        return train
    path, state = Path(training.output_dir) / "responses.jsonl", PartialState()
    if state.is_main_process:
        names = ("policy_adapter", "reward_adapter", "reward_funcs", "dataset_name", "world_seed", "world_scale")
        settings = {name: getattr(recipe, name) for name in names} | {"model": model.get_base_model().name_or_path}
        show_report(sample_responses(model, tokenizer, train, path, sampling, scorer, settings), path)
    state.wait_for_everyone()
    return load_responses(path)


def report(before: tuple[dict[str, float], list[str]], after: Any, prompts: Any) -> None:
    """The table before / after, and three responses side by side."""
    body = []
    for key, label in LABELS.items():
        if key in before[0]:
            cells = []
            for metrics in (before[0], after[0]):
                std = f" ± {metrics[f'{key}_std']:.3f}" if f"{key}_std" in metrics else ""
                cells.append(f"{metrics[key]:.3f}{std}")
            body.append((label, *cells))
    print_table("Before and after RRHF", ("", "before", "after"), body)
    for prompt, first, second in list(zip(prompts["prompt"], before[1], after[1], strict=True))[:3]:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print_table(f"prompt: {text.strip()}", ("", "response"), [("before", first), ("after", second)])


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    recipe, training, sampling, model_args = parse(sys.argv[1:] if arguments is None else arguments)
    from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
    from transformers.trainer_utils import get_last_checkpoint

    from trl_ext import RRHFTrainer
    from trl_ext.rrhf import ResponseScorer
    from trl_ext.toy import gold_reward

    toy = model_args.model_name_or_path is None
    inputs = toy_inputs(recipe, training) if toy else real_inputs(recipe, model_args, training)
    model, functions, train, test = inputs
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    test = test.select(range(min(recipe.eval_prompts, len(test)))).select_columns("prompt") if toy else test
    test = test.select(range(min(recipe.eval_prompts, len(test))))
    scorer = ResponseScorer(model, tokenizer, functions, reward_weights=training.reward_weights)
    train = with_responses(model, tokenizer, train, scorer, (recipe, training, sampling))

    online = {"reward_funcs": functions or None} if training.online else {}
    trainer = RRHFTrainer(model, training, train, processing_class=tokenizer, **online)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    shown = {"loss": "loss", "ranking_accuracy": "accuracy", "kl": "kl", "reward": "reward"}
    trainer.add_callback(ProgressWithMetrics(shown))
    show = print if trainer.is_world_process_zero() else (lambda *_, **__: None)
    settings = {"max_new_tokens": sampling.max_new_tokens, "seed": training.seed, "gold": gold_reward if toy else None}

    resume: Any = training.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "1", "yes"):
        resume = get_last_checkpoint(training.output_dir)
    model.to(training.device)
    show("Evaluating the policy before training ...", flush=True)
    before = evaluate_policy(model, tokenizer, test, scorer, **settings)
    trainer.train(resume_from_checkpoint=resume or None)
    show("Evaluating the policy after training ...", flush=True)
    after = evaluate_policy(model, tokenizer, test, scorer, **settings)

    trainer.save_model()
    if trainer.is_world_process_zero():
        report(before, after, test)
        folder = Path(training.output_dir).resolve()
        panels = {"loss": {"rank_loss": "rank", "sft_loss": "best response"}, "ranking": {"ranking_accuracy": "pairs"}}
        plot_run(trainer.state.log_history, panels, folder / "training.png")
        print(f"policy adapter   {folder}\npicture          {folder / 'training.png'}")
        print(f'load it with     AutoPeftModelForCausalLM.from_pretrained("{folder}")')
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
