"""What a PPO run needs on a card, phase by phase, from the model's configuration alone: nothing is loaded.

    trl-ext plan-memory --config qlora_8b --gpu 24GB \
        --model_name_or_path meta-llama/Llama-3.1-8B

Takes the options of trl-ext ppo-max that change the memory, by flag or from its config file.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import ModelConfig

from trl_ext import PPOMaxConfig, Role, memory
from trl_ext.memory.trace import shallow_config
from trl_ext.roles import load_base_config, lora_config, quantization_method, read_adapter
from trl_ext.scripts.arguments import PPOArguments, check_model_flags
from trl_ext.scripts.models import config_options, fresh_adapter, tokenizer_of
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import printer, quiet_libraries
from trl_ext.scripts.tables import print_table
from trl_ext.text import TextEncoder


@dataclass
class PlanArguments:
    """What decides the memory of a run, with the names that `PPOMaxConfig` gives it."""

    gpu: str = field(default="auto", metadata={"help": "Size of the card, as in 24GB; 'auto' is the card at hand."})
    max_prompt_length: int = field(default=512, metadata={"help": "Tokens of the longest prompt."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens of the longest completion."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Sequences in a micro-batch of the update."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches in an optimizer step."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches in a rollout batch. Default: as accumulation."},
    )
    per_device_generate_batch_size: int | None = field(
        default=None, metadata={"help": "Completions generated at a time. Default: the whole rollout batch."}
    )
    per_device_score_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences scored at a time. Default: 2 times the micro-batch."}
    )
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in backward."})
    bf16: bool = field(default=True, metadata={"help": "Train under autocast, as on a card; false for pure float32."})
    update_kl_target: float | None = field(
        default=None, metadata={"help": "0 where the size of updates is not held: then no copy of the weights is kept."}
    )
    optim: str = field(default="paged_adamw_8bit", metadata={"help": "Optimizer."})
    adapters: list[str] = field(
        default_factory=lambda: ["policy", "reference", "reward", "critic"],
        metadata={
            "help": "Roles that have an adapter. Without 'reference' it is the bare base (no --policy_adapter); "
            "without 'reward' reward functions score."
        },
    )
    adapter_dtype: str = field(default="float32", metadata={"help": "Of every role's adapter: float32 or bfloat16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse(arguments: list[str]) -> tuple[PlanArguments, ModelConfig, Given]:
    """Flags over the config file over defaults; options of a run that do not change the memory are passed over there.

    Raises:
        ValueError: A flag that is no option here, or that the plan cannot honour.
    """
    parser = FlagParser((PlanArguments, ModelConfig), "plan-memory", passed_over=(PPOArguments, PPOMaxConfig))
    plan, model_args, given = parser.parse(arguments)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a Hub id, or a folder with a config.json.")
    flags = given.on_command_line()  # the file is of a run
    check_model_flags(flags, model_args)
    flags.refuse(["bnb_4bit_quant_storage"], "it does not change the memory of a run on one card. Drop it.")
    return plan, model_args, given


def attention_of(config: Any, model_args: Any) -> str:
    """The attention that a run would use: the one asked for, else what transformers chooses for this architecture."""
    if model_args.attn_implementation:
        return model_args.attn_implementation
    shallow = shallow_config(config, 1)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(shallow, attn_implementation="sdpa")
    except ValueError:  # GPT-Neo has none
        return "eager"
    return "sdpa"


def make_setup(config: Any, model_args: Any, lora: Any, **options: Any) -> Any:
    """TRL's model options as a `Setup`.

    Args:
        config: Of the base.
        model_args: `ModelConfig`.
        lora: LoRA configuration of the adapters; None for the project's own.
        options: Further fields of `Setup`.

    Raises:
        ValueError: An 8-bit base, which the plan does not know.
    """
    if model_args.load_in_8bit:
        raise ValueError("load_in_8bit=True: the plan knows 4 bits, 16 and 32. Set load_in_4bit, or neither.")
    name = model_args.dtype
    dtype = getattr(config, "dtype", None) if name in (None, "auto") else getattr(torch, name, None)
    if name not in (None, "auto") and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={name!r} is none of float32, bfloat16, float16, auto.")
    if options.get("autocast") is False and dtype is None:
        dtype = torch.float32
    return memory.Setup(
        load_in_4bit=model_args.load_in_4bit,
        double_quant=model_args.use_bnb_nested_quant,
        dtype=dtype or torch.bfloat16,
        lora=lora or lora_config(),
        attention=attention_of(config, model_args),
        **options,
    )


def setup_of(plan: PlanArguments, config: Any, model_args: Any, given: Given) -> Any:
    """The `Setup` of what was asked.

    Raises:
        ValueError: Roles or a dtype that there are not.
    """
    unknown = [name for name in plan.adapters if name not in list(Role)]
    if unknown:
        raise ValueError(f"adapters={unknown}: roles are {', '.join(Role)}.")
    if plan.adapter_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"adapter_dtype={plan.adapter_dtype!r} must be float32 or bfloat16.")
    return make_setup(
        config,
        model_args,
        fresh_adapter(given, model_args),
        autocast=plan.bf16,
        adapters=tuple(Role(name) for name in plan.adapters),
        optim=plan.optim,
        trained_dtype=getattr(torch, plan.adapter_dtype),
        frozen_dtype=getattr(torch, plan.adapter_dtype),
        checkpointing=plan.gradient_checkpointing,
        holds_updates=plan.update_kl_target != 0,
        prompt_length=plan.max_prompt_length,
        completion_length=plan.max_completion_length,
    )


def plan_of_run(recipe: PPOArguments, training: PPOMaxConfig, model_args: Any, given: Given, dataset: Any) -> Any:
    """The plan of a run of trl-ext ppo-max; with `--auto_batch` its batches are set to what fits.

    Nobody asks for a plan without `--auto_batch`: where there can be none, a printed line says why, and the run goes
    on. None too for a base that is quantised already, which the plan does not know.

    Raises:
        TooSmallError: With `--auto_batch`: nothing fits. The plan, what is missing and what to change.
    """
    if recipe.auto_batch:
        return make_plan(recipe, training, model_args, given, dataset)
    try:
        held = load_base_config(model_args.model_name_or_path, **config_options(model_args, training))
        if quantization_method(held) is not None:
            return None
        return make_plan(recipe, training, model_args, given, dataset)
    except Exception as error:
        printer()(f"There is no memory plan for this run, which goes on without: {type(error).__name__}: {error}")
        return None


def make_plan(recipe: PPOArguments, training: PPOMaxConfig, model_args: Any, given: Given, dataset: Any) -> Any:
    """`plan_of_run`, whose errors are errors.

    The sequences in an optimizer step and in a rollout batch stay as they are, so that learning does.
    """
    config = memory.load_config(model_args.model_name_or_path, **config_options(model_args, training))
    options: Any = training.chat_template_kwargs
    encoder = TextEncoder(tokenizer_of(model_args, training), None, options)
    brought = {Role.REFERENCE: recipe.policy_adapter, Role.REWARD: recipe.reward_adapter}
    setup = make_setup(
        config,
        model_args,
        fresh_adapter(given, model_args),
        autocast=bool(training.bf16 or training.fp16),
        adapters=(Role.POLICY, Role.CRITIC, *(role for role, adapter in brought.items() if adapter)),
        optim=getattr(training.optim, "value", training.optim),
        trained_dtype=getattr(torch, recipe.adapter_dtype),
        frozen_dtype=getattr(torch, recipe.adapter_dtype),
        checkpointing=training.gradient_checkpointing,
        holds_updates=training.update_kl_target != 0,
        prompt_length=max(encoder.prompt_lengths(dataset["prompt"])),
        completion_length=training.max_completion_length,
    )
    if recipe.policy_adapter is not None:
        setup = replace(setup, lora=read_adapter(recipe.policy_adapter, "policy_adapter").config)
    batch, per_rollout = training.per_device_train_batch_size, training.steps_per_generation or 1
    optimizer_batch, rollout_batch = batch * training.gradient_accumulation_steps, batch * per_rollout
    continuous = training.use_transformers_continuous_batching  # bounds its cache by the memory that it finds free
    at_once = 1 if continuous else training.per_device_generate_batch_size
    scored = training.per_device_score_batch_size
    if not recipe.auto_batch:
        tracer, weights = memory.Tracer(config, setup), memory.count_weights(config, setup)
        return memory.plan_memory(tracer, weights, batch, rollout_batch, scored, at_once)
    card = memory.card_bytes(recipe.gpu)
    plan, evaluated = memory.choose_batches(config, setup, card, optimizer_batch, rollout_batch, scored, at_once)
    training.per_device_train_batch_size = plan.train_batch
    training.per_device_score_batch_size = plan.score_batch
    training.per_device_eval_batch_size = evaluated
    training.gradient_accumulation_steps = optimizer_batch // plan.train_batch
    training.steps_per_generation = rollout_batch // plan.train_batch
    if plan.generate_batch < rollout_batch and not continuous:
        training.per_device_generate_batch_size = plan.generate_batch
    generated = "by continuous batching" if continuous else f"{plan.generate_batch} at a time"
    printer()(
        f"--auto_batch on {memory.format_gib(card)} GiB: micro-batches of {plan.train_batch}, "
        f"{training.gradient_accumulation_steps} an optimizer step, {training.steps_per_generation} a rollout batch, "
        f"generated {generated}, scored {plan.score_batch} at a time; evaluation in batches of {evaluated}. Predicted "
        f"peak {memory.format_gib(plan.allocated)} GiB."
    )
    return plan


class PredictedPeak(TrainerCallback):
    """Logs the plan's `memory/predicted_gib` beside the measured `peak_memory_gib`."""

    def __init__(self, trainer: Any, plan: Any):
        self.trainer, self.predicted = trainer, plan.allocated / 2**30

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.record({"memory/predicted_gib": self.predicted})


