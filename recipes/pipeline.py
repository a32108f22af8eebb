"""The whole road: preferences -> reward models -> PPO-Max -> do held-out reward models prefer the tuned answers?

    python recipes/pipeline.py --config recipes/configs/pipeline_tinychat.yaml --model_name_or_path MODEL \
        --dataset_name train.jsonl.gz --dataset_test_name test.jsonl.gz --output_dir runs/pipeline

1. M reward adapters on one base, each with its own start and order of the data (`output_dir/reward/member_1`, ...).
2. PPO-Max on the prompts of the training preferences: the first adapter is the reward role, the critic starts there.
3. Judgement on the test prompts: both policies answer; the other M - 1 adapters, which training never saw, say how
   often the tuned answer is better. `output_dir/judgement.json`, a table, and pictures.

Members that are there already are not trained again. `--reward_config` is a yaml of RewardModelConfig.
"""

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ProgressWithMetrics, plot_run, print_table
from reward_common import PreferenceArguments, load_reward_base, load_splits

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class PipelineArguments:
    """What the stages need beside `PPOMaxConfig` and `ModelConfig`."""

    reward_config: str = field(
        default=str(CONFIGS / "reward_tinychat.yaml"), metadata={"help": "Options of RewardModelConfig, a yaml file."}
    )
    reward_dir: str | None = field(
        default=None, metadata={"help": "Where reward adapters are, or go. Default: `output_dir/reward`."}
    )
    members: int = field(default=5, metadata={"help": "Reward adapters: one to train against, the rest to judge."})
    max_prompt_length: int = field(default=160, metadata={"help": "Longer prompts are left out, and counted."})
    judged_prompts: int = field(default=256, metadata={"help": "Test prompts that both policies answer."})


def parse(arguments: list[str]) -> tuple[Any, ...]:
    """Flags over config file over defaults.

    Raises:
        ValueError: No model, or fewer than two reward models.
    """
    from trl import ModelConfig, TrlParser

    from trl_ext import PPOMaxConfig

    parser = TrlParser((PipelineArguments, PreferenceArguments, PPOMaxConfig, ModelConfig))
    parser.description = __doc__
    parsed = parser.parse_args_and_config(arguments)
    if parsed[3].model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the model that is tuned, by Hub id or folder.")
    if parsed[0].members < 2:
        raise ValueError(f"--members {parsed[0].members}: one trains, the others judge; use at least 2.")
    return parsed


def train_rewards(recipe: Any, training: Any, model_args: Any, splits: tuple[Any, Any]) -> list[Path]:
    """Stage 1. Folders of the reward adapters."""
    import yaml
    from transformers import AutoTokenizer, PrinterCallback, ProgressCallback

    from trl_ext import RewardModelConfig, RewardModelTrainer
    from trl_ext.reward.strength import train_members

    folder = Path(recipe.reward_dir or Path(training.output_dir) / "reward")
    folders = [folder / f"member_{k + 1}" for k in range(recipe.members)]
    if all((member / "adapter_model.safetensors").is_file() for member in folders):
        return folders
    options = yaml.safe_load(Path(recipe.reward_config).read_text())
    args = RewardModelConfig(**options | {"output_dir": str(folder), "seed": training.seed})
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = load_reward_base(model_args, training)

    def make_trainer(model: Any, args: Any) -> Any:
        trainer = RewardModelTrainer(model, args, *splits, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressWithMetrics({"loss": "loss", "accuracy": "accuracy"}))
        return trainer

    seeds = [training.seed + k for k in range(recipe.members)]
    for k, trainer in enumerate(train_members(model, args, seeds, make_trainer), start=1):
        accuracy = trainer.evaluate_pairs()
        print(f"reward model {k}: test accuracy {accuracy['accuracy']:.3f} ± {accuracy['accuracy_standard_error']:.3f}")
        trainer.save_model()
    return folders


def prompts_of(rows: Any, tokenizer: Any, longest: int) -> Any:
    """The different prompts of preference rows, without those that are too long."""
    from datasets import Dataset

    seen, kept, long = set(), [], 0
    for row in rows:
        key = json.dumps(row["prompt"])
        if key in seen:
            continue
        seen.add(key)
        ids = tokenizer.apply_chat_template(row["prompt"], tokenize=True, return_dict=False, add_generation_prompt=True)
        if len(ids) > longest:
            long += 1
        else:
            kept.append({"prompt": row["prompt"]})
    print(f"{len(kept):,} different prompts of at most {longest} tokens, {long:,} longer ones left out")
    return Dataset.from_list(kept)


