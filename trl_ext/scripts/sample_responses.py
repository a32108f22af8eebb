"""K responses to every prompt, scored, in a jsonl file that survives being killed: what RRHF trains on.

    trl-ext sample --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \\
        --reward_funcs my_rewards.py:reward --sampling_methods temperature:3 diverse:3 --output responses.jsonl

Start it again with the same options to go on where it stopped. `--response_columns human chosen` ranks responses that
the dataset has along with the sampled ones. Scores come from `--reward_adapter` (several make an `--ensemble`), from
`--reward_funcs` (file.py:function, or the id of a sequence-classification model), or from both, added up;
`--unscored true` leaves them out, for trl-ext choose.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.data import load_split
from trl_ext.generation.vllm_options import VLLMOptions, check_vllm_options
from trl_ext.rrhf import SamplingConfig
from trl_ext.scripts.arguments import LORA, check_model_flags, check_prompt_flags
from trl_ext.scripts.inputs import check_prompt_rows, load_reward_functions
from trl_ext.scripts.models import load_policy, placed, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries
from trl_ext.scripts.tables import print_table


@dataclass
class SampleArguments(VLLMOptions):
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
    ensemble_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each reward adapter, for mean and variance. Default: all the same."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, path/to/file.py:function, or sequence classifiers by id."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One for each of `reward_funcs`."})
    unscored: bool = field(
        default=False, metadata={"help": "Sample only: for pairs that people label, not for RRHF, which needs scores."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse(arguments: list[str]) -> tuple[SampleArguments, SamplingConfig, ModelConfig, Given]:
    """Flags over config file over defaults.

    Raises:
        ValueError: What is missing, or a flag that this recipe cannot honour.
    """
    parser = FlagParser((SampleArguments, SamplingConfig, ModelConfig), "sample")
    recipe, sampling, model_args, given = parser.parse(arguments)
    for name, value in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("dataset_name", recipe.dataset_name),
        ("output", recipe.output),
    ):
        if value is None:
            raise ValueError(
                f"--{name} is missing: model_name_or_path, dataset_name and output are needed. See --help."
            )
    check_vllm_options(recipe)
    if recipe.vllm_server_url is not None:
        sampling.check_server()
    if recipe.unscored:
        names = ["reward_adapter", "reward_funcs", "reward_weights", "ensemble", "ensemble_coef", "ensemble_weights"]
        given.refuse(names, "--unscored samples without scores. Drop one of them.")
    else:
        check_prompt_flags(given, recipe)
    check_model_flags(given, model_args)
    given.refuse(
        [*LORA, "use_peft"], "nothing is trained here: responses come from the base, or from --policy_adapter."
    )
    if recipe.max_prompts is not None and recipe.max_prompts < 1:
        raise ValueError(f"--max_prompts {recipe.max_prompts}: take at least 1.")
    return recipe, sampling, model_args, given


def main(arguments: list[str] | None = None) -> None:
    """Sample, score, write, and show what is in the file."""
    quiet_libraries()
    recipe, sampling, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)

    from trl_ext.generation.vllm_probe import checked_engine
    from trl_ext.generation.vllm_server import SamplingParameters
    from trl_ext.rrhf import sample_responses
    from trl_ext.scoring import ResponseScorer
    from trl_ext.text import end_token_ids

    assert recipe.output is not None
    check_output_dir(Path(recipe.output).resolve().parent, "--output, whose folder")
    functions = load_reward_functions(recipe.reward_funcs, recipe.reward_weights)
    dataset = load_split(recipe.dataset_name or "", recipe.dataset_train_split, config=recipe.dataset_config)
    check_prompt_rows(dataset, recipe.dataset_name or "")
    if recipe.max_prompts is not None:
        dataset = dataset.select(range(min(recipe.max_prompts, len(dataset))))
    tokenizer = tokenizer_of(model_args, recipe)
    model = placed(load_policy(given, recipe, model_args, recipe, with_critic=False))
    scorer = None
    if not recipe.unscored:
        scorer = ResponseScorer(
            model,
            tokenizer,
            functions,
            reward_weights=recipe.reward_weights,
            ensemble=recipe.ensemble,
            ensemble_coef=recipe.ensemble_coef,
            ensemble_weights=recipe.ensemble_weights,
        )
    names = ("policy_adapter", "reward_adapter", "ensemble", "ensemble_coef", "reward_funcs", "reward_weights")
    settings = {name: getattr(recipe, name) for name in names} | {"model": model_args.model_name_or_path}
    if recipe.ensemble_weights is not None:
        settings["ensemble_weights"] = recipe.ensemble_weights
    if model_args.model_revision not in (None, "main"):
        settings["model_revision"] = model_args.model_revision
    engine = None
    if recipe.vllm_server_url is not None:
        ends = end_token_ids(tokenizer, model.generation_config)
        parameters = SamplingParameters(sampling.max_new_tokens, tuple(ends), sampling.sampling_temperature)
        folder, seed = Path(recipe.output).resolve().parent, sampling.sampling_seed
        engine = checked_engine(model, recipe, parameters, tokenizer, folder, owner=recipe.output, seed=seed)
    report = sample_responses(model, tokenizer, dataset, recipe.output, sampling, scorer, settings, engine)
    if engine is not None:
        engine.close()
    show_report(report, recipe.output)


def show_report(report: Any, path: Any) -> None:
    """What is in the file, by where the responses come from."""
    columns = ("source", "responses", "mean score", "truncated", "duplicates", "empty")
    print_table(f"{report.prompts:,} prompts in {Path(path).resolve()}", columns, report.rows())
    if report.torn:
        print(f"a torn line of {report.torn} bytes, left by a kill, was removed")
    new = report.prompts - report.resumed
    print(f"{report.resumed:,} prompts were there, {new:,} are new: {report.sampled_per_second:.1f} responses/s")
