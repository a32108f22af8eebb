"""PPO-Max: policy, reference, reward and critic on one frozen base.

    accelerate launch recipes/ppo_max.py

needs nothing: it builds a small world with a known gold reward (a tiny model, an SFT adapter, a reward adapter learned
from noisy preferences) and trains in it, on a CPU, in minutes. With a model and a dataset it is a real run:

    accelerate launch recipes/ppo_max.py --config recipes/configs/qlora_8b.yaml --output_dir out \
        --model_name_or_path meta-llama/Llama-3.1-8B --policy_adapter me/llama-sft --reward_adapter me/llama-rm \
        --dataset_name me/prompts

Every option of PPOMaxConfig and of TRL's ModelConfig is a flag (`--help`); `--config x.yaml` sets defaults for them.
"""

import logging
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ProgressWithMetrics, load_reward_function, plot_run, print_table, quantization_of
from plan_memory import PredictedPeak, plan_of_run

from trl_ext.data import load_split

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class RecipeArguments:
    """What this recipe needs beside `PPOMaxConfig` and `ModelConfig`."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts: Hub id, folder, or a jsonl/gz file with a column `prompt`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: the first rows of the training split."},
    )
    policy_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter the policy starts from and stays near. Default: a fresh one."}
    )
    reward_adapter: list[str] | None = field(
        default=None,
        metadata={
            "help": "LoRA adapter of a reward model on the same base (recipes/reward_model.py); "
            "several are an ensemble."
        },
    )
    critic_adapter: str | None = field(default=None, metadata={"help": "Default: a copy of the reward adapter."})
    adapter_dtype: str = field(
        default="float32",
        metadata={"help": "Of every role's adapter: float32, or bfloat16, half the memory and coarser updates."},
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, path/to/file.py:function, or sequence classifiers by id."}
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Texts for PPO-ptx: Hub id, folder or file. Needs `--ptx_coef`."}
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "Choose micro-batch, accumulation, evaluation batch, and how many sequences are generated and "
            "scored at a time, for the card by the memory plan; those in an optimizer step and in a rollout batch stay."
        },
    )
    gpu: str = field(default="auto", metadata={"help": "Size of the card for --auto_batch, as in 24GB."})
    eval_prompts: int = field(default=256, metadata={"help": "Prompts of the evaluation before and after."})
    world_seed: int | None = field(
        default=None, metadata={"help": "Embedded world: seed of its data and models. Default: `--seed`."}
    )
    world_scale: float = field(default=1.0, metadata={"help": "Embedded world: factor on its trainings, for tests."})


def parse(arguments: list[str]) -> tuple[Any, Any, Any]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config."""
    from trl import ModelConfig, TrlParser

    from trl_ext import PPOMaxConfig

    if not any(flag.split("=")[0] in ("--config", "--model_name_or_path", "-h", "--help") for flag in arguments):
        arguments = ["--config", str(CONFIGS / "toy.yaml"), *arguments]
    parser = TrlParser((RecipeArguments, PPOMaxConfig, ModelConfig))
    parser.description = __doc__
    return parser.parse_args_and_config(arguments)


def toy_inputs(recipe: RecipeArguments, training: Any) -> tuple[Any, dict[str, Any]]:
    """The embedded world: four roles, and the gold reward watched with weight 0."""
    from accelerate import PartialState

    from trl_ext import SharedBaseModel
    from trl_ext.toy import build_world, gold_reward

    seed = training.seed if recipe.world_seed is None else recipe.world_seed
    with PartialState().main_process_first():
        world = build_world(Path(training.output_dir) / "world", seed, scale=recipe.world_scale)
    model = SharedBaseModel.from_pretrained(
        str(world.base), policy_adapter=world.policy_adapter, reward_adapter=world.reward_adapter, dtype="float32"
    )
    training.reward_weights = [0.0]
    inputs = {"reward_funcs": [gold_reward], "train_dataset": world.train_prompts, "eval_dataset": world.eval_prompts}
    if training.ptx_coef > 0:
        inputs["ptx_dataset"] = world.pretrain_texts
    return model, inputs


