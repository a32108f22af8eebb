"""A card that turns out too small in the middle of a run: what the error says, and what is left."""

from types import SimpleNamespace

import pytest
import torch

from tests.ppo import tiny
from trl_ext.ppo import logging


def fail_after(function, calls):
    """`function`, which runs out of memory after so many calls."""
    seen = iter(range(calls))

    def run(*args, **kwargs):
        if next(seen, None) is None:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return function(*args, **kwargs)

    return run


# What runs out, the phase that the error names, the option that it names with its value
PHASES = [
    ("generate", "generate", r"per_device_generate_batch_size \(now 8\)"),
    ("score_parts", "score", r"per_device_score_batch_size \(now 8\)"),
    ("forward", "update", r"per_device_train_batch_size \(now 4;"),
    ("backward", "update", r"per_device_train_batch_size \(now 4;"),
]


@pytest.mark.parametrize(("what", "phase", "remedy"), PHASES)
def test_the_error_names_phase_option_and_checkpoint_from_which_the_run_goes_on(world, tmp_path, what, phase, remedy):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "steps_per_generation": 2}
    options["update_kl_target"] = 0.0  # no passes beside those that are counted here
    trainer = tiny.trainer(world, tmp_path, **options)
    if what == "backward":
        trainer.accelerator.backward = fail_after(trainer.accelerator.backward, 4)
    elif what == "forward":  # one for a rollout, two for its update
        trainer.model.forward = fail_after(trainer.model.forward, 7)
    else:
        setattr(trainer.model, what, fail_after(getattr(trainer.model, what), 2))
    plan = SimpleNamespace(phases={phase: SimpleNamespace(allocated=3 * 2**30)})
    message = rf"phase {phase}\. The plan says 3\.00 GiB.*{remedy}"
    with pytest.raises(RuntimeError, match=message) as caught, trainer.explained_out_of_memory(plan):
        trainer.train()
    assert "checkpoint-4." in str(caught.value)
    assert "tried to allocate 2.00 GiB" in str(caught.value)
    again = tiny.trainer(world, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 8


def test_an_evaluation_has_its_own_option_and_other_errors_pass(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, eval_dataset=tiny.prompts(4))
    trainer.model.score_parts = fail_after(trainer.model.score_parts, 0)
    message = r"phase evaluation\. Lower per_device_eval_batch_size.*no checkpoint yet"
    with pytest.raises(RuntimeError, match=message), trainer.explained_out_of_memory():
        trainer.evaluate()
    with pytest.raises(KeyError), trainer.explained_out_of_memory():
        raise KeyError


def test_every_phase_begins_with_no_memory_cached_by_the_last(monkeypatch):
    seen, timer = [], logging.PhaseTimer()
    monkeypatch.setattr(logging, "clear_device_cache", lambda: seen.append("cleared"))
    for name in ("generate", "score"):
        with timer.phase(name):
            seen.append(timer.running)
    timer.start_update(1)
    assert seen == ["cleared", "generate", "cleared", "score", "cleared"]
    assert timer.running == "update"
