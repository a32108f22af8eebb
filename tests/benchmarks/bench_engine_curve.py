"""Learning curves of PPO-Max through a vLLM server and through `generate`, over seeds.

    PYTHONPATH=. python tests/benchmarks/bench_engine_curve.py --model MODEL --data DATA --url http://127.0.0.1:8000

MODEL is the base that the server holds: TinyStories-656K as tests/generation/widened.py widens it. DATA is a folder
with lexicon_reward.py and tinystories/prompts_train.jsonl.gz. A run is 20 rollouts of 32 completions of 48 tokens with
2 passes, LoRA r=16, reward by the valence of words. A line for each run, then mean, spread over seeds and Welch's t.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.ppo import tiny

WAYS = ("generate", "server")
ENDS = 5  # rollouts of the first and of the last figure


def curve(options: argparse.Namespace, through: str, seed: int, reward: Any, rows: Dataset) -> dict[str, float]:
    """Reward and KL of one run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny.trainer(
            options.model,
            Path(folder),
            model=str(options.model),
            reward_funcs=reward,
            dataset=rows,
            peft_config=tiny.lora(r=16, lora_alpha=32),
            per_device_train_batch_size=32,
            num_iterations=2,
            max_completion_length=48,
            max_steps=2 * options.rollouts,
            learning_rate=3e-3,
            seed=seed,
            **({"vllm_server_url": options.url} if through == "server" else {}),
        )
        trainer.train()
        entries = tiny.rollout_entries(trainer)
    return {
        "reward, first 5": statistics.mean(entry["reward"] for entry in entries[:ENDS]),
        "reward, last 5": statistics.mean(entry["reward"] for entry in entries[-ENDS:]),
        "KL, last 5": statistics.mean(entry["kl"] for entry in entries[-ENDS:]),
        "KL, last": entries[-1]["kl"],
    }


def welch(a: list[float], b: list[float]) -> float:
    """Difference of two means over its standard error."""
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    return (statistics.mean(a) - statistics.mean(b)) / error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(42, 52)))
    parser.add_argument("--rollouts", type=int, default=20)
    options = parser.parse_args()
    sys.path.insert(0, str(options.data))
    from lexicon_reward import lexicon_reward

    rows = Dataset.from_json(str(options.data / "tinystories" / "prompts_train.jsonl.gz"))
    found: dict[str, list[dict[str, float]]] = {through: [] for through in WAYS}
    for seed in options.seeds:
        for through in WAYS:
            found[through].append(curve(options, through, seed, lexicon_reward, rows))
            print(json.dumps({"through": through, "seed": seed} | found[through][-1]), flush=True)
    print("\n| | server | `generate` | Welch's t |\n| --- | --- | --- | --- |")
    for name in found["server"][0]:
        columns = {through: [run[name] for run in found[through]] for through in WAYS}
        cells = [
            f"{statistics.mean(c):.3f} ({statistics.stdev(c):.3f})" for c in (columns["server"], columns["generate"])
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} | {welch(columns['server'], columns['generate']):.2f} |")


if __name__ == "__main__":
    main()
