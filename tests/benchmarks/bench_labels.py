"""Labels that choosing saves, in the embedded world: accuracy against the number of labels, chosen against random.

    python tests/benchmarks/bench_labels.py --output_dir runs/labels --seeds 0 1 2

For each seed: a world, its SFT policy's answers to `--prompts` prompts (four to each), a reader whose labels are
those of the world (Bradley-Terry on the gold reward, temperature 0.25, one label a pair, the same in every arm). Every
arm starts with the same random pairs; then an ensemble is trained anew on all its labels, tested, and asked which pairs
come next. Tested is the mean of the members on pairs of answers to other prompts, labelled by the gold reward without
noise.
What is done is kept in results.json: a run that was stopped goes on.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
SETTINGS = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 128,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "write_report": False,
    "normalize_rewards": False,
    "center_rewards_coefficient": 0.01,
}
ANSWERS = 4


def answers(world: Any, prompts: Any, path: Path, seed: int) -> list[dict[str, Any]]:
    """The SFT policy's answers, sampled into a file or read from there."""
    from trl_ext import SharedBaseModel
    from trl_ext.rrhf import SamplingConfig, sample_responses
    from trl_ext.text import load_tokenizer

    args = SamplingConfig([f"temperature:{ANSWERS}"], max_new_tokens=40, sampling_batch_size=256, sampling_seed=seed)
    model = SharedBaseModel.from_pretrained(
        str(world.base), policy_adapter=world.policy_adapter, dtype="float32", with_critic=False
    )
    sample_responses(model, load_tokenizer(str(world.base)), prompts, path, args, None)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def reader(pair: Any, seed: int) -> str:
    """Which answer the noisy reader prefers, "a" or "b"; the same whenever it is asked."""
    from trl_ext.toy.task import gold_score

    lead = gold_score(pair.a) - gold_score(pair.b)
    return "a" if random.Random(f"{seed}-{pair.id}").random() < 1 / (1 + math.exp(-lead / 0.25)) else "b"


