"""`trl-ext rlhf` in the embedded world and on a small chat model.

    python tests/benchmarks/bench_rlhf.py iterate --output_dir runs/iterate --seeds 0 1 2
    python tests/benchmarks/bench_rlhf.py processes --output_dir runs/processes --model tinychat-3m --data data/hh

`iterate`: rounds of labels against as many at once, with as many PPO samples: gold reward, and how far what the reward
models say of the policy is from it, by round. What is done is not repeated.
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


ARMS = {
    "rounds": "labels in rounds",
    "once": "all labels at once",
    "moved": "all labels at once, the KL penalty to where each third of PPO begins",
    "fitted": "labels in rounds, the reward models of each trained for as many steps as those of all labels at once",
}


def iterate(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of each arm and seed, by round; those that are done are not repeated.

    All arms of a seed have the same base, SFT policy, prompts and held-out prompts, `rounds` times `labels` labels,
    as many optimizer steps of the reward models (to a step or two) and as many PPO samples. `moved` tells what the
    labels do from what it does that each round of PPO begins, and is held, where the last one ended. In `fitted` the
    reward models of every round have as many steps as those of all labels, so more in all: labels cost more than steps.
    """
    path = Path(options.output_dir) / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in options.seeds:
        for arm in options.arms:
            if f"{arm}-{seed}" not in found:
                found[f"{arm}-{seed}"] = _arm(options, arm, seed)
                path.write_text(json.dumps(found, indent=1))
    return found


