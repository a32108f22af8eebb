"""What it costs to hold the size of each update, and to watch: their share of an iteration's CPU time.

    python tests/benchmarks/bench_step_cost.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function

CPU seconds of one thread, of what is done for that alone: weights that are kept, distances, the pass at the end of an
update and those of steps that are shortened, figures of the completions, the guard and the policies that it keeps. One
run with all of it, so that both sides of the ratio are of the same iterations. Micro-batches of 8, 32 completions of
64 tokens a rollout batch, 2 passes. The first two iterations are left out.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from methods import BATCH, Watched, adapter, common, load_prompts, load_reward, steps


def timed(owner: Any, name: str, part: str, spent: Counter[str]) -> None:
    """Count the CPU time of a function of a class or a module; a call within another one of it counts once."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        spent["depth"] += 1
        begun = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent["depth"] -= 1
            if not spent["depth"]:
                spent[part] += time.process_time() - begun  # type: ignore[assignment]

    setattr(owner, name, call)


def main() -> None:
    import torch
    from transformers import PrinterCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer
    from trl_ext.ppo import trainer as ppo_trainer
    from trl_ext.ppo.step import StepControl, StepControls
    from trl_ext.ppo.watching import WatchCallback

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reward", required=True, help="file.py:function")
    parser.add_argument("--rollouts", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)

    spent: Counter[str] = Counter()
    for owner, names in ((StepControls, ("check", "end")), (StepControl, ("before_step", "after_step"))):
        for name in names:
            timed(owner, name, "size of the update", spent)
    timed(ppo_trainer, "completion_figures", "guard", spent)
    for name in ("observe", "end_update", "on_step_end"):
        timed(WatchCallback, name, "guard", spent)

    job = {"seed": 0, "rate": 1e-3, "micro": 8, "passes": 2, "prompts": args.prompts}
    own = {"num_iterations": 2, "max_completion_length": 64, "steps_per_generation": BATCH // 8}
    config = {k: v for k, v in common(job).items() if k != "lr_scheduler_type"} | own
    config["max_steps"] = args.rollouts * steps(job)
    reward, calls = Watched(load_reward(args.reward)), []

    def rewards(completions: list[Any], **columns: Any) -> list[float]:
        calls.append((time.process_time(), spent["size of the update"], spent["guard"]))
        return reward(completions, **columns)

    trainer = PPOMaxTrainer(args.model, rewards, PPOMaxConfig(**config), load_prompts(job), peft_config=adapter())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    iterations = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(calls[2:])]
    print(f"an iteration: {statistics.median(row[0] for row in iterations):.3f} s (median of {len(iterations)})")
    for part, name in enumerate(("size of the update held", "guard"), 1):
        share = sum(row[part] for row in iterations) / sum(row[0] for row in iterations)
        seconds = statistics.median(row[part] for row in iterations)
        print(f"{name}: {100 * share:.2f} % of the CPU time, {seconds:.4f} s")


if __name__ == "__main__":
    main()
