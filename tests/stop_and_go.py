"""Run by test_signals.py: a tiny run in a process of its own. python stop_and_go.py JSON

A job says which trainer, where, with what options, and after which step the process sends itself which signals: in the
next rollout or step, so at a moment that is known.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.reward import runs
from tests.rrhf import ranked


class SendSignals(TrainerCallback):
    """When the step after `step` begins."""

    def __init__(self, step: int, signals: list[int], send=lambda number: os.kill(os.getpid(), number)):
        self.step, self.signals, self.send = step, signals, send

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.signals:
                self.send(number)


def make(kind: str, world: Path, folder: Path, callbacks=(), **options):
    """A trainer; PPO with rollouts of 4 optimizer steps, RRHF online with rounds of 3, the others with none."""
    options = {"save_strategy": "steps", "callbacks": list(callbacks)} | options
    if kind == "ppo":
        rollouts = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 2}
        return tiny.trainer(world, folder, dataset=tiny.prompts(32), **rollouts | {"max_steps": 12} | options)
    if kind == "online":
        online = {"online_every_steps": 3, "reward_funcs": ranked.count_w3, "dataset": tiny.prompts(32)}
        return ranked.trainer(world, folder, **online | {"max_steps": 8} | options)
    if kind == "rrhf":
        return ranked.trainer(world, folder, dataset=ranked.ranked(16), **{"max_steps": 8} | options)
    return runs.trainer(world / "base", folder, dataset=runs.pairs(16), **{"max_steps": 8} | options)


def main() -> None:
    job = json.loads(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    callbacks = [SendSignals(job["step"], job["signals"])] if rank == job.get("rank", 0) else []
    if job.get("wait"):  # until the parent has sent its own

        class Wait(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == job["step"]:
                    Path(job["wait"]).touch()
                    while not Path(job["wait"] + "-sent").exists():
                        time.sleep(0.01)

        callbacks = [Wait()]
    trainer = make(job["kind"], Path(job["world"]), Path(job["folder"]), callbacks, **job["options"])
    trainer.train(resume_from_checkpoint=job.get("resume"))
    print("trained")
    torch.save(runs.weights(trainer.model), Path(job["folder"]) / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
