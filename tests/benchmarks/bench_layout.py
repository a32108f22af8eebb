"""What two optimisations gain: folded LoRA products on a CPU; cuts of rows into parts, beside one part and the best.

    python tests/benchmarks/bench_layout.py                  # the model and the sizes of bench_ppo.py
    python tests/benchmarks/bench_layout.py --varied         # prompts of 8 to 120 tokens, responses of 8 to 64
    python tests/benchmarks/bench_layout.py --hidden 64      # the size of the embedded world

One iteration of PPO's passes: a batch of 32 scored by four roles, 16 at a time, then policy and critic forward and
backward over it twice in micro-batches of 8. Variants alternate in one process, and process CPU time is compared pair
by pair, because the wall clock of a shared machine says little. The first round is not counted. Random weights, seed 0.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
BATCH, SCORED, TRAINED, PASSES = 32, 16, 8, 2


def build(hidden: int, layers: int, vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl_ext.roles import AdapterWeights, Role, SharedBaseModel, lora_config

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    reward = SharedBaseModel(LlamaForCausalLM(config), lora_config(r=8)).adapter_weights(Role.CRITIC)
    head = torch.randn(1, hidden) / hidden**0.5
    reward = AdapterWeights(reward.config, reward.weights, head)
    policy = AdapterWeights(reward.config, reward.weights)
    return SharedBaseModel(LlamaForCausalLM(config), policy, reward)


def sequences(vocabulary: int, varied: bool, batches: int) -> list[tuple[list[list[int]], list[int]]]:
    """Sequences and the starts of their responses, for each batch."""
    import random

    generator, found = random.Random(0), []
    for _ in range(batches):
        starts = [generator.randint(8, 120) if varied else 64 for _ in range(BATCH)]
        lengths = [start + (generator.randint(8, 64) if varied else 64) for start in starts]
        rows = [[generator.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
        found.append((rows, starts))
    return found


def iteration(model: Any, rows: list[list[int]], starts: list[int]) -> None:
    import torch

    from trl_ext import Role
    from trl_ext.ops.packing import pack

    def parts(first: int, count: int) -> Any:
        chosen = slice(first, first + count)
        return pack([[ids] for ids in rows[chosen]], [[start] for start in starts[chosen]], 0)

    model.eval()
    with torch.no_grad():
        for first in range(0, BATCH, SCORED):
            batch = parts(first, SCORED)
            model(parts=batch, roles=(Role.POLICY, Role.REFERENCE, Role.CRITIC), entropy="values")
            model.score_parts(batch)
    model.train()
    for _ in range(PASSES):
        for first in range(0, BATCH, TRAINED):
            outputs = model(parts=parts(first, TRAINED), roles=(Role.POLICY, Role.CRITIC), entropy="values")
            (outputs["logps"].sum() + outputs["values"].sum()).backward()
        model.zero_grad()


def alternating(variants: dict[str, Callable[[], None]], run: Callable[[int], None], rounds: int) -> None:
    """Print the median CPU seconds of each variant, and of their ratios to the first in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name in sorted(variants, reverse=bool(i % 2)):
            variants[name]()
            start = time.process_time()
            run(i)
            seconds[name].append(time.process_time() - start)
    first = next(iter(variants))
    print(flush=True)
    print(f"| variant | CPU seconds | of {first} | 10 % to 90 % |\n| --- | --- | --- | --- |")
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values[1:], seconds[first][1:], strict=True))
        tenth = len(ratios) // 10
        spread = f"{ratios[tenth]:.3f} to {ratios[-1 - tenth]:.3f}"
        print(f"| {name} | {statistics.median(values[1:]):.3f} | {statistics.median(ratios):.3f} | {spread} |")


def fewest_tokens(widths: list[int], max_tokens: int | None) -> list[int]:
    """The best cuts that there are, by a dynamic program over the rows."""
    from trl_ext.ops.packing import PART_OVERHEAD

    best, cut = [0], [0]
    for stop in range(1, len(widths) + 1):
        width = widths[stop - 1]
        first = 0 if max_tokens is None else max(stop - max(max_tokens // width, 1), 0)
        costs = [best[start] + (stop - start) * width + PART_OVERHEAD for start in range(first, stop)]
        best.append(min(costs))
        cut.append(first + costs.index(best[-1]))
    starts, stop = [], len(widths)
    while stop > 0:
        stop = cut[stop]
        starts.append(stop)
    return starts[::-1]


def main() -> None:
    import torch

    from trl_ext.ops import packing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--varied", action="store_true")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["folding", "cuts"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args.hidden, args.layers, args.vocabulary)
    data = sequences(args.vocabulary, args.varied, args.rounds + 1)

    layers = [layer for layer in model.lora_layers if "forward" in vars(layer)]
    forwards = [vars(layer)["forward"] for layer in layers]

    def fold(on: bool) -> None:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer).pop("forward", None)
            if on:
                layer.forward = forward

    if layers and args.only != "cuts":
        alternating(
            {"PEFT's products": lambda: fold(False), "folded": lambda: fold(True)},
            lambda i: iteration(model, *data[i]),
            args.rounds,
        )

    if args.only == "folding":
        return
    rules: dict[str, Any] = {
        "one part": lambda widths, max_tokens: [0],
        "cuts that save most": packing._cuts,
        "fewest tokens": fewest_tokens,
    }

    def cut(name: str) -> None:
        packing._cuts = rules[name]

    tokens = dict.fromkeys(rules, 0)
    for name in rules:
        cut(name)
        for rows, starts in data:
            for size in (SCORED, TRAINED):
                for i in range(0, BATCH, size):
                    parts = packing.pack([[r] for r in rows[i : i + size]], [[s] for s in starts[i : i + size]], 0)
                    tokens[name] += sum(part.input_ids.numel() + packing.PART_OVERHEAD for part in parts)
    print("\ntokens, padding and 256 a part: " + ", ".join(f"{name} {count}" for name, count in tokens.items()))
    alternating({n: (lambda n=n: cut(n)) for n in rules}, lambda i: iteration(model, *data[i]), args.rounds)


if __name__ == "__main__":
    main()
