"""Where the critic starts, the reward adapter or nothing: explained variance over the first 20 rollout batches.

    python tests/benchmarks/bench_critic.py
    python tests/benchmarks/bench_critic.py --config trl_ext/configs/pipeline_tinychat.yaml --model MODEL \
        --reward_adapter ADAPTER --prompts train.jsonl.gz

Without arguments in the embedded world. Everything but the critic's start is equal: model, prompts, seeds, warm-up.
Writes a json and a picture, mean over the seeds and each seed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[2]
BATCHES = 20


def run(args: argparse.Namespace, start: str, seed: int) -> list[float]:
    import torch
    import yaml
    from datasets import Dataset
    from transformers import PrinterCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer, SharedBaseModel
    from trl_ext.data import load_preferences
    from trl_ext.roles import AdapterWeights, load_base, lora_config, read_adapter
    from trl_ext.toy import build_world

    torch.set_num_threads(1)
    policy: Any = lora_config()
    if args.model is None:
        world = build_world(args.output.parent / "worlds", seed)
        name, adapter, prompts = str(world.base), world.reward_adapter, world.train_prompts
        policy = read_adapter(world.policy_adapter)
    else:
        name, adapter = args.model, args.reward_adapter
        rows = load_preferences(args.prompts)[0]
        short = [row["prompt"] for row in rows if sum(len(m["content"].split()) for m in row["prompt"]) <= 80]
        prompts = Dataset.from_dict({"prompt": short})
    settings = yaml.safe_load(args.config.read_text())
    updates = settings["steps_per_generation"] * settings["num_iterations"]
    settings |= {"output_dir": str(args.output.parent / "run"), "seed": seed, "disable_tqdm": True}
    settings |= {"max_steps": BATCHES * updates, "logging_steps": updates, "lr_scheduler_type": "constant"}
    critic = None
    if start == "fresh":
        critic = AdapterWeights(policy.config if isinstance(policy, AdapterWeights) else policy)
    model = SharedBaseModel(load_base(name, dtype="float32"), policy, read_adapter(adapter), critic)
    trainer = PPOMaxTrainer(model, args=PPOMaxConfig(**settings), train_dataset=prompts)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["explained_variance"] for entry in trainer.state.log_history if "explained_variance" in entry]


def draw(results: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (start, runs), colour in zip(results.items(), ("#0072b2", "#d55e00"), strict=True):
        steps = range(1, len(runs[0]) + 1)
        for values in runs:
            axis.plot(steps, [max(value, -1.0) for value in values], color=colour, alpha=0.25, linewidth=1)
        mean = [sum(column) / len(column) for column in zip(*runs, strict=True)]
        axis.plot(steps, [max(value, -1.0) for value in mean], color=colour, linewidth=2, label=start)
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.set(xlabel="rollout batch", ylabel="explained variance of returns", xticks=range(0, BATCHES + 1, 5))
    axis.legend(title="critic starts from", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "trl_ext" / "configs" / "toy.yaml")
    parser.add_argument("--model")
    parser.add_argument("--reward_adapter")
    parser.add_argument("--prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench_critic.json"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[list[float]]] = {}
    for start in ("the reward adapter", "fresh"):
        for seed in args.seeds:
            results.setdefault(start, []).append(run(args, start, seed))
            print(start, seed, [round(value, 2) for value in results[start][-1]], flush=True)
    args.output.write_text(json.dumps(results, indent=1))
    draw(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
