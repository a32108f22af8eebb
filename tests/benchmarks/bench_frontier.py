"""How much reward any policy can get at a KL from the model, measured from samples of the model alone.

    python tests/benchmarks/bench_frontier.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function

Of all policies with the same KL from p, the one that tilts it, p(y) exp(t r(y)) / Z, has the highest mean reward
(Rafailov et al. 2023, arXiv 2305.18290, appendix A.1). With y sampled from p, its mean reward and its KL are weighted
means:

    w_i = exp(t r_i) / sum_j exp(t r_j)        reward = sum_i w_i r_i        KL = sum_i w_i log(N w_i)

Both are means over the prompts. Few samples carry the weight when t is large: the effective number, 1 / sum w^2, is
printed, and rows below `MIN_EFFECTIVE` are left out. Beyond them the line goes on as reward gained per sqrt(KL), which
is constant for rewards with a normal distribution and was found to be nearly so here.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

MIN_EFFECTIVE = 30
TILTS = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28)


def rewards_of_samples(args: argparse.Namespace) -> Any:
    """(prompts, samples) rewards of completions sampled at temperature 1."""
    import torch
    from bench_learning import LENGTH
    from methods import load_prompts, load_reward
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows, reward = load_prompts({"prompts": args.prompts}), load_reward(args.reward)
    chosen = rows["prompt"][:: len(rows) // args.number][: args.number]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    scores: list[list[float]] = [[] for _ in chosen]
    bar = tqdm(total=len(chosen) * args.samples, desc="sampling")
    for prompt, row in zip(chosen, scores, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        while len(row) < args.samples:
            copies = ids.repeat(min(args.batch, args.samples - len(row)), 1)
            out = model.generate(
                copies,
                attention_mask=torch.ones_like(copies),
                max_new_tokens=LENGTH,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
            row += reward(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
            bar.update(len(copies))
    return torch.tensor(scores, dtype=torch.float64)


def frontier(rewards: Any) -> list[dict[str, float]]:
    """Reward and KL of the tilted policies; `rewards` is (prompts, samples)."""
    start = float(rewards.mean())
    points = []
    for tilt in TILTS:
        log_w = (tilt * rewards).log_softmax(1)
        w = log_w.exp()
        effective = float((1 / w.square().sum(1)).mean())
        if effective < MIN_EFFECTIVE:
            break
        kl = float((w * (log_w + math.log(rewards.shape[1]))).sum(1).mean())
        reward = float((w * rewards).sum(1).mean())
        gain = (reward - start) / math.sqrt(kl)
        points.append({"tilt": tilt, "kl": kl, "reward": reward, "gain": gain, "effective": effective})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reward", required=True, help="file.py:function")
    parser.add_argument("--number", type=int, default=8, help="prompts, spread over the file")
    parser.add_argument("--samples", type=int, default=6000, help="of each prompt")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("frontier.json"))
    args = parser.parse_args()
    rewards = rewards_of_samples(args)
    points = frontier(rewards)
    start, spread = float(rewards.mean()), float(rewards.std(1).mean())
    print(f"untuned model: mean reward {start:.3f}, standard deviation within a prompt {spread:.3f}\n")
    print("| KL | best mean reward | reward gained / sqrt(KL) | effective samples |\n| --- | --- | --- | --- |")
    for point in points:
        print("| {kl:.2f} | {reward:.3f} | {gain:.3f} | {effective:.0f} |".format(**point))
    args.output.write_text(json.dumps({"start": start, "gain": points[-1]["gain"], "points": points}, indent=1))


if __name__ == "__main__":
    main()
