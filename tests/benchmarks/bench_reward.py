"""Reward models: speed against TRL's RewardTrainer, accuracy on real preferences, and denoising of known noise.

    python tests/benchmarks/bench_reward.py speed --model MODEL --train train.jsonl.gz
    python tests/benchmarks/bench_reward.py accuracy --model MODEL --train train.jsonl.gz --test test.jsonl.gz
    python tests/benchmarks/bench_reward.py noise

MODEL is a causal language model, the files hold preferences in any format of trl_ext.data. `accuracy` trains five
plain models, which are the ensemble that measures the preference strength of the training pairs, and each variant with
every seed; results are kept beside the json of --output: a run resumes.
`noise` flips a quarter of the labels of the embedded world; `back` is the share of the loss that a policy undoes.
One thread a process: tiny models are slower with more.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
MEMBERS = 5
SETTINGS = {
    "per_device_eval_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
NOISE_SETTINGS = SETTINGS | {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
}
# Of each variant beside the plain model: how the strength is used, and the options of the trainer.
VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "+ imitation term": (None, {"lm_coef": 0.1}),
    "+ label smoothing": (None, {"label_smoothing": 0.1}),
    "+ margin (measured strength)": ("margin", {"margin_column": "strength_mean"}),
    "flip the weakest 10 %": ("flip", {}),
}


def quiet() -> None:
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def train_one(model: Any, args: Any, train: Any, test: Any, tokenizer: Any = None) -> tuple[Any, float]:
    """The trainer after training, and its seconds."""
    from transformers import PrinterCallback

    from trl_ext import RewardModelTrainer

    trainer = RewardModelTrainer(model, args, train, test, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def lead(trainer: Any, rows: Any) -> Any:
    scores = trainer.score(rows)
    return scores["chosen"] - scores["rejected"]


def accuracy_of(difference: Any) -> float:
    return float((difference > 0).float().mean())


# ---------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> None:
    """One trainer per process, alternating, the same rows, batches and steps; pairs per second and peak memory."""
    figures: dict[str, list[dict[str, float]]] = {"trl": [], "ours": [], "ours, prompts not shared": []}
    for _ in range(args.repeats):
        for name, runs in figures.items():
            command = [sys.executable, __file__, "speed-one", "--model", args.model, "--train", str(args.train)]
            command += ["--steps", str(args.steps), "--batch_size", str(args.batch_size), "--trainer", name]
            command += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
            output = subprocess.run(command, capture_output=True, text=True, check=False)
            if output.returncode:
                raise RuntimeError(output.stderr[-3000:])
            runs.append(json.loads(output.stdout.strip().splitlines()[-1]))
            print(name, runs[-1], flush=True)
    base = max(run["pairs_per_second"] for run in figures["trl"])
    print("\n| trainer | pairs/s | ratio | peak MiB |\n| --- | --- | --- | --- |")
    for name, runs in figures.items():
        rate, peak = max(run["pairs_per_second"] for run in runs), min(run["peak_mib"] for run in runs)
        print(f"| {name} | {rate:.2f} | {rate / base:.2f} | {peak:.0f} |")


def speed_one(args: argparse.Namespace) -> None:
    import resource

    import torch
    from transformers import PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from trl_ext import RewardModelConfig, RewardModelTrainer
    from trl_ext.data import load_preferences
    from trl_ext.roles import lora_config

    quiet()
    rows, _ = load_preferences(args.train)
    common = SETTINGS | {"output_dir": "unused", "max_steps": args.steps + 1, "max_length": 256, "seed": 0}
    common |= {
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": 1e-3,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    peft_config = lora_config("SEQ_CLS")
    if args.trainer == "trl":
        trainer: Any = RewardTrainer(args.model, RewardConfig(**common), train_dataset=rows, peft_config=peft_config)
    else:
        config = RewardModelConfig(**common, normalize_rewards=False, share_prompts=args.trainer == "ours")
        trainer = RewardModelTrainer(args.model, config, rows, peft_config=peft_config)
    trainer.remove_callback(PrinterCallback)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    with torch.profiler.profile() if args.profile else open(os.devnull) as profile:
        trainer.train()
    if args.profile:
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    seconds = ends[-1] - ends[0]  # the first step warms up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"pairs_per_second": args.batch_size * args.steps / seconds, "peak_mib": peak}))


# ---------------------------------------------------------------------- accuracy


def accuracy(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from trl_ext import RewardModelConfig
    from trl_ext.data import load_preferences
    from trl_ext.reward.strength import apply_strength
    from trl_ext.roles import RewardModel, load_base, lora_config

    quiet()
    train, test = (load_preferences(path)[0] for path in (args.train, args.test))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = RewardModel(load_base(args.model, dtype="float32"), lora_config("SEQ_CLS", **json.loads(args.lora)))
    folder = args.output.parent / args.output.stem
    folder.mkdir(parents=True, exist_ok=True)

    def run(name: str, seed: int, rows: Any, **options: Any) -> dict[str, Any]:
        """Train one model, or read what it scored when it was trained."""
        path = folder / f"{name.replace(' ', '_').replace('%', '')}-{seed}.pt"
        if not path.exists():
            settings = SETTINGS | json.loads(args.settings) | options
            config = RewardModelConfig(
                output_dir=str(folder / path.stem), seed=seed, max_length=256, normalize_rewards=True, **settings
            )
            model.reset(seed)
            trainer, seconds = train_one(model, config, rows, test, tokenizer)
            trainer.save_model()
            result = {"test": lead(trainer, test), "seconds": seconds, "pairs": len(rows)}
            if name == "plain":
                result["train"] = lead(trainer, train)
            torch.save(result, path)
            print(f"{name} seed {seed}: {accuracy_of(result['test']):.4f}, {seconds:.0f} s", flush=True)
        return torch.load(path)

    if not args.only or args.only == ["plain"]:
        members = [run("plain", k, train) for k in range(MEMBERS)]
    if args.only:
        for name in set(args.only) & {n for n, (policy, _) in VARIANTS.items() if policy is None}:
            for seed in args.seeds:
                run(name, seed, train, **VARIANTS[name][1])
        return
    differences = torch.stack([member["train"] for member in members])
    leads = torch.stack([member["test"] / member["test"].std() for member in members])
    table = {
        "plain": [accuracy_of(members[seed]["test"]) for seed in args.seeds],
        f"ensemble of {MEMBERS}": [accuracy_of(leads.mean(0))],
    }
    for name, (policy, options) in VARIANTS.items():
        rows = train if policy is None else apply_strength(train, differences, policy, share=0.1)[0]
        table[name] = [accuracy_of(run(name, seed, rows, **options)["test"]) for seed in args.seeds]
    args.output.write_text(json.dumps(table, indent=1))
    error = (0.65 * 0.35 / len(test)) ** 0.5
    print(f"\n{len(train)} training pairs, {len(test)} test pairs, standard error of one accuracy {error:.3f}\n")
    print("| | mean | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " |")
    print("| --- | --- |" + " --- |" * len(args.seeds))
    for name, values in table.items():
        print(f"| {name} | {sum(values) / len(values):.3f} | " + " | ".join(f"{v:.3f}" for v in values) + " |")


# ---------------------------------------------------------------------- noise


def noise(args: argparse.Namespace) -> None:
    quiet()
    results = {}
    for seed in args.seeds:
        results[seed] = noise_of(seed, args)
        print(seed, {name: round(value, 3) for name, value in results[seed].items()}, flush=True)
        args.output.write_text(json.dumps(results, indent=1))
    print("\n| seed | " + " | ".join(next(iter(results.values()))) + " |")
    for seed, row in results.items():
        print(f"| {seed} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")


def noise_of(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Gold accuracy of models from clean, noisy and denoised labels; how well the flipped labels were found."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from trl_ext import RewardModelConfig
    from trl_ext.reward.strength import apply_strength
    from trl_ext.roles import RewardModel, load_base
    from trl_ext.toy import build_world
    from trl_ext.toy.task import preference_pairs

    world = build_world(args.output.parent / "worlds", seed)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = RewardModel(load_base(str(world.base), dtype="float32"))
    rng = random.Random(f"noise-{seed}")
    clean = preference_pairs(args.pairs, rng)
    flipped = torch.tensor([rng.random() < 0.25 for _ in clean])
    noisy = [dict(row) for row in clean]
    for i in flipped.nonzero().flatten().tolist():
        noisy[i]["chosen"], noisy[i]["rejected"] = clean[i]["rejected"], clean[i]["chosen"]
    test = Dataset.from_list(preference_pairs(args.test_pairs, rng, temperature=0, split="eval"))
    final = NOISE_SETTINGS | json.loads(args.settings)
    member = final | json.loads(args.member_settings)

    def train(rows: Any, run_seed: int, settings: dict[str, Any] = final, **options: Any) -> Any:
        config = RewardModelConfig(
            output_dir=str(args.output.parent), seed=run_seed, normalize_rewards=False, **(settings | options)
        )
        model.reset(run_seed)
        return train_one(model, config, rows, test, tokenizer)[0]

    noisy_rows = Dataset.from_list(noisy)
    row = {"clean": accuracy_of(lead(train(Dataset.from_list(clean), seed), test))}
    row["plain"] = accuracy_of(lead(train(noisy_rows, seed), test))
    print(f"seed {seed}: clean {row['clean']:.3f}, noisy {row['plain']:.3f}", flush=True)
    differences, leads = [], []
    for k in range(MEMBERS):
        trainer = train(noisy_rows, seed + 100 * k, member)
        differences.append(lead(trainer, noisy_rows))
        leads.append(lead(trainer, test))
    row["member"] = sum(map(accuracy_of, leads)) / MEMBERS
    row["ensemble"] = accuracy_of(torch.stack(leads).mean(0))
    members = torch.stack(differences)
    for policy in ("flip", "drop", "smooth"):
        rows, report = apply_strength(noisy_rows, members, policy, share=args.share)
        options = {"label_smoothing": 0.3, "label_smoothing_on": "suspected"} if policy == "smooth" else {}
        row[policy] = accuracy_of(lead(train(rows, seed, **options), test))
        row[f"{policy}: back"] = (row[policy] - row["plain"]) / (row["clean"] - row["plain"])
        print(f"seed {seed}: {policy} {row[policy]:.3f}, {row[f'{policy}: back']:.0%} of the loss", flush=True)
    suspected = members.mean(0) < report.threshold
    hits = float((suspected & flipped).sum())
    return row | {"precision": hits / float(suspected.sum()), "recall": hits / float(flipped.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "speed-one", "accuracy", "noise"])
    parser.add_argument("--model")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench_reward.json"))
    parser.add_argument("--settings", default="{}", help="options of the trainer, as json")
    parser.add_argument("--lora", default="{}", help="options of the LoRA configuration, as json")
    parser.add_argument("--only", nargs="+", help="accuracy: train these and stop, for several processes at once")
    parser.add_argument("--member_settings", default="{}", help="noise: what differs for the judges, as json")
    parser.add_argument("--pairs", type=int, default=2560)
    parser.add_argument("--test_pairs", type=int, default=5000)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--trainer", default="ours")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    {"speed": speed, "speed-one": speed_one, "accuracy": accuracy, "noise": noise}[args.what](args)


if __name__ == "__main__":
    main()
