"""A run of PPO-Max that no model made, from random numbers."""

import math
import random
from pathlib import Path

from trl_ext.report.lines import JsonLines, as_json
from trl_ext.report.samples import keyed

HOSTILE = (
    "</script><script>document.title='taken'</script> [INST] {{ 7*7 }} \u202e\u2028 a\x00b & "
    "<img src=x onerror=alert(1)> ``` | $x_1$"
)


def write_run(folder: Path, steps: int = 200, prompts: int = 40, seed: int = 0, hostile: bool = False) -> Path:
    """A folder as a run of PPO-Max leaves it, from random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    lines = []
    for i in range(steps):
        t = i / steps
        kl = 6 * (1 - math.exp(-4 * t)) + draw.gauss(0, 0.3) * (t > 0.02)
        line = {
            "entry": i,
            "step": i + 1,
            "time": 1.7e9 + i,
            "reward": 1.5 * (1 - math.exp(-3 * t)) + draw.gauss(0, 0.1),
            "kl": abs(kl),
            "beta": 0.05 + 0.05 * t + draw.gauss(0, 0.002),
            "update_kl": 0.19 * (1 - t) + abs(draw.gauss(0, 0.02)),
            "entropy": 2.1 - 0.4 * t + draw.gauss(0, 0.04),
            "completions/mean_length": 30 + 12 * t + draw.gauss(0, 1.5),
            "completions/truncated_ratio": abs(draw.gauss(0.06, 0.02)),
            "completions/distinct_2": 0.8 - 0.06 * t + draw.gauss(0, 0.01),
            "perplexity": 8 - 2 * t + draw.gauss(0, 0.2),
            "perplexity_reference": 8 + 3 * t + draw.gauss(0, 0.3),
            "explained_variance": 0.65 * (1 - math.exp(-6 * t)) + draw.gauss(0, 0.05),
            "policy_loss": draw.gauss(-0.01, 0.01),
            "value_loss": 0.4 * math.exp(-2 * t) + abs(draw.gauss(0, 0.03)),
            "clip_fraction/policy": abs(draw.gauss(0.03, 0.01)),
            "clip_fraction/value": abs(draw.gauss(0.08, 0.03)),
            "rewards/reward_role/mean": 1.4 * (1 - math.exp(-3 * t)),
            "rewards/gold_reward/mean": 0.9 * (1 - math.exp(-3 * t)) - 0.3 * t,
            "learning_rate/policy": 1e-4 * (1 - t),
            "learning_rate/critic": 3e-4 * (1 - t),
            "grad_norm/policy": abs(draw.gauss(0.4, 0.1)),
            "grad_norm/critic": abs(draw.gauss(1.1, 0.4)),
            "seconds/generate": abs(draw.gauss(11, 0.6)),
            "seconds/score": abs(draw.gauss(2.5, 0.2)),
            "seconds/update": abs(draw.gauss(7, 0.4)),
            "peak_memory_gib": 15.2 + 2 * min(t * 10, 1),
            "memory/predicted_gib": 18.1,
        }
        if i == steps // 3:
            seen = HOSTILE if hostile else "KL 10.9, its target 6"
            line["alarms"] = [
                {"step": i + 1, "alarm": "kl_high", "seen": seen, "act": None, "means": "a reward too strong"}
            ]
        if i == steps // 2:
            line["alarms"] = [{"step": i + 1, "alarm": "repetition", "seen": "distinct-2 0.4", "act": "raise_beta"}]
        lines.append(line)
    JsonLines(folder / "metrics.jsonl").begin(lines)
    samples = JsonLines(folder / "samples.jsonl")
    samples.begin([])
    for step in (0, steps // 2, steps):
        rows = []
        for i in range(prompts if step in (0, steps) else 8):
            words = " ".join(
                draw.choice(["the", "cat", "sat", "on", "a", "warm", "mat", "and", "slept"]) for _ in range(40)
            )
            rows.append(
                {
                    "prompt": HOSTILE if hostile and i == 0 else f"Tell me a story about animal number {i}.",
                    "completion": f"{HOSTILE} {words}" if hostile else words,
                    "reward": draw.gauss(1.4 * step / steps, 0.5),
                    "rewards": {"reward_role": draw.gauss(step / steps, 0.5), "gold_reward": draw.gauss(0, 0.4)},
                    "tokens": 40,
                    "nll": abs(draw.gauss(80, 5)),
                    "reference_nll": abs(draw.gauss(80 + 6 * step / steps, 5)),
                    "kl": draw.gauss(6 * step / steps, 1),
                    "truncated": draw.random() < 0.1,
                }
            )
        samples.append([{"kind": "evaluation", "step": step, "part": len(rows) == 8, **row} for row in keyed(rows)])
    training = {"kind": "training", "step": 4, "prompt": "A prompt", "completion": HOSTILE if hostile else "text"}
    samples.append([training | {"reward": 0.3, "kl": 1.0, "tokens": 5}])
    info = {
        "format": 1,
        "method": "PPO-Max",
        "command": f"python ppo_max.py {HOSTILE}" if hostile else "python recipes/ppo_max.py --config qlora_8b.yaml",
        "base": "someone/base-1b",
        "seed": seed,
        "outcome": "finished",
        "why": None,
        "started": "2026-01-31T10:00:00+00:00",
        "ended": "2026-01-31T14:20:00+00:00",
        "steps": {"planned": steps, "done": steps},
        "sessions": [
            {"started": "2026-01-31T10:00:00+00:00", "ended": "2026-01-31T14:20:00+00:00", "from_step": 0,
             "to_step": steps, "outcome": "finished"}
        ],
        "identity": {"rows of train_dataset": 5000, "reward_funcs": [HOSTILE if hostile else "gold_reward 12ab"]},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "hardware": {"device": "cuda", "card": "A card", "processes": 1, "cpu_cores": 8},
        "memory": {"planned_gib": 18.1, "measured_gib": 17.2},
        "configuration": {"beta": 0.05, "kl_control": "pi", "kl_target": 6.0, "update_kl_target": 0.1875,
                          "max_completion_length": 64, "learning_rate": 2e-4, "seed": seed, "run_name": None,
                          "critic_learning_rate": 6e-4, "reward_weights": [0.0]},
        "defaults": {"beta": 0.05, "kl_control": "pi", "kl_target": 6.0, "update_kl_target": None,
                     "max_completion_length": 256, "learning_rate": 1e-4, "seed": 42, "run_name": None,
                     "critic_learning_rate": None},
        "best_policy": {"step": float(steps - steps // 10), "reward": 1.4, "kl": 6.0},
    }  # fmt: skip
    (folder / "run.json").write_text(as_json(info))
    return folder
