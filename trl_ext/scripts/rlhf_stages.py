"""The trainings of `trl-ext rlhf` on one base: SFT, reward models, PPO-Max; each done once, in a folder of its own."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.checkpoints import newest_whole
from trl_ext.data import join_datasets
from trl_ext.reward.data import TRAINING
from trl_ext.reward.strength import is_trained, train_ensemble
from trl_ext.run_identity import MAY_CHANGE, data_facts
from trl_ext.scripts.held_out import keep_prompts
from trl_ext.scripts.models import (
    config_options,
    encoder_by_name,
    fresh_adapter,
    fresh_reward_model,
    load_causal_base,
    placed,
    tokenizer_of,
)
from trl_ext.scripts.parsing import read_config
from trl_ext.scripts.pipeline import reward_arguments, reward_options
from trl_ext.scripts.rlhf_data import own_data, world_data
from trl_ext.scripts.rlhf_facts import begin, digest, done, ended_early, finish, model_facts
from trl_ext.scripts.rlhf_summary import write_sft_card
from trl_ext.scripts.running import options_of, show_progress, write_json

MACHINE = ("use_cpu", "bf16", "fp16", "report_to", "disable_tqdm", "dataloader_pin_memory")  # of the whole run
FREE = {name for names in MAY_CHANGE.values() for name in names} | {"output_dir", "max_steps", "num_train_epochs"}


@dataclass
class Work:
    """What all stages share.

    Attributes:
        recipe, training, model_args, given: The flags.
        folder: `output_dir`.
        base: Loaded once; without adapters between stages.
        tokenizer, encoder: Of the base.
        demonstrations: For SFT; None where an adapter takes its place.
        preferences, test_pairs: Of the first round.
        prompts, held_out: Of PPO; to be judged on.
        show: Prints, in the main process.
    """

    recipe: Any
    training: Any
    model_args: Any
    given: Any
    folder: Path
    base: Any
    tokenizer: Any
    encoder: Any
    demonstrations: Dataset | None
    preferences: Dataset
    test_pairs: Dataset
    prompts: Dataset
    held_out: Dataset
    show: Callable[..., Any]

    @property
    def in_world(self) -> bool:
        """Whether this is the embedded world, where answers have a gold reward."""
        return self.model_args.model_name_or_path is None

    def round(self, number: int) -> Path:
        """Folder of a round, from 1 on."""
        return self.folder / f"round_{number}"


# ---------------------------------------------------------------------- data, then the base


def prepare(recipe: Any, training: Any, model_args: Any, given: Any, show: Callable[..., Any]) -> Work:
    """Read and check all data, then load the base.

    Raises:
        ValueError: Several processes, data that cannot be trained on, a configuration with a wrong key, or a prompt
            that leaves no room.
    """
    from accelerate import PartialState
    from accelerate.utils import set_seed

    from trl_ext.ppo.data import check_inputs
    from trl_ext.roles import load_base, load_base_config, max_positions, read_adapter
    from trl_ext.text import TextEncoder, end_token_ids, load_generation_config, load_tokenizer

    if PartialState().num_processes > 1:
        raise ValueError("trl-ext rlhf runs in one process. On several devices run its stages one by one.")
    set_seed(training.seed)
    reward_arguments(recipe.reward_config, **reward_settings(recipe, training) | {"output_dir": "unused"})
    used = reward_options(recipe.reward_config)
    passed = [name for name in read_config(recipe.reward_config, "--reward_config") if name not in used]
    if passed:
        show(f"{recipe.reward_config}: {', '.join(passed)} are passed over, the flags of this run count.")
    if recipe.policy_adapter is None:
        sft_arguments(recipe.sft_config, training, Path("unused"))
    else:
        read_adapter(recipe.policy_adapter, "--policy_adapter")
    if model_args.model_name_or_path is None:
        name, data = world_data(recipe, training, show)
        tokenizer = load_tokenizer(name)
        encoder = TextEncoder(tokenizer, end_token_ids(tokenizer, load_generation_config(name)))
    else:
        name = str(model_args.model_name_or_path)
        tokenizer = tokenizer_of(model_args, training, truncation_side="left", padding_side="left")
        encoder = encoder_by_name(tokenizer, model_args, training, training.chat_template_kwargs)
        data = own_data(recipe, training, encoder, show)
    demonstrations, preferences, test_pairs, prompts, held_out = data
    config = load_base_config(name, **config_options(model_args, training))
    check_inputs(training, encoder, max_positions(config), prompts, held_out, None, scored=True)
    training.choose_optim(quantised=model_args.load_in_4bit or model_args.load_in_8bit)
    in_world = model_args.model_name_or_path is None
    base = load_base(name, dtype="float32") if in_world else load_causal_base(model_args, training)
    base = placed(base, training.device)  # a stage that is done already trains nothing, which would move it
    parts = (recipe, training, model_args, given, Path(str(training.output_dir)), base, tokenizer, encoder)
    return Work(*parts, demonstrations, preferences, test_pairs, prompts, held_out, show)


# ---------------------------------------------------------------------- trainings on one base


@contextlib.contextmanager
def lent(base: Any) -> Iterator[None]:
    """The base in a trainer's hands; afterwards it computes as before.

    TRL's trainers replace its `forward` by one with a fused LM head, which the next one would wrap once more.
    """
    own = base.__dict__.get("forward")
    yield
    base.__dict__.pop("forward", None)
    if own is not None:
        base.forward = own
    base.activation_checkpointing_disable()
    if hasattr(base, "_require_grads_hook"):
        base.disable_input_require_grads()
    base.requires_grad_(False)


def machine_of(training: Any) -> dict[str, Any]:
    """Fields that all trainings of the run share."""
    return {name: getattr(training, name) for name in MACHINE}


# ---------------------------------------------------------------------- 1. SFT


def sft_arguments(path: str, training: Any, folder: Path) -> Any:
    """`SFTConfig` of a yaml file, with the machine's part of the run's.

    Raises:
        ValueError: A key that there is not, or a value that it refuses.
    """
    from trl import SFTConfig

    options = read_config(path, "--sft_config")
    known = {f.name for f in fields(SFTConfig) if f.init}
    for key in options:
        if key not in known:
            raise ValueError(f"{key} in {path}: no such option of SFTConfig.")
    options.setdefault("gradient_checkpointing", training.gradient_checkpointing)
    return SFTConfig(**options | machine_of(training) | {"output_dir": str(folder), "seed": training.seed})


def run_sft(work: Work) -> Path:
    """Stage 1: the folder of the SFT adapter."""
    from accelerate.utils import set_seed
    from trl import SFTTrainer

    from trl_ext.roles import lora_config

    if work.recipe.policy_adapter is not None:
        return Path(work.recipe.policy_adapter)
    folder = work.folder / "sft"
    facts = model_facts(work) | {"options": read_config(work.recipe.sft_config, "--sft_config")}
    facts |= data_facts("sft_dataset", work.demonstrations)
    if done(folder, facts):
        work.show("SFT is there.")
        return folder
    begin(folder, facts)
    work.show(f"SFT on {len(work.demonstrations or ()):,} demonstrations ...", flush=True)
    set_seed(work.training.seed)
    with lent(work.base):
        trainer: Any = SFTTrainer(
            model=work.base,
            args=sft_arguments(work.recipe.sft_config, work.training, folder),
            train_dataset=with_template_options(work.demonstrations, work.training.chat_template_kwargs),
            processing_class=work.tokenizer,
            peft_config=fresh_adapter(work.given, work.model_args) or lora_config("CAUSAL_LM"),
        )
        for parameter in trainer.model.parameters():  # on a 4-bit base TRL makes adapters bfloat16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        show_progress(trainer, {"loss": "loss"})
        trainer.train(resume_from_checkpoint=sft_checkpoint(work, folder))
        trainer.model.save_pretrained(str(folder))
        work.tokenizer.save_pretrained(str(folder))
        write_sft_card(work, trainer)
        trainer.model.unload()
    finish(folder, facts)
    return folder


def with_template_options(rows: Any, options: Any) -> Any:
    """Demonstrations with the run's options of the chat template, in the column where TRL's SFTTrainer reads them."""
    if not options or "chat_template_kwargs" in rows.column_names:
        return rows
    return rows.add_column("chat_template_kwargs", [options] * len(rows))


def sft_checkpoint(work: Work, folder: Path) -> str | None:
    """The newest whole checkpoint of the SFT stage; newer ones that are torn are named."""
    path, torn, _ = newest_whole(folder)
    for each, problem in torn.items():
        work.show(f"SFT: {each.name} was passed over: {problem}")
    return None if path is None else str(path)


# ---------------------------------------------------------------------- 2. reward models


def reward_settings(recipe: Any, training: Any) -> dict[str, Any]:
    """Options of the reward models: of the yaml file over those of the run, which are its lengths and its memory."""
    longest = recipe.max_prompt_length + training.max_completion_length
    options = {"max_length": longest, "gradient_checkpointing": training.gradient_checkpointing}
    return options | reward_options(recipe.reward_config) | {"chat_template_kwargs": training.chat_template_kwargs}


def run_rewards(work: Work, number: int, sets: Mapping[str, Dataset], starts: Sequence[Path]) -> list[Path]:
    """Stage 2 of a round: the folders of its reward models, which go on from those of the round before.

    Args:
        work: What is shared.
        number: Of the round.
        sets: Name -> preferences.
        starts: Reward models of the round before; none: fresh ones.
    """
    from trl_ext import RewardModelTrainer

    folder, path = work.round(number) / "reward", work.recipe.reward_config
    preferences = join_datasets(sets)
    options = reward_settings(work.recipe, work.training)
    compared = {name: value for name, value in options.items() if name not in MAY_CHANGE["memory"]}
    facts = model_facts(work) | {"options": compared, "members": work.recipe.members}
    facts |= data_facts("preferences", preferences) | data_facts("test_pairs", work.test_pairs)
    facts["starts"] = [digest(each) for each in starts]
    members = [folder / f"member_{k + 1}" for k in range(work.recipe.members)]
    if done(folder, facts) and all(map(is_trained, members)):
        work.show(f"Round {number}: reward models are there.")
        return members
    begin(folder, facts)
    work.show(f"Round {number}: {len(members)} reward models on {len(preferences):,} pairs ...", flush=True)
    seed = work.training.seed + 1000 * (number - 1)
    args = reward_arguments(path, **options | machine_of(work.training) | {"output_dir": str(folder), "seed": seed})
    model = fresh_reward_model(work.base, work.model_args)

    def make_trainer(model: Any, args: Any) -> Any:
        trainer = RewardModelTrainer(model, args, preferences, work.test_pairs, processing_class=work.tokenizer)
        show_progress(trainer, {"loss": "loss", "accuracy": "accuracy"})
        return trainer

    accuracies: list[float] = []
    for trainer in train_ensemble(model, args, [seed + k for k in range(len(members))], make_trainer, starts):
        if not accuracies:
            work.show(trainer.reports[TRAINING])
        accuracies.append(float(trainer.evaluate_pairs()["accuracy"]))
        work.show(f"reward model {len(accuracies)}: test accuracy {accuracies[-1]:.3f}")
        trainer.save_model()
        trainer.dataset_name = work.recipe.preferences or "embedded world"
        title = f"{work.folder.name}, reward model {len(accuracies)} of round {number}"
        if trainer.state.log_history or not (Path(trainer.args.output_dir) / "README.md").is_file():
            trainer.create_model_card(title + (f", with the labels of rounds 1 to {number}" if number > 1 else ""))
    model.unload()
    work.base.activation_checkpointing_disable()
    work.base.requires_grad_(False)
    write_json(folder / "accuracy.json", accuracies)
    finish(folder, facts)
    return members


# ---------------------------------------------------------------------- 3. PPO-Max


def paying(rewards: Sequence[Path]) -> list[Path]:
    """The reward models that PPO has: all but the last one, which judges; a single one pays, and nothing judges."""
    return list(rewards[:-1] or rewards)


def run_ppo(work: Work, number: int, start: Path, critic: Path | None, rewards: Sequence[Path]) -> Path:
    """Stage 3 of a round: the folder of the tuned policy.

    Args:
        work: What is shared.
        number: Of the round.
        start: Policy adapter that it begins at, and stays near.
        critic: Of the round before; None: from the first reward model.
        rewards: Members; the last one is kept for judging.
    """
    from accelerate.utils import set_seed

    from trl_ext import PPOMaxTrainer, SharedBaseModel
    from trl_ext.roles import read_adapter
    from trl_ext.runs import RunStoppedError
    from trl_ext.toy import gold_reward

    folder, args = work.round(number) / "ppo", copy.deepcopy(work.training)
    args.output_dir, args.seed = str(folder), work.training.seed + number - 1
    length = {name: getattr(args, name) for name in ("max_steps", "num_train_epochs")}
    options = {name: getattr(args, name) for name in work.given if hasattr(args, name) and name not in FREE}
    paid = paying(rewards)
    adapters = [start, *paid, *([critic] if critic else [])]
    facts = model_facts(work) | {"options": options | length, "adapters": [digest(each) for each in adapters]}
    facts |= data_facts("prompts", work.prompts)
    if done(folder, facts):
        why = ended_early(folder)
        work.show(f"Round {number}: the policy is there." + (f" It ended before its last step: {why}" if why else ""))
        return folder
    work.show(f"Round {number}: PPO-Max ...", flush=True)
    set_seed(args.seed)
    members = [read_adapter(each, "reward_adapter") for each in paid]
    begun = None if critic is None else read_adapter(critic, "critic_adapter")
    functions: list[Any] = [gold_reward] if work.in_world else []
    args.reward_weights = [0.0] if work.in_world else None
    with lent(work.base):
        model = SharedBaseModel(work.base, read_adapter(start, "policy_adapter"), members, begun)
        trainer = PPOMaxTrainer(
            model,
            functions,
            args=args,
            train_dataset=work.prompts,
            eval_dataset=work.held_out if args.eval_strategy != "no" else None,
            processing_class=work.tokenizer,
        )
        shown = {"reward": "reward", "rewards/gold_reward/mean": "gold", "kl": "kl"}
        show_progress(trainer, shown | {"explained_variance": "critic"})
        base = {"model_name_or_path": work.model_args.model_name_or_path or str(work.base.name_or_path)}
        kept = keep_prompts(work.folder, work.prompts, work.held_out)
        trainer.recorder.options = options_of(work.model_args) | base | kept
        why = None
        try:
            trainer.train(resume_from_checkpoint=trainer.own_checkpoint())
        except RunStoppedError as error:  # with a sound policy
            why = str(error)
            work.show(f"Round {number}: PPO-Max has ended before its last step: {why}")
        trainer.save_model()
        trainer.dataset_name = work.recipe.prompts or work.recipe.preferences or "embedded world"
        trainer.create_model_card(f"{work.folder.name}, policy of round {number}")
        trainer.model.unload()
    finish(folder, facts, why)
    return folder
