"""The whole road: preferences -> reward models -> PPO-Max -> do held-out reward models prefer the tuned answers?

    trl-ext pipeline --config pipeline_tinychat --model_name_or_path MODEL \\
        --dataset_name train.jsonl.gz --dataset_test_name test.jsonl.gz --output_dir runs/pipeline

1. M reward adapters on one base, each with its own start and order of the data (`output_dir/reward/member_1`, ...).
2. PPO-Max on the prompts of the training preferences: the first adapter is the reward role, the critic starts there,
   and the policy at `--policy_adapter` or fresh.
3. Judgement on the test prompts: both policies answer; the other M - 1 adapters, which training never saw, say how
   often the tuned answer is better. `output_dir/judgement.json`, a table, and pictures.

The base is loaded once, in 4 bits if the flags say so, and serves all three stages. Members that are there already are
not trained again. `--reward_config` is a yaml of RewardModelConfig. `--resume_from_checkpoint true` goes on wherever a
run was stopped: in a member, if its configuration has a save_strategy; in PPO-Max, if the flags have one; what has been
judged is not judged again.
"""

import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext import PPOMaxConfig
from trl_ext.reward.strength import is_trained, train_ensemble
from trl_ext.roles.adapters import WEIGHTS_FILE
from trl_ext.scripts.arguments import PreferenceArguments, check_model_flags
from trl_ext.scripts.held_out import keep_prompts, prompts_of_both
from trl_ext.scripts.inputs import load_preference_splits
from trl_ext.scripts.models import (
    config_options,
    encoder_by_name,
    fresh_adapter,
    fresh_reward_model,
    load_causal_base,
    tokenizer_of,
)
from trl_ext.scripts.parsing import FlagParser, Given, read_config
from trl_ext.scripts.running import (
    ANSWERED_AT_A_TIME,
    answers,
    check_output_dir,
    checkpoint_to_resume,
    options_of,
    printer,
    quiet_libraries,
    show_progress,
    write_json,
)
from trl_ext.scripts.tables import last_text, plot_run, print_table

EXAMPLES, SHOWN = 5, 3
JUDGEMENT = "judgement.json"


@dataclass
class PipelineArguments(PreferenceArguments):
    """What the stages need beside `PPOMaxConfig` and `ModelConfig`."""

    policy_adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter the policy starts from and stays near. Default: a fresh one."}
    )
    reward_config: str = field(
        default="reward_tinychat", metadata={"help": "Options of RewardModelConfig: a yaml file, or the name of one."}
    )
    reward_dir: str | None = field(
        default=None, metadata={"help": "Where reward adapters are, or go. Default: `output_dir/reward`."}
    )
    members: int = field(default=5, metadata={"help": "Reward adapters: one to train against, the rest to judge."})
    max_prompt_length: int = field(default=160, metadata={"help": "Longer prompts are left out, and counted."})
    judged_prompts: int = field(default=256, metadata={"help": "Test prompts that both policies answer."})


def parse(arguments: list[str]) -> tuple[PipelineArguments, PPOMaxConfig, ModelConfig, Given]:
    """Flags over config file over defaults.

    Raises:
        ValueError: No model, fewer than two reward models, or a flag that this recipe cannot honour.
    """
    parser = FlagParser((PipelineArguments, PPOMaxConfig, ModelConfig), "pipeline")
    recipe, training, model_args, given = parser.parse(arguments)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the model that is tuned, by Hub id or folder.")
    if recipe.members < 2:
        raise ValueError(f"--members {recipe.members}: one trains, the others judge; use at least 2.")
    if recipe.judged_prompts < 1:
        raise ValueError(f"--judged_prompts {recipe.judged_prompts}: judge at least 1.")
    if training.ptx_coef > 0:
        raise ValueError(f"--ptx_coef {training.ptx_coef}: this recipe has no texts for it. trl-ext ppo-max has.")
    if training.vllm_one_copy:
        given.refuse(["vllm_one_copy"], "only trl-ext ppo-max has it. Use vllm_server_url, or drop it.")
    given.refuse(["reward_weights"], "the first reward adapter scores, and no function. Drop it.")
    check_model_flags(given, model_args)  # beside a --policy_adapter the LoRA flags are those of the reward adapters
    return recipe, training, model_args, given


