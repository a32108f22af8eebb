"""Four roles in one pass with rows of several adapters (PEFT's mixed batches) against a pass for each role.

    python tests/benchmarks/bench_passes.py                        # hidden 256, 4 layers, 32 sequences of 128 tokens
    python tests/benchmarks/bench_passes.py --load_in_4bit
    python tests/benchmarks/bench_passes.py --load_in_4bit --layers 1 --hidden 4096 --sequences 4 --length 256

What a mixed pass saves is reading, and in 4 bits dequantising, the base once for four roles instead of four times. So
does a pass over four times as many sequences of one role, which is as large; that is why both are measured, with
`--chunk` sequences at a time and with all. Prints the best of `--repeats`, alternating, and the largest difference of
the hidden states from those of separate passes. Random weights, seed 0.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def build(args: argparse.Namespace, folder: str) -> Any:
    """A model with four roles, each with an adapter of its own, on one base; in eval mode."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from trl_ext import Role, SharedBaseModel
    from trl_ext.roles import AdapterWeights, load_base, lora_config

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,  # 11008 for 4096, as Llama-2-7B
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    load = partial(load_base, folder, quantization_config=quantization, dtype=dtype)
    adapter = SharedBaseModel(load(), lora_config(r=16)).adapter_weights(Role.CRITIC)
    random = {name: torch.randn_like(weight) / 50 for name, weight in (adapter.weights or {}).items()}
    policy = AdapterWeights(adapter.config, random)
    reward = AdapterWeights(adapter.config, random, torch.randn(1, args.hidden) / args.hidden**0.5)
    return SharedBaseModel(load(), policy, reward).to(args.device).eval()


@contextmanager
def mixed(model: Any, names: list[str]) -> Iterator[None]:
    """Inside, row i of a batch is computed with adapter names[i]."""

    def name_rows(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"adapter_names": names}

    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    import torch

    from trl_ext import Role

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--chunk", type=int, help="sequences at a time; default: a quarter")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = build(args, folder)
    roles = (Role.POLICY, Role.REFERENCE, Role.CRITIC, Role.REWARD)
    ids = torch.randint(3, 512, (args.sequences, args.length), device=args.device)

    def states(part: Any) -> Any:
        return model.hidden_states(part, torch.ones_like(part))

    @torch.no_grad()
    def separate(size: int) -> Any:
        out = []
        for role in roles:
            with model.role(role):
                out.append(torch.cat([states(part) for part in ids.split(size)]))
        return torch.stack(out)

    @torch.no_grad()
    def together(size: int) -> Any:
        out = []
        for part in ids.split(size):
            with mixed(model, [role.adapter_name for role in roles for _ in part]):
                out.append(states(part.repeat(len(roles), 1)).view(len(roles), len(part), args.length, -1))
        return torch.cat(out, dim=1)

    chunk = args.chunk or args.sequences // 4
    variants = {
        f"a pass for each role, {chunk} sequences": partial(separate, chunk),
        f"a pass for each role, {args.sequences} sequences": partial(separate, args.sequences),
        f"four roles in a pass, {chunk} sequences": partial(together, chunk),
        f"four roles in a pass, {args.sequences} sequences": partial(together, args.sequences),
    }
    expected, best = separate(chunk), dict.fromkeys(variants, float("inf"))
    difference = {name: float((run() - expected).abs().max()) for name, run in variants.items()}
    for _ in range(args.repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    first = next(iter(best.values()))
    print("\n| | seconds | speed | largest difference |\n| --- | --- | --- | --- |")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.3f} | {first / seconds:.2f} | {difference[name]:.1e} |")


if __name__ == "__main__":
    main()
