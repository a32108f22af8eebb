"""Builds the embedded world with TRL's own trainers: a pretrained base, an SFT policy adapter and a reward adapter."""

import hashlib
import importlib.metadata
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
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


def build_world(
    output_dir: str | os.PathLike[str], seed: int = 0, *, scale: float = 1.0, template: str | None = None
) -> ToyWorld:
    """Build the embedded world under `output_dir`, or load it if it is there.

    Three stages, each by the TRL trainer that a user would run, in float32 on the GPU if there is one:

    1. base: full-parameter language modelling of the corpus from random weights (`SFTTrainer`);
    2. policy: LoRA fine-tuning of the base on prompt/completion demonstrations (`SFTTrainer`);
    3. reward: LoRA fine-tuning of the base with a score head on noisily labelled pairs (`RewardTrainer`).

    The world lies in a subfolder named after the seed, the scale, and a hash of the toy's source and of the versions of
    the libraries that train it. A stage is written beside its place and renamed into it when it is complete, so a
    killed build continues with the stage it was in, and a finished one is only loaded. One process builds at a time:
    others that come to the same world, also those of the same distributed run, wait and load. The global random states
    of python, numpy and torch are left as they were, so that a cached world and a fresh one give the same run.

    Args:
        output_dir: folder for this and other worlds; created if missing.
        seed: seed of every text, weight and batch order.
        scale: factor on the optimizer steps and examples of every stage; small values are for tests.
        template: None: prompts and completions are plain texts. "chatml": they are conversations, of a user's opening
            and an assistant's story, by a chat template that writes a line break behind the end token.

    Raises:
        ValueError: `scale` is not positive, or an unknown `template`.
        RuntimeError: the process that builds for a distributed run failed.
    """
    root, tokenizer = _build(output_dir, seed, scale, template, tuple(_BUILDERS))
    train, test = (
        task.sample_prompts(count, _rng(seed, split), split)
        for count, split in ((_TRAIN_PROMPTS, "train"), (_EVAL_PROMPTS, "eval"))
    )
    texts = task.corpus(_PRETRAIN_TEXTS, _rng(seed, "base"))
    if template:
        texts = [str(tokenizer.apply_chat_template(_conversation(text), tokenize=False)) for text in texts]
    return ToyWorld(
        base=root / "base",
        policy_adapter=root / "policy",
        reward_adapter=root / "reward",
        train_prompts=Dataset.from_dict({"prompt": [_prompt(text, template) for text in train]}),
        eval_prompts=Dataset.from_dict({"prompt": [_prompt(text, template) for text in test]}),
        pretrain_texts=Dataset.from_dict({"text": texts}),
    )


def build_base(output_dir: str | os.PathLike[str], seed: int = 0, *, scale: float = 1.0) -> Path:
    """The first stage of `build_world` alone, in the same place: the folder of the base, for who trains the rest.

    Raises:
        ValueError: `scale` is not positive.
    """
    return _build(output_dir, seed, scale, None, ("base",))[0] / "base"