def _arm(options: argparse.Namespace, arm: str, seed: int) -> list[dict[str, float]]:
    """What the policy is worth after each part of its training: `_figures`."""
    from trl_ext.scripts import rlhf, rlhf_rounds, rlhf_stages

    folder = Path(options.output_dir) / f"{arm}-{seed}"
    _take(options, folder, seed)
    rounds = options.rounds
    labels, in_rounds, config = options.labels, arm in ("rounds", "fitted"), "reward_toy"
    if arm != "rounds":
        config = _longer_rewards(options, 1 if in_rounds else rounds)
    if not in_rounds:
        labels *= rounds
    flags = [f"--output_dir={folder}", f"--seed={seed}", f"--rounds={rounds}", f"--world_pairs={labels}"]
    flags += ["--config=rlhf_toy", "--disable_tqdm=true", "--judge=none", "--write_report=false", "--random_share=0"]
    flags += [f"--labels_per_round={options.labels}", f"--sampled_prompts={options.prompts}", "--judged_prompts=512"]
    flags += ["--sft_config=sft_toy", f"--reward_config={config}", f"--choose={options.choose}"]
    flags += [f"--learning_rate={options.learning_rate}", "--update_kl_target=0.1875"]
    parts = 1 if arm == "once" else rounds
    work = rlhf_stages.prepare(*rlhf.parse([*flags, f"--max_steps={options.steps * rounds // parts}"]), print)
    sft = policy = rlhf_stages.run_sft(work)
    critic: Path | None = None
    sets, rewards, course = {"start": work.preferences}, list[Path](), list[dict[str, float]]()
    for number in range(1, parts + 1):
        if arm == "fitted":
            work.recipe.reward_config = _longer_rewards(options, number)
        if number > 1 and in_rounds:
            sets[f"round_{number}"] = rlhf_rounds.label_round(work, number, policy, rewards, sets)
        if number == 1 or in_rounds:
            rewards = rlhf_stages.run_rewards(work, number, sets, rewards)
        policy = rlhf_stages.run_ppo(work, number, policy, critic, rewards)
        critic = policy / "critic"
        part = {"round": number * rounds // parts, "accuracy": _accuracy(rewards[0].parent)}
        course.append(part | _figures(work, sft, policy, rewards))
        print(arm, seed, course[-1], flush=True)
    return course


def _take(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """What another arm has made of the same: the base, the SFT policy, the reward models of all labels."""
    root = Path(options.output_dir)
    places = [(root / f"rounds-{seed}", part) for part in ("world", "sft")]
    if folder.name.startswith("moved"):
        places.append((root / f"once-{seed}", "round_1/reward"))
    for other, part in places:
        if (other / part).is_dir() and not (folder / part).exists():
            shutil.copytree(other / part, folder / part)


def _longer_rewards(options: argparse.Namespace, rounds: int) -> Path:
    """Reward models on the labels of so many rounds, with as many steps as those of all rounds together."""
    import yaml

    from trl_ext.scripts.configs import CONFIGS

    config = yaml.safe_load((CONFIGS / "reward_toy.yaml").read_text())
    config["num_train_epochs"] *= (
        options.rounds * (options.rounds + 1) / 2 / rounds
    )  # 1 + 2 + ... + N, of a round's labels
    path = Path(options.output_dir) / f"reward_on_{rounds}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _accuracy(folder: Path) -> float:
    found = json.loads((folder / "accuracy.json").read_text())
    return float(sum(found) / len(found))


def _figures(work: Any, sft: Path, policy: Path, rewards: list[Path]) -> dict[str, float]:
    """Gold and proxy of a policy on held-out prompts.

    Both have one unit: `gold_gain` and `proxy_gain` are how far their mean is above that of the SFT policy, in standard
    deviations over the answers of the SFT policy; the gap is their difference. `rank` is Spearman's correlation of
    proxy and gold over the answers of the policy. The proxy is the mean of the reward models that PPO had, `judge` the
    one that it had not.
    """
    import numpy as np

    from trl_ext.reward.pair_statistics import spearman
    from trl_ext.scripts.judging import member_scores
    from trl_ext.scripts.rlhf_rounds import answer, answers_path, sampling_facts
    from trl_ext.scripts.rlhf_stages import paying
    from trl_ext.toy.task import gold_score

    prompts = work.held_out.select(range(min(work.recipe.judged_prompts, len(work.held_out))))
    told: list[dict[str, Any]] = []
    for each, folder in ((sft, work.folder), (policy, policy.parent)):
        rows = answer(work, each, prompts, answers_path(folder, sampling_facts(work, prompts, each)), 1)
        texts = [row["responses"][0] for row in rows]
        scores = member_scores(work.base, work.encoder, rewards, [row["prompt"] for row in rows], texts)[0].numpy()
        told.append({"gold": [gold_score(text) for text in texts], "proxy": scores[:, : len(paying(rewards))].mean(1)})
        told[-1] |= {"judge": scores[:, -1], "length": [len(text) for text in texts]}
    start, now = ({name: np.asarray(values) for name, values in side.items()} for side in told)
    gains = {f"{k}_gain": (now[k].mean() - start[k].mean()) / start[k].std() for k in ("gold", "proxy", "judge")}
    found = gains | {"gold": now["gold"].mean(), "gold_sft": start["gold"].mean(), "length": now["length"].mean()}
    found |= {
        "rank": spearman(now["proxy"], now["gold"]),
        "different": len(set(texts)) / len(texts),
    }
    return {name: float(value) for name, value in found.items()}


def picture(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    titles = ("gold reward", "gap: gain of proxy less gain of gold", "rank correlation of proxy and gold")
    for shift, (arm, style) in enumerate(zip(ARMS, ("o-", "s", "^--", "d:"), strict=True)):
        runs = [run for name, run in found.items() if name.startswith(f"{arm}-")]
        if not runs:
            continue
        at = np.array([part["round"] for part in runs[0]]) + 0.04 * (shift - 1.5)
        gold, gain, proxy, rank = (
            np.array([[part[name] for part in run] for run in runs])
            for name in ("gold", "gold_gain", "proxy_gain", "rank")
        )
        for axis, table in zip(axes, (gold, proxy - gain, rank), strict=True):
            axis.errorbar(at, table.mean(0), yerr=table.std(0, ddof=len(runs) > 1), fmt=style, capsize=3, label=arm)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="round")
        axis.set_xticks(range(1, 1 + max(part["round"] for run in found.values() for part in run)))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------- one process against three


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of one process and of three, on the same work, in turn."""
    found: dict[str, Any] = {"three": [], "one": []}
    for repeat in range(options.repeats):
        folder = Path(options.output_dir) / str(repeat)
        folder.mkdir(parents=True, exist_ok=True)
        commands = _commands(options, folder)
        for kind in ("three", "one") if repeat % 2 == 0 else ("one", "three"):
            each = [_run(command, folder) for command in commands[kind]]
            sums = {name: sum(run[name] for run in each) for name in ("seconds", "cpu_seconds")}
            found[kind].append(sums | {"peak_mb": max(run["peak_mb"] for run in each), "each": each})
            print(kind, found[kind][-1], flush=True)
    for name in ("seconds", "cpu_seconds", "peak_mb"):
        pairs = zip(found["one"], found["three"], strict=True)
        found[f"{name}_ratio"] = [one[name] / three[name] for one, three in pairs]
    return found


def _commands(options: argparse.Namespace, folder: Path) -> dict[str, list[list[str]]]:
    """What is started: three recipes one after the other, and the one that does their work."""
    demonstrations, prompts, train, test = _texts(Path(options.data), folder, options.rows)
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
    sft = [sys.executable, "-c", SFT, options.model, str(demonstrations), str(folder / "sft.yaml"), str(folder / "sft")]
    reward = [sys.executable, str(ROOT / "recipes" / "reward_model.py"), f"--config={folder / 'reward.yaml'}"]
    reward += [f"--model_name_or_path={options.model}", f"--output_dir={folder / 'rm'}", f"--dataset_name={train}"]
    reward += [f"--dataset_test_name={test}", "--disable_tqdm=true"]
    tune = [sys.executable, str(ROOT / "recipes" / "ppo_max.py"), *ppo, f"--output_dir={folder / 'ppo'}"]
    tune += [f"--dataset_name={prompts}", f"--policy_adapter={folder / 'sft'}", f"--reward_adapter={folder / 'rm'}"]
    tune += ["--eval_on_start=false", "--eval_prompts=1"]
    one = [sys.executable, str(ROOT / "recipes" / "rlhf.py"), *ppo, f"--output_dir={folder / 'one'}", "--judge=none"]
    one += [f"--sft_dataset={demonstrations}", f"--preferences={train}", f"--preferences_test={test}"]
    one += [f"--prompts={prompts}", f"--sft_config={folder / 'sft.yaml'}", f"--reward_config={folder / 'reward.yaml'}"]
    return {"three": [sft, reward, tune], "one": [[*one, "--members=1", "--judged_prompts=1"]]}


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
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=300, help="of a round")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of PPO in a round, or of each stage")
    parser.add_argument("--prompts", type=int, default=500, help="answered to choose pairs from")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of PPO in the rounds, where it starts")
    parser.add_argument("--choose", default="information", help="how the pairs of a round are chosen")
    parser.add_argument("--repeats", type=int, default=2, help="of one process and of three, in turn")
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
