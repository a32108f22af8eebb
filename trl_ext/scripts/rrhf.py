"""RRHF: sample responses, score them, rank them. No critic, no rollout loop, one or two models.

    trl-ext rrhf

needs nothing: it builds a small world with a known gold reward, samples four responses to each prompt from its SFT
policy, scores them by its reward adapter and tunes the policy on the ranking, on a CPU, in minutes. A real run:

    trl-ext rrhf --config rrhf_8b --output_dir out \\
        --model_name_or_path meta-llama/Llama-3.1-8B --policy_adapter me/llama-sft --reward_adapter me/llama-rm \\
        --dataset_name me/prompts

A dataset with the columns `responses` and `scores` (trl-ext sample makes one) is trained on as it is; for
one with prompts only, responses are sampled first, or during training with `--online_every_steps`,
`--online_every_pass`. Every option of RRHFConfig, SamplingConfig and of TRL's ModelConfig is a flag (`--help`).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext import RRHFConfig
from trl_ext.report.evaluation import LABELS, evaluate_policy
from trl_ext.rrhf import SamplingConfig
from trl_ext.scripts.arguments import (
    LORA,
    PromptArguments,
    WorldArguments,
    check_model_flags,
    check_prompt_flags,
    check_world_flags,
    names_of,
)
from trl_ext.scripts.configs import CONFIGS
from trl_ext.scripts.inputs import WORLD_DATA, first_prompts, load_prompts, load_reward_functions, toy_world
from trl_ext.scripts.models import config_options, encoder_by_name, load_policy, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given, names_a_model
from trl_ext.scripts.running import (
    options_of,
    printer,
    quiet_libraries,
    show_progress,
    start_run,
    write_json,
)
from trl_ext.scripts.sample_responses import show_report
from trl_ext.scripts.tables import before_and_after, plot_run, print_pairs, print_table

SAMPLES = 3
RESPONSES = {"responses", "scores"}
ONLINE = (
    "num_online_responses",
    "online_keep_best",
    "temperature",
    "top_p",
    "max_completion_length",
    "generation_batch_size",
)


@dataclass
class RecipeArguments(WorldArguments, PromptArguments):
    """What this recipe needs beside `RRHFConfig`, `SamplingConfig` and `ModelConfig`."""

    max_prompts: int | None = field(default=None, metadata={"help": "Train on so many prompts, from the first one on."})


def parse(arguments: list[str]) -> tuple[RecipeArguments, RRHFConfig, SamplingConfig, ModelConfig, Given]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config.

    Raises:
        ValueError: A flag that there is not, or that this run cannot honour.
    """
    parser = FlagParser((RecipeArguments, RRHFConfig, SamplingConfig, ModelConfig), "rrhf")
    default = None if names_a_model(arguments) else CONFIGS / "rrhf_toy.yaml"
    recipe, training, sampling, model_args, given = parser.parse(arguments, default)
    check_flags(recipe, training, model_args, given)
    return recipe, training, sampling, model_args, given


def check_flags(recipe: RecipeArguments, training: RRHFConfig, model_args: ModelConfig, given: Given) -> None:
    """Check that every flag has an effect. Those of sampling may stand in a config file that serves several runs.

    Raises:
        ValueError: One that would be dropped, by name.
    """
    in_world = model_args.model_name_or_path is None
    brought = set(names_of(PromptArguments)) - {"eval_prompts"}
    check_world_flags(given, in_world, *sorted(brought | {"use_peft", "reward_weights", *LORA}))
    if recipe.max_prompts is not None and recipe.max_prompts < 1:
        raise ValueError(f"--max_prompts {recipe.max_prompts}: train on at least 1.")
    flags = given.on_command_line()
    if training.online:
        names = set(names_of(SamplingConfig)) - {"max_new_tokens"}
        flags.refuse(sorted(names), "responses are sampled online here, which has options of its own. Drop it.")
    else:
        why = "for responses that are sampled online. Set --online_every_steps or --online_every_pass, or drop it."
        flags.refuse(ONLINE, why)
    if in_world:
        return
    check_prompt_flags(given, recipe)
    check_model_flags(given, model_args, recipe.policy_adapter)


