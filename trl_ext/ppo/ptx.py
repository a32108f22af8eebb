"""Batches of a pretraining or SFT dataset for PPO-ptx, found again after a resume from the step alone."""

from typing import Any

import torch
from datasets import Dataset


class PTXBatches:
    """Language-model batches by number: `batch(i)` is the same in every run with the same seed.

    Args:
        dataset: Column `text`, or `messages` (conversational), or `prompt` and `completion` in either form.
        tokenizer: With a pad token.
        batch_size: Rows per process.
        max_length: Tokens at which a text is cut.
        seed, process_index, num_processes: Each process reads rows of its own.

    Raises:
        ValueError: No known column, or no rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        names = set(dataset.column_names)
        if not ({"text", "messages"} & names or {"prompt", "completion"} <= names):
            raise ValueError(
                f"ptx_dataset has columns {sorted(names)}: it needs 'text', 'messages', or 'prompt' and 'completion'."
            )
        if len(dataset) == 0:
            raise ValueError("ptx_dataset is empty: give texts, or set ptx_coef=0.")
        self.dataset, self.tokenizer = dataset, tokenizer
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.process_index, self.num_processes = process_index, num_processes

    def _ids(self, row: dict[str, Any]) -> list[int]:
        if "text" in row:
            text = row["text"]
        elif "messages" in row or not isinstance(row["prompt"], str):
            messages = row.get("messages") or row["prompt"] + row["completion"]
            return self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][: self.max_length]
        else:
            text = row["prompt"] + row["completion"]
        return (self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id])[: self.max_length]

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """(B, L) `input_ids` and `attention_mask`, padded right."""
        size, rows = len(self.dataset), []
        for k in range(self.batch_size):
            position = (index * self.num_processes + self.process_index) * self.batch_size + k
            epoch, offset = divmod(position, size)
            order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + epoch))
            rows.append(self._ids(self.dataset[int(order[offset])]))
        width = max(len(row) for row in rows)
        ids = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def ptx_batches(dataset: Dataset | None, tokenizer: Any, args: Any, accelerator: Any) -> PTXBatches | None:
    """The batches of a trainer with these `PPOMaxConfig` arguments; None without a dataset."""
    if dataset is None:
        return None
    return PTXBatches(
        dataset,
        tokenizer,
        batch_size=args.per_device_train_batch_size,
        max_length=args.ptx_max_length,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
