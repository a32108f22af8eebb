"""SIGINT and SIGTERM in training: where it stops, what is saved and said, and how the run goes on from there."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.processes import run_script
from tests.reward import runs
from tests.stop_and_go import SendSignals, make

KINDS = {"ppo": 4, "online": 3, "rrhf": 2, "reward": 2}  # the first border after a signal in step 2
EXCEPTIONS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}
SCRIPT = Path(__file__).with_name("stop_and_go.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def handlers_as_they_were():
    """Every test leaves the process as it was; SIGINT may be ignored from the start, as in a script's background."""
    before = {number: signal.getsignal(number) for number in EXCEPTIONS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before[signal.SIGINT])


def stopped(kind, world, folder, number, step=1, **options):
    trainer = make(kind, world, folder, [SendSignals(step, [number], signal.raise_signal)], **options)
    with pytest.raises(EXCEPTIONS[number]) as caught:
        trainer.train()
    return trainer, caught.value


@pytest.mark.parametrize(("kind", "number"), [*((k, signal.SIGTERM) for k in KINDS), ("ppo", signal.SIGINT)])
def test_training_stops_at_the_border_with_a_checkpoint_and_goes_on_as_if_nothing_had_happened(
    world, tmp_path, kind, number, capfd
):
    border = KINDS[kind]
    trainer, error = stopped(kind, world, tmp_path / "run", number, save_steps=500)
    assert trainer.state.global_step == border
    assert not isinstance(error, SystemExit) or error.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{border}"]
    printed = capfd.readouterr()
    name, last = number.name, printed.out.strip().splitlines()[-1]
    assert f"{name}: training stops at the end of this rollout; once more ends it now." in printed.err
    assert last.startswith(f"{name}: training ended after step {border} of {trainer.state.max_steps}. Saved ")
    assert f"checkpoint-{border}: go on with resume_from_checkpoint=True" in last
    again = make(kind, world, tmp_path / "run", save_steps=500)
    again.train(resume_from_checkpoint=True)
    whole = make(kind, world, tmp_path / "whole", save_steps=500)
    whole.train()
    assert tiny.same(runs.weights(whole.model), runs.weights(again.model))
    histories = [tiny.comparable(run.state.log_history[:-1]) for run in (whole, again)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("kind", ["ppo", "reward"])
def test_without_a_strategy_nothing_is_saved_and_that_is_said(world, tmp_path, kind, capsys):
    trainer, _ = stopped(kind, world, tmp_path / "run", signal.SIGTERM, save_strategy="no")
    assert trainer.state.global_step == KINDS[kind]
    assert "Nothing was saved: save_strategy is 'no'." in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["ppo", "reward"])
def test_a_second_signal_ends_at_once(world, tmp_path, kind):
    reached = []

    class Reached(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            reached.append(state.global_step)

    send = SendSignals(1, [signal.SIGTERM, signal.SIGINT], signal.raise_signal)
    trainer = make(kind, world, tmp_path, [send, Reached()], save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert reached == [1]


def test_the_second_goes_to_the_handler_that_was_there_before(world, tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        send = SendSignals(1, [signal.SIGTERM, signal.SIGTERM], signal.raise_signal)
        with pytest.raises(SystemExit):
            make("reward", world, tmp_path, [send]).train()
        assert got == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)  # it is in its place again
        assert got == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored(world, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make("reward", world, tmp_path, [SendSignals(1, [signal.SIGINT], signal.raise_signal)])
    trainer.train()
    assert trainer.state.global_step == 8
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_handlers_are_restored_after_an_error_too(world, tmp_path):
    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            raise KeyError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError):
        make("reward", world, tmp_path, [Fail()]).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_installed(world, tmp_path):
    seen, trainer = [], make("reward", world, tmp_path, max_steps=1)
    before = signal.getsignal(signal.SIGTERM)

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))

    trainer.add_callback(See())
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert seen == [before]
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", ["ppo", "reward", pytest.param("rrhf", marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_with_a_strategy_by_epochs_and_evaluations_a_stopped_run_goes_on_alike(world, tmp_path, kind, when):
    """Epochs of 4 steps; PPO's rollouts end at 4 and 8 whatever the epochs are."""
    datasets = {"ppo": tiny.prompts(4), "reward": runs.pairs(4), "rrhf": None}
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 10, "eval_dataset": datasets[kind]}
    if kind == "rrhf":
        from tests.rrhf.ranked import ranked

        options["eval_dataset"] = ranked(4)
    trainer, _ = stopped(kind, world, tmp_path / "run", signal.SIGTERM, step=when, **options)
    assert (tmp_path / "run" / f"checkpoint-{trainer.state.global_step}").is_dir()
    again = make(kind, world, tmp_path / "run", **options)
    again.train(resume_from_checkpoint=True)
    whole = make(kind, world, tmp_path / "whole", **options)
    whole.train()
    assert tiny.same(runs.weights(whole.model), runs.weights(again.model))
    evaluations = [[e["step"] for e in run.state.log_history if "eval_loss" in e] for run in (whole, again)]
    assert evaluations[0] == evaluations[1]


