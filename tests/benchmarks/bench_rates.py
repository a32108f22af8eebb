"""Learning rates a factor of 100 apart, everything else default: does it learn, does it collapse?

    python tests/benchmarks/bench_rates.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function
    python tests/benchmarks/bench_rates.py                # the embedded world: the reward role scores, gold is watched
    python tests/benchmarks/bench_rates.py --method rloo --model ...                               # or grpo, trl_ppo

A run is 50 rollout batches of 32 completions, LoRA r=16 on all linear layers. Figures are those of the first and of the
last fifth of the batches. Diversity is distinct-2 of the completions' words, last over first. Collapsed is a run whose
diversity is below 0.8 of its start's, or its length below 0.7, whose KL does not end between 0.5 and 1.5 of the target,
or was ever above 2 times it; of methods without a target only diversity and length count. Runs of OUTPUT that exist are
not repeated; several such commands may share the work. To see another commit, copy this folder into a checkout of it.

    python tests/benchmarks/bench_rates.py --picture rates.png --folders "before=OLD" "now=NEW"

draws KL and reward of the first seed's runs, a row for each folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from methods import BATCH, METHODS, run

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TARGET = 6.0  # the default of PPOMaxConfig


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """First and last fifth of each record, the largest KL, and whether the run collapsed."""
    records = result["records"]
    fifth = max(len(records) // 5, 1)

    def ends(name: str) -> tuple[float, float]:
        return tuple(sum(r.get(name, 0.0) for r in part) / fifth for part in (records[:fifth], records[-fifth:]))

    out: dict[str, Any] = {name: ends(name) for name in ("reward", "gold", "length", "diversity", "kl")}
    out["largest"] = max(record["kl"] for record in records)
    collapsed = out["diversity"][1] < 0.8 * out["diversity"][0] or out["length"][1] < 0.7 * out["length"][0]
    if result["job"]["method"] == "ours":
        target = result["job"]["settings"].get("kl_target", TARGET)
        within = 0.5 * target <= out["kl"][1] <= 1.5 * target and out["largest"] <= 2 * target
        collapsed |= not within
    return out | {"collapsed": collapsed}


def row(result: dict[str, Any]) -> str:
    """Of the table in Markdown."""
    job = result["job"]
    cells = [f"{job['rate']:g}", str(job["seed"])]
    if not result["records"]:
        return "| " + " | ".join([*cells, "", "", "", "", "", result["error"][:100]]) + " |"
    seen = figures(result)
    cells += ["{:.2f} -> {:.2f}".format(*seen["reward"]), f"{seen['kl'][1]:.1f} ({seen['largest']:.1f})"]
    cells += [f"{seen['length'][1]:.0f}", f"{seen['diversity'][1] / max(seen['diversity'][0], 1e-9):.2f}"]
    cells += [", ".join(sorted({alarm["alarm"] for alarm in result.get("alarms", [])})) or "none"]
    return "| " + " | ".join([*cells, "yes" if seen["collapsed"] else "no"]) + " |"


def draw(folders: list[str], path: Path, seed: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(folders),
        2,
        figsize=(10, 3.1 * len(folders)),
        layout="constrained",
        sharex=True,
        sharey="col",
        squeeze=False,
    )
    for (kl, reward), folder in zip(axes, folders, strict=True):
        name, _, place = folder.partition("=")
        for i, rate in enumerate(RATES):
            file = Path(place) / f"{rate:g}-{seed}.json"
            records = json.loads(file.read_text())["records"] if file.exists() else []
            kwargs = {"color": plt.get_cmap("viridis")(i / len(RATES)), "label": f"{rate:g}"}
            kl.plot([r["kl"] for r in records], **kwargs)
            reward.plot([r["reward"] for r in records], **kwargs)
        kl.axhline(TARGET, color="grey", linestyle="--", linewidth=1)
        kl.set(ylabel=f"{name}: KL, nats a completion", yscale="symlog", ylim=(0, 600), yticks=[0, 1, 6, 30, 100, 500])
        kl.set_yticklabels(["0", "1", "6", "30", "100", "500"])
        reward.set(ylabel=f"{name}: reward")
        for axis in (kl, reward):
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set(xlabel="rollout batch of 32 completions")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=5, frameon=False, title="learning rate")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), default="ours")
    parser.add_argument("--model", help="default: the embedded world")
    parser.add_argument("--prompts")
    parser.add_argument("--reward", help="file.py:function")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rollouts", type=int, default=50)
    parser.add_argument("--settings", default="{}", help="other fields of the method's configuration, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("rates"), help="a folder")
    parser.add_argument("--trl_env", type=Path, default=Path.home() / ".cache" / "trl_ext" / "trl-1.12")
    parser.add_argument("--picture", type=Path, help="draw what was run")
    parser.add_argument("--folders", nargs="+", default=[], help="of the picture: NAME=FOLDER")
    args = parser.parse_args()
    if args.picture:
        draw(args.folders or [f"reward={args.output}"], args.picture, args.seeds[0])
        return
    if args.model is None and args.method != "ours":
        parser.error("--method: the embedded world is for `ours`; give --model, --prompts and --reward")
    columns = ("rate", "seed", "reward, first -> last fifth", "KL, last fifth (largest)", "length", "diversity")
    print(f"| {' | '.join([*columns, 'alarms', 'collapsed'])} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for seed in args.seeds:
        for rate in args.rates:
            job = {"method": args.method, "model": args.model, "prompts": args.prompts, "reward": args.reward}
            job |= {"rate": rate, "seed": seed, "samples": args.rollouts * BATCH, "passes": 2, "micro": BATCH}
            job |= {"length": 40 if args.model is None else 64, "settings": json.loads(args.settings)}
            job |= {"world": str(args.output / f"world-{seed}")} if args.model is None else {}
            print(row(run(job, args.output / f"{rate:g}-{seed}.json", args.trl_env, args.threads)), flush=True)


if __name__ == "__main__":
    main()
