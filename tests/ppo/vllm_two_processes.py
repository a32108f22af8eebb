"""Run by test_vllm.py on each of two processes: vllm_two_processes.py WORLD FOLDER URL"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ppo import tiny
from trl_ext import Role
from trl_ext.generation.vllm_server import VLLMError


def main() -> None:
    world, folder, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank = int(os.environ["RANK"])

    def reward(prompts, completions, **kwargs):
        seen.extend(prompts)
        return tiny.count_words(prompts, completions)

    seen: list[str] = []
    options = {"max_steps": 3, "dataset": tiny.prompts(32), "vllm_server_url": url, "vllm_wait": 5.0}
    trainer = tiny.trainer(world, folder / "run", reward_funcs=reward, **options)
    model = trainer.model

    def base():
        return {name: p.detach().clone() for name, p in model.named_parameters() if model.owner(name) is None}

    found = {"base before": base(), "start": tiny.role_weights(model, Role.POLICY)}
    trainer.train()
    found |= {
        "base after": base(),
        "policy": tiny.role_weights(model, Role.POLICY),
        "history": tiny.comparable(trainer.state.log_history[:-1]),
        "prompts": seen,
    }
    engine = trainer.vllm_generation.engine
    if rank == 0:
        complete = engine.server.complete

        def refuse(*given):
            engine.server.complete = complete
            raise VLLMError("refused with 400")

        engine.server.complete = refuse
    try:
        trainer.complete(list(tiny.prompts(2)["prompt"]))
    except VLLMError as error:
        found["error"] = str(error)
    trainer.complete(list(tiny.prompts(2)["prompt"]))  # and it goes on
    engine.close()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
