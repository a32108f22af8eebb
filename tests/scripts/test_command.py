"""`trl-ext`: what it answers without a library, how it starts a command, and how a user's error looks."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import trl_ext
from tests.report.made import write_run
from trl_ext.scripts import command, launching, ppo_max
from trl_ext.scripts.catalogue import COMMANDS, WIDTH, overview, render
from trl_ext.scripts.configs import ACCELERATE, CONFIGS, config_names, find_config
from trl_ext.scripts.parsing import LAUNCHER, FlagParser

ROOT = Path(__file__).resolve().parents[2]
LINES = 60  # two screens
PAGES = [name for name, each in COMMANDS.items() if each.page is not None]


# ---------------------------------------------------------------------- without a library


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands_with_a_line_each(arguments: list[str], capsys) -> None:
    command.main(arguments)
    printed = capsys.readouterr().out
    for name, each in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(each.summary)}$", printed, flags=re.M)


def test_the_version_is_that_of_the_package_and_written_once(capsys) -> None:
    command.main(["--version"])
    assert capsys.readouterr().out == f"trl_ext {trl_ext.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "trl_ext.__version__"}
    assert project["project"]["scripts"] == {"trl-ext": "trl_ext.scripts.command:main"}


def test_commands_pages_and_version_import_no_library() -> None:
    code = (
        "import sys\nfrom trl_ext.scripts.command import main\n"
        "for arguments in (['--version'], [], ['ppo-max', '--help'], ['plan-memory', '-h']): main(arguments)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'trl', 'transformers', 'yaml'}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_report_of_finished_runs_loads_what_it_says(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom trl_ext.scripts.command import main\n"
        f"main(['report', {str(write_run(tmp_path / 'run', steps=4, prompts=4))!r}])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'trl', 'transformers', 'datasets'}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == "trl-ext report: loading matplotlib ...\n"


def test_a_command_that_there_is_not_names_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["ppo_maxx"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "there is no command 'ppo_maxx'. Did you mean ppo-max?" in printed
    assert overview() in printed


# ---------------------------------------------------------------------- pages


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_two_screens(name: str, capsys) -> None:
    command.main([name, "--help"])
    printed = capsys.readouterr().out.splitlines()
    assert printed == render(name).splitlines()
    assert len(render(name, WIDTH).splitlines()) <= LINES
    assert max(map(len, render(name, WIDTH).splitlines())) <= WIDTH


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> FlagParser:
    """The parser of a command, caught where it is asked to parse."""
    caught: list[FlagParser] = []

    def catch(self: FlagParser, *_: Any) -> None:
        caught.append(self)
        raise StopIteration

    module = importlib.import_module(COMMANDS[name].module)
    monkeypatch.setattr(FlagParser, "parse", catch)
    with pytest.raises(StopIteration):
        module.parse([])
    return caught[0]


def shown(value: Any) -> str:
    """A default as a page writes it."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_flags_that_there_are_with_their_defaults(name: str, monkeypatch) -> None:
    parser = parser_of(name, monkeypatch)
    page = COMMANDS[name].page
    assert page is not None
    # of what is true there is a second action, --no_x
    defaults = {action.dest: shown(action.default) for action in reversed(parser._actions)}
    rows = [(flag, default) for rows in page.groups.values() for flag, default, _ in rows if flag != "config"]
    assert rows == [(flag, defaults.get(flag, "no such flag")) for flag, _ in rows]


@pytest.mark.parametrize("name", PAGES)
def test_the_examples_of_a_page_parse(name: str) -> None:
    page = COMMANDS[name].page
    assert page is not None
    module = importlib.import_module(COMMANDS[name].module)
    examples = "\n".join(page.examples).replace("\\\n", " ").splitlines()
    for example in examples:
        words = example.partition("  #")[0].split()
        assert words[:2] == ["trl-ext", name]
        if "..." not in words:
            module.parse([*words[2:], *(["--optim=adamw_torch"] if "qlora" in example or "_8b" in example else [])])


