"""`trl-ext rlhf` in the embedded world and on a small chat model.

    python tests/benchmarks/bench_rlhf.py iterate --output_dir runs/iterate --seeds 0 1 2
    python tests/benchmarks/bench_rlhf.py processes --output_dir runs/processes --model tinychat-3m --data data/hh

`iterate`: rounds of labels against as many at once, with as many PPO samples: gold reward of the last policy, and
what the reward models that PPO had say of it, by round. The SFT policy is the same.
`processes`: SFT, a reward model and PPO-Max in one process by recipes/rlhf.py, and in three by TRL's SFTTrainer,
recipes/reward_model.py and recipes/ppo_max.py, on the same work: seconds, and the largest resident memory of a process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[2]
SFT = """
import sys, yaml
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from trl_ext.roles import lora_config
model, data, config, output = sys.argv[1:]
args = SFTConfig(output_dir=output, use_cpu=True, bf16=False, report_to="none", **yaml.safe_load(open(config)))
rows = load_dataset("json", data_files=data, split="train")
trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=lora_config("CAUSAL_LM"))
trainer.train()
trainer.model.save_pretrained(output)
"""


# ---------------------------------------------------------------------- rounds


def iterate(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of each seed and arm, by round."""
    from trl_ext.scripts import rlhf

    found: dict[str, Any] = {}
    for seed in options.seeds:
        for arm, rounds in (("rounds", options.rounds), ("once", 1)):
            folder = Path(options.output_dir) / f"{arm}-{seed}"
            pairs = options.labels if arm == "rounds" else options.labels * options.rounds
            steps = options.steps if arm == "rounds" else options.steps * options.rounds
            _take(options, folder, seed)
            flags = [f"--output_dir={folder}", f"--seed={seed}", f"--rounds={rounds}", f"--world_pairs={pairs}"]
            flags += [f"--max_steps={steps}", "--config=rlhf_toy", "--disable_tqdm=true", "--judge=none"]
            flags += ["--sft_config=sft_toy", "--reward_config=reward_toy", "--write_report=false"]
            if arm == "rounds":
                flags += [f"--labels_per_round={options.labels}", "--random_share=0"]
                flags += [f"--sampled_prompts={options.prompts}"]
            rlhf.main(flags)
            found[f"{arm}-{seed}"] = json.loads((folder / "rounds.json").read_text())
            (Path(options.output_dir) / "results.json").write_text(json.dumps(found, indent=1))
    return found