def toy_inputs(recipe: RecipeArguments, training: RRHFConfig) -> tuple[Any, ...]:
    """The embedded world: policy, reference and reward on one base, its tokenizer, no function, its prompts."""
    from trl_ext import SharedBaseModel
    from trl_ext.text import load_tokenizer

    world = toy_world(recipe, training)
    model = SharedBaseModel.from_pretrained(
        str(world.base),
        policy_adapter=world.policy_adapter,
        reward_adapter=world.reward_adapter,
        dtype="float32",
        with_critic=False,
    )
    test = first_prompts(world.eval_prompts, recipe.eval_prompts)
    return model, load_tokenizer(str(world.base)), [], world.train_prompts, test


def real_inputs(
    recipe: RecipeArguments, training: RRHFConfig, sampling: SamplingConfig, model_args: ModelConfig, given: Given
) -> tuple[Any, ...]:
    """A model by name, adapters, its tokenizer, reward functions, and prompts; the data is checked first.

    Raises:
        ValueError: No dataset, nothing that scores, or data that cannot be trained on.
    """
    functions = load_reward_functions(recipe.reward_funcs, training.reward_weights)
    train, test = load_prompts(recipe, printer())
    if set(train.column_names) >= RESPONSES:
        names = set(names_of(SamplingConfig)) - {"max_new_tokens"}
        why = f"{recipe.dataset_name} has responses and scores, so none are sampled. Drop it."
        given.on_command_line().refuse(sorted(names), why)
    if training.eval_strategy != "no" and not set(test.column_names) >= RESPONSES:
        raise ValueError(
            f"--eval_strategy {training.eval_strategy}: the loss is evaluated on rows with `responses` and `scores`, "
            "and the test rows have none. Give a --dataset_test_split that has, or drop it."
        )
    test = first_prompts(test, recipe.eval_prompts)
    tokenizer = tokenizer_of(model_args, training)
    check_room(train, test, tokenizer, model_args, training, sampling)
    return load_policy(given, recipe, model_args, training, with_critic=False), tokenizer, functions, train, test


def check_room(
    train: Any, test: Any, tokenizer: Any, model_args: ModelConfig, training: RRHFConfig, sampling: SamplingConfig
) -> None:
    """Check that the model has positions for every prompt and a response to it.

    Raises:
        ValueError: It has not, for the row that is named.
    """
    from trl_ext.roles import load_base_config, max_positions

    positions = max_positions(
        load_base_config(str(model_args.model_name_or_path), **config_options(model_args, training))
    )
    if positions is None:
        return
    room = training.max_completion_length if training.online else sampling.max_new_tokens
    flag = "max_completion_length" if training.online else "max_new_tokens"
    encoder = encoder_by_name(tokenizer, model_args, training, training.chat_template_kwargs)
    for name, dataset in (("training", train), ("test", test)):
        lengths = encoder.prompt_lengths(dataset["prompt"])
        row = max(range(len(lengths)), key=lengths.__getitem__)
        wanted = room if name == "test" or not set(train.column_names) >= RESPONSES or training.online else 1
        if lengths[row] + wanted + encoder.added_length(dataset[row]["prompt"]) > positions:
            raise ValueError(
                f"{name} row {row}: a prompt of {lengths[row]} tokens and a response of {wanted} (--{flag}) exceed the "
                f"model's {positions} positions. Lower --{flag}, or drop prompts of that length."
            )


def with_responses(model: Any, encoder: Any, train: Any, scorer: Any, parts: tuple[Any, ...]) -> Any:
    """The dataset to train on: as it is if it has responses and scores, or is trained online; else sampled now."""
    from accelerate import PartialState

    from trl_ext.rrhf import load_responses, sample_responses

    recipe, training, sampling = parts
    if recipe.max_prompts is not None:
        train = train.select(range(min(recipe.max_prompts, len(train))))
    if training.online or set(train.column_names) >= RESPONSES:
        return train
    path, state = Path(training.output_dir) / "responses.jsonl", PartialState()
    if state.is_main_process:
        names = ("policy_adapter", "reward_adapter", "reward_funcs", "dataset_name", "world_seed", "world_scale")
        settings = {name: getattr(recipe, name) for name in names} | {"model": model.get_base_model().name_or_path}
        if training.reward_weights is not None or training.reward_role_weight != 1:
            weights = (training.reward_weights, training.reward_role_weight)
            settings |= {"reward_weights": weights[0], "reward_role_weight": weights[1]}
        show_report(sample_responses(model, encoder, train, path, sampling, scorer, settings), path)
    state.wait_for_everyone()
    return load_responses(path)