def real_inputs(recipe: RecipeArguments, training: Any, model_args: Any) -> tuple[Any, dict[str, Any]]:
    """A model by name, adapters, prompts, and reward functions.

    Raises:
        ValueError: No dataset, or nothing that scores.
    """
    from trl import get_peft_config

    from trl_ext import SharedBaseModel

    if recipe.dataset_name is None:
        raise ValueError("--dataset_name is missing: a Hub id, a folder or a jsonl/gz file with a column `prompt`.")
    if not recipe.reward_adapter and not recipe.reward_funcs:
        raise ValueError("nothing scores the completions: give --reward_adapter, or --reward_funcs file.py:function.")
    functions = [load_reward_function(spec) for spec in recipe.reward_funcs or []]
    train = load_split(recipe.dataset_name, recipe.dataset_train_split, config=recipe.dataset_config)
    test = train
    if recipe.dataset_test_split is not None:
        test = load_split(recipe.dataset_name, recipe.dataset_test_split, config=recipe.dataset_config)
    inputs: dict[str, Any] = {"reward_funcs": functions, "train_dataset": train, "eval_dataset": test}
    quantization = quantization_of(model_args, training)
    training.choose_optim(quantised=quantization is not None)  # the plan counts its states
    if recipe.auto_batch or training.device.type == "cuda":  # before the weights are loaded
        inputs["memory_plan"] = plan_of_run(recipe, training, model_args, train)
    if recipe.ptx_dataset_name is not None:
        inputs["ptx_dataset"] = load_split(recipe.ptx_dataset_name, "train")
    model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
    model = SharedBaseModel.from_pretrained(
        model_args.model_name_or_path,
        policy_adapter=recipe.policy_adapter,
        reward_adapter=recipe.reward_adapter or None,
        critic_adapter=recipe.critic_adapter,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization,
        dtype=model_args.dtype or "auto",
        adapter_dtype=recipe.adapter_dtype,
        revision=model_args.model_revision,
        trust_remote_code=training.trust_remote_code,
        **({"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}),
    )
    return model, inputs


def sample_completions(trainer: Any, prompts: list[Any], seed: int) -> list[str]:
    """One completion per prompt, with a seed of its own, so that before and after differ by the policy alone."""
    import torch

    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        _, ids, _ = trainer.complete(prompts)
    return [text.strip() for text in trainer.processing_class.batch_decode(ids, skip_special_tokens=True)]


def report(before: dict[str, float], after: dict[str, float], samples: tuple[Any, Any, Any], gold: str | None) -> None:
    """The table before / after, and the completions side by side."""
    rows = [("reward (what PPO sees)", "eval_reward", "eval_reward_std")]
    if gold is not None:
        rows.insert(0, ("gold reward", f"eval_rewards/{gold}/mean", f"eval_rewards/{gold}/std"))
        rows[1] = ("proxy reward (what PPO sees)", "eval_reward", "eval_reward_std")
    rows += [
        ("KL from the reference, nats a completion", "eval_kl", ""),
        ("perplexity of completions under the reference", "eval_perplexity_reference", ""),
        ("perplexity under the policy itself", "eval_perplexity", ""),
        ("completion length, tokens", "eval_completions/mean_length", ""),
    ]
    body = []
    for label, key, std in rows:
        cells = []
        for metrics in (before, after):
            cell = f"{metrics[key]:.3f}" if key in metrics else "-"
            cells.append(f"{cell} ± {metrics[std]:.3f}" if std in metrics else cell)
        body.append((label, *cells))
    print_table("Before and after PPO-Max", ("", "before", "after"), body)
    prompts, old, new = samples
    for prompt, first, second in zip(prompts, old, new, strict=True):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print_table(f"prompt: {text.strip()}", ("", "completion"), [("before", first), ("after", second)])


def main(arguments: list[str] | None = None) -> None:
    # Two messages about libraries below us that a user can do nothing about
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    recipe, training, model_args = parse(sys.argv[1:] if arguments is None else arguments)
    from transformers import PrinterCallback, ProgressCallback
    from transformers.trainer_utils import get_last_checkpoint

    from trl_ext import PPOMaxTrainer

    toy = model_args.model_name_or_path is None
    model, inputs = toy_inputs(recipe, training) if toy else real_inputs(recipe, training, model_args)
    plan = inputs.pop("memory_plan", None)
    held_out = inputs["eval_dataset"]
    inputs["eval_dataset"] = held_out.select(range(min(recipe.eval_prompts, len(held_out))))
    trainer = PPOMaxTrainer(model, args=training, **inputs)
    gold = "gold_reward" if toy else None
    shown = {"reward": "reward", "rewards/gold_reward/mean": "gold", "kl": "kl", "beta": "beta"}
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressWithMetrics(shown | {"explained_variance": "critic"}))
    if plan is not None:
        trainer.add_callback(PredictedPeak(trainer, plan))
    print_main = print if trainer.is_world_process_zero() else (lambda *_, **__: None)

    resume: Any = training.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "1", "yes"):
        resume = get_last_checkpoint(training.output_dir)
    prompts = inputs["eval_dataset"][:3]["prompt"]
    print_main("Evaluating the policy before training ...", flush=True)
    with trainer.explained_out_of_memory(plan):
        before, first = trainer.evaluate(), sample_completions(trainer, prompts, training.seed)
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model()
        print_main("Evaluating the policy after training ...", flush=True)
        after, second = trainer.evaluate(), sample_completions(trainer, prompts, training.seed)

    if trainer.is_world_process_zero():
        report(before, after, (prompts, first, second), gold)
        picture = Path(training.output_dir) / "training.png"
        panels = {
            "reward": {"reward": "proxy" if toy else "reward", "rewards/gold_reward/mean": "gold"},
            "KL per completion": {"kl": "kl"},
            "critic": {"explained_variance": "explained variance"},
        }
        plot_run(trainer.state.log_history, panels, picture)
        folder = Path(training.output_dir).resolve()
        print(f"policy adapter   {folder}\ncritic adapter   {folder / 'critic'}")
        print(f"reward adapter   {folder / 'reward'}" if (folder / "reward").is_dir() else "", end="\n")
        print(f"curves           {picture.resolve()}")
        print(f'load it with     AutoPeftModelForCausalLM.from_pretrained("{folder}")')
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
