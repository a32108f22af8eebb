"""PPO-Max: policy, reference, reward and critic on one frozen base.

    trl-ext ppo-max

needs nothing: it builds a small world with a known gold reward (a tiny model, an SFT adapter, a reward adapter learned
from noisy preferences) and trains in it, on a CPU, in minutes. With a model and a dataset it is a real run:

    trl-ext ppo-max --config qlora_8b --output_dir out \\
        --model_name_or_path meta-llama/Llama-3.1-8B --policy_adapter me/llama-sft --reward_adapter me/llama-rm \\
        --dataset_name me/prompts

Every option of PPOMaxConfig and of TRL's ModelConfig is a flag (`--help`); `--config x.yaml` sets defaults for them.
"""

import sys
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext import PPOMaxConfig
from trl_ext.data import load_split
from trl_ext.runs import RunStoppedError
from trl_ext.scripts.arguments import (
    LORA,
    PPOArguments,
    PromptArguments,
    check_model_flags,
    check_prompt_flags,
    check_world_flags,
    names_of,
)
from trl_ext.scripts.configs import CONFIGS
from trl_ext.scripts.inputs import WORLD_DATA, first_prompts, load_prompts, load_reward_functions, toy_world
from trl_ext.scripts.models import config_options, encoder_by_name, load_policy, quantization_of, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given, names_a_model
from trl_ext.scripts.running import (
    EvaluationAtStart,
    HeldOutSamples,
    SeededEvaluation,
    answers,
    first_evaluation,
    options_of,
    printer,
    quiet_libraries,
    show_progress,
    start_run,
    write_json,
)
from trl_ext.scripts.tables import before_and_after, plot_run, print_pairs, print_table

SAMPLES = 3


def parse(arguments: list[str]) -> tuple[PPOArguments, PPOMaxConfig, ModelConfig, Given]:
    """Flags over config file over defaults; without a model and without a config, the embedded world's config.

    Raises:
        ValueError: A flag that there is not, or that this run cannot honour.
    """
    parser = FlagParser((PPOArguments, PPOMaxConfig, ModelConfig), "ppo-max")
    default = None if names_a_model(arguments) else CONFIGS / "toy.yaml"
    recipe, training, model_args, given = parser.parse(arguments, default)
    check_flags(recipe, training, model_args, given)
    return recipe, training, model_args, given


def check_flags(recipe: PPOArguments, training: PPOMaxConfig, model_args: ModelConfig, given: Given) -> None:
    """Check that every flag has an effect.

    Raises:
        ValueError: One that would be dropped, by name.
    """
    in_world = model_args.model_name_or_path is None
    brought = set(names_of(PromptArguments)) - {"eval_prompts"}
    brought |= {"critic_adapter", "ptx_dataset_name", "auto_batch", "gpu", "use_peft", *LORA}
    check_world_flags(given, in_world, *sorted(brought))
    if in_world:
        if training.vllm_one_copy:
            given.refuse(["vllm_one_copy"], "the embedded world has no place for it. Name a model, or drop it.")
        return
    check_prompt_flags(given, recipe)
    check_model_flags(given, model_args, recipe.policy_adapter)
    if recipe.auto_batch and training.vllm_one_copy:
        raise ValueError("--auto_batch does not know what the vLLM of vllm_one_copy holds: drop one of them.")
    if not recipe.auto_batch:
        given.refuse(["gpu"], "only --auto_batch fits a run to a card. Set it too, or drop this.")
    if training.ptx_coef > 0 and recipe.ptx_dataset_name is None:
        raise ValueError(f"--ptx_coef {training.ptx_coef} needs texts: give --ptx_dataset_name.")
    if training.ptx_coef == 0:
        given.refuse(["ptx_dataset_name"], "texts are used with --ptx_coef above 0. Set it too, or drop this.")