def main(arguments: list[str] | None = None) -> None:
    """Sample if need be, train, compare before and after, and say where everything is."""
    quiet_libraries()
    recipe, training, sampling, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext import RRHFTrainer
    from trl_ext.scoring import ResponseScorer
    from trl_ext.text import TextEncoder, end_token_ids
    from trl_ext.toy import gold_reward

    resume, show = start_run(training), printer()
    toy = model_args.model_name_or_path is None
    inputs = toy_inputs(recipe, training) if toy else real_inputs(recipe, training, sampling, model_args, given)
    model, tokenizer, functions, train, test = inputs
    model.to(training.device)
    weights: Any = {"reward_weights": training.reward_weights, "role_weight": training.reward_role_weight}
    options: Any = training.chat_template_kwargs
    encoder = TextEncoder(tokenizer, end_token_ids(tokenizer, model.generation_config), options)
    scorer = ResponseScorer(model, encoder, functions, **weights)
    train = with_responses(model, encoder, train, scorer, (recipe, training, sampling))

    online: Any = {"reward_funcs": functions or None} if training.online else {}
    held_out = test if training.eval_strategy != "no" else None
    trainer = RRHFTrainer(model, training, train, held_out, processing_class=tokenizer, **online)
    trainer.dataset_name = WORLD_DATA if toy else recipe.dataset_name
    trainer.recorder.options = options_of(recipe, sampling, model_args)
    show_progress(trainer, {"loss": "loss", "ranking_accuracy": "accuracy", "kl": "kl", "reward": "reward"})
    settings: Any = {
        "max_new_tokens": sampling.max_new_tokens,
        "seed": training.seed,
        "gold": gold_reward if toy else None,
        "keep": trainer.recorder.evaluated,
        "engine": None if trainer.sampler is None else trainer.sampler.engine,
    }
    prompts = test.remove_columns([name for name in (*RESPONSES, "truncated") if name in test.column_names])
    show("Evaluating the policy before training ...", flush=True)
    before = evaluate_policy(model, encoder, prompts, scorer, **settings)
    trainer.recorder.end_evaluation(step=0)
    trainer.train(resume_from_checkpoint=resume)
    show("Evaluating the policy after training ...", flush=True)
    after = evaluate_policy(model, encoder, prompts, scorer, **settings)
    trainer.recorder.end_evaluation(trainer.state.global_step)
    trainer.recorder.write_report()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer, before, after, prompts)
    if training.push_to_hub:
        trainer.push_to_hub()


def report(
    trainer: Any, before: tuple[dict[str, float], list[str]], after: tuple[dict[str, float], list[str]], prompts: Any
) -> None:
    """Write figures and curves, then show them and say where everything is."""
    folder = Path(trainer.args.output_dir).resolve()
    write_json(folder / "before_after.json", {"before": before[0], "after": after[0]})
    panels = {"loss": {"rank_loss": "rank", "sft_loss": "best response"}, "ranking": {"ranking_accuracy": "pairs"}}
    plot_run(trainer.state.log_history, panels, folder / "training.png")
    labels = [(label, key, f"{key}_std") for key, label in LABELS.items() if key in before[0]]
    print_table("Before and after RRHF", ("", "before", "after"), before_and_after(labels, before[0], after[0]))
    print_pairs(prompts[:SAMPLES]["prompt"], before[1][:SAMPLES], after[1][:SAMPLES], "response")
    trainer.create_model_card()
    print(f"policy adapter   {folder}\npicture          {folder / 'training.png'}")
    if (folder / "report.html").is_file():
        print(f"report           {folder / 'report.html'}")
    print(f'load it with     AutoPeftModelForCausalLM.from_pretrained("{folder}")')
