"""Run by test_distributed.py on each of two processes, under torch.distributed.run: two_processes.py WORLD FOLDER"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.rrhf.ranked import count_w3, ranked, trainer
from trl_ext import Role

# 8 prompts on each of two processes of 2 micro-batches: one optimizer step sees all of the data
WHOLE = {"beta": 0.2, "max_steps": 1, "max_grad_norm": 1e9}
HALF = WHOLE | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ONLINE = {"reward_funcs": count_w3, "online_every_steps": 2, "max_steps": 5, "per_device_train_batch_size": 2}


class Gradients(TrainerCallback):
    """Those of the first optimizer step."""

    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.found:
            named = model.named_parameters()
            self.found = {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}


def run(world: Path, folder: Path, options: dict) -> dict:
    gradients = Gradients()
    made = trainer(world, folder, callbacks=[gradients], eval_dataset=ranked(6), **options)
    made.train()
    return {
        "gradients": gradients.found,
        "weights": tiny.role_weights(made.model, Role.POLICY),
        "history": tiny.comparable(made.state.log_history[:-1]),
        "evaluation": made.evaluate(),
        "wrapped": type(made.model_wrapped).__name__,
    }


def main() -> None:
    world, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {name: run(world, folder / name, options) for name, options in (("half", HALF), ("online", ONLINE))}
    first = trainer(world, folder / "evaluated", eval_dataset=ranked(6), **HALF)
    first.evaluate()
    first.train()
    found["evaluated first"] = type(first.model_wrapped).__name__, tiny.role_weights(first.model, Role.POLICY)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