def _take(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """The base and the SFT policy of the other arm, which are the same."""
    other = Path(options.output_dir) / f"rounds-{seed}"
    for part in ("world", "sft"):
        if (other / part).is_dir() and not (folder / part).exists():
            shutil.copytree(other / part, folder / part)


def picture(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for arm, style in (("rounds", "o-"), ("once", "s")):
        runs = [run for name, run in found.items() if name.startswith(arm)]
        last = max(len(run) for run in found.values())
        at = [entry["round"] for entry in runs[0]] if arm == "rounds" else [last]
        gold = np.array([[entry["gold"] for entry in run] for run in runs])
        gap = np.array([[entry["proxy"] - entry["gold"] for entry in run] for run in runs])
        for axis, table in zip(axes, (gold, gap), strict=True):
            axis.errorbar(at, table.mean(0), yerr=table.std(0), fmt=style, capsize=3, label=arm)
    for axis, title in zip(axes, ("gold reward", "proxy less gold"), strict=True):
        axis.set(title=title, xlabel="round")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------- one process against three


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of one process and of three, on the same work."""
    folder, data = Path(options.output_dir), Path(options.data)
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations, prompts, train, test = _texts(data, folder, options.rows)
    common = f"per_device_train_batch_size: 8\nmax_steps: {options.steps}\nmax_length: 256\nlearning_rate: 3.0e-4\n"
    (folder / "sft.yaml").write_text(common + "gradient_checkpointing: false\nsave_strategy: 'no'\nlogging_steps: 10\n")
    (folder / "reward.yaml").write_text(
        common + "use_cpu: true\nbf16: false\ngradient_checkpointing: false\nreport_to: none\nsave_strategy: 'no'\n"
        "write_report: false\nnormalization_samples: 64\n"
    )
    ppo = ["--use_cpu=true", "--bf16=false", "--gradient_checkpointing=false", "--report_to=none", "--save_strategy=no"]
    ppo += [
        "--write_report=false",
        "--disable_tqdm=true",
        "--per_device_train_batch_size=8",
        "--steps_per_generation=4",
    ]
    ppo += [f"--max_steps={options.steps}", "--max_completion_length=32", f"--model_name_or_path={options.model}"]
    found: dict[str, Any] = {}
    start = time.perf_counter()
    sft = [sys.executable, "-c", SFT, options.model, str(demonstrations), str(folder / "sft.yaml"), str(folder / "sft")]
    reward = [sys.executable, str(ROOT / "recipes" / "reward_model.py"), f"--config={folder / 'reward.yaml'}"]
    reward += [f"--model_name_or_path={options.model}", f"--output_dir={folder / 'rm'}", f"--dataset_name={train}"]
    reward += [f"--dataset_test_name={test}", "--disable_tqdm=true"]
    tune = [sys.executable, str(ROOT / "recipes" / "ppo_max.py"), *ppo, f"--output_dir={folder / 'ppo'}"]
    tune += [f"--dataset_name={prompts}", f"--policy_adapter={folder / 'sft'}", f"--reward_adapter={folder / 'rm'}"]
    tune += ["--eval_on_start=false", "--eval_prompts=1"]
    three = [_run(command, folder) for command in (sft, reward, tune)]
    found["three"] = {
        "seconds": time.perf_counter() - start,
        "each": three,
        "peak_mb": max(r["peak_mb"] for r in three),
    }
    one = [sys.executable, str(ROOT / "recipes" / "rlhf.py"), *ppo, f"--output_dir={folder / 'one'}", "--judge=none"]
    one += [f"--sft_dataset={demonstrations}", f"--preferences={train}", f"--preferences_test={test}"]
    one += [f"--prompts={prompts}", f"--sft_config={folder / 'sft.yaml'}", f"--reward_config={folder / 'reward.yaml'}"]
    found["one"] = _run([*one, "--members=1", "--judged_prompts=1"], folder)
    processor = found["one"]["cpu_seconds"] / sum(each["cpu_seconds"] for each in three)
    return found | {"ratio": found["one"]["seconds"] / found["three"]["seconds"], "cpu_ratio": processor}


def _texts(data: Path, folder: Path, rows: int) -> list[Path]:
    """Demonstrations, prompts, preferences and as many test pairs at most, of the first rows."""
    from trl_ext.data import load_preferences

    sets = [load_preferences(data / f"{name}_256tok.jsonl.gz")[0].to_list()[:rows] for name in ("train", "test")]
    told = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in sets[0]]
    asked = [{"prompt": row["prompt"]} for row in sets[0] if len(json.dumps(row["prompt"])) < 400]
    paths = [folder / f"{name}.jsonl" for name in ("sft", "prompts", "train", "test")]
    for path, lines in zip(paths, (told, asked, *sets), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def _run(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of a process."""
    start = time.perf_counter()
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, env=own, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[1]} failed: see {folder / 'log.txt'}")
    after = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": after, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("iterate", "processes"))
    parser.add_argument("--output_dir", default="runs/bench_rlhf")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=300, help="of a round")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of PPO in a round, or of each stage")
    parser.add_argument("--prompts", type=int, default=500, help="answered to choose pairs from")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    found = iterate(options) if options.what == "iterate" else processes(options)
    (Path(options.output_dir) / "results.json").write_text(json.dumps(found, indent=1))
    if options.what == "iterate":
        picture(found, Path(options.output_dir) / "rounds.png")
    print(json.dumps(found, indent=1), f"\n{time.process_time() - start:.0f} s of processor time in this process")


if __name__ == "__main__":
    main()
