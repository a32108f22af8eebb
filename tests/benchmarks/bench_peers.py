"""Reward gained at equal KL on a real small model: PPO-Max with its defaults against peers that were tuned.

    python tests/benchmarks/bench_peers.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function

Each peer is run at every learning rate and beta of its grid with the first seed. Of those whose KL in the last 320
samples is between 6 and 8 nats a completion the one with the most reward is taken (where there is none, the one with
the most reward below 8), and run with the other seeds. PPO-Max runs with `kl_target` 7 and nothing else set. The gain
is the mean reward of the last 320 samples less that of the untuned model, which is the same for all: the mean over the
first batch of every run. Runs of OUTPUT that exist are not repeated; several such commands may share the work.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from methods import BATCH, METHODS, NAMES, run

LAST = 320 // BATCH
# Rate and beta, close to each other where the KL ends near 7
SMALL = [(5e-4, 0.01), (1e-3, 0.01), (1e-3, 0.02), (1e-3, 0.03), (3e-3, 0.02), (3e-3, 0.03), (3e-3, 0.1), (6e-3, 0.03)]
SMALL += [(3e-3, 0.01), (6e-3, 0.01)]  # beyond it
GRIDS: dict[str, list[dict[str, Any]]] = {
    "rloo": [{"rate": rate, "settings": {"beta": beta, "num_generations": 4}} for rate, beta in SMALL],
    "grpo": [{"rate": rate, "settings": {"beta": beta, "num_generations": 8}} for rate, beta in SMALL],
    "online_dpo": [{"rate": rate, "settings": {"beta": 3 * beta}} for rate, beta in SMALL],
    "trl_ppo": [{"rate": 2 * rate, "settings": {"kl_coef": beta}} for rate, beta in SMALL],
}
OURS = {"rate": 1e-4, "settings": {"kl_target": 7.0}}  # the default rate


def last(result: dict[str, Any], name: str) -> float:
    """Mean of the last 320 samples; that of a run without any is nan."""
    records = result["records"][-LAST:]
    return sum(record[name] for record in records) / len(records) if records else float("nan")


def name_of(method: str, setting: dict[str, Any], seed: int) -> str:
    values = "-".join(f"{key}{value:g}" for key, value in setting["settings"].items())
    return f"{method}-{setting['rate']:g}-{values}-{seed}.json"


def choose(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The best setting of a grid."""
    within = [r for r in results if 6 <= last(r, "kl") <= 8] or [r for r in results if last(r, "kl") < 8]
    return max(within, key=lambda r: last(r, "reward"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reward", required=True, help="file.py:function")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--output", type=Path, default=Path("peers"), help="a folder")
    parser.add_argument("--trl_env", type=Path, default=Path.home() / ".cache" / "trl_ext" / "trl-1.12")
    args = parser.parse_args()

    def result(method: str, setting: dict[str, Any], seed: int) -> dict[str, Any]:
        job = {"method": method, "model": args.model, "prompts": args.prompts, "reward": args.reward, "seed": seed}
        job |= {"samples": args.samples, "length": 64, "passes": 2, "micro": 8, **setting}
        out = run(job, args.output / name_of(method, setting, seed), args.trl_env)
        print(
            f"{method:10s} rate {setting['rate']:g} {json.dumps(setting['settings'])} seed {seed}: "
            f"reward {last(out, 'reward'):.3f} at KL {last(out, 'kl'):.1f}{' ' + out.get('error', '')}",
            flush=True,
        )
        return out

    chosen: dict[str, dict[int, dict[str, Any]]] = {}
    everything = []
    for method in args.methods:
        if method == "ours":
            setting = OURS
        else:
            tried = [result(method, setting, args.seeds[0]) for setting in GRIDS[method]]
            everything += tried
            job = choose(tried)["job"]
            setting = {"rate": job["rate"], "settings": job["settings"]}
        chosen[method] = {seed: result(method, setting, seed) for seed in args.seeds}
        everything += chosen[method].values()
    first = [r["records"][0]["reward"] for r in everything if r["records"]]
    start = sum(first) / len(first)
    print(f"\nuntuned: {start:.3f} (first batch of {len(first)} runs)\n")
    print(f"| method | learning rate, settings | {' | '.join(f'seed {s}: gain at KL' for s in args.seeds)} |")
    print(f"| --- | --- |{' --- |' * len(args.seeds)}")
    for method, runs in chosen.items():
        job = runs[args.seeds[0]]["job"]
        cells = [f"{last(r, 'reward') - start:.3f} at {last(r, 'kl'):.1f}" for r in runs.values()]
        print(f"| {NAMES[method]} | {job['rate']:g}, {json.dumps(job['settings'])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