def _build(
    output_dir: str | os.PathLike[str], seed: int, scale: float, template: str | None, stages: tuple[str, ...]
) -> tuple[Path, Any]:
    """The folder of a world in which these stages are there, and its tokenizer."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    tokenizer = toy_model.build_tokenizer(template)
    name = f"world-seed{seed}-scale{scale:g}{f'-{template}' if template else ''}-{_version()}"
    root = Path(output_dir).resolve() / name
    missing = [stage for stage in stages if not (root / stage).exists()]
    if missing and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        build_alone(output_dir, seed, scale, template)
    elif missing:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            for stage in stages:
                if not (root / stage).exists():
                    _run_stage(root, stage, tokenizer, seed, scale)
    return root, tokenizer


def _prompt(text: str, template: str | None) -> Any:
    return [{"role": "user", "content": text}] if template else text


def _answer(text: str, template: str | None) -> Any:
    return [{"role": "assistant", "content": text.strip()}] if template else text


def _conversation(text: str) -> list[dict[str, str]]:
    """A text of the corpus: its opening is the user's, the rest the assistant's."""
    opening, story = text.split(" . ", 1)
    return [*_prompt(f"{opening} .", "chatml"), *_answer(story, "chatml")]


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


def _run_stage(root: Path, name: str, tokenizer: Any, seed: int, scale: float) -> None:
    """Run one stage in a scratch folder beside `root / name`, then rename it into place; the lock is ours."""
    for left in root.glob(".unfinished-*"):  # by a build that was killed
        shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(dir=root, prefix=f".unfinished-{name}-") as scratch,
        quiet_console(),
        random_state_kept(),
    ):
        built = Path(scratch) / name
        _BUILDERS[name](built, root / "base", tokenizer, seed, scale)
        built.rename(root / name)


def build_alone(output_dir: str | os.PathLike[str], seed: int, scale: float, template: str | None) -> None:
    """Build a world in a process that knows nothing of the distributed run that this one belongs to.

    Trainers inside a distributed run would wait for each other; whichever process comes first builds, the rest find the
    world complete when the lock is theirs.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    launcher: tuple[str, ...] = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "MASTER_",
    )
    launcher += ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE")
    own = {k: v for k, v in os.environ.items() if not k.startswith(launcher) or k == "ACCELERATE_USE_CPU"}
    if torch.cuda.device_count() > 1:
        own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    package = str(Path(__file__).resolve().parents[2])
    own["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [own.get("PYTHONPATH")])])
    call = f"build_world({str(output_dir)!r}, {seed!r}, scale={scale!r}, template={template!r})"
    code = f"from trl_ext.toy import build_world; {call}"
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the embedded world at {output_dir} could not be built:\n{done.stderr[-2000:]}")


def _build_base(output: Path, base: Path, tokenizer: Any, seed: int, scale: float) -> None:
    texts, template = task.corpus(_BASE.examples(scale), _rng(seed, "base")), tokenizer.chat_template
    rows = {"messages": [_conversation(text) for text in texts]} if template else {"text": texts}
    trainer = SFTTrainer(
        model=toy_model.build_model(tokenizer, seed),
        args=SFTConfig(**_arguments(output, _BASE, seed, scale), max_length=128),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[StageProgress("embedded world 1/3: base")],
    )
    _train_and_save(trainer, tokenizer, output)


def _build_policy(output: Path, base: Path, tokenizer: Any, seed: int, scale: float) -> None:
    template = tokenizer.chat_template
    rows = [
        {"prompt": _prompt(row["prompt"], template), "completion": _answer(row["completion"], template)}
        for row in task.demonstrations(_POLICY.examples(scale), _rng(seed, "policy"))
    ]
    trainer = SFTTrainer(
        model=str(base),
        args=SFTConfig(**_arguments(output, _POLICY, seed, scale), max_length=128),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(task_type="CAUSAL_LM"),
        callbacks=[StageProgress("embedded world 2/3: policy")],
    )
    _train_and_save(trainer, tokenizer, output)


def _build_reward(output: Path, base: Path, tokenizer: Any, seed: int, scale: float) -> None:
    template = tokenizer.chat_template
    rows = [
        {name: (_prompt if name == "prompt" else _answer)(text, template) for name, text in row.items()}
        for row in task.preference_pairs(_REWARD.examples(scale), _rng(seed, "reward"))
    ]
    trainer = RewardTrainer(
        model=str(base),
        args=RewardConfig(**_arguments(output, _REWARD, seed, scale), max_length=128, center_rewards_coefficient=0.01),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(task_type="SEQ_CLS"),
        callbacks=[StageProgress("embedded world 3/3: reward")],
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


_BUILDERS: dict[str, Callable[[Path, Path, Any, int, float], None]] = {
    "base": _build_base,
    "policy": _build_policy,
    "reward": _build_reward,
}