def test_a_signal_in_the_last_step_is_not_swallowed(world, tmp_path, capsys):
    trainer, _ = stopped("reward", world, tmp_path, signal.SIGTERM, step=7)
    assert trainer.state.global_step == 8
    assert "training ended after step 8 of 8. Saved" in capsys.readouterr().out
    again = make("reward", world, tmp_path)
    assert again.train(resume_from_checkpoint=True).global_step == 8
    assert again.model.scale is not None  # what comes after training is made up for
    assert trainer.model.scale is None


class SendAtEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_the_last_step_is_not_swallowed(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make("reward", world, tmp_path, [SendAtEnd()]).train()
    assert "training ended after step 8 of 8." in capsys.readouterr().out


def test_the_means_since_the_last_log_are_logged_before_they_are_lost(world, tmp_path):
    stopped("reward", world, tmp_path, signal.SIGTERM, logging_steps=5)
    assert [e["step"] for e in tiny.read_state(tmp_path / "checkpoint-2")["log_history"]] == [2]


# ---------------------------------------------------------------------- processes


def start(job, repo_root, *launcher):
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), json.dumps(job)],
        cwd=repo_root,
        env=tiny.environment(repo_root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # pytest in the background of a script ignores SIGINT, and a child would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def send_when_there(process, flag):
    """SIGTERM to a process once its training has come to a known step, and waits there."""
    while not flag.exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1)  # torchrun looks for signals to hand on so often
    flag.with_name(f"{flag.name}-sent").touch()


def job_of(world, folder, kind="ppo", **job):
    return {"kind": kind, "world": str(world), "folder": str(folder), "step": 5, "signals": [], "options": {}} | job


def test_a_process_that_gets_sigterm_ends_with_143_and_a_checkpoint(world, tmp_path):
    job = job_of(world, tmp_path / "run", signals=[signal.SIGTERM])
    done = run_script(SCRIPT, json.dumps(job), ACCELERATE_USE_CPU="true")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "trained" not in done.stdout
    assert (tmp_path / "run" / "checkpoint-8").is_dir()
    again = make("ppo", world, tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    whole = make("ppo", world, tmp_path / "whole")
    whole.train()
    assert tiny.same(runs.weights(whole.model), runs.weights(again.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], -signal.SIGINT),  # Python's own end of a KeyboardInterrupt; a shell says 130
        ([signal.SIGTERM] * 2, -signal.SIGTERM),
        ([signal.SIGINT] * 2, -signal.SIGINT),
    ],
)
def test_a_process_that_gets_others(world, tmp_path, repo_root, signals, code):
    process = start(job_of(world, tmp_path, signals=signals, options={"save_steps": 4}), repo_root)
    _, err = process.communicate(timeout=200)
    assert process.returncode == code, err[-3000:]
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == ({"checkpoint-4"} if len(signals) == 2 else {"checkpoint-4", "checkpoint-8"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_from_outside(world, tmp_path, repo_root, kind):
    flag = tmp_path / "there"
    process = start(job_of(world, tmp_path / "run", kind, step=1, wait=str(flag)), repo_root)
    send_when_there(process, flag)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, err[-3000:]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{KINDS[kind]}"]


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("kind", "border"), [("ppo", 8), ("online", 6), ("reward", 6)])
def test_of_two_processes_one_gets_the_signal_and_both_stop_at_the_same_border(
    world, tmp_path, repo_root, kind, border, rank
):
    job = job_of(world, tmp_path / "run", kind, signals=[signal.SIGTERM], rank=rank)
    process = start(job, repo_root, *TWO)
    out, err = process.communicate(timeout=280)
    assert process.returncode != 0
    assert "exitcode  : 143" in err, err[-5000:]  # torchrun's report, which ends the other when one has ended
    assert out.count(f"training ended after step {border} of") == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{border}"]
    for folder, options in (("run", {"resume": True}), ("whole", {})):
        process = start(job_of(world, tmp_path / folder, kind, step=-1, **options), repo_root, *TWO)
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err[-5000:]
    ended = [torch.load(tmp_path / folder / f"rank{r}.pt") for folder in ("run", "whole") for r in (0, 1)]
    assert all(tiny.same(ended[0], other) for other in ended[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "rrhf", "reward"])
def test_a_checkpoint_of_one_process_goes_on_with_two_in_the_same_batch_and_is_refused_in_another(
    world, tmp_path, repo_root, kind
):
    trainer, _ = stopped(kind, world, tmp_path / "run", signal.SIGTERM)
    rows = trainer.args.per_device_train_batch_size
    halves = {"per_device_train_batch_size": rows // 2}
    for options, code in ((halves, 0), ({}, 1)):
        job = job_of(world, tmp_path / "run", kind, step=-1, resume=True, options=options)
        _, err = (process := start(job, repo_root, *TWO)).communicate(timeout=280)
        assert process.returncode == code, err[-5000:]
    assert f"Set per_device_train_batch_size={rows // 2}, gradient_accumulation_steps=1" in err
    ended = [torch.load(tmp_path / "run" / f"rank{r}.pt") for r in (0, 1)]
    assert tiny.same(*ended)


@pytest.mark.slow
def test_torchrun_hands_sigterm_on_and_the_run_is_saved(world, tmp_path, repo_root):
    flag = tmp_path / "there"
    process = start(job_of(world, tmp_path / "run", step=1, wait=str(flag)), repo_root, *TWO)
    send_when_there(process, flag)
    out, err = process.communicate(timeout=280)
    assert "training ended after step 4 of 12. Saved" in out, err[-5000:]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