def main(arguments: list[str] | None = None) -> None:
    """Print the plan; exit status 1 where it does not fit."""
    quiet_libraries()
    args, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    card = memory.card_bytes(args.gpu)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    config = memory.load_config(str(name), revision=revision, trust_remote_code=args.trust_remote_code)
    setup = setup_of(args, config, model_args, given)
    tracer, weights = memory.Tracer(config, setup), memory.count_weights(config, setup)
    per_rollout = args.steps_per_generation or args.gradient_accumulation_steps
    train = args.per_device_train_batch_size
    at_once = args.per_device_score_batch_size, args.per_device_generate_batch_size
    plan = memory.plan_memory(tracer, weights, train, train * per_rollout, *at_once)

    gib = memory.format_gib
    print(
        f"{name}: {weights.parameters:,} parameters, {weights.linear} linear layers, {weights.quantised} in 4 bits, "
        f"{weights.adapted} with LoRA. The roles take {weights.resident_bytes / weights.base_bytes:.3f} times the base."
    )
    sizes = f"update {train}, score {plan.score_batch}, generate {plan.generate_batch}"
    print_table(f"{args.max_prompt_length} + {args.max_completion_length} tokens; sequences: {sizes}", *plan.table())
    print(f"Largest tile of logits, part of the working memory: {gib(plan.logits_tile)} GiB.")
    if plan.fits(card):
        print(f"Fits into {gib(card)} GiB with {gib(card - plan.needed)} GiB to spare.")
    largest = memory.largest_batches(tracer, weights, card)
    rows = [(phase, str(batch) if batch else "none fits") for phase, batch in largest.items()]
    print_table(f"Largest batches on {gib(card)} GiB (powers of two, up to 256)", ("phase", "sequences"), rows)
    if not plan.fits(card):
        raise SystemExit("Does not fit: " + memory.explain(config, plan, card))


if __name__ == "__main__":
    main()
