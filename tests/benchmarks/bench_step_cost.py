"""What it costs to hold the size of each update, and to watch: seconds of an iteration with and without, in turns.

    python tests/benchmarks/bench_step_cost.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function

CPU seconds of one thread, so that other work on the machine counts less. Micro-batches of 8, 32 completions of 64
tokens a rollout batch, 2 passes. The first two iterations of each run are left out.
"""

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

from methods import BATCH, Watched, adapter, common, load_prompts, load_reward, steps

VARIANTS: dict[str, dict[str, Any]] = {
    "neither": {"update_kl_target": 0.0, "guard": False},
    "size of the update held": {"guard": False},
    "and the guard (default)": {},
}


def iteration(args: argparse.Namespace, settings: dict[str, Any]) -> float:
    """Median CPU seconds from one call of the reward function to the next."""
    from transformers import PrinterCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer

    job = {"seed": 0, "rate": 1e-3, "micro": 8, "passes": 2, "prompts": args.prompts}
    own = {"num_iterations": 2, "max_completion_length": 64, "steps_per_generation": BATCH // 8}
    own |= {"max_steps": args.rollouts * steps(job), "kl_control": "fixed"}
    config = {k: v for k, v in common(job).items() if k != "lr_scheduler_type"} | own | settings
    reward, calls = Watched(load_reward(args.reward)), []

    def timed(completions: list[Any], **columns: Any) -> list[float]:
        calls.append(time.process_time())
        return reward(completions, **columns)

    trainer = PPOMaxTrainer(args.model, timed, PPOMaxConfig(**config), load_prompts(job), peft_config=adapter())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return statistics.median(b - a for a, b in pairwise(calls[2:]))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reward", required=True, help="file.py:function")
    parser.add_argument("--rollouts", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, settings in VARIANTS.items():
            seconds[name].append(iteration(args, settings))
    first = seconds["neither"]
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, first, strict=True)]
        print(f"{name:26s} {' '.join(f'{v:.3f}' for v in values)} s, {statistics.median(ratios):.3f} times")


if __name__ == "__main__":
    main()