def toy_inputs(recipe: PPOArguments, training: PPOMaxConfig) -> dict[str, Any]:
    """The embedded world: four roles, and the gold reward watched with weight 0."""
    from trl_ext import SharedBaseModel
    from trl_ext.toy import gold_reward

    world = toy_world(recipe, training)
    training.reward_weights = training.reward_weights or [0.0]
    return {
        "model": SharedBaseModel.from_pretrained(
            str(world.base),
            policy_adapter=world.policy_adapter,
            reward_adapter=world.reward_adapter,
            dtype="float32",
            adapter_dtype=recipe.adapter_dtype,
        ),
        "reward_funcs": [gold_reward],
        "train_dataset": world.train_prompts,
        "eval_dataset": first_prompts(world.eval_prompts, recipe.eval_prompts),
        "ptx_dataset": world.pretrain_texts if training.ptx_coef > 0 else None,
    }


def real_inputs(
    recipe: PPOArguments, training: PPOMaxConfig, model_args: ModelConfig, given: Given
) -> tuple[dict[str, Any], Any]:
    """A model by name, adapters, prompts, and reward functions; and the memory plan, if there is one.

    Everything that can be wrong with the data is found before the base is loaded.

    Raises:
        ValueError: No dataset, nothing that scores, or data that cannot be trained on.
    """
    from trl_ext.ppo.data import check_inputs, longest_request
    from trl_ext.roles import load_base_config, max_positions
    from trl_ext.scripts.plan_memory import plan_of_run

    functions = load_reward_functions(recipe.reward_funcs, training.reward_weights)
    train, test = load_prompts(recipe, printer())
    test = first_prompts(test, recipe.eval_prompts)
    ptx = load_split(recipe.ptx_dataset_name) if recipe.ptx_dataset_name is not None else None
    config = load_base_config(str(model_args.model_name_or_path), **config_options(model_args, training))
    tokenizer = tokenizer_of(model_args, training, truncation_side="left", padding_side="left")
    encoder = encoder_by_name(tokenizer, model_args, training, training.chat_template_kwargs)
    check_inputs(training, encoder, max_positions(config), train, test, ptx, scored=bool(recipe.reward_adapter))
    training.choose_optim(quantised=quantization_of(model_args, training) is not None)  # the plan counts its states
    plan = None
    if recipe.auto_batch or training.device.type == "cuda":  # before the weights are loaded
        plan = plan_of_run(recipe, training, model_args, given, train)
    longest = longest_request(training, encoder, train, test) if training.vllm_one_copy else None
    more = {"critic_adapter": recipe.critic_adapter, "adapter_dtype": recipe.adapter_dtype}
    inputs = {
        "model": load_policy(given, recipe, model_args, training, longest, **more),
        "reward_funcs": functions,
        "train_dataset": train,
        "eval_dataset": test,
        "ptx_dataset": ptx,
        "processing_class": tokenizer,
    }
    return inputs, plan


def sample_completions(trainer: Any, prompts: list[Any]) -> tuple[list[str], list[str]]:
    """One completion of each prompt by the policy's start, which is the reference, and one by the policy.

    Both draw the same random numbers, and the trainer's metrics know nothing of them. The main process calls it; a
    vLLM server samples where the run's do.
    """
    _, *written = answers(trainer, trainer.encoder, prompts)
    before, after = (trainer.processing_class.batch_decode(ids, skip_special_tokens=True) for ids in written)
    return [text.strip() for text in before], [text.strip() for text in after]