def test_every_flag_is_shown_by_help_all(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        ppo_max.main(["--help-all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--kl_horizon", "--lora_dropout", "--weight_decay", "--kl_target"):
        assert flag in printed


# ---------------------------------------------------------------------- configurations by name


def test_a_configuration_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    assert {"qlora_8b", "colab_0.5b", "toy"} <= set(config_names())
    for name in config_names():
        assert find_config(name) in (CONFIGS / f"{name}.yaml", CONFIGS / "presets" / f"{name}.yaml")
    assert find_config("vapo") == find_config("presets/vapo") == CONFIGS / "presets" / "vapo.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("seed: 1\n")
    assert find_config(own) == own
    assert find_config("fsdp2_2", "--config_file", ACCELERATE).parent == ACCELERATE


def test_a_name_that_there_is_not_lists_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"--config qlora_8: .*Did you mean qlora_8b\?") as error:
        ppo_max.parse(["--config", "qlora_8"])
    assert all(name in str(error.value) for name in config_names())


def test_a_run_takes_a_configuration_by_name() -> None:
    flags = ["--model_name_or_path=m", "--dataset_name=d", "--reward_funcs=f", "--output_dir=x"]
    _, training, model_args, given = ppo_max.parse([*flags, "--config=colab_0.5b", "--max_completion_length=7"])
    assert (model_args.lora_r, training.max_completion_length) == (16, 7)
    assert given["lora_r"] == "lora_r in colab_0.5b"


def test_the_wheel_holds_every_configuration() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["trl_ext"]
    held = {path for pattern in patterns for path in (ROOT / "trl_ext").glob(pattern)}
    assert {path for path in (ROOT / "trl_ext").rglob("*") if path.suffix not in (".py", ".pyc", "")} == held


# ---------------------------------------------------------------------- the launcher


def test_flags_of_the_launcher_are_told_from_those_of_the_command() -> None:
    flags = ["--beta", "0.1", "--num_processes", "2", "--reward_funcs", "a", "b", "--cpu", "--mixed-precision=bf16"]
    theirs, own = launching.LauncherFlags().split([*flags, "--debug", "x", "--no_such_flag"])
    assert theirs == ["--num_processes", "2", "--cpu", "--mixed-precision=bf16"]
    assert own == ["--beta", "0.1", "--reward_funcs", "a", "b", "--debug", "x", "--no_such_flag"]


def test_flags_that_both_have_are_the_commands(monkeypatch) -> None:
    theirs = {action.dest for action in launching.LauncherFlags()._actions}
    both: set[str] = set()
    for name in (name for name in PAGES if COMMANDS[name].launched):
        with monkeypatch.context() as patched:
            both |= {action.dest for action in parser_of(name, patched)._actions} & theirs
    assert both - {"help"} == set(launching.SHARED)
    assert set(LAUNCHER) <= theirs


@pytest.fixture
def started(monkeypatch, tmp_path: Path) -> list[argparse.Namespace]:
    """What accelerate's launcher is given, in place of starting it; on a machine without accelerate's own file."""
    found: list[argparse.Namespace] = []
    monkeypatch.setattr(launching, "launch_command", found.append)
    monkeypatch.setattr(launching, "hand_on_signals", lambda: None)
    monkeypatch.setattr(launching, "default_config_file", str(tmp_path / "none.yaml"))
    return found


def test_on_one_device_the_command_runs_in_this_process(started, monkeypatch) -> None:
    called = []
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(ppo_max, "main", called.append)
    command.main(["ppo-max", "--beta", "0.1"])
    assert called == [["--beta", "0.1"]]
    assert started == []


def test_several_devices_flags_or_a_file_of_accelerate_start_its_launcher(started, monkeypatch) -> None:
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 8)
    assert not launching.launch("ppo-max", ["--beta=0.1"])
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 1)
    assert not launching.launch("ppo-max", ["--beta=0.1", "--config_file", "fsdp2_2", "--machine_rank", "1"])
    monkeypatch.setattr(launching, "default_config_file", __file__)
    assert not launching.launch("ppo-max", ["--beta=0.1"])
    for options in started:
        assert (options.module, options.training_script) == (True, "trl_ext")
        assert options.training_script_args == ["ppo-max", "--beta=0.1"]
        assert options.quiet
    assert started[1].config_file == str(ACCELERATE / "fsdp2_2.yaml")
    assert started[1].machine_rank == 1
    with pytest.raises(ValueError, match=r"--config_file fsdp3: .*fsdp2_2"):
        launching.launch("ppo-max", ["--config_file", "fsdp3"])


