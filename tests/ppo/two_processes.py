"""Run by test_distributed.py on each of two processes, under torch.distributed.run: two_processes.py WORLD FOLDER"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.ppo import tiny
from trl_ext import PPOMaxTrainer, Role

# What is compared with one process on the whole rollout: micro-batches of 2 rows on each of two processes
GRADIENTS = {
    "one micro-batch": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "in warm-up": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "critic_warmup_steps": 5},
}
# Three rollouts of 4 optimizer steps; the critic warms up alone for the first and half of the second
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 12,
    "critic_warmup_steps": 6,
    "kl_control": "adaptive",
    "kl_horizon": 40.0,
    "entropy_coef": 0.01,
    "ptx_coef": 0.1,
}


def rank_reward(prompts, completions, **kwargs):
    """Rewards that differ between processes: a moment that is not global shows."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [float(len(text.split())) + 10 * rank for text in completions]


def gradient_options(options: dict) -> dict:
    """For a loss whose gradient is not clipped away where the rollout is not the model's own."""
    return {"max_steps": 6, "epsilon": 0.9, "value_clip": 5.0, "entropy_coef": 0.1, "max_grad_norm": 1e9} | options


class KilledError(Exception):
    pass


class RaiseAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KilledError


def run(
    world: Path, folder: Path, *callbacks: TrainerCallback, resume: bool = False
) -> tuple[PPOMaxTrainer, list, list]:
    """A trained trainer; this process's mean advantage of each rollout; what the KL controller was told."""
    trainer = tiny.trainer(
        world,
        folder,
        reward_funcs=rank_reward,
        dataset=tiny.prompts(32),
        eval_dataset=tiny.prompts(4),
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        per_device_eval_batch_size=2,
        ptx_dataset=tiny.texts(),
        callbacks=list(callbacks),
        **TRAINING,
    )
    advantages, rollout = [], trainer._generate_and_score_completions
    observed, controller = [], trainer.ppo_state.kl
    update = controller.update
    controller.update = lambda kl, n: observed.append((kl, n)) or update(kl, n)

    def record(inputs):
        batch = rollout(inputs)
        advantages.append((batch["advantages"].sum() / batch["completion_mask"].sum()).item())
        return batch

    trainer._generate_and_score_completions = record
    with contextlib.suppress(KilledError):
        trainer.train(resume_from_checkpoint=resume)
    return trainer, advantages, observed


def evaluated_first(trainer) -> dict:
    """What `trainer.evaluate(); trainer.train()` leaves on this process."""
    trainer.evaluate()
    trainer.train()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": tiny.role_weights(trainer.model, Role.POLICY),
    }


def let_rest(trainer: PPOMaxTrainer) -> bool:
    """What the control answers where the policy has covered its target."""
    trainer.ppo_state.steps[Role.POLICY].resting = True
    return True


def shortened(world: Path, folder: Path) -> dict:
    """A run whose first update goes much too far."""
    options = {"learning_rate": 1.0, "max_steps": 8, "reward_funcs": rank_reward, "critic_warmup_steps": 0}
    trainer = tiny.trainer(world, folder, ptx_dataset=tiny.texts(), dataset=tiny.prompts(32), **TRAINING | options)
    trainer.train()
    return ending(trainer)


def ending(trainer: PPOMaxTrainer) -> dict:
    return {
        "weights": {role.value: tiny.role_weights(trainer.model, role) for role in Role},
        "state": trainer.ppo_state.state_dict(),
        "history": tiny.comparable(trainer.state.log_history[:-1]),
    }


def main() -> None:
    world, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, options in GRADIENTS.items():
        trainer = tiny.trainer(world, folder / name, **gradient_options(options))
        found[name] = tiny.gradients(trainer, tiny.random_rollout())
    trainer = tiny.trainer(world, folder / "anew", **gradient_options(GRADIENTS["accumulated"]))
    trainer.ppo_state.steps.check = lambda *given: True  # every pass is void, and made anew
    found["anew"] = tiny.gradients(trainer, tiny.random_rollout())
    trainer = tiny.trainer(world, folder / "resting", **gradient_options(GRADIENTS["accumulated"]))
    trainer.ppo_state.steps.check = lambda *given: let_rest(trainer)
    found["resting"] = tiny.gradients(trainer, tiny.random_rollout())
    found["shortened"] = shortened(world, folder / "shortened")
    start = tiny.role_weights(tiny.four_roles(world), Role.POLICY)
    trainer, advantages, observed = run(world, folder / "run")
    found |= {"wrapped": type(trainer.model_wrapped).__name__, "start": start, "advantages": advantages}
    found["observed"] = observed
    options = {"eval_dataset": tiny.prompts(4), "per_device_eval_batch_size": 2, "reward_funcs": rank_reward}
    found["evaluated first"] = evaluated_first(tiny.trainer(world, folder / "evaluated", bf16=True, **options))
    on_start = tiny.trainer(
        world, folder / "on_start", eval_strategy="steps", eval_steps=2, eval_on_start=True, **options
    )
    on_start.train()
    found["on start"] = [entry["step"] for entry in on_start.state.log_history if "eval_loss" in entry]
    found |= {"end": ending(trainer), "next_random": torch.rand(1).item()}
    run(world, folder / "killed", RaiseAfterSave())
    found["resumed"] = ending(run(world, folder / "killed", resume=True)[0])
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