# ---------------------------------------------------------------------- 1. reward models


def member_folders(recipe: PipelineArguments, training: PPOMaxConfig) -> list[Path]:
    """Where the reward adapters are, or go."""
    folder = Path(recipe.reward_dir or Path(str(training.output_dir)) / "reward")
    return [folder / f"member_{k + 1}" for k in range(recipe.members)]


def reward_options(path: str) -> dict[str, Any]:
    """The options of a yaml file that are `RewardModelConfig`'s; those of the model are passed over for the run's own.

    Raises:
        ValueError: A key that there is not.
    """
    from trl_ext import RewardModelConfig

    options = read_config(path, "--reward_config")
    known, models = ([f.name for f in fields(kind) if f.init] for kind in (RewardModelConfig, ModelConfig))
    for key in options:
        if key not in known and key not in models:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{key} in {path}: no such option{f'; did you mean {near[0]}' if near else ''}.")
    return {key: value for key, value in options.items() if key in known}


def reward_arguments(path: str, **own: Any) -> Any:
    """`RewardModelConfig` of a yaml file, with some fields set here.

    Raises:
        ValueError: A key that there is not.
    """
    from trl_ext import RewardModelConfig

    return RewardModelConfig(**reward_options(path) | own)


def train_rewards(
    recipe: PipelineArguments,
    training: PPOMaxConfig,
    model_args: ModelConfig,
    base: Any,
    data: tuple[Any, ...],
) -> None:
    """Stage 1: the reward adapters that are not there yet. The base is as before afterwards."""
    from trl_ext import RewardModelTrainer

    folders = member_folders(recipe, training)
    if all(map(is_trained, folders)):
        return
    tokenizer, train, test = data
    own = {"output_dir": str(folders[0].parent), "seed": training.seed}
    args = reward_arguments(recipe.reward_config, **own, chat_template_kwargs=training.chat_template_kwargs)
    model = fresh_reward_model(base, model_args)

    def make_trainer(model: Any, args: Any) -> Any:
        trainer = RewardModelTrainer(model, args, train, test, processing_class=tokenizer)
        show_progress(trainer, {"loss": "loss", "accuracy": "accuracy"})
        return trainer

    seeds = [training.seed + k for k in range(recipe.members)]
    for k, trainer in enumerate(train_ensemble(model, args, seeds, make_trainer), start=1):
        result = trainer.evaluate_pairs()
        accuracy = f"{result['accuracy']:.3f} ± {result['accuracy_standard_error']:.3f}"
        printer()(f"reward model {k}: test accuracy {accuracy}")
        trainer.save_model()
    model.unload()
    base.activation_checkpointing_disable()
    base.requires_grad_(False)


# ---------------------------------------------------------------------- 2. PPO-Max


