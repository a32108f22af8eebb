"""K responses to every prompt, scored, in a jsonl file that survives being killed: what RRHF trains on.

    python recipes/sample_responses.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \
        --reward_funcs my_rewards.py:reward --sampling_methods temperature:3 diverse:3 --output responses.jsonl

Start it again with the same options to go on where it stopped. `--response_columns human chosen` ranks responses that
the dataset has along with the sampled ones. Scores come from `--reward_adapter` (several make an `--ensemble`), from
`--reward_funcs` (file.py:function, or the id of a sequence-classification model), or from both, added up.
"""

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import load_reward_function, print_table, quantization_of

from trl_ext.data import load_split


@dataclass
class SampleArguments:
    """What this recipe needs beside `SamplingConfig` and `ModelConfig`."""

    output: str | None = field(default=None, metadata={"help": "The jsonl file."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts: Hub id, folder, or a jsonl/gz file with a column `prompt`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to take."})
    max_prompts: int | None = field(default=None, metadata={"help": "Only so many prompts, from the first one on."})
    policy_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter to sample from. Default: the base."}
    )
    reward_adapter: list[str] | None = field(
        default=None, metadata={"help": "LoRA adapters of reward models on the same base; several make an ensemble."}
    )
    ensemble: str = field(default="mean", metadata={"help": "How they make one score: mean, min or variance."})
    ensemble_coef: float = field(default=0.5, metadata={"help": "variance: mean - coef * variance."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, path/to/file.py:function, or sequence classifiers by id."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One for each of `reward_funcs`."})


def load_functions(specs: list[str] | None) -> list[Any]:
    """Reward functions by name; a model's id becomes a function too."""
    from trl_ext.rrhf import ClassifierReward

    found = [load_reward_function(spec) for spec in specs or []]
    return [ClassifierReward(each) if isinstance(each, str) else each for each in found]


def load_model(recipe: Any, model_args: Any, **extra: Any) -> Any:
    """The base that the flags name, in 4 bits if they say so, with policy and reward adapters."""
    import torch
    from trl import get_peft_config

    from trl_ext import SharedBaseModel

    model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
    quantization = quantization_of(model_args)
    attention = model_args.attn_implementation
    model = SharedBaseModel.from_pretrained(
        model_args.model_name_or_path,
        policy_adapter=recipe.policy_adapter,
        reward_adapter=recipe.reward_adapter,
        peft_config=get_peft_config(model_args) if recipe.policy_adapter is None else None,
        quantization_config=quantization,
        dtype=model_args.dtype or "auto",
        revision=model_args.model_revision,
        with_critic=False,
        **({"attn_implementation": attention} if attention else {}),
        **extra,
    )
    return model if quantization or not torch.cuda.is_available() else model.to("cuda")


def check(recipe: SampleArguments, model_args: Any) -> None:
    """Whatever is missing, before anything is loaded.

    Raises:
        ValueError: It is named.
    """
    for name, value in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("dataset_name", recipe.dataset_name),
        ("output", recipe.output),
    ):
        if value is None:
            raise ValueError(f"--{name} is missing. An example: {' '.join((__doc__ or '').split()[15:22])} ...")
    if not recipe.reward_adapter and not recipe.reward_funcs:
        raise ValueError("nothing scores the responses: give --reward_adapter, or --reward_funcs file.py:function.")


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from trl import ModelConfig, TrlParser

    from trl_ext.rrhf import ResponseScorer, SamplingConfig, sample_responses

    parser = TrlParser((SampleArguments, SamplingConfig, ModelConfig))
    parser.description = __doc__
    recipe, sampling, model_args = parser.parse_args_and_config(sys.argv[1:] if arguments is None else arguments)
    check(recipe, model_args)
    from transformers import AutoTokenizer

    functions = load_functions(recipe.reward_funcs)
    dataset = load_split(recipe.dataset_name, recipe.dataset_train_split, config=recipe.dataset_config)
    if recipe.max_prompts is not None:
        dataset = dataset.select(range(min(recipe.max_prompts, len(dataset))))
    model = load_model(recipe, model_args)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    scorer = ResponseScorer(
        model if recipe.reward_adapter else None,
        tokenizer,
        functions,
        reward_weights=recipe.reward_weights,
        ensemble=recipe.ensemble,
        ensemble_coef=recipe.ensemble_coef,
    )
    names = ("policy_adapter", "reward_adapter", "ensemble", "ensemble_coef", "reward_funcs", "reward_weights")
    settings = {name: getattr(recipe, name) for name in names} | {"model": model_args.model_name_or_path}
    report = sample_responses(model, tokenizer, dataset, recipe.output, sampling, scorer, settings)
    show_report(report, recipe.output)


def show_report(report: Any, path: Any) -> None:
    """What is in the file, by where the responses come from."""
    columns = ("source", "responses", "mean score", "truncated", "duplicates", "empty")
    print_table(f"{report.prompts:,} prompts in {Path(path).resolve()}", columns, report.rows())
    if report.torn:
        print(f"a torn line of {report.torn} bytes, left by a kill, was removed")
    new = report.prompts - report.resumed
    print(f"{report.resumed:,} prompts were there, {new:,} are new: {report.sampled_per_second:.1f} responses/s")


if __name__ == "__main__":
    main()
