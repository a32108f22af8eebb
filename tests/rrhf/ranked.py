"""Ranked responses in the tiny world, and trainers on them."""

from pathlib import Path

from datasets import Dataset

from tests.ppo.tiny import WORDS
from trl_ext import SharedBaseModel
from trl_ext.rrhf import RRHFConfig, RRHFTrainer


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 5 * i) % len(WORDS)] for i in range(count))


def ranked_rows(rows: int = 8) -> list[dict]:
    """Prompts of different lengths; 2 to 4 responses of different lengths, no two scores of a prompt alike."""
    found = []
    for i in range(rows):
        k = 2 + i % 3
        responses = [words(i + 3 * j, 1 + (i + j) % 4) for j in range(k)]
        scores = [float((7 * i + 3 * j) % 5 + 0.1 * j) for j in range(k)]
        found.append({"prompt": words(i, 1 + i % 4), "responses": responses, "scores": scores})
    return found


def ranked(rows: int = 8) -> Dataset:
    return Dataset.from_list(ranked_rows(rows))


def chats(rows: int = 8) -> Dataset:
    """The same as conversations; every other response a list of messages would not fit one column type: all are."""
    return Dataset.from_list(
        [
            row
            | {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "responses": [[{"role": "assistant", "content": text}] for text in row["responses"]],
            }
            for row in ranked_rows(rows)
        ]
    )


def count_w3(prompts, completions, **kwargs) -> list[float]:
    """A reward: how often the word w3 comes, less a little for each other word."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.split().count("w3") - 0.1 * len(text.split()) for text in texts]


def config(folder: Path, **options) -> RRHFConfig:
    """Two optimizer steps of 4 prompts, rates high enough to see a difference."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_completion_length": 6,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "write_report": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return RRHFConfig(output_dir=str(folder), **(defaults | options))


def tuned(world: Path, reward: bool = False) -> SharedBaseModel:
    """Policy and reference start at the SFT adapter; no critic."""
    return SharedBaseModel.from_pretrained(
        str(world / "base"),
        policy_adapter=world / "policy",
        reward_adapter=world / "reward" if reward else None,
        with_critic=False,
    )


def trainer(world: Path, folder: Path, *, model=None, dataset=None, **options) -> RRHFTrainer:
    names = ("eval_dataset", "peft_config", "processing_class", "callbacks", "reward_funcs")
    own = {name: options.pop(name) for name in names if name in options}
    return RRHFTrainer(
        model=tuned(world) if model is None else model,
        args=config(folder, **options),
        train_dataset=ranked() if dataset is None else dataset,
        **own,
    )
