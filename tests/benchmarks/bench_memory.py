"""Whole PPO-Max iterations of a 7B or 8B shape under a cap on device memory, beside TRL 1.12's PPOTrainer.

    python tests/benchmarks/bench_memory.py --shape llama-3.1-8b --cap 24 16 12 8
    python tests/benchmarks/bench_memory.py --shape tiny --device cpu
    python tests/benchmarks/bench_memory.py --shape llama-2-7b --device cpu --resident

Models of the shape of Llama-2-7B, Llama-3.1-8B, Qwen2.5-7B and Llama-3.2-1B, with random weights: built on the meta
device, then filled and quantised (NF4, double) one layer at a time on the device. Nothing is downloaded and the model
is never there in 16 bits. Four roles, LoRA r=16 on all linear layers, prompts and responses of 512 tokens, one rollout
batch of `--rollout` sequences, `--passes` passes in micro-batches that the memory plan chooses for the cap. Printed for
each phase: the peak of PyTorch's allocator and the plan's prediction, seconds, tokens per second. `--trl_env` holds TRL
1.12 (made if missing): the same work with its four models, each of them in 4 bits. Each run is a process of its own; a
run that the cap stops says so and the next goes on.

The part for CUDA has not been run yet: no card was at hand. On a CPU there is no cap, and peaks are those of tensors
allocated in the phase beyond what was resident when it began, plus that, as counted by `trl_ext.memory.LiveBytes`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from bench_ppo import trl_python

ROPE = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
SHAPES = {
    "llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, ROPE),
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, ROPE),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, ROPE),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, ROPE | {"tie_word_embeddings": True}),
    "tiny": ("llama", 512, 64, 128, 3, 4, 2, ROPE),
}
GIB = 2**30


def make_config(shape: str):
    """The configuration of a shape; token 0 pads, 1 ends."""
    from transformers import AutoConfig

    kind, vocabulary, hidden, intermediate, layers, heads, kv_heads, more = SHAPES[shape]
    return AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        **more,
    )


def build(shape: str, device: str, seed: int = 0, auto_class: str = "AutoModelForCausalLM", **options):
    """A model with random weights, quantised to NF4 layer by layer on the device."""
    import bitsandbytes as bnb
    import torch
    import transformers
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    config = make_config(shape)
    for name, value in options.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    skip = {*get_keys_to_not_convert(model), "score"}

    def random(tensor):
        data = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        return data.fill_(1.0) if tensor.ndim == 1 else data.normal_(0, 0.02, generator=generator)

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name not in skip:
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(
                random(module.weight), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
            ).to(device)
            if module.bias is not None:
                layer.bias = torch.nn.Parameter(random(module.bias).zero_(), requires_grad=False)
            model.set_submodule(name, layer)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = torch.nn.Parameter(random(parameter), requires_grad=False)
    model.tie_weights()
    for name, module in list(model.named_modules()):  # what is computed from the configuration, not learned
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            with torch.device(device):
                model.set_submodule(name, type(module)(config=config))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model.config.quantization_config = quantization
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    model.hf_device_map = {"": device}
    return model.requires_grad_(False)


def tokenizer(vocabulary: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts(count: int, length: int):
    from datasets import Dataset

    rows = [" ".join(f"w{3 + (17 * i + k) % 500}" for k in range(length)) for i in range(count)]
    return Dataset.from_dict({"prompt": rows})


class Peaks:
    """The peak of allocated bytes in each phase, and its seconds since `restart`."""

    def __init__(self, device: str, model):
        from trl_ext.memory import tensor_bytes

        self.cuda = device == "cuda"
        self.bytes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.known = [*model.parameters(), *model.buffers()]
        self.resident = tensor_bytes(model)
        self.trainer = None

    def restart(self) -> None:
        self.seconds.clear()

    @contextmanager
    def phase(self, name: str):
        import torch

        from trl_ext.memory import LiveBytes

        start = time.perf_counter()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            yield
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            held = sum(p.grad.nbytes for p in self.known if p.grad is not None)
            states = self.trainer.optimizer.state.values()
            held += sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))
            with LiveBytes(self.known) as live:
                yield
            peak = self.resident + held + live.peak
        self.bytes[name] = max(peak, self.bytes.get(name, 0))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, function):
        """The function as a phase."""

        def call(*values, **options):
            with self.phase(name):
                return function(*values, **options)

        return call


def cap(args: argparse.Namespace) -> None:
    """Let PyTorch have no more than `--cap` GiB, less what the context takes."""
    import torch

    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(args.cap[0] * GIB / total, 1.0))


def four_roles(args: argparse.Namespace):
    """Policy and its reference, reward and critic, on one base."""
    import torch

    from trl_ext import Role, SharedBaseModel
    from trl_ext.roles import AdapterWeights, lora_config

    lora = lora_config(r=args.lora_r)
    model = SharedBaseModel(build(args.shape, args.device), lora, with_critic=False)
    start = model.adapter_weights(Role.POLICY)
    weights = {name: tensor.detach().clone() for name, tensor in (start.weights or {}).items()}
    head = torch.randn(1, make_config(args.shape).hidden_size) / 100
    return SharedBaseModel(
        model.unload(), AdapterWeights(start.config, weights), AdapterWeights(start.config, weights, head)
    )


def print_resident(args: argparse.Namespace) -> None:
    """Bytes of the four roles and of their base, counted tensor by tensor, with adapters in each dtype."""
    import torch

    from trl_ext.memory import tensor_bytes

    model = four_roles(args)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    base = tensor_bytes(model) - sum(p.nbytes for p in (*adapters, *model.heads.parameters()))
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in adapters:
            parameter.data = parameter.data.to(dtype)
        roles = tensor_bytes(model)
        print(f"{args.shape}: base {base:,} bytes, four roles in {dtype} {roles:,} bytes, {roles / base:.3f} times")


def measure(trainer, peaks: Peaks) -> None:
    """Make the phases of a trainer phases of `peaks`."""
    from trl_ext.ppo import trainer as module

    peaks.trainer = trainer
    trainer._generate = peaks.timed("generate", trainer._generate)
    module.score_with_roles = peaks.timed("score", module.score_with_roles)
    step, prepare = trainer.training_step, trainer._prepare_inputs

    def training_step(model, inputs, *values, **options):
        inputs = prepare(inputs)  # generates and scores where a rollout begins
        trainer._prepare_inputs = lambda ready: ready
        try:
            with peaks.phase("update"):
                return step(model, inputs, *values, **options)
        finally:
            trainer._prepare_inputs = prepare

    trainer.training_step = training_step


def run_ours(args: argparse.Namespace) -> dict:
    from transformers import TrainerCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer, memory

    cap(args)
    cuda = args.device == "cuda"
    config, length = make_config(args.shape), args.tokens
    optim = "paged_adamw_8bit" if cuda else "adamw_torch"
    setup = memory.Setup(
        load_in_4bit=True, autocast=cuda, lora=memory_lora(args), optim=optim, prompt_length=length,
        completion_length=length,
    )  # fmt: skip
    plan, _ = memory.choose_batches(config, setup, round(args.cap[0] * GIB), args.rollout, args.rollout)
    model = four_roles(args)
    peaks = Peaks(args.device, model)

    class Second(TrainerCallback):
        """The first iteration is not timed."""

        started = 0.0

        def on_step_end(self, args_, state, control, **kwargs):
            if state.global_step == args.passes:
                peaks.restart()
                self.started = time.perf_counter()

    training = PPOMaxConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=plan.train_batch,
        gradient_accumulation_steps=args.rollout // plan.train_batch,
        per_device_generate_batch_size=plan.generate_batch,
        per_device_score_batch_size=plan.score_batch,
        num_iterations=args.passes,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        max_steps=args.passes * 2,
        critic_warmup_steps=0,
        gradient_checkpointing=True,
        optim=optim,
        use_cpu=not cuda,
        bf16=cuda,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Second()
    data = prompts(2 * args.rollout, length)
    trainer = PPOMaxTrainer(
        model, args=training, train_dataset=data, processing_class=tokenizer(config.vocab_size), callbacks=[clock]
    )
    measure(trainer, peaks)
    trainer.train()
    seconds = time.perf_counter() - clock.started
    tokens = {"generate": length, "score": 2 * length, "update": 2 * length * args.passes}
    phases = {
        name: {
            "peak_gib": peaks.bytes[name] / GIB,
            "predicted_gib": plan.phases[name].allocated / GIB,
            "seconds": peaks.seconds[name],
            "tokens_per_second": args.rollout * tokens[name] / peaks.seconds[name],
        }
        for name in tokens
    }
    return {"micro_batch": plan.train_batch, "samples_per_second": args.rollout / seconds, "phases": phases}


def memory_lora(args: argparse.Namespace):
    from trl_ext.roles import lora_config

    return lora_config(r=args.lora_r)


def run_trl(args: argparse.Namespace) -> dict:
    """TRL 1.12: policy, reference (its adapters off), reward and value model, of which three are bases of their own."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    cap(args)
    cuda, length = args.device == "cuda", args.tokens

    class Clock(TrainerCallback):
        started = stopped = 0.0

        def on_step_end(self, args_, state, control, **kwargs):
            self.started, self.stopped = self.started or time.perf_counter(), time.perf_counter()

    words = tokenizer(make_config(args.shape).vocab_size)
    data = prompts(2 * args.rollout, length).map(
        lambda row: {"input_ids": words(row["prompt"])["input_ids"]}, remove_columns="prompt"
    )
    lora = {"r": args.lora_r, "lora_alpha": 2 * args.lora_r, "target_modules": "all-linear"}
    policy = get_peft_model(build(args.shape, args.device), LoraConfig(task_type="CAUSAL_LM", **lora))
    kind = "AutoModelForSequenceClassification"
    reward = build(args.shape, args.device, 1, kind, num_labels=1)
    value = build(args.shape, args.device, 2, kind, num_labels=1)
    value = get_peft_model(value, LoraConfig(task_type="SEQ_CLS", **lora))
    reference = build(args.shape, args.device)
    training = PPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=args.trl_micro_batch,
        gradient_accumulation_steps=args.rollout // args.trl_micro_batch,
        num_mini_batches=1,
        local_rollout_forward_batch_size=args.trl_micro_batch,
        num_ppo_epochs=args.passes,
        response_length=length,
        temperature=1.0,
        total_episodes=2 * args.rollout,
        num_sample_generations=0,
        gradient_checkpointing=cuda,
        optim="paged_adamw_8bit" if cuda else "adamw_torch",
        bf16=cuda,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = PPOTrainer(
        args=training,
        processing_class=copy.deepcopy(words),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        callbacks=[clock],
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
    return {"micro_batch": args.trl_micro_batch, "peak_gib": peak} | {
        "samples_per_second": args.rollout / (clock.stopped - clock.started)
    }


def child(python: str, what: str, limit: float, args: argparse.Namespace) -> dict:
    """Run one side under one cap in a process of its own; a failure is part of the result."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if what == "ours":
        environment["PYTHONPATH"] = str(root)
    command = [python, __file__, "--child", what, "--cap", str(limit)]
    for name in ("shape", "device", "tokens", "rollout", "passes", "lora_r", "trl_micro_batch"):
        command += [f"--{name}", str(getattr(args, name))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not lines:
        return {"failed": "\n".join((result.stderr or result.stdout).strip().splitlines()[-15:])}
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cap", type=float, nargs="+", default=[24, 16, 12, 8], help="GiB; all of the card counts")
    parser.add_argument("--tokens", type=int, help="of a prompt, and of a response; default 512, tiny 16")
    parser.add_argument("--rollout", type=int, default=8, help="sequences in a rollout batch")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--trl_micro_batch", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "trl"])
    parser.add_argument("--resident", action="store_true", help="build the four roles, print their bytes, and stop")
    parser.add_argument("--trl_env", type=Path, default=Path.home() / ".cache" / "trl_ext" / "trl-1.12")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tokens = args.tokens or (16 if args.shape == "tiny" else 512)
    if args.child:
        print("RESULT " + json.dumps({"ours": run_ours, "trl": run_trl}[args.child](args)))
        return
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here. Try the code path with --shape tiny --device cpu.")
    if args.resident:
        print_resident(args)
        return
    sides = [args.only] if args.only else ["ours", "trl"]
    pythons = {"ours": sys.executable}
    if "trl" in sides:
        pythons["trl"] = trl_python(args.trl_env)
        if subprocess.run([pythons["trl"], "-c", "import bitsandbytes"], capture_output=True, check=False).returncode:
            parser.error(f"{args.trl_env} has no bitsandbytes: {pythons['trl']} -m pip install bitsandbytes")
    print(f"{args.shape}, {args.tokens} + {args.tokens} tokens, rollout {args.rollout}, {args.passes} passes, seed 0")
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else platform.machine()}, torch {torch.__version__}")
    for limit in args.cap:
        for side in sides:
            result = child(pythons[side], side, limit, args)
            phases = result.pop("phases", {})
            print(f"cap {limit:g} GiB, {side}: {result.pop('failed', None) or json.dumps(result)}", flush=True)
            for name, figures in phases.items():
                line = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"  {name:9s} {line}", flush=True)


if __name__ == "__main__":
    main()
