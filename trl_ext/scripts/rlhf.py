"""The three stages and their rounds in one process, on one base loaded once: SFT -> reward models -> PPO-Max -> judge.

    trl-ext rlhf                                   # the embedded world: no download, minutes on a CPU
    trl-ext rlhf --rounds 3                        # and label, train and tune again, twice
    trl-ext rlhf --model_name_or_path MODEL --load_in_4bit --output_dir out --sft_dataset demonstrations.jsonl \\
        --preferences Anthropic/hh-rlhf --prompts prompts.jsonl --rounds 2 --labels_from people

1. `output_dir/sft`: TRL's SFTTrainer on the shared base; `--policy_adapter` takes its place.
2. `output_dir/round_1/reward/member_1`, ...: an ensemble of reward models. The last one judges, PPO never sees it.
3. `output_dir/round_1/ppo`: PPO-Max against the others.
   With `--rounds N`: the policy answers, pairs of answers are chosen where the ensemble disagrees, and labelled; the
   reward models go on with all labels, and PPO-Max with its policy, whose KL penalty is then to where its round began.
4. `output_dir/judge`: the last policy against the SFT policy on held-out prompts.

The same command goes on where a run was stopped: a stage that is there is not repeated. One that was made with other
settings is an error. `--sft_config` and `--reward_config` are yaml files of SFTConfig and RewardModelConfig; all other
options are those of PPOMaxConfig and ModelConfig.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext import PPOMaxConfig
from trl_ext.scripts.arguments import WorldArguments, check_model_flags, check_world_flags
from trl_ext.scripts.configs import CONFIGS
from trl_ext.scripts.parsing import FlagParser, Given, names_a_model
from trl_ext.scripts.running import check_output_dir, printer, quiet_libraries

LABELS_FROM = ("gold", "judge", "people")
JUDGES = ("adapter", "endpoint", "local", "people", "none")
LEAST_PAIRS = 16


@dataclass
class RLHFArguments(WorldArguments):
    """What the stages need beside `PPOMaxConfig` and `ModelConfig`."""

    world_pairs: int = field(default=600, metadata={"help": "Embedded world: labelled pairs of the first round."})
    sft_dataset: str | None = field(
        default=None, metadata={"help": "Demonstrations (prompt and completion, or messages): Hub id, folder or file."}
    )
    policy_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter in place of the SFT stage: where the policy starts."}
    )
    preferences: str | None = field(
        default=None, metadata={"help": "Preferences of the first round: Hub id, folder or file."}
    )
    preferences_format: str = field(default="auto", metadata={"help": "As --dataset_format of trl-ext reward-model."})
    preferences_test: str | None = field(
        default=None, metadata={"help": "Preferences to test on. Default: a tenth of `preferences`, by prompt."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Prompts of PPO, with a column `prompt`. Default: those of `preferences`."}
    )
    prompts_test: str | None = field(
        default=None, metadata={"help": "Prompts to judge on, never trained on. Default: held out of `prompts`."}
    )
    max_prompt_length: int = field(default=512, metadata={"help": "Longer prompts are left out, and counted."})
    sft_config: str = field(default="sft", metadata={"help": "Options of SFTConfig: a yaml file, or its name."})
    reward_config: str = field(
        default="reward", metadata={"help": "Options of RewardModelConfig: a yaml file, or its name."}
    )
    members: int = field(
        default=3, metadata={"help": "Reward models: the last one judges, PPO has the others; a single one pays."}
    )
    rounds: int = field(default=1, metadata={"help": "How often reward models and policy are trained."})
    labels_per_round: int = field(default=300, metadata={"help": "Pairs that are labelled between two rounds."})
    sampled_prompts: int = field(default=500, metadata={"help": "Prompts answered to choose these pairs from."})
    answers_per_prompt: int = field(default=4, metadata={"help": "Answers to each of them."})
    choose: str = field(default="information", metadata={"help": "By what: information, random or different."})
    random_share: float = field(
        default=0.2, metadata={"help": "Share of them drawn at random, and held out of training to test on."}
    )
    labels_from: str | None = field(
        default=None,
        metadata={"help": "gold (of the embedded world, its default), judge, or people (the default elsewhere)."},
    )
    label_port: int = field(default=7860, metadata={"help": "Port of the label page, on 127.0.0.1."})
    judge: str = field(
        default="adapter", metadata={"help": "adapter (the last reward model), endpoint, local, people or none."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "Of endpoint: its name there; of local: a folder."})
    judge_base_url: str | None = field(default=None, metadata={"help": "Of the endpoint. Default: OpenAI's."})
    judge_api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable with the key."})
    judge_prompt: str = field(default="helpful", metadata={"help": "helpful, harmless, or a text file."})
    judged_prompts: int = field(default=256, metadata={"help": "Held-out prompts that policies answer."})


OF_DATA = ("sft_dataset", "preferences", "preferences_format", "preferences_test", "prompts", "prompts_test")
OF_ROUNDS = ("labels_per_round", "sampled_prompts", "answers_per_prompt", "choose", "random_share", "labels_from")


def parse(arguments: list[str]) -> tuple[RLHFArguments, PPOMaxConfig, ModelConfig, Given]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's.

    Raises:
        ValueError: What is missing or out of its range, or a flag that this run cannot honour.
    """
    parser = FlagParser((RLHFArguments, PPOMaxConfig, ModelConfig), "rlhf")
    default = None if names_a_model(arguments) else CONFIGS / "rlhf_toy.yaml"
    recipe, training, model_args, given = parser.parse(arguments, default)
    in_world = model_args.model_name_or_path is None
    if in_world:
        for name, value in (("sft_config", "sft_toy"), ("reward_config", "reward_rlhf_toy")):
            if name not in given:
                setattr(recipe, name, value)
    recipe.labels_from = recipe.labels_from or ("gold" if in_world else "people")
    check_numbers(recipe)
    check_flags(recipe, training, model_args, given)
    return recipe, training, model_args, given


