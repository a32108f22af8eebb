"""Run on each process, one or more, by `tests.processes`: on_two_processes.py RECIPE FOLDER FLAGS ...

The recipe as it is; when a trainer saves its model at the end, every process writes down what it has trained.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer


def main() -> None:
    recipe, folder, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    save, train, start = Trainer.save_model, Trainer.train, {}

    def weights(trainer):
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}

    def recorded_train(self, *args, **kwargs):
        start.update(weights(self))
        return train(self, *args, **kwargs)

    def recorded_save(self, *args, **kwargs):
        kind = type(self.model_wrapped).__name__
        found = {"start": dict(start), "end": weights(self), "wrapped": kind}
        torch.save(found, folder / f"{type(self).__name__}-rank{os.environ.get('RANK', 0)}.pt")
        return save(self, *args, **kwargs)

    Trainer.train, Trainer.save_model = recorded_train, recorded_save
    importlib.import_module(f"trl_ext.scripts.{recipe}").main(flags)
    if dist.is_initialized():  # not with one process
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
