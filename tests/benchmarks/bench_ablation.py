"""Each PPO-Max trick off in turn, in the embedded world: final gold reward, proxy reward and KL.

    python tests/benchmarks/bench_ablation.py --output runs/ablation.json

The configuration is that of `accelerate launch recipes/ppo_max.py`; one option changes at a time. Every seed has a
world of its own (data, base, SFT adapter, reward adapter). Evaluated on 256 held-out prompts. Prints a markdown table:
mean over the seeds, and the smallest and the largest.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "PPO-Max": {},
    "no reward normalisation": {"reward_normalization": "none"},
    "reward scaled, not centred": {"reward_normalization": "scale"},
    "no reward clip": {"reward_clip": None},
    "no KL penalty": {"beta": 0.0},
    "fixed KL coefficient": {"kl_control": "fixed"},
    "KL control by doubling and halving": {"kl_control": "penalty"},
    "no advantage whitening": {"normalize_advantages": False},
    "no policy clip": {"epsilon": 1.0, "epsilon_high": 1e6},
    "no value clip": {"value_clip": None},
    "no critic warm-up": {"critic_warmup_steps": 0},
    "critic at the policy's learning rate": {"critic_learning_rate": "policy"},
    "fresh critic": {"fresh_critic": True},
    "no gradient clip": {"max_grad_norm": 0.0},
    "lambda 1 (Monte Carlo)": {"gae_lambda": 1.0},
    "missing-end penalty 1": {"missing_eos_penalty": 1.0},
    "PPO-ptx 0.1": {"ptx_coef": 0.1},
    "entropy bonus 0.01": {"entropy_coef": 0.01},
}


def run(name: str, changes: dict[str, Any], seed: int, folder: Path, prompts: int) -> dict[str, float]:
    import yaml
    from transformers import PrinterCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer, SharedBaseModel
    from trl_ext.roles import AdapterWeights, load_base, read_adapter
    from trl_ext.toy import build_world, gold_reward

    world = build_world(folder / "worlds", seed)
    settings = yaml.safe_load((ROOT / "trl_ext" / "configs" / "toy.yaml").read_text())
    settings |= {"output_dir": str(folder / "run"), "seed": seed, "disable_tqdm": True, "logging_steps": 1000}
    settings |= {k: v for k, v in changes.items() if k != "fresh_critic"}
    if settings.get("critic_learning_rate") == "policy":
        settings["critic_learning_rate"] = settings["learning_rate"]
    args = PPOMaxConfig(**settings, reward_weights=[0.0])
    policy = read_adapter(world.policy_adapter)
    critic = AdapterWeights(policy.config) if changes.get("fresh_critic") else None
    base = load_base(str(world.base), dtype="float32")
    model = SharedBaseModel(base, policy, read_adapter(world.reward_adapter), critic)
    extra = {"ptx_dataset": world.pretrain_texts} if args.ptx_coef else {}
    held_out = world.eval_prompts.select(range(prompts))
    trainer = PPOMaxTrainer(model, [gold_reward], args, world.train_prompts, held_out, **extra)
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate() if name == "PPO-Max" else {}
    trainer.train()
    # The KL is measured against the reference also where training did without it.
    trainer.beta = trainer.beta or 1e-9
    after = trainer.evaluate()
    figures = {
        "gold": after["eval_rewards/gold_reward/mean"],
        "proxy": after["eval_reward"],
        "kl": after["eval_kl"],
        "truncated": after["eval_completions/truncated_ratio"],
    }
    if before:
        figures |= {"gold_sft": before["eval_rewards/gold_reward/mean"], "sd": before["eval_rewards/gold_reward/std"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=256)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.only or VARIANTS:
        for seed in args.seeds:
            if str(seed) in results.get(name, {}):
                continue
            figures = run(name, VARIANTS[name], seed, args.output.parent, args.prompts)
            results.setdefault(name, {})[str(seed)] = figures
            args.output.write_text(json.dumps(results, indent=1))
            print(f"{name:36s} seed {seed} {json.dumps({k: round(v, 3) for k, v in figures.items()})}", flush=True)
    print("\n| variant | gold reward | proxy reward | KL |\n| --- | --- | --- | --- |")
    for name, seeds in results.items():
        cells = []
        for key in ("gold", "proxy", "kl"):
            values = [figures[key] for figures in seeds.values()]
            cells.append(f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
