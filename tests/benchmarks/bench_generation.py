"""Tokens per second of the rollout by each path of generation that a CPU can run.

    python tests/benchmarks/bench_generation.py

A Llama with random weights (hidden 256, 4 layers, vocabulary 2,048) under a `PPOMaxTrainer`, LoRA r=8 on all linear
layers, float32; 32 prompts of 16 to 64 tokens, completions of at most 256. Two workloads: nearly every completion is
cut at the limit, or each token ends it with probability 1/64 (64 tokens on average, as long as the limit once in 50).
The paths take turns over `--repeats`, after one call each that is not counted; the best counts.
"""

import argparse
import platform
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY, ROWS = 2048, 32
# Workload -> how many of the tokens end a completion; random weights sample all tokens about as often
WORKLOADS = {"all as long as the limit": 1, "64 tokens on average": VOCABULARY // 64}
PATHS = {
    "generate, all at once": {},
    "generate, 8 at a time": {"per_device_generate_batch_size": 8},
    "continuous batching": {"use_transformers_continuous_batching": True},
    "continuous batching, 8 at a time": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"max_requests_per_batch": 8},
    },
}


def make_trainer(ends: int, tokens: int, options: dict):
    """A trainer that will not train."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trl_ext import PPOMaxConfig, PPOMaxTrainer, SharedBaseModel
    from trl_ext.roles import lora_config

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.generation_config.eos_token_id = list(range(1, 1 + ends))
    draw = random.Random(0)
    rows = [
        " ".join(f"w{draw.randrange(ends + 2, VOCABULARY)}" for _ in range(draw.randint(16, 64))) for _ in range(ROWS)
    ]
    args = PPOMaxConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        max_completion_length=tokens,
        use_cpu=True,
        report_to=[],
        **options,
    )
    return PPOMaxTrainer(
        SharedBaseModel(base, lora_config(r=8)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="limit of a completion")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch
    import transformers
    import trl

    torch.set_num_threads(arguments.threads)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s), {versions}")
    for workload, ends in WORKLOADS.items():
        trainers = {name: make_trainer(ends, arguments.tokens, options) for name, options in PATHS.items()}
        best: dict[str, tuple[float, int]] = dict.fromkeys(trainers, (0.0, 0))
        for repeat in range(arguments.repeats + 1):
            for name, trainer in trainers.items():
                torch.manual_seed(repeat)
                started = time.perf_counter()
                _, completions, _ = trainer.complete(list(trainer.train_dataset["prompt"]))
                seconds = time.perf_counter() - started
                count = sum(map(len, completions))
                if repeat:
                    best[name] = max(best[name], (count / seconds, count))
        print(f"\n{workload}, best of {arguments.repeats}:")
        first = best[next(iter(PATHS))][0]
        for name, (speed, count) in best.items():
            print(f"  {name:34s} {speed:7.0f} tokens/s  {speed / first:5.2f} times  ({count} tokens)", flush=True)
    print(f"\npeak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
