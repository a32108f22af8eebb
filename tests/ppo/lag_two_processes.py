"""Run by test_lag.py on each of two processes: lag_two_processes.py WORLD FOLDER URL"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ppo import tiny
from tests.ppo.test_resume import Recorder, assert_same_run, killed_and_resumed, make
from trl_ext import Role
from trl_ext.generation.vllm_server import VLLMError


def main() -> None:
    world, folder, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank = int(os.environ["RANK"])
    seen = Recorder()
    options = {"max_steps": 6, "save_steps": 3, "dataset": tiny.prompts(32), "reward_funcs": seen.reward}
    options |= {"vllm_server_url": url, "vllm_wait": 5.0, "rollout_lag": 1}
    whole = make(world, folder / "whole", **options)
    whole.train()
    prompts = list(seen.prompts)
    resumed = killed_and_resumed(world, folder / "killed", **options)
    assert_same_run(whole, resumed)

    # An error of the thread, which is on the main process alone
    broken = make(world, folder / "broken", **options)
    engine = broken.vllm_generation.engine
    if rank == 0:
        complete = engine._complete

        def refuse(*given):
            if len(given) == 4:  # in the background
                raise VLLMError("refused with 400")
            return complete(*given)

        engine._complete = refuse
    try:
        broken.train()
        error = None
    except VLLMError as raised:
        error = str(raised)
    found = {
        "policy": tiny.role_weights(whole.model, Role.POLICY),
        "lags": [entry["sampling/lag"] for entry in tiny.rollout_entries(whole)],
        "prompts": prompts,
        "error": error,
        "steps": broken.state.global_step,
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