def metric_labels(gold: bool) -> list[tuple[str, str, str]]:
    """(label, key, key of the standard deviation) of the table before / after."""
    reward = "proxy reward (what PPO sees)" if gold else "reward (what PPO sees)"
    rows = [("gold reward", "eval_rewards/gold_reward/mean", "eval_rewards/gold_reward/std")] if gold else []
    return [
        *rows,
        (reward, "eval_reward", "eval_reward_std"),
        ("KL from the reference, nats a completion", "eval_kl", ""),
        ("perplexity of completions under the reference", "eval_perplexity_reference", ""),
        ("perplexity under the policy itself", "eval_perplexity", ""),
        ("completion length, tokens", "eval_completions/mean_length", ""),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Train, compare before and after, and say where everything is."""
    quiet_libraries()
    recipe, training, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext import PPOMaxTrainer
    from trl_ext.scripts.plan_memory import PredictedPeak

    class Trainer(SeededEvaluation, PPOMaxTrainer):
        """PPO-Max, evaluated with a seed."""

    resume, show = start_run(training), printer()
    toy, plan = model_args.model_name_or_path is None, None
    if toy:
        inputs = toy_inputs(recipe, training)
    else:
        inputs, plan = real_inputs(recipe, training, model_args, given)
    training.eval_on_start = training.eval_on_start or "eval_on_start" not in given
    trainer = Trainer(args=training, **inputs)
    trainer.dataset_name = WORLD_DATA if toy else recipe.dataset_name
    trainer.recorder.options = options_of(recipe, model_args)
    trainer.add_callback(EvaluationAtStart())
    trainer.add_callback(HeldOutSamples(trainer, inputs["eval_dataset"]))
    shown = {"reward": "reward", "rewards/gold_reward/mean": "gold", "kl": "kl", "beta": "beta"}
    show_progress(trainer, shown | {"explained_variance": "critic"})
    if plan is not None:
        trainer.add_callback(PredictedPeak(trainer, plan))

    with trainer.explained_out_of_memory(plan):
        stopped = None
        try:
            trainer.train(resume_from_checkpoint=resume)
        except RunStoppedError as error:  # with a sound policy, which is reported before the process ends with 1
            stopped = str(error)
        trainer.save_model()
        show("Evaluating the policy after training ...", flush=True)
        after = trainer.evaluate()
    if trainer.is_world_process_zero():
        report(trainer, inputs["eval_dataset"], after, toy)
    trainer.create_model_card()  # with what the evaluation has found
    if stopped is not None:
        raise SystemExit(stopped if trainer.is_world_process_zero() else 1)
    if training.push_to_hub:
        trainer.push_to_hub()


def report(trainer: Any, prompts: Any, after: dict[str, float], toy: bool) -> None:
    """Write figures and curves, then show them and say where everything is."""
    folder = Path(trainer.args.output_dir).resolve()
    history = trainer.state.log_history
    before = first_evaluation(history, "eval_reward")
    outcome = trainer.watch.outcome()
    write_json(folder / "before_after.json", {"before": before, "after": after, **outcome})
    panels = {
        "reward": {"reward": "proxy" if toy else "reward", "rewards/gold_reward/mean": "gold"},
        "KL per completion": {"kl": "kl"},
        "critic": {"explained_variance": "explained variance"},
    }
    plot_run(history, panels, folder / "training.png")
    shown = prompts[:SAMPLES]["prompt"]
    samples = sample_completions(trainer, shown)
    rows = before_and_after(metric_labels(toy), before, after)
    print_table("Before and after PPO-Max", ("", "before", "after"), rows)
    print_pairs(shown, *samples, "completion")
    for alarm in outcome["alarms"]:
        print(f"alarm            step {alarm['step']}: {alarm['alarm']}, {alarm['seen']}")
    if "best_policy" in outcome:
        best, evaluated = outcome["best_policy"], [e["eval_reward"] for e in history if "eval_reward" in e]
        last = evaluated[-2]  # the one after it is that of the best policy
        print(f"best policy      step {best['step']:.0f}, reward {best['reward']:.3g}; of the last one {last:.3g}")
    print(f"policy adapter   {folder}\ncritic adapter   {folder / 'critic'}")
    print(f"reward adapter   {folder / 'reward'}" if (folder / "reward").is_dir() else "", end="\n")
    if (folder / "report.html").is_file():
        print(f"report           {folder / 'report.html'}")
    print(f"curves           {folder / 'training.png'}")
    print(f'load it with     AutoPeftModelForCausalLM.from_pretrained("{folder}")')
