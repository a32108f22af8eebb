"""PPO-Max against TRL 1.12's PPOTrainer, the last one: samples per second and peak resident memory, in one run.

    python tests/benchmarks/bench_ppo.py

Same work for both: a Llama with random weights (hidden 256, 4 layers, vocabulary 8,192), prompts of 64 tokens
(`--varied`: of 8 to 120), responses of 64, batches of 32, 2 passes over each batch in micro-batches of `--micro_batch`,
LoRA r=8 on all linear layers of the policy, float32, no gradient checkpointing. TRL's value model is a full model of
its own, as its trainer wants it; ours is an adapter. TRL 1.12 is installed into a virtual environment of its own
(`--trl_env`, made if missing). Each trainer runs in a process of its own; the first batch is not timed; the order
alternates over `--repeats`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PROMPT, RESPONSE, BATCH, PASSES, VOCABULARY = 64, 64, 32, 2, 8192
SHORTEST, LONGEST = 8, 120
MIB = 2**20


def build(folder: Path) -> None:
    """Base, reward and value model, and a tokenizer, with random weights from seed 0."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(3, VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        num_labels=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    fast.save_pretrained(folder / "base")


def prompts(count: int, varied: bool):
    """Prompts of exactly PROMPT words, or of SHORTEST to LONGEST, as many on average."""
    import random

    from datasets import Dataset

    generator = random.Random(0)
    lengths = [generator.randint(SHORTEST, LONGEST) if varied else PROMPT for _ in range(count)]
    rows = [" ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(length)) for length in lengths]
    return Dataset.from_dict({"prompt": rows})


def report(timed_batches: int, seconds: float, **more) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    figures = {
        "samples_per_second": timed_batches * BATCH / seconds,
        "peak_mib": peak,
        **more,
    }
    print("RESULT " + json.dumps(figures))


def run_ours(folder: Path, batches: int, micro_batch: int, varied: bool) -> None:
    import torch
    from transformers import TrainerCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer, Role, SharedBaseModel
    from trl_ext.roles import AdapterWeights, load_base, lora_config

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == PASSES:
                self.started = time.perf_counter()

    base = load_base(str(folder / "base"))
    reward = SharedBaseModel(base, lora_config(r=8)).adapter_weights(Role.CRITIC)  # random reward role, same shape
    base = load_base(str(folder / "base"))
    head = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) / 16
    model = SharedBaseModel(base, lora_config(r=8), AdapterWeights(reward.config, reward.weights, head))
    args = PPOMaxConfig(
        str(folder / "ours"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        num_iterations=PASSES,
        max_completion_length=RESPONSE,
        max_steps=PASSES * (batches + 1),
        critic_warmup_steps=0,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=PASSES,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = PPOMaxTrainer(model, args=args, train_dataset=prompts(BATCH * (batches + 1), varied), callbacks=[clock])
    trainer.train()
    seconds = time.perf_counter() - clock.started
    phases = {}
    for phase in ("generate", "score", "update"):
        values = [e[f"seconds/{phase}"] for e in trainer.state.log_history if f"seconds/{phase}" in e][1:]
        phases[phase] = sum(values) / max(len(values), 1)
    report(batches, seconds, seconds_per_batch=phases)


def run_trl(folder: Path, batches: int, micro_batch: int, varied: bool) -> None:
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        started, stopped, seen = 0.0, 0.0, 0

        def on_step_end(self, args, state, control, **kwargs):
            self.seen += 1
            if self.seen == 1:
                self.started = time.perf_counter()
            self.stopped = time.perf_counter()

    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    dataset = prompts(BATCH * (batches + 1), varied).map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns="prompt"
    )
    args = PPOConfig(
        str(folder / "trl"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        num_mini_batches=1,
        local_rollout_forward_batch_size=micro_batch,
        num_ppo_epochs=PASSES,
        response_length=RESPONSE,
        temperature=1.0,
        total_episodes=BATCH * (batches + 1),
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32"),
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype="float32"),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype="float32"),
        train_dataset=dataset,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    report(batches, clock.stopped - clock.started)


def child(python: str, what: str, folder: Path, args: argparse.Namespace) -> dict:
    """Run one side in a process of its own and read its figures."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "OMP_NUM_THREADS": str(args.threads),
        "CUDA_VISIBLE_DEVICES": "",
    }
    if what == "ours":
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [python, __file__, "--child", what, "--folder", str(folder)]
    command += ["--batches", str(args.batches), "--micro_batch", str(args.micro_batch)]
    command += ["--varied"] if args.varied else []
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not lines:
        raise RuntimeError(f"{what} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def trl_python(folder: Path) -> str:
    """The python of a virtual environment with TRL 1.12, made if missing, with the torch of this one."""
    python = folder / "bin" / "python"
    if not python.exists():
        from importlib.metadata import version

        venv.create(folder, with_pip=True)
        pins = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "peft", "accelerate")]
        subprocess.run([python, "-m", "pip", "install", "-q", pins[0]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "trl==1.12.0", *pins], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6, help="timed batches of 32 samples")
    parser.add_argument("--varied", action="store_true", help="prompts of 8 to 120 tokens instead of 64 each")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=["ours", "trl"])
    parser.add_argument("--trl_env", type=Path, default=Path.home() / ".cache" / "trl_ext" / "trl-1.12")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        {"ours": run_ours, "trl": run_trl}[args.child](args.folder, args.batches, args.micro_batch, args.varied)
        return

    pythons = {"ours": sys.executable}
    if args.only != "ours":
        pythons["trl"] = trl_python(args.trl_env)
    if args.only == "trl":
        del pythons["ours"]
    results: dict[str, list[dict]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for repeat in range(args.repeats):
            for name in sorted(pythons, reverse=bool(repeat % 2)):
                results[name].append(child(pythons[name], name, Path(folder), args))
                print(f"{name:5s} {json.dumps(results[name][-1])}", flush=True)
    import torch

    print(f"\n{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, seed 0")
    best = {name: max(r["samples_per_second"] for r in rows) for name, rows in results.items()}
    peak = {name: max(r["peak_mib"] for r in rows) for name, rows in results.items()}
    for name in pythons:
        print(f"{name:5s} best of {args.repeats}: {best[name]:.2f} samples/s, peak {peak[name]:.0f} MiB")
    if len(pythons) == 2:
        ratios = best["ours"] / best["trl"], peak["ours"] / peak["trl"]
        print(f"ours / TRL 1.12: {ratios[0]:.2f} times the samples/s, {ratios[1]:.2f} of the memory")


if __name__ == "__main__":
    main()
