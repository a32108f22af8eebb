"""Labels that choosing saves on real preferences: chosen against random, with reward models that cost seconds.

    python tests/benchmarks/bench_labels_hh.py --output_dir runs/labels_hh --model MODEL --data HH_FOLDER

Pairs and labels are HH's. A reward model is a linear head on what the frozen base makes of an answer: the hidden states
of its last token, and their mean over the answer, each column with mean 0 and variance 1; Bradley-Terry loss with an
L2 penalty. That is less than LoRA learns, but states are computed once, and then hundreds of ensembles cost seconds:
what it takes to see differences of a point. Members are trained on resampled labels, their mean is tested.
For each seed other pairs are held out, by prompt; every arm begins with the same random pairs.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
METHODS = ("random", "information", "different")


def states(options: argparse.Namespace, path: Path) -> tuple[list[dict[str, Any]], Any, Any]:
    """All pairs, (N, 2, D) of what the base makes of the chosen and the rejected answer, and how long they are."""
    import numpy as np
    import torch

    from trl_ext import RewardModelConfig
    from trl_ext.data import load_preferences
    from trl_ext.reward.data import tokenize_preferences
    from trl_ext.roles import load_base
    from trl_ext.text import TextEncoder, load_tokenizer

    rows = [row for name in ("train", "test") for row in load_preferences(options.data / f"{name}_256tok.jsonl.gz")[0]]
    rows = random.Random(0).sample(rows, min(options.pairs, len(rows)))
    if path.is_file():
        kept = np.load(path)
        return [rows[i] for i in kept["row"]], kept["states"], kept["lengths"]
    from datasets import Dataset

    encoder = TextEncoder(load_tokenizer(str(options.model)))
    args = RewardModelConfig("unused", max_length=256, use_cpu=True, bf16=False)
    tokenized, _ = tokenize_preferences(Dataset.from_list(rows), encoder, args, "dataset")
    texts = [ids for name in ("chosen_ids", "rejected_ids") for ids in tokenized[name]]
    begins = [*tokenized["prompt_length"], *tokenized["prompt_length"]]
    base = load_base(str(options.model), dtype="float32").eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Any] = [None] * len(texts)
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        width = max(len(texts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for k, i in enumerate(batch):
            ids[k, : len(texts[i])], mask[k, : len(texts[i])] = torch.tensor(texts[i]), 1
        with torch.no_grad():
            hidden = base.base_model(ids, attention_mask=mask).last_hidden_state
        for k, i in enumerate(batch):
            own = hidden[k, begins[i] : len(texts[i])]
            found[i] = torch.cat([own[-1], own.mean(0)]).numpy()
    table = np.stack(found)
    table = ((table - table.mean(0)) / table.std(0)).reshape(2, len(tokenized), -1).swapaxes(0, 1)
    lengths = np.array([len(ids) for ids in texts]).reshape(2, -1).T
    np.savez(path, row=tokenized["row"], states=table, lengths=lengths)
    return [rows[i] for i in tokenized["row"]], table, lengths


def fit(leads: Any, penalty: float) -> Any:
    """The head w that minimises sum log(1 + exp(-leads w)) + penalty/2 |w|^2, by Newton's method."""
    import numpy as np

    w = np.zeros(leads.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(leads @ w))
        slope = penalty * w - leads.T @ p
        curve = leads.T @ (leads * (p * (1 - p))[:, None]) + penalty * np.eye(len(w))
        step = np.linalg.solve(curve, slope)
        w = w - step
        if abs(step).max() < 1e-6:
            break
    return w


