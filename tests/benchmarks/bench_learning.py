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

BATCH, PASSES, LENGTH = 32, 2, 64


def load_inputs(args: argparse.Namespace) -> tuple[Any, Any]:
    import importlib.util

    from datasets import load_dataset

    file, _, name = args.reward.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompts = load_dataset("json", data_files=args.prompts, split="train")
    keep = [column for column in prompts.column_names if column != "prompt"]
    return prompts.remove_columns(keep), getattr(module, name)


def curve(history: list[dict[str, float]], reward: str, kl: str, scale: float = 1.0) -> list[dict[str, float]]:
    """One point per rollout batch: reward and KL per sequence."""
    rows = [entry for entry in history if reward in entry and kl in entry]
    return [{"reward": entry[reward], "kl": entry[kl] * scale} for entry in rows]


def common(args: argparse.Namespace, rate: float) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "seed": args.seed,
        "learning_rate": rate,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from trl_ext import PPOMaxConfig, PPOMaxTrainer
    from trl_ext.roles import lora_config

    prompts, reward = load_inputs(args)
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


def run_rloo(args: argparse.Namespace) -> dict[str, Any]:
    """RLOO with two completions of each of 16 prompts, no critic."""
    from trl import RLOOConfig, RLOOTrainer

    from trl_ext.roles import lora_config

    prompts, reward = load_inputs(args)
    config = RLOOConfig(
        **common(args, args.rate),
        num_generations=2,
        num_iterations=PASSES,
        max_completion_length=LENGTH,
        beta=0.05,
        max_steps=args.samples // BATCH * PASSES,
        logging_steps=PASSES,
    )
    peft = lora_config(r=16, lora_alpha=16)
    trainer = RLOOTrainer(args.model, reward, config, prompts, peft_config=peft)
    trainer.train()
    # RLOO logs the KL per token; nearly every completion here has LENGTH tokens
    length = [e["completions/mean_length"] for e in trainer.state.log_history if "completions/mean_length" in e]
    return {"points": curve(trainer.state.log_history, "reward", "kl", sum(length) / len(length)), "completions": []}


def run_trl_ppo(args: argparse.Namespace) -> dict[str, Any]:
    """TRL 1.12's PPOTrainer, with the reward function in place of its reward model."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    prompts, reward = load_inputs(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    dataset = prompts.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns="prompt")

    def scores(model: Any, sequences: Any, pad_token_id: int, context_length: int) -> Any:
        texts = tokenizer.batch_decode(sequences[:, context_length:], skip_special_tokens=True)
        score = torch.tensor(reward(texts), dtype=torch.float32)
        return None, score, None

    original = ppo_trainer.get_reward
    ppo_trainer.get_reward = lambda model, *rest: (
        scores(model, *rest) if isinstance(model, torch.nn.Identity) else original(model, *rest)
    )
    history: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            history.append(dict(logs))

    value = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype="float32")
    trainer = PPOTrainer(
        args=PPOConfig(
            **common(args, args.rate),
            num_ppo_epochs=PASSES,
            num_mini_batches=1,
            local_rollout_forward_batch_size=BATCH,
            response_length=LENGTH,
            temperature=1.0,
            kl_coef=0.05,
            total_episodes=args.samples,
            num_sample_generations=0,
            logging_steps=1,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
        ref_model=None,
        reward_model=torch.nn.Identity(),
        value_model=value,
        train_dataset=dataset,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Keep()],
    )
    trainer.train()
    return {"points": curve(history, "objective/scores", "objective/kl"), "completions": []}


def child(python: str, what: str, seed: int, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment["OMP_NUM_THREADS"] = str(args.threads)
    if what != "trl_ppo":
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [python, __file__, "--child", what, "--seed", str(seed), "--rate", str(rate)]
    for name in ("model", "prompts", "reward", "config", "samples"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--completions"] if args.completions else []
    started = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not lines:
        raise RuntimeError(f"{what} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    out = json.loads(lines[-1].removeprefix("RESULT "))
    return out | {"trainer": what, "seed": seed, "rate": rate, "seconds": time.perf_counter() - started}


def distinct_2(texts: list[str]) -> float:
    """Different pairs of words / pairs of words, over all texts together (Li et al. 2016)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)


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
    for name in ("--child", "--seed", "--rate"):
        parser.add_argument(name, type=str if name == "--child" else float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.seed = int(args.seed)
        run = {"ours": run_ours, "oracle": run_ours, "rloo": run_rloo, "trl_ppo": run_trl_ppo}[args.child]
        print("RESULT " + json.dumps(run(args)))
        return
    jobs = [(name, seed, 0.0) for name in ("ours", "oracle") if name in args.trainers for seed in args.seeds]
    jobs += [(name, 0, rate) for name in ("rloo", "trl_ppo") if name in args.trainers for rate in args.rates]
    runs = []
    for name, seed, rate in jobs:
        python = sys.executable
        if name == "trl_ppo":
            from bench_ppo import trl_python

            python = trl_python(args.trl_env)
        runs.append(child(python, name, seed, rate, args))
        print(summarise(runs[-1]), flush=True)
    args.output.with_suffix(".json").write_text(json.dumps(runs))
    frontier = json.loads(args.frontier.read_text()) if args.frontier else None
    plot(runs, args.output.with_suffix(".png"), frontier)


if __name__ == "__main__":
    main()