class Ensemble:
    """Reward models that are trained anew on whatever is labelled, on one base."""

    def __init__(self, world: Any, members: int, epochs: int, folder: Path):
        from trl_ext.roles import RewardModel, load_base
        from trl_ext.text import load_tokenizer

        self.tokenizer = load_tokenizer(str(world.base))
        self.model = RewardModel(load_base(str(world.base), dtype="float32"))
        self.members, self.epochs, self.folder = members, epochs, folder

    def train_and_score(self, labelled: list[Any], seed: int, sets: list[Any]) -> list[list[Any]]:
        """Scores of each set by each member: sets x members of (N, 2)."""
        from datasets import Dataset
        from transformers import PrinterCallback

        from trl_ext import RewardModelConfig, RewardModelTrainer
        from trl_ext.reward.scoring import make_collator, score_rows

        rows = []
        for pair in labelled:
            chosen, rejected = (pair.a, pair.b) if reader(pair, seed) == "a" else (pair.b, pair.a)
            rows.append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected})
        found: list[list[Any]] = [[] for _ in sets]
        for member in range(self.members):
            own = 1000 * seed + member
            args = RewardModelConfig(str(self.folder), **SETTINGS, num_train_epochs=self.epochs, seed=own)
            self.model.reset(own)
            trainer = RewardModelTrainer(self.model, args, Dataset.from_list(rows), processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            collator = make_collator(self.model, self.tokenizer)
            for scores, tokenized in zip(found, sets, strict=True):
                scores.append(score_rows(self.model, tokenized, collator, 128))
        return found

    def tokenized(self, rows: list[dict[str, Any]]) -> Any:
        from datasets import Dataset

        from trl_ext import RewardModelConfig
        from trl_ext.reward.data import tokenize_preferences
        from trl_ext.text import TextEncoder

        args = RewardModelConfig("unused", **SETTINGS)
        return tokenize_preferences(Dataset.from_list(rows), TextEncoder(self.tokenizer), args, "dataset")[0]


def test_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of answers whose gold rewards differ, the better one chosen."""
    from trl_ext.feedback.choose import make_candidates
    from trl_ext.toy.task import gold_score

    found = []
    for candidate in make_candidates(rows)[0]:
        gold = sorted((candidate.pair.a, candidate.pair.b), key=gold_score)
        if gold_score(gold[0]) < gold_score(gold[1]):
            found.append({"prompt": candidate.pair.prompt, "chosen": gold[1], "rejected": gold[0]})
    return found


def curve(method: str, seed: int, options: argparse.Namespace, world: Any, kept: dict[str, Any]) -> None:
    """Accuracies of one arm at each number of labels, into `kept`."""
    import numpy as np

    from trl_ext.feedback import choose

    folder = Path(options.output_dir)
    ensemble = Ensemble(world, options.members, options.epochs, folder / "unused")
    pool = answers(world, world.train_prompts.select(range(options.prompts)), folder / f"pool-{seed}.jsonl", seed)
    held = answers(world, world.eval_prompts.select(range(options.held)), folder / f"held-{seed}.jsonl", seed)
    candidates, _ = choose.make_candidates(pool)
    couples, records = [], []
    for number, row in enumerate(pool):
        for i, j in choose.response_couples(row["responses"]):
            couples.append((number, i, j))
            records.append({"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][j]})
    tested, pooled = ensemble.tokenized(test_rows(held)), ensemble.tokenized(records)
    start = choose.choose_pairs(candidates, options.sizes[0], None, method="random", seed=seed)
    labelled = [choice.pair for choice in start]
    for count, following in zip(options.sizes, [*options.sizes[1:], None], strict=True):
        on_test, on_pool = ensemble.train_and_score(labelled, seed, [tested, pooled])
        leads = np.stack([(scores[:, 0] - scores[:, 1]).numpy() for scores in on_test])
        gold = [reader(pair, seed) == ("a" if better(pair) >= 0 else "b") for pair in labelled]
        kept[f"{method}-{seed}-{count}"] = {
            "accuracy": float((leads.mean(0) > 0).mean()),
            "members": float((leads > 0).mean()),
            "labels_right": sum(gold) / len(gold),
        }
        print(method, seed, count, kept[f"{method}-{seed}-{count}"], flush=True)
        if following is None:
            return
        left = [c for c in candidates if c.pair.id not in {pair.id for pair in labelled}]
        values = None
        if method == "information":
            scores = [{} for _ in on_pool]
            for member, found in zip(scores, on_pool, strict=True):
                for row, (one, two) in zip(pooled["row"], found.tolist(), strict=True):
                    number, i, j = couples[row]
                    member[number, i], member[number, j] = one, two
            values = choose.information_gain(choose.member_differences(left, scores))
        elif method == "different":
            values = choose.difference_values(left)
        more = (
            choose.choose_pairs(left, following - count, values, method=method, random_share=0.0, seed=seed + count)
            if values is not None
            else choose.choose_pairs(left, following - count, None, method="random", seed=seed + count)
        )
        labelled += [choice.pair for choice in more]


def better(pair: Any) -> float:
    from trl_ext.toy.task import gold_score

    return gold_score(pair.a) - gold_score(pair.b)


def needed(sizes: list[int], accuracies: list[float], target: float) -> float:
    """Labels with which a curve, its running maximum between sizes a straight line, first has an accuracy."""
    best = accuracies[0]
    if best >= target:
        return float(sizes[0])
    for k in range(1, len(sizes)):
        now = max(best, accuracies[k])
        if now >= target:
            return sizes[k - 1] + (sizes[k] - sizes[k - 1]) * (target - best) / (now - best)
        best = now
    return math.nan


def summary(kept: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Mean curves, and labels that the chosen arm needs for the accuracy of random at each size."""
    import numpy as np

    curves = {
        method: np.array([[kept[f"{method}-{s}-{n}"]["accuracy"] for n in options.sizes] for s in options.seeds])
        for method in options.methods
    }
    found: dict[str, Any] = {"sizes": options.sizes}
    for method, table in curves.items():
        found[method] = {"mean": table.mean(0).tolist(), "std": table.std(0, ddof=len(table) > 1).tolist()}
        if method != "random":
            mean = curves["random"].mean(0).tolist()
            found[method]["share_of_labels"] = [
                needed(options.sizes, table.mean(0).tolist(), target) / n
                for n, target in zip(options.sizes, mean, strict=True)
            ]
    return found


def picture(found: dict[str, Any], path: Path, title: str = "Embedded world") -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for method in (name for name in found if name != "sizes"):
        mean, std = found[method]["mean"], found[method]["std"]
        axis.errorbar(found["sizes"], mean, yerr=std, marker="o", capsize=3, label=method)
    axis.set(xlabel="labels", ylabel="accuracy on held-out pairs", xscale="log", title=title)
    axis.set_xticks(found["sizes"], [str(n) for n in found["sizes"]], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/labels")
    parser.add_argument("--world_dir", default=None, help="where worlds are, or are built; default: in output_dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384, 640, 1024])
    parser.add_argument("--methods", nargs="+", default=["random", "information"])
    parser.add_argument("--prompts", type=int, default=800)
    parser.add_argument("--held", type=int, default=256, help="prompts whose answers are tested on")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the world's trainings, for a first look")
    options = parser.parse_args()
    import datasets
    import torch

    from trl_ext.toy import build_world

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    begun = time.process_time()
    for seed in options.seeds:
        world = build_world(options.world_dir or folder / "world", seed, scale=options.scale)
        for method in options.methods:
            if f"{method}-{seed}-{options.sizes[-1]}" not in kept:
                curve(method, seed, options, world, kept)
                path.write_text(json.dumps(kept, indent=1))
    found = summary(kept, options)
    (folder / "summary.json").write_text(json.dumps(found, indent=1))
    picture(found, folder / "labels_saved.png")
    print(json.dumps(found, indent=1), f"\n{time.process_time() - begun:.0f} s of processor time")


if __name__ == "__main__":
    main()
