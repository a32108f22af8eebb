"""Preference rows that a tiny base can learn, and reward-model trainers on top of it."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from tests.ppo import tiny
from trl_ext.reward.config import RewardModelConfig
from trl_ext.reward.trainer import RewardModelTrainer


def words(generator: random.Random, pool: list[str], most: int) -> str:
    return " ".join(generator.choices(pool, k=generator.randint(1, most)))


def pairs(rows: int = 8, seed: int = 0, **columns) -> Dataset:
    """Prompts and responses of different lengths; the chosen ones are of other words than the rejected ones."""
    generator = random.Random(seed)
    made = [
        {
            "prompt": words(generator, tiny.WORDS, 4),
            "chosen": " " + words(generator, tiny.WORDS[:6], 5),
            "rejected": " " + words(generator, tiny.WORDS[6:], 5),
        }
        for _ in range(rows)
    ]
    dataset = Dataset.from_list(made)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def rankings(rows: int = 6, k: int = 3) -> Dataset:
    """K responses each, of which those with more of the first words score more."""
    generator = random.Random(1)
    made = []
    for _ in range(rows):
        responses = [f"w{i} " + words(generator, tiny.WORDS, 3) for i in generator.sample(range(12), k)]
        made.append(
            {
                "prompt": words(generator, tiny.WORDS, 4) + " ",
                "responses": responses,
                "scores": [-float(text.split()[0][1:]) for text in responses],
            }
        )
    return Dataset.from_list(made)


def base(folder: Path) -> Path:
    """A folder with a base of random weights and its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.tiny_config()).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def config(folder: Path, **options) -> RewardModelConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "write_report": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return RewardModelConfig(output_dir=str(folder), **(defaults | options))


def trainer(base: Path, folder: Path, *, dataset=None, model=None, **options) -> RewardModelTrainer:
    """`options` are those of the trainer or the config. The adapter is not the fresh one: its scores differ."""
    names = ("eval_dataset", "reference_dataset", "callbacks", "quantization_config")
    own = {name: options.pop(name) for name in names if name in options}
    made = RewardModelTrainer(
        str(base) if model is None else model,
        config(folder, **options),
        pairs() if dataset is None else dataset,
        peft_config=tiny.lora("SEQ_CLS") if model is None else None,
        **own,
    )
    if model is None:
        randomize(made.model)
    return made


def randomize(model, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def batch(trainer: RewardModelTrainer, rows: list[int]) -> dict:
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])
