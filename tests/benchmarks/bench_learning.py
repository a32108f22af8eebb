"""Reward against KL on a real small model: PPO-Max, TRL's RLOO, and TRL 1.12's PPO, the last one.

    python tests/benchmarks/bench_learning.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function \
        --config trl_ext/configs/tinystories.yaml --output docs/images/tinystories

Every trainer gets the same number of samples of the same length, from the same prompts, in batches of 32 with 2 passes
over each, LoRA r=16 on all linear layers. TRL's trainers run at the learning rates of `--rates`, PPO-Max as its config
file says. Writes OUTPUT.json (all curves) and OUTPUT.png, and prints the mean of the first and of the last 320 samples.
TRL 1.12 runs in a virtual environment of its own (`--trl_env`, made if missing).

Two things say how much is left to gain. `--trainers oracle` is PPO-Max paid for every token by what it added to the
reward, which leaves the critic little to assign. `--frontier FILE` draws into the picture what no policy
can exceed, measured by bench_frontier.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import methods
from methods import BATCH, distinct_2

PASSES, LENGTH = 2, 64


def curve(history: list[dict[str, float]], reward: str, kl: str, scale: float = 1.0) -> list[dict[str, float]]:
    """One point per rollout batch: reward and KL per sequence."""
    rows = [entry for entry in history if reward in entry and kl in entry]
    return [{"reward": entry[reward], "kl": entry[kl] * scale} for entry in rows]


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from trl_ext import PPOMaxConfig, PPOMaxTrainer
    from trl_ext.roles import lora_config

    prompts, reward = methods.load_prompts({"prompts": args.prompts}), methods.load_reward(args.reward)
    settings = yaml.safe_load(Path(args.config).read_text())
    settings = {k: v for k, v in settings.items() if not k.startswith("lora_") and k != "use_peft"}
    # yaml 1.1 reads 5e-3 as a string
    numbers = ("learning_rate", "critic_learning_rate")
    settings = {k: float(v) if k in numbers else v for k, v in settings.items()}
    settings |= {"output_dir": tempfile.mkdtemp(), "seed": args.seed, "disable_tqdm": True, "report_to": []}
    config = PPOMaxConfig(**settings)
    steps = PASSES * config.steps_per_generation // config.gradient_accumulation_steps
    config.max_steps, config.logging_steps = args.samples // BATCH * steps, steps
    assert config.generation_batch_size == BATCH
    assert config.num_iterations == PASSES
    trainer = PPOMaxTrainer(args.model, reward, config, prompts, peft_config=lora_config(r=16, lora_alpha=16))
    if args.child == "oracle":
        pay_by_token(trainer, reward)
    trainer.train()
    points = curve(trainer.state.log_history, "reward", "kl")
    for point, entry in zip(points, (e for e in trainer.state.log_history if "reward" in e), strict=False):
        point["explained_variance"] = entry["explained_variance"]
    last = args.samples // 4
    texts = final_completions(trainer, prompts, min(last, 256)) if args.completions else []
    return {"points": points, "completions": texts}


def pay_by_token(trainer: Any, reward: Any) -> None:
    """Pay every token what it adds to the reward of the text so far, in place of the whole reward at the end."""
    import torch

    import trl_ext.ppo.trainer as seam

    original, tokenizer = seam.add_kl_and_rewards, trainer.processing_class

    def by_token(rollout: Any, *, estimator: str, beta: float) -> None:
        original(rollout, estimator=estimator, beta=beta)
        std = trainer.ppo_state.moments.std
        rewards = -beta * rollout.kl
        for row, ids, length in zip(rewards, rollout.completion_ids, rollout.completion_mask.sum(1), strict=True):
            texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(1, int(length) + 1)]
            so_far = torch.tensor([0.0, *reward(texts)])
            row[: len(texts)] += (so_far[1:] - so_far[:-1]) / std
        rollout.rewards = rewards

    seam.add_kl_and_rewards = by_token


def final_completions(trainer: Any, prompts: Any, count: int) -> dict[str, list[str]]:
    """Completions of the same prompts by the policy and by its reference, from one seed."""
    import torch

    from trl_ext import Role

    rows = [prompts[i % len(prompts)]["prompt"] for i in range(count)]
    out = {}
    trainer.model.eval()
    for role in (Role.POLICY, Role.REFERENCE):
        torch.manual_seed(0)
        with trainer.model.role(role):
            texts = []
            for start in range(0, count, BATCH):
                _, _, completions = trainer._generate(rows[start : start + BATCH])
                texts += [c if isinstance(c, str) else c[0]["content"] for c in completions]
        out[role.value] = texts
    return out


def run_of_trl(what: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """One of TRL's trainers, as methods.py sets it up; RLOO with two completions of each of 16 prompts."""
    job = {"method": what, "model": args.model, "prompts": args.prompts, "reward": args.reward, "seed": 0, "rate": rate}
    job |= {"samples": args.samples, "length": LENGTH, "passes": PASSES, "micro": BATCH, "settings": {}}
    with tempfile.TemporaryDirectory() as folder:
        result = methods.run(job, Path(folder, "result.json"), args.trl_env, args.threads)
    out = {"points": result["records"], "completions": [], "seconds": result["seconds"]}
    return out | {"trainer": what, "seed": 0, "rate": rate}


