"""Run by test_distributed.py on each of two processes, under torch.distributed.run: two_processes.py BASE FOLDER"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ppo import tiny
from tests.reward import runs

# Five steps of four pairs, in epochs of four; ten pairs to evaluate on, which four do not divide
TRAINING = {
    "max_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "center_rewards_coefficient": 0.01,
    "label_smoothing": 0.1,
    "max_grad_norm": 1e9,
}


def run(base: Path, folder: Path, processes: int) -> dict:
    """Train with four pairs a step, shared among the processes; what is left when the run has ended."""
    size = {f"per_device_{mode}_batch_size": 4 // processes for mode in ("train", "eval")}
    held_out = runs.pairs(10, seed=3)
    trainer = runs.trainer(base, folder, dataset=runs.pairs(16), eval_dataset=held_out, **TRAINING, **size)
    trainer.train()
    trainer.save_model()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": runs.weights(trainer.model),
        "history": tiny.comparable(trainer.state.log_history[:-1]),
        "scale": (trainer.model.scale.mean, trainer.model.scale.std, trainer.model.scale.count),
        "scores": trainer.score(held_out),
    }


def main() -> None:
    base, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = run(base, folder / "run", 2)
    first = runs.trainer(base, folder / "evaluated", dataset=runs.pairs(16), eval_dataset=runs.pairs(4, seed=3))
    first.evaluate()
    first.train()
    found["evaluated first"] = type(first.model_wrapped).__name__, runs.weights(first.model)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
