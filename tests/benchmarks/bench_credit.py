"""What each option of a critic does where credit matters: sums of 14 steps, one reward at the end or one for each step.

    python tests/benchmarks/bench_credit.py --output runs/credit            # every variant, both tasks, 3 seeds
    python tests/benchmarks/bench_credit.py --output runs/credit --only ppo,vapo --tasks sparse --seeds 0
    python tests/benchmarks/bench_credit.py --output runs/credit --tiny     # tries every variant, measures nothing

Every run trains a fresh adapter (LoRA r=16 on all linear layers) on the pretrained base of `trl_ext.toy.sums` for the
same number of generated samples, 32 a rollout batch. Beside PPO stand TRL's GRPO and RLOO with groups of 8, each with
8 settings: learning rates and KL coefficients. A run that is in the output folder already is not made again.

Success rate: share of a rollout batch's samples whose answer is right, `solved`, which the dense task only watches.
KL: nats a completion, from the policy that the run started from. Prints a markdown table of the means over seeds:
success and KL over the last eighth of the samples, and the number of samples after which the mean of four rollout
batches in a row is at least the final success of the best critic-free settings. `explained_variance.png` shows the
critic.
"""

import argparse
import json
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
BATCH, GROUP, LENGTH = 32, 8, 110
MEASURED = 1e-6  # in place of a beta of 0, which leaves the reference out, and with it the KL
WINDOW = 4  # rollout batches of which the success is averaged
PPO = {"reward_normalization": "none", "reward_clip": None, "learning_rate": 1e-3, "num_iterations": 2}
LONG_WARMUP = {"critic_warmup_steps": 20, "critic_warmup_explained_variance": None}
# Name -> (changes to PPO, task that it is for; None: both)
VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "ppo": ({}, None),
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
    for method, rate, beta in product(("grpo", "rloo"), (3e-4, 1e-3, 3e-3, 1e-2), (MEASURED, 0.02))
}


def common(samples: int, seed: int, passes: int, micro: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "seed": seed,
        "per_device_train_batch_size": micro,
        "steps_per_generation": BATCH // micro,
        "max_steps": samples // BATCH * passes * BATCH // micro,
        "logging_steps": passes * BATCH // micro,
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
    from trl_ext.toy.sums import solved, step_rewards

    return ([checked_reward(solved)], [1.0]) if task == "sparse" else ([step_rewards, solved], [1.0, 0.0])


def train_ours(changes: dict[str, Any], task: str, seed: int, samples: int, world: Any) -> Any:
    import yaml
    from peft import LoraConfig

    from trl_ext import PPOMaxConfig, PPOMaxTrainer
    from trl_ext.scripts.configs import find_config

    settings = PPO | {k: v for k, v in changes.items() if k != "preset"}
    if "preset" in changes:
        settings |= yaml.safe_load(find_config(changes["preset"]).read_text())
        settings["critic_learning_rate"] *= settings["learning_rate"] / 1e-4  # the ratio of the preset
    if settings.get("beta") == 0:
        settings |= {"beta": MEASURED, "kl_control": "fixed"}
    settings |= common(samples, seed, settings["num_iterations"], 16)
    if settings.get("critic_warmup_steps") and settings["critic_warmup_steps"] * 2 > settings["max_steps"]:
        settings["critic_warmup_steps"] = settings["max_steps"] // 4
    functions, weights = rewards_of(task)
    prompts = world.train_prompts
    if settings.get("reward_sigmoid"):  # of the start the success rate, which is about that of every prompt
        prompts = prompts.add_column("reference_scores", [0.2] * len(prompts))
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = PPOMaxConfig(**settings, reward_weights=weights, write_report=False, guard=False)
    return PPOMaxTrainer(str(world.base), functions, args, prompts, peft_config=adapter)


def train_critic_free(method: str, changes: dict[str, Any], task: str, seed: int, samples: int, world: Any) -> Any:
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from trl_ext.scoring import checked_reward

    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[method]
    functions, weights = rewards_of(task)
    functions = [function if hasattr(function, "placed") else checked_reward(function) for function in functions]
    settings = common(samples, seed, 2, 16) | {"num_generations": GROUP, "num_iterations": 2, "reward_weights": weights}
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
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "rewards/solved/mean" in entry]
    keys = {"success": "rewards/solved/mean", "kl": "kl", "explained_variance": "explained_variance"}
    records: dict[str, list[float | None]] = {k: [entry.get(key) for entry in entries] for k, key in keys.items()}
    if name in CRITIC_FREE:  # GRPO logs a k3 estimate per token; the other trainer's is of a completion
        per_token = [entry.get("completions/mean_length", 1.0) if name.startswith("grpo") else 1.0 for entry in entries]
        records["kl"] = [None if kl is None else kl * n for kl, n in zip(records["kl"], per_token, strict=True)]
    return records


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

    averages = [
        sum(final(r["success"]) for r in rs) / len(rs) for name, rs in runs.items() if name in CRITIC_FREE and rs
    ]
    level = max(averages, default=None)
    lines = ["| variant | seeds | success | KL | samples to the level |", "| --- | --- | --- | --- | --- |"]
    for name, records in runs.items():
        reached = [samples_to(r["success"], level) for r in records] if level is not None else []
        figures = (mean([final(r[figure]) for r in records]) for figure in ("success", "kl"))
        samples = ", ".join("never" if n is None else str(n) for n in reached)
        lines.append(f"| {name} | {len(records)} | {' | '.join(figures)} | {samples} |")
    return f"{task}; level: {'-' if level is None else f'{level:.3g}'}\n\n" + "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Explained variance over samples, with and without pretraining of the critic; mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("pretraining on Monte-Carlo returns", "the same warm-up on lambda returns", "no warm-up"):
        rows = [r["explained_variance"] for key, r in results.items() if key.startswith(f"sparse/{name}/")]
        if rows and rows[0]:
            means = [sum(column) / len(column) for column in zip(*rows, strict=False)]
            axes.plot([BATCH * (i + 1) for i in range(len(means))], means, label=name)
    axes.set(xlabel="generated samples", ylabel="explained variance of the returns", ylim=(-1, 1))
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of worlds, results and the picture")
    parser.add_argument("--samples", type=int, default=3840, help="generated samples of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=["sparse", "dense"], choices=["sparse", "dense"])
    parser.add_argument("--only", help="names of variants, with commas between; default: all")
    parser.add_argument("--tiny", action="store_true", help="a base of 2 steps, one rollout batch a run")
    options = parser.parse_args()
    from trl_ext.toy.sums import build_sums

    known = [*VARIANTS, *CRITIC_FREE]
    names = options.only.split(",") if options.only else known
    if set(names) - set(known):
        raise SystemExit(f"--only: {sorted(set(names) - set(known))} are none of {', '.join(known)}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / ("tiny.json" if options.tiny else "results.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    samples = BATCH if options.tiny else options.samples
    for seed in options.seeds[:1] if options.tiny else options.seeds:
        world = build_sums(options.output / "worlds", seed, **({"steps": 2} if options.tiny else {}))
        for name, task in product(names, options.tasks):
            key = f"{task}/{name}/{seed}"
            if key in results or (name in VARIANTS and VARIANTS[name][1] not in (None, task)):
                continue
            results[key] = run(name, task, seed, samples, world)
            file.write_text(json.dumps(results))
            print(f"{key}: success {final(results[key]['success'])}, KL {final(results[key]['kl'])}", flush=True)
    for task in options.tasks:
        print(f"\n{table(results, task)}")
    draw(results, options.output / "explained_variance.png")


if __name__ == "__main__":
    main()