def tune(
    recipe: PipelineArguments, training: PPOMaxConfig, model_args: ModelConfig, given: Given, parts: tuple[Any, ...]
) -> Any:
    """Stage 2: the trainer, its policy tuned and saved."""
    from accelerate.utils import set_seed

    from trl_ext import PPOMaxTrainer, SharedBaseModel
    from trl_ext.roles import read_adapter

    base, tokenizer, train, test, resume = parts
    policy: Any = fresh_adapter(given, model_args)
    if recipe.policy_adapter is not None:
        policy = read_adapter(recipe.policy_adapter, "--policy_adapter")
    set_seed(training.seed)  # whether reward models were trained or found
    model = SharedBaseModel(base, policy, read_adapter(member_folders(recipe, training)[0], "reward_adapter"))
    held_out = test if training.eval_strategy != "no" else None
    trainer = PPOMaxTrainer(
        model, args=training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    kept = keep_prompts(Path(str(training.output_dir)), train, test)
    trainer.recorder.options = options_of(recipe, model_args) | kept
    show_progress(trainer, {"reward": "reward", "kl": "kl", "explained_variance": "critic"})
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


# ---------------------------------------------------------------------- 3. judgement


def judge_scores(judges: Any, encoder: Any, rows: Sequence[list[int]]) -> Any:
    """(N, M): what each of M reward adapters gives the sequences, read where it was trained to read."""
    import torch

    from trl_ext.text import pad_ids

    device, scores = next(judges.parameters()).device, []
    for start in range(0, len(rows), ANSWERED_AT_A_TIME):
        ids, mask = pad_ids(rows[start : start + ANSWERED_AT_A_TIME], encoder.pad_id, left=False, device=device)
        scores.append(judges.score_members(ids, mask).float().cpu())
    return torch.cat(scores)


def outcomes(before: Any, tuned: Any, same: Any) -> Any:
    """1 where the tuned answer scores more, 0 where less, 1/2 for a tie: equal scores, or the same answer twice.

    Args:
        before, tuned: Scores, (N,) or (N, M).
        same: Whether both answers are the same tokens, (N,) bool.
    """
    better = (tuned > before).float() + 0.5 * (tuned == before)
    better[same] = 0.5
    return better


def judgement_of(before: Any, tuned: Any, same: Any) -> dict[str, Any]:
    """What M judges say of N pairs of answers.

    Args:
        before, tuned: Scores, (N, M).
        same: Whether both answers are the same tokens, (N,) bool.

    Returns:
        Shares by the mean of the judges: `win`, `tie`, `loss`, and `ensemble_prefers_tuned`, wins and half the ties,
        with its `standard_error`; `each_judge`, the same of each; `all_judges_agree`, the share of pairs without a tie
        on which they do, None without such pairs; and mean scores.
    """
    mean = outcomes(before.mean(1), tuned.mean(1), same)
    each = outcomes(before, tuned, same)
    decided = each[(each != 0.5).all(1)]
    unanimous = (decided == decided[:, :1]).all(1).float()
    count = len(mean)
    return {
        "prompts": count,
        "win": float((mean == 1).float().mean()),
        "tie": float((mean == 0.5).float().mean()),
        "loss": float((mean == 0).float().mean()),
        "ensemble_prefers_tuned": float(mean.mean()),
        "standard_error": float(mean.std(unbiased=False)) / count**0.5,
        "each_judge": each.mean(0).tolist(),
        "all_judges_agree": float(unanimous.mean()) if len(decided) else None,
        "mean_score_before": float(before.mean()),
        "mean_score_tuned": float(tuned.mean()),
    }


def judge(trainer: Any, encoder: Any, prompts: Sequence[Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Stage 3: both policies answer every prompt, then the judges' adapters take the place of the roles on the base."""
    import torch

    from trl_ext import SharedBaseModel
    from trl_ext.roles import read_adapter

    prompt_ids, before, tuned = answers(trainer, encoder, prompts)
    base = trainer.model.unload()
    judges = SharedBaseModel(base, None, [read_adapter(path, "reward_adapter") for path in folders], with_critic=False)
    judges.eval()

    def scores(responses: list[list[int]]) -> Any:
        rows = zip(prompts, prompt_ids, responses, strict=True)
        return judge_scores(judges, encoder, [encoder.scored_ids(*row) for row in rows])

    same = torch.tensor([old == new for old, new in zip(before, tuned, strict=True)])
    texts = [encoder.tokenizer.batch_decode(ids[:EXAMPLES], skip_special_tokens=True) for ids in (before, tuned)]
    examples = [
        {"prompt": last_text(prompt), "before": old, "tuned": new}
        for prompt, old, new in zip(prompts[:EXAMPLES], *texts, strict=True)
    ]
    return judgement_of(scores(before), scores(tuned), same) | {"examples": examples}


# ---------------------------------------------------------------------- all of it


def resume_of(recipe: PipelineArguments, training: PPOMaxConfig) -> str | bool | None:
    """As `checkpoint_to_resume`; what is there of the reward models is said.

    Raises:
        ValueError: There is no such folder.
    """
    resume = checkpoint_to_resume(training)
    if resume is True:
        done = sum(map(is_trained, member_folders(recipe, training)))
        printer()(f"{done} of {recipe.members} reward models are there.")
    return resume


def judged_of(recipe: PipelineArguments, training: PPOMaxConfig) -> dict[str, Any]:
    """What a judgement hangs on: the seed, how many prompts, and digests of the policy and of the judges' adapters."""
    folders = [Path(str(training.output_dir)), *member_folders(recipe, training)[1:]]
    digests = [hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest() for folder in folders]
    names = ("seed", "max_completion_length", "temperature", "top_p")
    options = {name: getattr(training, name) for name in names} | {"judged_prompts": recipe.judged_prompts}
    return options | {
        "dataset": [recipe.dataset_name or recipe.dataset_mixture, recipe.dataset_test_name],
        "adapters": digests,
    }


def judged_before(path: Path, judged: dict[str, Any]) -> dict[str, Any] | None:
    """The judgement in a file, if it is one of this; None: it must be made."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("judged") == judged else None


def main(arguments: list[str] | None = None) -> None:
    """All three stages; what is judged is written before it is shown."""
    quiet_libraries()
    recipe, training, model_args, given = parse(sys.argv[1:] if arguments is None else arguments)
    from accelerate.utils import set_seed

    from trl_ext.ppo.data import check_inputs
    from trl_ext.roles import load_base_config, max_positions

    check_output_dir(str(training.output_dir))
    resume = resume_of(recipe, training)
    set_seed(training.seed)
    train, test = load_preference_splits(recipe, training.seed, printer())
    tokenizer = tokenizer_of(model_args, training, truncation_side="left", padding_side="left")
    encoder = encoder_by_name(tokenizer, model_args, training, training.chat_template_kwargs)
    prompts = prompts_of_both(train, test, encoder, recipe.max_prompt_length, printer())
    config = load_base_config(str(model_args.model_name_or_path), **config_options(model_args, training))
    check_inputs(training, encoder, max_positions(config), prompts[0], prompts[1], None, scored=True)
    training.choose_optim(quantised=model_args.load_in_4bit or model_args.load_in_8bit)
    base = load_causal_base(model_args, training)
    train_rewards(recipe, training, model_args, base, (tokenizer, train, test))
    trainer = tune(recipe, training, model_args, given, (base, tokenizer, *prompts, resume))
    if training.push_to_hub:
        trainer.push_to_hub()
    if not trainer.is_world_process_zero():
        return
    judged = judged_of(recipe, training)
    judgement = judged_before(Path(str(training.output_dir)) / JUDGEMENT, judged) if resume else None
    if judgement is None:
        print("Both policies answer the test prompts ...", flush=True)
        rows = prompts[1][: recipe.judged_prompts]["prompt"]
        judgement = judge(trainer, encoder, rows, member_folders(recipe, training)[1:]) | {"judged": judged}
    report(trainer, judgement)


def report(trainer: Any, judgement: dict[str, Any]) -> None:
    """Add the course of the run, write everything, then show it."""
    folder = Path(trainer.args.output_dir).resolve()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    tenth = max(1, len(history) // 10)
    for key in ("reward", "kl") if history else ():
        judgement[f"{key}_first"] = sum(entry[key] for entry in history[:tenth]) / tenth
        judgement[f"{key}_last"] = sum(entry[key] for entry in history[-tenth:]) / tenth
    judgement["explained_variance"] = [entry["explained_variance"] for entry in history]
    write_json(folder / JUDGEMENT, judgement)
    panels = {"reward": {"reward": "reward model"}, "KL": {"kl": "kl"}, "critic": {"explained_variance": "explained"}}
    plot_run(trainer.state.log_history, panels, folder / "training.png")
    shares = " / ".join(f"{judgement[name]:.3f}" for name in ("win", "tie", "loss"))
    rows = [("win / tie / loss of the tuned answers", shares)]
    shown = {key: value for key, value in judgement.items() if key not in ("win", "tie", "loss")}
    rows += [(key, f"{value:.3f}") for key, value in shown.items() if isinstance(value, float)]
    print_table("Before and after PPO-Max", ("", "value"), rows)
    for example in judgement["examples"][:SHOWN]:
        print_table(f"prompt: {example['prompt']}", ("", "answer"), [(k, example[k]) for k in ("before", "tuned")])
