"""What each option of a critic does where credit matters: a way through 20 halls, told in words (`trl_ext.toy.halls`).

    python tests/benchmarks/bench_credit.py --output runs/credit            # every variant, three tasks, 3 seeds
    python tests/benchmarks/bench_credit.py --output runs/credit --only ppo,vapo --tasks sparse --seeds 0
    python tests/benchmarks/bench_credit.py --output runs/credit --tiny     # tries every variant, measures nothing

The tasks: one reward at the end ("sparse"), a share of it for each right door ("dense"), and the former where an
environment says where one is ("turns"). Every run trains a fresh adapter (LoRA r=16 on all linear layers) on the
pretrained base for the same number of generated samples, 64 a rollout batch. Beside PPO stand TRL's GRPO and RLOO with
groups of 8, in 8 settings in all. A run that is in the output folder already is not made again.

Success rate: share of a rollout batch's samples that get out, `solved`, which the dense task only watches. KL: nats a
completion, from the policy that the run started from. Prints a markdown table: success and KL over the last eighth of
the samples, means over seeds, and for each seed the number of samples after which the mean of four rollout batches in a
row is at least the final success of the best critic-free setting. `explained_variance.png` shows the critic,
`success.png` the success rate.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
BATCH, MICRO, GROUP, LENGTH = 64, 32, 8, 104
MEASURED = 1e-6  # in place of a beta of 0, which leaves the reference out, and with it the KL
TASKS = ("sparse", "dense", "turns")
WINDOW = 4  # rollout batches of which the success is averaged
PPO = {"reward_normalization": "none", "reward_clip": None, "learning_rate": 1e-3, "num_iterations": 2}
PPO |= {"lr_scheduler_type": "constant"}  # as the critic-free ones
PPO |= {"diversity_target": 0.0}  # one right answer
# The batch mean stands in for a critic that explains nothing: no samples are spent on it alone
QUICK = {"value_lambda": 1.0, "critic_warmup_steps": 0, "update_kl_target": 0.5}
# The rate, and steps of any size, as TRL's trainers take them
LIKE_RLOO = QUICK | {"learning_rate": 3e-3, "critic_learning_rate": 3e-3, "update_kl_target": 0.0}
LARGE = {"learning_rate": 3e-3, "update_kl_target": 1.0}  # updates as large as theirs
LONG_WARMUP = {"critic_warmup_steps": 20, "critic_warmup_explained_variance": None}
# Name -> (changes to PPO, task that it is for; None: both)
VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "ppo": ({}, None),
    "quick": (QUICK, None),
    "quick at lambda 1": (QUICK | {"gae_lambda": 1.0}, None),
    "as RLOO": (LIKE_RLOO, None),
    "as RLOO at lambda 1": (LIKE_RLOO | {"gae_lambda": 1.0}, None),
    "large updates": (LARGE, None),
    "large updates without KL": (LARGE | {"beta": 0.0}, None),
    "no warm-up": ({"critic_warmup_steps": 0}, None),
    "pretraining on Monte-Carlo returns": ({"critic_warmup_returns": "monte_carlo", **LONG_WARMUP}, None),
    "the same warm-up on lambda returns": (LONG_WARMUP, None),
    "value_lambda 1": ({"value_lambda": 1.0}, None),
    "gae_lambda 1": ({"gae_lambda": 1.0}, None),
    "gae_lambda_alpha 0.05": ({"gae_lambda_alpha": 0.05, "value_lambda": 1.0}, None),
    "gae_lambda_alpha 0.5": ({"gae_lambda_alpha": 0.5, "value_lambda": 1.0}, None),
    "dis": ({"policy_objective": "dis", "epsilon": 0.8, "epsilon_high": 3.0}, None),
    "critic_updates 2": ({"critic_updates": 2}, None),
    "critic_updates 4 of 4 passes": ({"critic_updates": 4, "num_iterations": 4}, None),
    "critic_freeze_attention": ({"critic_freeze_attention": True}, None),
    "best_lm_coef 0.1": ({"best_lm_coef": 0.1, "best_lm_score": 1.0}, None),
    "reward_sigmoid": ({"reward_sigmoid": True}, "sparse"),
    "vapo": ({"preset": "vapo"}, None),
    "sao": ({"preset": "sao"}, None),
    "open_reasoner_zero": ({"preset": "open_reasoner_zero"}, None),
}
CRITIC_FREE = {
    f"{method} lr {rate:g} beta {beta:g}": (method, {"learning_rate": rate, "beta": beta})
    for method, (rate, beta) in product(
        ("grpo", "rloo"), ((1e-3, MEASURED), (3e-3, MEASURED), (1e-2, MEASURED), (3e-3, 0.02))
    )
}


def common(samples: int, seed: int, passes: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "seed": seed,
        "per_device_train_batch_size": MICRO,
        "steps_per_generation": BATCH // MICRO,
        "max_steps": samples // BATCH * passes * BATCH // MICRO,
        "logging_steps": passes * BATCH // MICRO,
        "max_completion_length": LENGTH,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def rewards_of(task: str) -> tuple[list[Any], list[float]]:
    """What is trained on and, with weight 0, what is watched. Parts are summed for trainers that know no parts."""
    from trl_ext.scoring import checked_reward
    from trl_ext.toy.halls import solved, step_rewards

    return ([step_rewards, solved], [1.0, 0.0]) if task == "dense" else ([checked_reward(solved)], [1.0])


def train_ours(changes: dict[str, Any], task: str, seed: int, samples: int, world: Any) -> Any:
    import yaml
    from peft import LoraConfig

    from trl_ext import PPOMaxConfig, PPOMaxTrainer
    from trl_ext.scripts.configs import find_config
    from trl_ext.toy.halls import in_turns

    settings = PPO | {k: v for k, v in changes.items() if k != "preset"}
    if "preset" in changes:
        settings |= yaml.safe_load(find_config(changes["preset"]).read_text())
        settings["critic_learning_rate"] *= settings["learning_rate"] / 1e-4  # the ratio of the preset
    if settings.get("beta") == 0:
        settings |= {"beta": MEASURED, "kl_control": "fixed"}
    settings |= common(samples, seed, settings["num_iterations"])
    if settings.get("critic_warmup_steps") and settings["critic_warmup_steps"] * 2 > settings["max_steps"]:
        settings["critic_warmup_steps"] = settings["max_steps"] // 4
    functions, weights = rewards_of(task)
    prompts = world.train_prompts
    if settings.get("reward_sigmoid"):  # of the start the success rate, which is about that of every prompt
        prompts = prompts.add_column("reference_scores", [0.12] * len(prompts))
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = PPOMaxConfig(**settings, reward_weights=weights, write_report=False, guard=False)
    turns = {"rollout_func": in_turns} if task == "turns" else {}
    return PPOMaxTrainer(str(world.base), functions, args, prompts, peft_config=adapter, **turns)


def train_critic_free(method: str, changes: dict[str, Any], task: str, seed: int, samples: int, world: Any) -> Any:
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from trl_ext.scoring import checked_reward

    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[method]
    functions, weights = rewards_of(task)
    functions = [function if hasattr(function, "placed") else checked_reward(function) for function in functions]
    settings = common(samples, seed, 2) | {"num_generations": GROUP, "num_iterations": 2, "reward_weights": weights}
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = config(**settings, **changes, lr_scheduler_type="constant", model_init_kwargs={"dtype": "float32"})
    return trainer(str(world.base), functions, args, train_dataset=world.train_prompts, peft_config=adapter)


def run(name: str, task: str, seed: int, samples: int, world: Any) -> dict[str, list[float | None]]:
    from transformers import PrinterCallback, set_seed

    set_seed(seed)
    if name in VARIANTS:
        trainer = train_ours(VARIANTS[name][0], task, seed, samples, world)
    else:
        method, changes = CRITIC_FREE[name]
        trainer = train_critic_free(method, changes, task, seed, samples, world)
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    entries = [entry for entry in trainer.state.log_history if "rewards/solved/mean" in entry]
    keys = {"success": "rewards/solved/mean", "kl": "kl", "explained_variance": "explained_variance/monte_carlo"}
    records: dict[str, list[float | None]] = {k: [entry.get(key) for entry in entries] for k, key in keys.items()}
    if name in CRITIC_FREE:  # TRL's is of a token
        lengths = [entry.get("completions/mean_length", 1.0) for entry in entries]
        records["kl"] = [None if kl is None else kl * n for kl, n in zip(records["kl"], lengths, strict=True)]
    return records | {"cpu_seconds": [seconds]}


# ---------------------------------------------------------------------- what came out


def final(values: list[float | None]) -> float | None:
    """Mean over the last eighth."""
    last = [value for value in values[-max(len(values) // 8, 1) :] if value is not None]
    return sum(last) / len(last) if last else None


def samples_to(success: list[float], level: float) -> int | None:
    """Generated samples after which the mean of `WINDOW` rollout batches in a row is at least `level`."""
    for end in range(WINDOW, len(success) + 1):
        if sum(success[end - WINDOW : end]) / WINDOW >= level:
            return end * BATCH
    return None


def table(results: dict[str, dict[str, Any]], task: str) -> str:
    """Mean over seeds; results are named task/variant/seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for key, records in results.items():
        of, name, _ = key.split("/")
        if of == task:
            runs.setdefault(name, []).append(records)

    def mean(values: list[Any]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.3g}" if known else "-"

    free = [[final(r["success"]) or 0.0 for r in rs] for name, rs in runs.items() if name in CRITIC_FREE]
    averages = [sum(finals) / len(finals) for finals in free]
    level = max(averages, default=None)
    lines = ["| variant | seeds | success | KL | samples to the level |", "| --- | --- | --- | --- | --- |"]
    for name, records in runs.items():
        reached = [samples_to(r["success"], level) for r in records] if level is not None else []
        figures = (mean([final(r[figure]) for r in records]) for figure in ("success", "kl"))
        samples = ", ".join("never" if n is None else str(n) for n in reached)
        lines.append(f"| {name} | {len(records)} | {' | '.join(figures)} | {samples} |")
    return f"{task}; level: {'-' if level is None else f'{level:.3g}'}\n\n" + "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], figure: str, names: list[str], path: Path, label: str) -> None:
    """A figure over samples, mean over seeds, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = sorted({key.split("/")[0] for key in results}, key=TASKS.index)
    picture, panels = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, sharey=True)
    for axes, task in zip(panels[0], tasks, strict=True):
        for name in names:
            rows = [r[figure] for key, r in results.items() if key.startswith(f"{task}/{name}/")]
            means = [sum(column) / len(column) for column in zip(*rows, strict=False) if None not in column]
            means = [sum(means[max(i - WINDOW + 1, 0) : i + 1]) / min(i + 1, WINDOW) for i in range(len(means))]
            if means:
                axes.plot([BATCH * (i + 1) for i in range(len(means))], means, label=name)
        axes.set(xlabel="generated samples", title=task, ylabel=label)
        if axes.lines:
            axes.legend(fontsize=7)
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of worlds, results and the picture")
    parser.add_argument("--samples", type=int, default=1920, help="generated samples of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--only", help="names of variants, with commas between; default: all")
    parser.add_argument("--tiny", action="store_true", help="a base of 2 steps, one rollout batch a run")
    options = parser.parse_args()
    from trl_ext.toy.halls import build_halls

    known = [*VARIANTS, *CRITIC_FREE]
    names = options.only.split(",") if options.only else known
    if set(names) - set(known):
        raise SystemExit(f"--only: {sorted(set(names) - set(known))} are none of {', '.join(known)}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / ("tiny.json" if options.tiny else "results.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    samples = BATCH if options.tiny else options.samples
    world = build_halls(options.output / "worlds", **({"steps": 2} if options.tiny else {}))  # one for all seeds
    for seed in options.seeds[:1] if options.tiny else options.seeds:
        for name, task in product(names, options.tasks):
            key = f"{task}/{name}/{seed}"
            if name in CRITIC_FREE and task == "turns":
                continue  # RLOO takes no `rollout_func`: they are compared on the other two
            if key in results or (name in VARIANTS and VARIANTS[name][1] not in (None, task)):
                continue
            results[key] = run(name, task, seed, samples, world)
            file.write_text(json.dumps(results))
            print(f"{key}: success {final(results[key]['success'])}, KL {final(results[key]['kl'])}", flush=True)
    for task in options.tasks:
        print(f"\n{table(results, task)}")
    critics = ["pretraining on Monte-Carlo returns", "the same warm-up on lambda returns", "ppo", "no warm-up"]
    draw(results, "explained_variance", critics, options.output / "explained_variance.png", "explained variance")
    shown = list(dict.fromkeys(key.split("/")[1] for key in results))
    draw(results, "success", shown, options.output / "success.png", "success rate")


if __name__ == "__main__":
    main()
