"""Run by test_engines.py on each of two processes: under_engines.py WORLD FOLDER ENGINE, one of ddp, fsdp2, zero2."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType
from transformers import BitsAndBytesConfig, TrainerCallback

from tests.ppo import tiny
from tests.ppo.two_processes import KilledError, RaiseAfterSave, rank_reward
from trl_ext import Role, SharedBaseModel
from trl_ext.ppo import rollout as rollout_module
from trl_ext.ppo.rollout import Rollout

# Environment in which accelerate starts each engine; `accelerate launch` sets it from a configuration file
ENVIRONMENT = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    },
}
OPTIONS = {"zero2": {"use_cpu": False, "ddp_backend": "gloo"}}
# Five updates on one rollout; two processes take halves of each micro-batch
UPDATES = {
    "whole": {"per_device_train_batch_size": 8},
    "checkpointed": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "after warm-up": {"per_device_train_batch_size": 8, "critic_warmup_steps": 2, "weight_decay": 0.1},
}
# Updates that go too far and are shortened: not under ZeRO
HELD = {"per_device_train_batch_size": 8, "learning_rate": 0.3, "num_iterations": 2, "max_steps": 4}
HELD |= {"update_kl_target": 0.1}
RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 8,
    "critic_warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
}


def use_fsdp_on_cpu() -> None:
    """Accelerate splits weights on accelerators only: on CPUs it would go on with DistributedDataParallel."""
    start = AcceleratorState.__init__

    def started(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in vars(self) and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = started


def uneven_rollout() -> Rollout:
    """The rows of process 0 are long, those of process 1 short: it has fewer tokens, and fewer passes."""
    rollout = tiny.random_rollout()
    mask = torch.ones_like(rollout.completion_mask)
    mask[4:, 1:] = 0
    for name in ("completion_ids", "logps", "values", "advantages", "returns"):
        setattr(rollout, name, getattr(rollout, name) * mask)
    rollout.completion_mask, rollout.prompt_mask[4:, :-1] = mask, 0
    return rollout


def updated(world: Path, folder: Path, processes: int, model=None, **options) -> dict[str, dict[str, torch.Tensor]]:
    """Every role's weights after five updates."""
    settings = {
        "max_steps": 5,
        "epsilon": 0.9,
        "value_clip": 5.0,
        "entropy_coef": 0.1,
        "update_kl_target": 0.0,
    } | options
    settings["per_device_train_batch_size"] //= processes
    trainer = tiny.trainer(world, folder, model=model, **settings)
    tiny.give_rollout(trainer, uneven_rollout(), own=settings["update_kl_target"] != 0)
    trainer.train()
    logged = [entry["step/shortened/policy"] for entry in trainer.state.log_history if "update_kl" in entry]
    assert not logged or min(logged) < 1, "no update of this run was shortened"
    return {role.value: tiny.role_weights(trainer.model, role) for role in Role}


def run(world: Path, folder: Path, *callbacks: TrainerCallback, resume=None, **options):
    """A whole run, with rollouts of its own."""
    trainer = tiny.trainer(
        world,
        folder,
        reward_funcs=rank_reward,
        dataset=tiny.prompts(32),
        callbacks=list(callbacks),
        **(RUN | options),
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KilledError:
        return None
    trainer.save_model(str(folder / "final"))
    return {role.value: tiny.role_weights(trainer.model, role) for role in Role}, type(trainer.model_wrapped).__name__


def four_bit(world: Path) -> SharedBaseModel:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    adapters = {"policy_adapter": world / "policy", "reward_adapter": world / "reward"}
    return SharedBaseModel.from_pretrained(str(world / "base"), quantization_config=nf4, **adapters)


def main() -> None:
    world, folder, engine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    options = OPTIONS.get(engine, {})
    if engine == "fsdp2":
        use_fsdp_on_cpu()
    parts = rollout_module.Rollout.parts
    rollout_module.Rollout.parts = lambda self, max_tokens=None: parts(self, max_tokens if max_tokens else few())
    found: dict = {"updates": {}}
    for name, settings in UPDATES.items():
        found["updates"][name] = updated(world, folder / name, 2, **(settings | options))
    if engine != "zero2":
        found["updates"]["held"] = updated(world, folder / "held", 2, **HELD)
    if engine == "fsdp2":
        settings = UPDATES["checkpointed"] | {"optim": "adamw_torch"} | options
        found["updates"]["4 bits"] = updated(world, folder / "4 bits", 2, model=four_bit(world), **settings)
    found["end"], found["wrapped"] = run(world, folder / "run", **options)
    run(world, folder / "killed", RaiseAfterSave(), **options)
    found["resumed"], _ = run(world, folder / "killed", resume=True, **options)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def few() -> int | None:
    """Tokens in a pass: process 0 takes many passes where process 1 takes one."""
    return 9 if dist.get_rank() == 0 else None


if __name__ == "__main__":
    main()
