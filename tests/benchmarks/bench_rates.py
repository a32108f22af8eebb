"""PPO-Max at learning rates a factor of 100 apart, everything else default: does it learn, does it collapse?

    python tests/benchmarks/bench_rates.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function
    python tests/benchmarks/bench_rates.py                # the embedded world: the reward role scores, gold is watched

A run is 50 rollout batches of 32 completions, LoRA r=16 on all linear layers. Figures are those of the first and of the
last fifth of the batches. Diversity is distinct-2 of the completions' words, last over first. Collapsed is a run whose
diversity is below 0.8 of its start's, or its length below 0.7, whose KL does not end between 0.5 and 1.5 of the target,
or was ever above 2 times it. Runs of OUTPUT that exist are not repeated; several such commands may share the work.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BATCH, PASSES = 32, 2


class Watched:
    """A reward function that also measures distinct-2 of the words of each batch; `reward` None: it gives 0."""

    def __init__(self, reward: Any = None):
        self.reward, self.diversity = reward, []
        self.__name__ = "reward" if reward is not None else "diversity"

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        from trl_ext.ppo.guard import distinct_pairs

        self.diversity.append(distinct_pairs(completions, [[]] * len(completions), [0] * len(completions)))
        return [0.0] * len(completions) if self.reward is None else self.reward(completions, **columns)


def make_trainer(args: argparse.Namespace, rate: float, seed: int) -> tuple[Any, Watched]:
    from transformers import PrinterCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer, SharedBaseModel
    from trl_ext.roles import lora_config

    settings = {
        "output_dir": tempfile.mkdtemp(),
        "seed": seed,
        "learning_rate": rate,
        "per_device_train_batch_size": BATCH,
        "max_steps": args.rollouts * PASSES,
        "num_iterations": PASSES,
        "logging_steps": PASSES,
        "max_completion_length": 40 if args.model is None else 64,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    config = PPOMaxConfig(**{**settings, **json.loads(args.settings)})
    if args.model is None:
        from trl_ext.toy import build_world, gold_reward

        world = build_world(args.output / f"world-{seed}", seed)
        watched = Watched()
        config.reward_weights = [0.0, 0.0]
        inputs: dict[str, Any] = {
            "model": SharedBaseModel.from_pretrained(
                str(world.base),
                policy_adapter=world.policy_adapter,
                reward_adapter=world.reward_adapter,
                dtype="float32",
                adapter_dtype="float32",
            ),
            "reward_funcs": [gold_reward, watched],
            "train_dataset": world.train_prompts,
        }
    else:
        from bench_learning import load_inputs

        prompts, reward = load_inputs(args)
        watched = Watched(reward)
        inputs = {
            "model": args.model,
            "reward_funcs": watched,
            "train_dataset": prompts,
            "peft_config": lora_config(r=16),
        }
    trainer = PPOMaxTrainer(args=config, **inputs)
    trainer.remove_callback(PrinterCallback)
    return trainer, watched


def run(args: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    start = time.time()
    trainer, watched = make_trainer(args, rate, seed)
    stopped = None
    try:
        trainer.train()
    except RuntimeError as error:
        stopped = str(error)
    history = [entry for entry in trainer.state.log_history if "beta" in entry]
    history = [entry | {"diversity": d} for entry, d in zip(history, watched.diversity, strict=False)]
    fifth = max(len(history) // 5, 1)

    def ends(name: str) -> tuple[float, float]:
        first, last = history[:fifth], history[-fifth:]
        return tuple(sum(entry.get(name, 0.0) for entry in part) / fifth for part in (first, last))

    figures = {name: ends(key) for name, key in (("reward", "reward"), ("gold", "rewards/gold_reward/mean"))}
    figures |= {"kl": (ends("kl")[1], max(entry.get("kl", 0.0) for entry in history))}
    figures |= {"length": ends("completions/mean_length"), "diversity": ends("diversity")}
    alarms = trainer.watch.guard.state.raised if trainer.watch.guard is not None else []
    target = trainer.args.kl_target
    collapsed = (
        figures["diversity"][1] < 0.8 * figures["diversity"][0]
        or figures["length"][1] < 0.7 * figures["length"][0]
        or not 0.5 * target <= history[-1].get("kl", 0.0) <= 1.5 * target
        or figures["kl"][1] > 2 * target
    )
    return {
        "rate": rate,
        "seed": seed,
        **figures,
        "kl_at_the_end": history[-1].get("kl", 0.0),
        "collapsed": collapsed,
        "stopped": stopped,
        "alarms": alarms,
        "seconds": time.time() - start,
        "history": history,
    }


def row(result: dict[str, Any]) -> str:
    """Of the table in Markdown."""
    cells = [f"{result['rate']:g}", str(result["seed"])]
    cells += ["{:.2f} -> {:.2f}".format(*result["reward"])]
    cells += ["{:.1f} ({:.1f})".format(*result["kl"]), f"{result['length'][1]:.0f}"]
    cells += [f"{result['diversity'][1] / max(result['diversity'][0], 1e-9):.2f}"]
    cells += [", ".join(sorted({alarm["alarm"] for alarm in result["alarms"]})) or "none"]
    return "| " + " | ".join([*cells, "yes" if result["collapsed"] else "no"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded world")
    parser.add_argument("--prompts")
    parser.add_argument("--reward", help="file.py:function")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rollouts", type=int, default=50)
    parser.add_argument("--settings", default="{}", help="other fields of PPOMaxConfig, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("rates"), help="a folder")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args.output.mkdir(parents=True, exist_ok=True)
    columns = ("rate", "seed", "reward, first -> last fifth", "KL, last fifth (largest)", "length", "diversity")
    print(f"| {' | '.join([*columns, 'alarms', 'collapsed'])} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rate in args.rates:
        for seed in args.seeds:
            file = args.output / f"{rate:g}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(run(args, rate, seed), indent=1))
            print(row(json.loads(file.read_text())), flush=True)


if __name__ == "__main__":
    main()