def child(what: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, __file__, "--child", what, "--seed", str(seed)]
    for name in ("model", "prompts", "reward", "config", "samples"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--completions"] if args.completions else []
    started = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not lines:
        raise RuntimeError(f"{what} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    out = json.loads(lines[-1].removeprefix("RESULT "))
    return out | {"trainer": what, "seed": seed, "rate": 0.0, "seconds": time.perf_counter() - started}


def summarise(run: dict[str, Any]) -> str:
    points, k = run["points"], 320 // BATCH
    mean = lambda name, part: sum(p[name] for p in part) / len(part)  # noqa: E731
    text = (
        f"{run['trainer']:8s} rate {run['rate'] or 'config':>7} seed {run['seed']}: reward "
        f"{mean('reward', points[:k]):.3f} -> {mean('reward', points[-k:]):.3f}, "
        f"KL {mean('kl', points[-k:]):.2f}, {run['seconds']:.0f} s"
    )
    if run["completions"]:
        policy, reference = (distinct_2(run["completions"][role]) for role in ("policy", "reference"))
        text += f", distinct-2 {policy:.3f} (SFT {reference:.3f}, ratio {policy / reference:.2f})"
    return text


def plot(runs: list[dict[str, Any]], path: Path, frontier: dict[str, Any] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "ours": "PPO-Max",
        "oracle": "PPO-Max, every token's worth known",
        "rloo": "TRL RLOO",
        "trl_ppo": "TRL 1.12 PPO",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    kinds = list(dict.fromkeys((run["trainer"], run["rate"]) for run in runs))
    for run in runs:
        kind = (run["trainer"], run["rate"])
        color, label = f"C{kinds.index(kind)}", labels[kind[0]] + (f", rate {kind[1]:g}" if kind[1] else "")
        window = 6
        smooth = [
            {k: sum(p[k] for p in run["points"][i : i + window]) / window for k in ("reward", "kl")}
            for i in range(len(run["points"]) - window + 1)
        ]
        first = all(other is run or (other["trainer"], other["rate"]) != kind for other in runs[: runs.index(run)])
        kwargs = {"color": color, "alpha": 0.8, "label": label if first else None}
        axes[0].plot([p["kl"] for p in smooth], [p["reward"] for p in smooth], **kwargs)
        axes[1].plot([(i + window) * BATCH for i in range(len(smooth))], [p["reward"] for p in smooth], **kwargs)
    if frontier:
        end = axes[0].get_xlim()[1]
        kls = [end * i / 100 for i in range(101)]
        best = [frontier["start"] + frontier["gain"] * kl**0.5 for kl in kls]
        axes[0].plot(kls, best, "--", color="grey", label="no policy is above this")
    axes[0].set(xlabel="KL from the reference (nats a completion)", ylabel="reward")
    axes[1].set(xlabel="samples", ylabel="reward")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reward", required=True, help="file.py:function")
    parser.add_argument("--config", default="trl_ext/configs/tinystories.yaml")
    parser.add_argument("--output", type=Path, default=Path("learning"))
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3], help="of TRL's trainers (seed 0)")
    parser.add_argument("--trainers", nargs="+", default=["ours", "rloo", "trl_ppo"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--completions", action="store_true", help="also compare distinct-2 with the reference's")
    parser.add_argument("--frontier", type=Path, help="what bench_frontier.py wrote")
    parser.add_argument("--trl_env", type=Path, default=Path.home() / ".cache" / "trl_ext" / "trl-1.12")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(run_ours(args)))
        return
    runs = []
    for name in args.trainers:
        ours = name in ("ours", "oracle")
        for value in args.seeds if ours else args.rates:
            runs.append(child(name, value, args) if ours else run_of_trl(name, value, args))
            print(summarise(runs[-1]), flush=True)
    args.output.with_suffix(".json").write_text(json.dumps(runs))
    frontier = json.loads(args.frontier.read_text()) if args.frontier else None
    plot(runs, args.output.with_suffix(".png"), frontier)


if __name__ == "__main__":
    main()
