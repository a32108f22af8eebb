"""How much reward any policy can get at a KL from the model, measured from samples of the model alone.

    python tests/benchmarks/bench_frontier.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function
    python tests/benchmarks/bench_frontier.py --number 32 --samples 1000      # the embedded world and its reward role

Of all policies with the same KL from p, the one that tilts it, p(y) exp(t r(y)) / Z, has the highest mean reward
(Rafailov et al. 2023, arXiv 2305.18290, appendix A.1). With y sampled from p, its mean reward and its KL are weighted
means:

    w_i = exp(t r_i) / sum_j exp(t r_j)        reward = sum_i w_i r_i        KL = sum_i w_i log(N w_i)

Both are means over the prompts. Few samples carry the weight when t is large: the effective number, 1 / sum w^2, is
printed, and rows below `MIN_EFFECTIVE` are left out. Beyond them the line goes on as reward gained per sqrt(KL), which
is constant for rewards with a normal distribution and was found to be nearly so here. Diversity is distinct-2 of 32
completions drawn with these weights, over that of 32 drawn without: what the reward itself costs.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from methods import BATCH, distinct_2, load_prompts, load_reward

MIN_EFFECTIVE = 30
TILTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28)


def sampler(args: argparse.Namespace) -> tuple[Any, Any, list[str], Any, int]:
    """Model, tokenizer, prompts, reward of (prompt, completions), and the longest completion."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if args.model is not None:
        reward = load_reward(args.reward)
        rows = load_prompts({"prompts": args.prompts})
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        return model, AutoTokenizer.from_pretrained(args.model), rows["prompt"], lambda _, texts: reward(texts), 64

    import torch
    from peft import PeftModel

    from trl_ext.toy import build_world

    world = build_world(args.output.parent / f"world-{args.seed}", args.seed)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    scorer = AutoModelForSequenceClassification.from_pretrained(world.base, num_labels=1)
    scorer = PeftModel.from_pretrained(scorer, world.reward_adapter).eval()
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), world.policy_adapter).eval()

    def score(prompt: str, texts: list[str]) -> list[float]:
        whole = [f"{prompt} {text.strip()}<eos>" for text in texts]
        batch = tokenizer(whole, return_tensors="pt", padding=True, padding_side="right")
        with torch.no_grad():
            return scorer(**batch).logits[:, 0].tolist()

    return policy, tokenizer, world.train_prompts["prompt"], score, 40


def samples(args: argparse.Namespace) -> tuple[Any, list[list[str]]]:
    """(prompts, samples) rewards of completions sampled at temperature 1, and the completions."""
    import torch
    from tqdm.auto import tqdm

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model, tokenizer, prompts, reward, length = sampler(args)
    chosen = prompts[:: len(prompts) // args.number][: args.number]
    scores: list[list[float]] = [[] for _ in chosen]
    texts: list[list[str]] = [[] for _ in chosen]
    bar = tqdm(total=len(chosen) * args.samples, desc="sampling")
    for prompt, row, kept in zip(chosen, scores, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        while len(row) < args.samples:
            copies = ids.repeat(min(args.batch, args.samples - len(row)), 1)
            out = model.generate(
                input_ids=copies,
                attention_mask=torch.ones_like(copies),
                max_new_tokens=length,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
            new = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            kept += new
            row += reward(prompt, new)
            bar.update(len(copies))
    return torch.tensor(scores, dtype=torch.float64), texts


def diversity(weights: Any, texts: list[list[str]], seed: int) -> float:
    """Distinct-2 of 32 completions drawn with the weights, the mean of 20 draws."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    each = max(BATCH // len(texts), 1)
    drawn = [torch.multinomial(weights, each, replacement=True, generator=generator).tolist() for _ in range(20)]
    return sum(
        distinct_2([row[i] for row, chosen in zip(texts, draw, strict=True) for i in chosen]) for draw in drawn
    ) / len(drawn)


def frontier(rewards: Any, texts: list[list[str]], seed: int) -> list[dict[str, float]]:
    """Reward, KL and diversity of the tilted policies; `rewards` is (prompts, samples)."""
    start, diverse = float(rewards.mean()), diversity((0 * rewards).softmax(1), texts, seed)
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
        points[-1]["diversity"] = diversity(w, texts, seed) / diverse
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded world")
    parser.add_argument("--prompts")
    parser.add_argument("--reward", help="file.py:function")
    parser.add_argument("--number", type=int, default=8, help="prompts, spread over the file")
    parser.add_argument("--samples", type=int, default=6000, help="of each prompt")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("frontier.json"))
    args = parser.parse_args()
    rewards, texts = samples(args)
    points = frontier(rewards, texts, args.seed)
    start, spread = float(rewards.mean()), float(rewards.std(1).mean())
    print(f"untuned model: mean reward {start:.3f}, standard deviation within a prompt {spread:.3f}\n")
    print("| KL | best mean reward | reward gained / sqrt(KL) | diversity | effective samples |")
    print("| --- | --- | --- | --- | --- |")
    for point in points:
        print("| {kl:.2f} | {reward:.3f} | {gain:.3f} | {diversity:.2f} | {effective:.0f} |".format(**point))
    args.output.write_text(json.dumps({"start": start, "gain": points[-1]["gain"], "points": points}, indent=1))


if __name__ == "__main__":
    main()
