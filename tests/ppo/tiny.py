"""A base of a few thousand weights, its adapters and reward model, made in code, and trainers on top of them."""

import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from trl_ext import PPOMaxConfig, PPOMaxTrainer, Role, SharedBaseModel
from trl_ext.ppo.rollout import UPDATE_FIELDS, Rollout

WORDS = [f"w{i}" for i in range(12)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<end>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Metrics that no two runs share: what the clock and the operating system say
OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_memory", "runtime", "per_second", "step_time", "total_flos")


def lora(task_type: str = "CAUSAL_LM", **options) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    if task_type == "SEQ_CLS":
        options["modules_to_save"] = ["score"]
    return LoraConfig(task_type=task_type, **options)


def tiny_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Words split at spaces; one word is one token."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | options
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **options)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**options) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "num_labels": 1}
    options = {"max_position_embeddings": 64, "initializer_range": 0.2} | sizes | special | options
    return LlamaConfig(vocab_size=len(SPECIAL + WORDS), num_key_value_heads=2, **options)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters as training leaves them: LoRA's B starts at 0, which would make every adapter the base."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def build(folder: Path) -> Path:
    """`folder` with base/ (and tokenizer), policy/ (LoRA), reward/ (LoRA, SEQ_CLS) and classifier/ (a full model)."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    base, classifier = LlamaForCausalLM(tiny_config()), LlamaForSequenceClassification(tiny_config())
    base.generation_config.eos_token_id = [1, 5]  # <eos> and <end>, as models that chat have it
    base.save_pretrained(folder / "base")
    classifier.save_pretrained(folder / "classifier")
    for name in ("base", "classifier"):
        tokenizer.save_pretrained(folder / name)
    policy = LlamaForCausalLM.from_pretrained(folder / "base")
    randomized(get_peft_model(policy, lora())).save_pretrained(folder / "policy")
    reward = LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    randomized(get_peft_model(reward, lora("SEQ_CLS"))).save_pretrained(folder / "reward")
    return folder


def four_roles(world: Path) -> SharedBaseModel:
    return SharedBaseModel.from_pretrained(
        str(world / "base"), policy_adapter=world / "policy", reward_adapter=world / "reward"
    )


def prompts(rows: int = 8, **columns) -> Dataset:
    """Prompts of different lengths, no two alike."""
    texts = [[WORDS[(5 * i + k) % len(WORDS)] for k in range(1 + i % 4 + i // len(WORDS))] for i in range(rows)]
    return Dataset.from_dict({"prompt": [" ".join(words) for words in texts], **columns})


def chats(rows: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompts(rows)["prompt"]]})


def texts(rows: int = 5) -> Dataset:
    """For PPO-ptx: rows of different lengths, of a number that no batch size divides."""
    words = [[WORDS[(i + k) % len(WORDS)] for k in range(3 + i)] for i in range(rows)]
    return Dataset.from_dict({"text": [" ".join(row) for row in words]})


def count_words(prompts, completions, **kwargs) -> list[float]:
    """A reward: the number of words of the completion."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text.split())) for text in texts]


def config(folder: Path, **options) -> PPOMaxConfig:
    """Two optimizer steps of four sequences, one rollout each, no warm-up; rates high enough to see a difference."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_iterations": 1,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "critic_warmup_steps": 0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "write_report": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return PPOMaxConfig(output_dir=str(folder), **(defaults | options))


def trainer(
    world: Path, folder: Path, *, model=None, reward_funcs=None, dataset=None, trainer_class=PPOMaxTrainer, **options
) -> PPOMaxTrainer:
    """A trainer on all four roles, unless `model` says otherwise; `options` are those of the trainer or the config."""
    names = ("eval_dataset", "ptx_dataset", "peft_config", "processing_class", "callbacks", "reward_processing_classes")
    names += ("rollout_func",)
    own = {name: options.pop(name) for name in names if name in options}
    return trainer_class(
        model=four_roles(world) if model is None else model,
        reward_funcs=reward_funcs,
        args=config(folder, **options),
        train_dataset=prompts() if dataset is None else dataset,
        **own,
    )


def random_rollout(rows: int = 8, prompt: int = 3, completion: int = 5) -> Rollout:
    """A rollout that no model made: lengths, and everything an update needs, from fixed random numbers."""
    generator = torch.Generator().manual_seed(2)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def normal() -> torch.Tensor:
        return torch.randn(rows, completion, generator=generator) * mask

    lengths = integers(1, completion + 1, rows)
    mask = (torch.arange(completion) < lengths.unsqueeze(1)).long()
    prompt_mask = (torch.arange(prompt) >= integers(0, prompt, rows).unsqueeze(1)).long()
    return Rollout(
        prompt_ids=integers(len(SPECIAL), len(SPECIAL + WORDS), rows, prompt) * prompt_mask,
        prompt_mask=prompt_mask,
        completion_ids=integers(len(SPECIAL), len(SPECIAL + WORDS), rows, completion) * mask,
        completion_mask=mask,
        truncated=torch.zeros(rows, dtype=torch.bool),
        logps=(normal() - 3) * mask,
        values=normal(),
        advantages=normal(),
        returns=normal(),
    )


def give_rollout(trainer: PPOMaxTrainer, rollout: Rollout, own: bool = False) -> None:
    """Let a trainer train on this rollout; of several processes each takes its share of the rows.

    `own`: with the log-probabilities of its policy instead of random ones, so that it can be said how far it moves.
    """

    def give(inputs):
        start = trainer.accelerator.process_index * len(inputs)
        part = {f: getattr(rollout, f)[start : start + len(inputs)] for f in UPDATE_FIELDS}
        if own:
            part["logps"] = trainer._outputs_now(Role.POLICY, part) * part["completion_mask"]
        trainer._probe = part
        return part | {"num_tokens": trainer._tokens_per_micro_batch(Rollout(**part))}

    trainer._generate_and_score_completions = give


def gradients(trainer: PPOMaxTrainer, rollout: Rollout, steps: int = 1) -> dict[str, torch.Tensor | None]:
    """Mean gradient of each trained weight over the first optimizer steps of `train()`, if this is the rollout.

    Of several processes each takes its share of the rows. None where there is no gradient.
    """
    found: dict[str, torch.Tensor | None] = {}

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad and parameter.grad is None:
                    found.setdefault(name, None)
                elif parameter.requires_grad:
                    found[name] = found.get(name, 0) + parameter.grad / steps
            control.should_training_stop = state.global_step + 1 >= steps

    trainer.add_callback(Record())
    give_rollout(trainer, rollout)
    trainer.train()
    return found


def rollout_entries(trainer: PPOMaxTrainer) -> list[dict]:
    """The log entries of steps that began with a rollout."""
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def comparable(history: list[dict]) -> list[dict]:
    """Log entries without what the clock and the operating system say."""
    return [{k: v for k, v in entry.items() if not any(part in k for part in OF_THE_MACHINE)} for entry in history]


def role_weights(model: SharedBaseModel, role: Role) -> dict[str, torch.Tensor]:
    """A copy of a role's adapter, and of its head."""
    adapter = model.adapter_weights(role)
    weights = {name: tensor.detach().clone() for name, tensor in (adapter.weights or {}).items()}
    return weights if adapter.head is None else weights | {"head": adapter.head.clone()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def environment(repo_root: Path, **more: str) -> dict[str, str]:
    """For a process of its own."""
    return os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | more