def check_numbers(recipe: RLHFArguments) -> None:
    """Check what has a range or choices.

    Raises:
        ValueError: A value outside of them, by its flag.
    """
    from trl_ext.feedback.choose import METHODS

    several = recipe.judge == "adapter" or (recipe.rounds > 1 and recipe.choose == "information")
    least = {
        "members": 2 if several else 1,
        "rounds": 1,
        "labels_per_round": 1,
        "sampled_prompts": 1,
        "answers_per_prompt": 2,
    }
    least |= {"judged_prompts": 1, "max_prompt_length": 1, "world_pairs": LEAST_PAIRS}
    for name, number in least.items():
        if getattr(recipe, name) < number:
            raise ValueError(f"--{name} {getattr(recipe, name)}: must be at least {number}.")
    if not 0 <= recipe.random_share < 1:
        raise ValueError(f"--random_share {recipe.random_share}: must be at least 0 and below 1.")
    for name, known in (("choose", METHODS), ("labels_from", LABELS_FROM), ("judge", JUDGES)):
        if getattr(recipe, name) not in known:
            raise ValueError(f"--{name} {getattr(recipe, name)} is unknown: use one of {', '.join(known)}.")


def check_flags(recipe: RLHFArguments, training: PPOMaxConfig, model_args: ModelConfig, given: Given) -> None:
    """Check that every flag has an effect, and that judges and pages can be had.

    Raises:
        ValueError: One that would be dropped, or what is missing, by name.
    """
    from trl_ext.scripts.judging import check_label_page, check_model_judge

    if training.vllm_one_copy:
        given.refuse(["vllm_one_copy"], "only trl-ext ppo-max has it. Use vllm_server_url, or drop it.")
    in_world = model_args.model_name_or_path is None
    check_world_flags(given, in_world, *OF_DATA, "policy_adapter")
    if in_world:
        given.refuse(["use_peft"], "adapters are what this recipe trains. Drop it.")
    else:
        given.refuse(["world_pairs"], "of the embedded world, and this run has a model of its own. Drop it.")
        check_model_flags(given, model_args)
        if recipe.preferences is None:
            raise ValueError("--preferences is missing: preferences by Hub id, folder or file.")
        if (recipe.sft_dataset is None) == (recipe.policy_adapter is None):
            raise ValueError("give --sft_dataset (demonstrations), or --policy_adapter in place of the SFT stage.")
        if recipe.prompts is None and recipe.prompts_test is not None:
            raise ValueError("--prompts_test: without --prompts both come from the preferences. Give both, or none.")
        if recipe.labels_from == "gold":
            raise ValueError("--labels_from gold: only the embedded world has a gold reward. Use judge or people.")
    if recipe.policy_adapter is not None:
        given.refuse(["sft_config"], "with --policy_adapter there is no SFT stage. Drop one.")
    if recipe.rounds == 1:
        given.refuse(OF_ROUNDS, "labels are given between rounds, and there is one. Set --rounds 2, or drop it.")
    given.refuse(["resume_from_checkpoint"], "the same command goes on by itself where a run was stopped. Drop it.")
    given.refuse(["reward_weights"], "reward models score, and no function. Drop it.")
    if training.ptx_coef > 0:
        raise ValueError(f"--ptx_coef {training.ptx_coef}: this recipe has no texts for it. trl-ext ppo-max has.")
    labelled = recipe.labels_from if recipe.rounds > 1 else None
    if recipe.judge in ("endpoint", "local") or labelled == "judge":
        check_model_judge(recipe)
    else:
        names = ["judge_model", "judge_base_url", "judge_prompt", "judge_api_key_env"]
        given.refuse(names, "no model judges. Set --judge endpoint, --judge local or --labels_from judge.")
    if recipe.judge == "people" or labelled == "people":
        check_label_page()
    else:
        given.refuse(["label_port"], "no people are asked. Set --judge people or --labels_from people.")


def main(arguments: list[str] | None = None) -> None:
    """All stages that are not there yet; then what came out."""
    quiet_libraries()
    recipe, training, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.scripts import rlhf_rounds, rlhf_stages
    from trl_ext.scripts.rlhf_summary import write_summary

    folder = Path(str(training.output_dir))
    check_output_dir(folder)
    work = rlhf_stages.prepare(recipe, training, model_args, given, printer())
    policy = sft = rlhf_stages.run_sft(work)
    places = {"SFT policy": sft}
    critic: Path | None = None
    sets, rewards, course = {"start": work.preferences}, list[Path](), list[dict[str, Any]]()
    for number in range(1, recipe.rounds + 1):
        if number > 1:
            sets[f"round_{number}"] = rlhf_rounds.label_round(work, number, policy, rewards, sets)
        rewards = rlhf_stages.run_rewards(work, number, sets, rewards)
        policy = rlhf_stages.run_ppo(work, number, policy, critic, rewards)
        critic = policy / "critic"
        course.append(rlhf_rounds.measure(work, number, policy, rewards))
        places |= {f"round {number}, labels": work.round(number)} if number > 1 else {}
        places |= {f"round {number}, reward model {k}": each for k, each in enumerate(rewards, start=1)}
        places[f"round {number}, policy"] = policy
    rlhf_rounds.report(work, course)
    judged = None if recipe.judge == "none" else rlhf_rounds.judge(work, sft, policy, rewards)
    print(f"begin with       {write_summary(work, course, places, judged).resolve()}")
    print(f"policy adapter   {policy.resolve()}\nreward adapters  {', '.join(str(each.resolve()) for each in rewards)}")