def test_a_process_that_failed_ends_the_launcher_with_its_status_and_one_line(started, monkeypatch, capsys) -> None:
    for status, code, how in ((3, 3, "with status 3"), (-9, 137, "by signal 9")):
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=status, error_file="none")

        def fail(options: Any, failure: ProcessFailure = failure) -> None:
            raise ChildFailedError("trl_ext", {1: failure})

        monkeypatch.setattr(launching, "launch_command", fail)
        with pytest.raises(SystemExit) as ended:
            launching.start("ppo-max", SimpleNamespace())
        assert ended.value.code == code
        assert capsys.readouterr().err == f"trl-ext ppo-max: process 1 ended {how}; what it said is above.\n"


def test_sigterm_reaches_the_process_that_accelerate_started() -> None:
    code = (
        "import signal, subprocess, sys\nfrom trl_ext.scripts.launching import hand_on_signals\nhand_on_signals()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])\n"
        "print('ready', flush=True)\nprint(child.wait(), flush=True)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "1\n"}
    process.send_signal(signal.SIGINT)  # as from a terminal, where the child has it by itself
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == f"{-signal.SIGTERM}\n"
    assert process.returncode == 0


# ---------------------------------------------------------------------- errors


def ended_with(name: str, *flags: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        command.run(name, list(flags))
    return ended.value.code


def test_a_users_error_is_one_line_and_the_command_says_first_what_it_does(capsys) -> None:
    assert ended_with("ppo-max", "--learning_rat=1") == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "trl-ext ppo-max: loading PyTorch, transformers and TRL ..."
    assert printed[1:] == [
        "trl-ext ppo-max: error: --learning_rat=1: no such option; did you mean --learning_rate. See --help."
    ]


def test_a_value_of_the_wrong_kind_is_one_line(capsys) -> None:
    assert ended_with("ppo-max", "--beta=much") == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "trl-ext ppo-max: error: argument --beta: invalid float value: 'much'. See --help."
    ]


def test_what_a_library_says_of_flags_is_one_line_too(capsys) -> None:
    assert ended_with("ppo-max", "--eval_strategy=steps", "--eval_steps=0.5", "--logging_steps=-1") == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("flag", ["--num_processes=2", "--num_proceses=2"])
def test_flags_of_the_launcher_are_known_where_it_does_not_run(flag: str, capsys) -> None:
    assert ended_with("ppo-max", flag) == 1
    assert "num_processes" in capsys.readouterr().err.splitlines()[1]


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise ValueError("from a test, which is no part of the package")

    monkeypatch.setattr(ppo_max, "main", broken)
    with pytest.raises(ValueError, match="no part of the package"):
        command.work("ppo-max", [])
    monkeypatch.undo()
    monkeypatch.setenv(command.SHOW_TRACEBACK, "1")
    with pytest.raises(ValueError, match="no such option"):
        command.work("ppo-max", ["--learning_rat=1"])


def test_an_interrupt_while_loading_ends_with_130(monkeypatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.importlib, "import_module", interrupted)
    assert ended_with("ppo-max") == 130


def test_of_several_processes_the_first_speaks_and_the_others_wait(monkeypatch, capsys) -> None:
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert ended_with("ppo-max", "--learning_rat=1") == 1
    assert waited == [command.OTHERS_WAIT]
    assert capsys.readouterr().err.startswith("trl-ext ppo-max: error (process 1): --learning_rat=1")
