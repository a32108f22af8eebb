"""The command that starts a server: what it is for which vLLM, and what is an error before anything runs."""

import subprocess
import sys
import threading

import pytest

from tests.vllm_stand_in import StandIn
from trl_ext.scripts.vllm_serve import Installed, advice, find_vllm, main, parse, serve_command, wait_for

CPU, CUDA = Installed("0.32.0", cpu=True, four_bit=False), Installed("0.32.0", cpu=False, four_bit=True)


def command_of(installed, *arguments) -> tuple[str, dict[str, str]]:
    options, more = parse(["--model", "m", *arguments])
    command, environment = serve_command(options, installed, more)
    return " ".join(command[1:]), environment


def test_on_a_cpu_it_computes_in_float32_with_a_small_cache():
    command, environment = command_of(CPU, "--max_lora_rank", "12", "--cpu_kv_gib=2")
    assert command == (
        "-m vllm.entrypoints.openai.api_server --model m --served-model-name base --host 127.0.0.1 --port 8000 "
        "--enable-lora --max-loras 1 --max-lora-rank 16 --logprobs-mode processed_logprobs --dtype float32 "
        "--enforce-eager"
    )
    assert environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "2"}


def test_on_a_card_it_takes_a_share_of_it_and_what_stands_behind_the_dashes():
    command, environment = command_of(
        CUDA, "--load-in-4bit", "--gpu-memory-utilization", "0.4", "--", "--max-num-seqs", "64"
    )
    assert command.endswith(
        "--dtype bfloat16 --gpu-memory-utilization 0.4 --quantization bitsandbytes --max-num-seqs 64"
    )
    assert environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        (CPU, ["--load_in_4bit"], "vLLM 0.32.0 needs vllm-bnb-plugin"),
        (Installed("0.27.1", True, False), ["--load_in_4bit"], "vLLM 0.27.1 needs bitsandbytes"),
        (CUDA, ["--load_in_4bit", "--dtype=float32"], "the engine refuses that"),
    ],
)
def test_what_cannot_run_is_said_before(installed, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command_of(installed, *arguments)


def test_flags_that_there_are_not_are_refused(capsys):
    for wrong in (["--max_lora_rank", "1000"], ["--load"], []):
        with pytest.raises(SystemExit):
            parse(["--model", "m", *wrong] if wrong else [])
    assert "must be from 1 to 512" in capsys.readouterr().err


def test_an_environment_without_vllm_is_told_how_to_get_it():
    with pytest.raises(SystemExit, match=r"has no vLLM\. Install `vllm`"):
        find_vllm(sys.executable)
    with pytest.raises(SystemExit, match="does not run"):
        find_vllm("/nowhere/python")


def test_it_waits_for_the_server_or_its_end():
    with StandIn() as server:
        url, port = server.url, server.port
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    again = StandIn(port=port)
    start = threading.Timer(0.2, again.start)
    start.start()
    assert wait_for(url, process, every=0.05)
    start.join()
    again.stop()
    process.terminate()
    assert not wait_for(url, process, every=0.05)


def test_it_says_what_the_trainer_needs():
    options, _ = parse(["--model", "m", "--load_in_4bit"])
    text = advice(options, "http://h:1")
    assert "--model_name_or_path m --vllm_server_url http://h:1 --load_in_4bit --use_bnb_nested_quant" in text


def test_a_dry_run_prints_the_command_alone(capsys, monkeypatch):
    monkeypatch.setattr("trl_ext.scripts.vllm_serve.find_vllm", lambda python: CPU)
    main(["--model", "m", "--dry_run"])
    out = capsys.readouterr().out
    assert out.startswith("vLLM 0.32.0, CPU:\nVLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_CPU_KVCACHE_SPACE=1 ")


def test_it_needs_nothing_but_python(repo_root):
    code = "import sys; import trl_ext.scripts.vllm_serve; print({'torch', 'trl', 'requests'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