def judge(trainer: Any, recipe: Any, prompts: Any, judges: list[Path], base: str, dtype: Any) -> dict[str, Any]:
    """Stage 3. Both policies answer every prompt; how often each judge, and their mean, prefers the tuned answer."""
    import torch
    from transformers import AutoTokenizer

    from trl_ext import Role, SharedBaseModel

    rows = prompts.select(range(min(recipe.judged_prompts, len(prompts))))["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    scorer = SharedBaseModel.from_pretrained(base, reward_adapter=judges, dtype=dtype, with_critic=False).eval()
    scores, texts = {}, {}
    for name, role in (("before", Role.REFERENCE), ("tuned", Role.POLICY)):
        answers, members = [], []
        for start in range(0, len(rows), 32):
            batch = rows[start : start + 32]
            with trainer.model.role(role), torch.random.fork_rng():
                torch.manual_seed(trainer.args.seed + start)
                _, completions, _ = trainer.complete(batch)
            prompt_ids = [tokenizer.apply_chat_template(p, tokenize=True, return_dict=False) for p in batch]
            ids = [[*p, *c] for p, c in zip(prompt_ids, completions, strict=True)]
            padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
            members.append(scorer.score_members(padded["input_ids"], padded["attention_mask"]))
            answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
        scores[name], texts[name] = torch.cat(members), answers
    better = (scores["tuned"] > scores["before"]).float()
    mean_better = (scores["tuned"].mean(1) > scores["before"].mean(1)).float()
    share = float(mean_better.mean())
    return {
        "prompts": len(rows),
        "ensemble_prefers_tuned": share,
        "standard_error": (share * (1 - share) / len(rows)) ** 0.5,
        "each_judge": better.mean(0).tolist(),
        "all_judges_agree": float((better.all(1) | (1 - better).all(1)).float().mean()),
        "mean_score_before": float(scores["before"].mean()),
        "mean_score_tuned": float(scores["tuned"].mean()),
        "examples": [
            {"prompt": rows[i][-1]["content"], "before": texts["before"][i], "tuned": texts["tuned"][i]}
            for i in range(5)
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    recipe, preferences, training, model_args = parse(sys.argv[1:] if arguments is None else arguments)
    from transformers import AutoTokenizer, PrinterCallback, ProgressCallback

    from trl_ext import PPOMaxTrainer, SharedBaseModel

    splits = load_splits(preferences, training.seed)
    folders = train_rewards(recipe, training, model_args, splits)
    name, dtype = model_args.model_name_or_path, model_args.dtype or "auto"
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, test = (prompts_of(rows, tokenizer, recipe.max_prompt_length) for rows in splits)
    model = SharedBaseModel.from_pretrained(name, reward_adapter=folders[0], dtype=dtype)
    trainer = PPOMaxTrainer(model, args=training, train_dataset=train)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressWithMetrics({"reward": "reward", "kl": "kl", "explained_variance": "critic"}))
    trainer.train()
    trainer.save_model()
    folder = Path(training.output_dir).resolve()
    print("Both policies answer the test prompts ...", flush=True)
    judgement = judge(trainer, recipe, test, folders[1:], name, dtype)
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    tenth = max(1, len(history) // 10)
    for key in ("reward", "kl"):
        judgement[f"{key}_first"] = sum(entry[key] for entry in history[:tenth]) / tenth
        judgement[f"{key}_last"] = sum(entry[key] for entry in history[-tenth:]) / tenth
    judgement["explained_variance"] = [entry["explained_variance"] for entry in history]
    (folder / "judgement.json").write_text(json.dumps(judgement, indent=1))
    panels = {"reward": {"reward": "reward model"}, "KL": {"kl": "kl"}, "critic": {"explained_variance": "explained"}}
    plot_run(trainer.state.log_history, panels, folder / "training.png")
    numbers = {key: value for key, value in judgement.items() if isinstance(value, float)}
    print_table("Before and after PPO-Max", ("", "value"), [(key, f"{value:.3f}") for key, value in numbers.items()])
    for example in judgement["examples"][:3]:
        print_table(f"prompt: {example['prompt']}", ("", "answer"), [(k, example[k]) for k in ("before", "tuned")])


if __name__ == "__main__":
    main()
