"""Builds the embedded world with TRL's own trainers: a pretrained base, an SFT policy adapter and a reward adapter."""

import hashlib
import importlib.metadata
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from trl_ext.roles.adapters import lora_config

from . import model as toy_model
from . import task
from .isolation import StageProgress, quiet_console, random_state_kept

_TRAIN_PROMPTS, _EVAL_PROMPTS, _PRETRAIN_TEXTS = 4096, 512, 2048


@dataclass(frozen=True)
class ToyWorld:
    """What `build_world` made: folders that load with plain transformers and PEFT, and datasets in TRL's formats.

    base: folder of the pretrained causal language model and its tokenizer.
    policy_adapter: folder of the LoRA adapter (CAUSAL_LM) fine-tuned on the demonstrations.
    reward_adapter: folder of the LoRA adapter (SEQ_CLS) and its `score` head, trained on noisy preferences.
    train_prompts: column "prompt"; 4,096 different prompts of the training pool.
    eval_prompts: column "prompt"; 512 different prompts that no stage was trained on.
    pretrain_texts: column "text"; 2,048 texts of the pretraining corpus, for PPO-ptx.
    """

    base: Path
    policy_adapter: Path
    reward_adapter: Path
    train_prompts: Dataset
    eval_prompts: Dataset
    pretrain_texts: Dataset


@dataclass(frozen=True)
class _Stage:
    """Size of one training: optimizer steps at scale 1, examples a step, passes over the data, peak learning rate."""

    steps: int
    batch_size: int
    epochs: int
    learning_rate: float

    def scaled_steps(self, scale: float) -> int:
        return max(2, round(self.steps * scale))

    def examples(self, scale: float) -> int:
        return -(-self.scaled_steps(scale) // self.epochs) * self.batch_size


_BASE = _Stage(steps=280, batch_size=64, epochs=2, learning_rate=6e-3)
_POLICY = _Stage(steps=100, batch_size=64, epochs=2, learning_rate=5e-3)
_REWARD = _Stage(steps=160, batch_size=32, epochs=2, learning_rate=1e-3)


def build_world(output_dir: str | os.PathLike[str], seed: int = 0, *, scale: float = 1.0) -> ToyWorld:
    """Build the embedded world under `output_dir`, or load it if it is there.

    Three stages, each by the TRL trainer that a user would run, in float32 on the GPU if there is one:

    1. base: full-parameter language modelling of the corpus from random weights (`SFTTrainer`);
    2. policy: LoRA fine-tuning of the base on prompt/completion demonstrations (`SFTTrainer`);
    3. reward: LoRA fine-tuning of the base with a score head on noisily labelled pairs (`RewardTrainer`).

    The world lies in a subfolder named after the seed, the scale, and a hash of the toy's source and of the versions of
    the libraries that train it. A stage is written beside its place and renamed into it when it is complete, so a
    killed build continues with the stage it was in, and a finished one is only loaded. The global random states of
    python, numpy and torch are left as they were, so that a cached world and a fresh one give the same run.

    Args:
        output_dir: folder for this and other worlds; created if missing.
        seed: seed of every text, weight and batch order.
        scale: factor on the optimizer steps and examples of every stage; small values are for tests.

    Raises:
        ValueError: `scale` is not positive.
        RuntimeError: several processes (`WORLD_SIZE` > 1) and the world is not complete yet.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    root = Path(output_dir).resolve() / f"world-seed{seed}-scale{scale:g}-{_version()}"
    builders = {"base": _build_base, "policy": _build_policy, "reward": _build_reward}
    for name, build in builders.items():
        if not (root / name).exists():
            _run_stage(root, name, build, seed, scale)
    return ToyWorld(
        base=root / "base",
        policy_adapter=root / "policy",
        reward_adapter=root / "reward",
        train_prompts=Dataset.from_dict({"prompt": task.sample_prompts(_TRAIN_PROMPTS, _rng(seed, "train"))}),
        eval_prompts=Dataset.from_dict({"prompt": task.sample_prompts(_EVAL_PROMPTS, _rng(seed, "eval"), "eval")}),
        pretrain_texts=Dataset.from_dict({"text": task.corpus(_PRETRAIN_TEXTS, _rng(seed, "base"))}),
    )


def _rng(seed: int, purpose: str) -> random.Random:
    return random.Random(f"{purpose}-{seed}")


def _version() -> str:
    """Eight hex digits that change with the source of the toy and with the libraries that train it."""
    digest = hashlib.sha256()
    for module_file in (task.__file__, toy_model.__file__, __file__):
        digest.update(Path(module_file).read_bytes())
    for library in ("torch", "transformers", "trl", "peft"):
        digest.update(f"{library}={importlib.metadata.version(library)}".encode())
    return digest.hexdigest()[:8]


def _run_stage(root: Path, name: str, build: Callable[[Path, Path, int, float], None], seed: int, scale: float) -> None:
    """Run one stage in a scratch folder beside `root / name`, then rename it into place."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"the toy world at {root} lacks its stage '{name}' and {os.environ['WORLD_SIZE']} processes are running; "
            "call build_world once in a single process first"
        )
    root.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=root, prefix=f".unfinished-{name}-") as scratch,
        quiet_console(),
        random_state_kept(),
    ):
        built = Path(scratch) / name
        build(built, root / "base", seed, scale)
        try:
            built.rename(root / name)
        except OSError:
            # Another process finished the same stage meanwhile; anything else is a true failure.
            if not (root / name).exists():
                raise


def _build_base(output: Path, base: Path, seed: int, scale: float) -> None:
    tokenizer = toy_model.build_tokenizer()
    trainer = SFTTrainer(
        model=toy_model.build_model(tokenizer, seed),
        args=SFTConfig(**_arguments(output, _BASE, seed, scale), max_length=128),
        train_dataset=Dataset.from_dict({"text": task.corpus(_BASE.examples(scale), _rng(seed, "base"))}),
        processing_class=tokenizer,
        callbacks=[StageProgress("toy world 1/3: base")],
    )
    _train_and_save(trainer, tokenizer, output)


def _build_policy(output: Path, base: Path, seed: int, scale: float) -> None:
    tokenizer = toy_model.build_tokenizer()
    trainer = SFTTrainer(
        model=str(base),
        args=SFTConfig(**_arguments(output, _POLICY, seed, scale), max_length=128),
        train_dataset=Dataset.from_list(task.demonstrations(_POLICY.examples(scale), _rng(seed, "policy"))),
        processing_class=tokenizer,
        peft_config=lora_config(task_type="CAUSAL_LM"),
        callbacks=[StageProgress("toy world 2/3: policy")],
    )
    _train_and_save(trainer, tokenizer, output)


def _build_reward(output: Path, base: Path, seed: int, scale: float) -> None:
    tokenizer = toy_model.build_tokenizer()
    trainer = RewardTrainer(
        model=str(base),
        args=RewardConfig(**_arguments(output, _REWARD, seed, scale), max_length=128, center_rewards_coefficient=0.01),
        train_dataset=Dataset.from_list(task.preference_pairs(_REWARD.examples(scale), _rng(seed, "reward"))),
        processing_class=tokenizer,
        peft_config=lora_config(task_type="SEQ_CLS"),
        callbacks=[StageProgress("toy world 3/3: reward")],
    )
    _train_and_save(trainer, tokenizer, output)


def _arguments(output: Path, stage: _Stage, seed: int, scale: float) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "max_steps": stage.scaled_steps(scale),
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10 if scale >= 1 else 0,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _train_and_save(trainer: Any, tokenizer: Any, output: Path) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.save_pretrained(output)
    tokenizer.save_pretrained(output)