def curve(
    method: str, seed: int, options: argparse.Namespace, rows: list[dict[str, Any]], table: Any, kept: dict[str, Any]
) -> None:
    """Accuracies of one arm at each number of labels, into `kept`."""
    import numpy as np

    from trl_ext.feedback import choose
    from trl_ext.scripts.held_out import prompt_key

    rng = np.random.default_rng(seed)
    keys = [prompt_key(row["prompt"]) for row in rows]
    shuffled = rng.permutation(sorted(set(keys)))
    held = set(shuffled[: round(options.held * len(shuffled))].tolist())
    test, pool = ([i for i, key in enumerate(keys) if (key in held) is side] for side in (True, False))
    leads = table[:, 0] - table[:, 1]
    texts = [
        {"prompt": rows[i]["prompt"], "responses": [said(rows[i]["chosen"]), said(rows[i]["rejected"])]} for i in pool
    ]
    candidates, _ = choose.make_candidates(texts)
    first = choose.choose_pairs(candidates, options.sizes[0], None, method="random", seed=seed)
    row_of = {c.pair.id: pool[c.prompt] for c in candidates}
    labelled = [row_of[choice.pair.id] for choice in first]
    for count, following in zip(options.sizes, [*options.sizes[1:], None], strict=True):
        drawn = [rng.choice(labelled, len(labelled)) for _ in range(options.members)]
        heads = np.stack([fit(leads[own], options.penalty) for own in drawn])
        kept[f"{method}-{seed}-{count}"] = float((leads[test] @ heads.mean(0) > 0).mean())
        if following is None:
            return
        left = [c for c in candidates if row_of[c.pair.id] not in set(labelled)]
        values = None
        if method == "information":
            values = choose.information_gain(heads @ leads[[row_of[c.pair.id] for c in left]].T)
        elif method == "different":
            values = choose.difference_values(left)
        share = {} if values is None else {"random_share": 0.0}
        more = choose.choose_pairs(left, following - count, values, method=method, seed=seed + count, **share)
        labelled += [row_of[choice.pair.id] for choice in more]


def said(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def summary(kept: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Mean curves; of the difference to random, seed by seed, its standard error; labels for the accuracy of random."""
    import numpy as np
    from bench_labels import needed

    curves = {
        method: np.array([[kept[f"{method}-{s}-{n}"] for n in options.sizes] for s in range(options.seeds)])
        for method in METHODS
    }
    found: dict[str, Any] = {"sizes": options.sizes}
    mean = curves["random"].mean(0).tolist()
    for method, table in curves.items():
        lead = table - curves["random"]
        found[method] = {"mean": table.mean(0).tolist(), "std": table.std(0, ddof=1).tolist()}
        if method != "random":
            found[method]["lead"] = lead.mean(0).tolist()
            found[method]["lead_error"] = (lead.std(0, ddof=1) / len(lead) ** 0.5).tolist()
            own = table.mean(0).tolist()
            pairs = zip(options.sizes, mean, strict=True)
            found[method]["share_of_labels"] = [needed(options.sizes, own, target) / n for n, target in pairs]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/labels_hh"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train_256tok.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=1600, help="of both files, drawn at random")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 768])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--penalty", type=float, default=100.0)
    parser.add_argument("--held", type=float, default=0.3, help="share of the prompts that are tested on")
    options = parser.parse_args()
    import torch
    from bench_labels import picture

    torch.set_num_threads(1)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    rows, table, lengths = states(options, options.output_dir / "states.npz")
    kept: dict[str, Any] = {}
    for seed in range(options.seeds):
        for method in METHODS:
            curve(method, seed, options, rows, table, kept)
    (options.output_dir / "results.json").write_text(json.dumps(kept, indent=1))
    found = summary(kept, options)
    found_pairs = {"pairs": len(rows), "longer_is_chosen": float((lengths[:, 0] > lengths[:, 1]).mean())}
    (options.output_dir / "summary.json").write_text(json.dumps(found | found_pairs, indent=1))
    picture(found, options.output_dir / "labels_saved_hh.png", "Anthropic HH, helpful")
    print(json.dumps(found | found_pairs, indent=1), f"\n{time.process_time() - begun:.0f} s of processor time")


if __name__ == "__main__":
    main()
