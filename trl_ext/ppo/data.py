"""What PPO reads: prompts, checked before a model is loaded, and batches of texts for PPO-ptx."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset

from trl_ext.fields import is_number
from trl_ext.text import TextEncoder, check_prompt, check_prompts, pad_ids

SHORTEST_TEXT = 2  # tokens: a text of one predicts nothing
NAMED = 5  # rows that an error names
REFERENCES = "reference_scores"  # column


def check_inputs(
    args: Any,
    encoder: TextEncoder,
    positions: int | None,
    train_dataset: Any,
    eval_dataset: Any,
    ptx_dataset: Any,
    *,
    scored: bool,
    progress: bool = False,
) -> None:
    """Everything about a run's data that can be wrong without a model.

    Args:
        args: `PPOMaxConfig`.
        encoder: Counts the tokens of every prompt.
        positions: Of the base; None where it has no limit.
        train_dataset, eval_dataset, ptx_dataset: The trainer's.
        scored: A reward role reads completions, with what a chat template puts behind them.
        progress: Show a bar while prompts are counted.

    Raises:
        TypeError: A dataset of another kind.
        ValueError: What is wrong, and what to change.
    """
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for part_name, part in _parts(dataset, name):
            check_dataset(part, part_name)
            check_references(part, part_name, args.reward_sigmoid)
            check_lengths(part, part_name, encoder, args.max_completion_length, positions, scored, progress)
    if args.reward_role_pays != "end" and not scored:
        raise ValueError(
            f"reward_role_pays={args.reward_role_pays!r} pays the reward role's score in parts, and the model has no "
            "reward role: give a reward adapter, or leave it at 'end'."
        )
    wanted = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < wanted:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, a rollout batch takes {wanted} (generation_batch_size / "
            "num_generations): nothing would be trained. Give more prompts, or lower steps_per_generation or "
            "per_device_train_batch_size."
        )
    if (args.ptx_coef > 0) != (ptx_dataset is not None):
        raise ValueError(f"ptx_coef={args.ptx_coef} and ptx_dataset go together: give both, or neither.")


def _parts(dataset: Any, name: str) -> list[tuple[str, Any]]:
    """Several evaluation sets come as a dict."""
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", part) for key, part in dataset.items()]
    return [(name, dataset)]


def check_dataset(dataset: Any, name: str) -> None:
    """Check that a dataset has a column `prompt` and at least one row, and that every prompt is one.

    Raises:
        TypeError: It is no dataset.
        ValueError: What is missing, by dataset and row.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt', only {dataset.column_names}. Rename one: "
            "dataset.rename_column('your_column', 'prompt')."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: give at least one prompt.")
    check_prompts(dataset["prompt"], name)


def reference_scores(value: Any) -> list[float]:
    """The scores of a prompt's reference answers, given as one number or several.

    Raises:
        ValueError: There is none, or one is no finite number.
    """
    scores = list(value) if isinstance(value, list | tuple) else [value]
    if not scores or not all(is_number(score) for score in scores):
        raise ValueError(f"{value!r} is not one finite number or a list of them")
    return [float(score) for score in scores]


def check_references(dataset: Any, name: str, wanted: bool) -> None:
    """Check that every prompt has the scores of its reference answers, where `reward_sigmoid` wants them.

    Raises:
        ValueError: What is missing, by dataset and row.
    """
    if not wanted or not isinstance(dataset, Dataset):
        return
    if REFERENCES not in dataset.column_names:
        raise ValueError(
            f"reward_sigmoid=True needs the column '{REFERENCES}', which {name} lacks: for each prompt the score of an "
            "answer by the policy that training starts from, or a list of such scores, by the same rewards and weights."
        )
    for row, value in enumerate(dataset[REFERENCES]):
        try:
            reference_scores(value)
        except ValueError as error:
            raise ValueError(f"{name} row {row}: {REFERENCES}={error}.") from error


def check_lengths(
    dataset: Any,
    name: str,
    encoder: TextEncoder,
    max_completion_length: int,
    positions: int | None,
    scored: bool,
    progress: bool,
) -> None:
    """Check that every prompt and a whole completion fit the model's positions, `scored` with its template's ending.

    Raises:
        ValueError: By how much the longest does not, how many do not, and for which row.
    """
    if positions is None:
        return
    if max_completion_length >= positions:
        raise ValueError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt: the model has {positions} "
            "positions. Lower max_completion_length."
        )
    if not isinstance(dataset, Dataset):
        return
    prompts = dataset["prompt"]
    lengths = prompt_lengths(dataset, encoder, f"measuring the prompts of {name}" if progress else None)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    added = encoder.added_length(prompts[longest]) if scored else 0
    room = positions - max_completion_length - added
    too_long = sum(length > room for length in lengths)
    if too_long:
        left = positions - added - lengths[longest]
        lower = f"Lower max_completion_length to at most {left}, or drop" if left > 0 else "Drop"
        raise ValueError(
            f"{name} row {longest}: a prompt of {lengths[longest]} tokens and max_completion_length="
            f"{max_completion_length} exceed the model's {positions} positions, as do {too_long} of {len(lengths)} "
            f"rows. {lower} prompts of more than {room} tokens."
        )


def longest_request(args: Any, encoder: TextEncoder, *datasets: Any) -> int | None:
    """Tokens of the longest prompt and a whole completion; None where no dataset can be measured.

    Args:
        args: `PPOMaxConfig`.
        encoder: Counts the tokens of every prompt.
        datasets: The trainer's.
    """
    parts = [part for dataset in datasets for _, part in _parts(dataset, "") if isinstance(part, Dataset)]
    lengths = [max(prompt_lengths(part, encoder, None)) for part in parts]
    return max(lengths) + args.max_completion_length if lengths else None


_MEASURED: dict[tuple[Any, ...], list[int]] = {}  # of this process, so that a recipe and its trainer measure once


def prompt_lengths(dataset: Dataset, encoder: TextEncoder, desc: str | None) -> list[int]:
    """Number of tokens of every prompt of a dataset, measured at most once."""
    tokenizer = encoder.tokenizer
    kind = tokenizer.name_or_path, len(tokenizer), tokenizer.chat_template, str(encoder.chat_template_kwargs)
    key = dataset._fingerprint, tokenizer.bos_token_id, tokenizer.eos_token_id, *kind
    if key not in _MEASURED:
        _MEASURED[key] = encoder.prompt_lengths(dataset["prompt"], desc)
    return _MEASURED[key]


class PTXBatches:
    """Language-model batches by number: `batch(i)` is the same in every run with the same seed.

    Args:
        dataset: Column `text`, or `messages` (conversational), or `prompt` and `completion` in either form.
        encoder: Of the model's tokenizer.
        batch_size: Rows per process.
        max_length: Tokens at which a text is cut.
        seed, process_index, num_processes: Each process reads rows of its own.

    Raises:
        ValueError: No known column, no rows, or rows without a text.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: TextEncoder,
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
        column = next(name for name in ("text", "messages", "completion") if name in names)
        blank = [i for i, text in enumerate(dataset[column]) if not (text.strip() if isinstance(text, str) else text)]
        if blank:
            raise ValueError(
                f"ptx_dataset has {len(blank)} rows whose {column} is empty, {blank[:NAMED]} among them: there is "
                f"nothing to learn from them. Drop such rows: dataset.filter(lambda row: row['{column}'])."
            )
        if column != "text":
            for row, start in enumerate(dataset["messages" if column == "messages" else "prompt"]):
                check_prompt(start, f"ptx_dataset row {row}")
        plain = column == "text" or (column == "completion" and isinstance(dataset[0]["prompt"], str))
        for row, text in enumerate(dataset[column]):
            if isinstance(text, str) if column == "messages" else plain and not isinstance(text, str):
                raise ValueError(
                    f"ptx_dataset row {row}: {column} is {text!r}, a {type(text).__name__}. Give a text, or for "
                    "conversations a list of messages {'role': 'user', 'content': '...'}."
                )
        self.dataset, self.encoder = dataset, encoder
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.process_index, self.num_processes = process_index, num_processes
        self._order: tuple[int, list[int]] | None = None  # of the epoch that was read last

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """(B, L) `input_ids` and `attention_mask`, padded right.

        Raises:
            ValueError: A text of fewer than two tokens, in which there is nothing to predict.
        """
        rows = []
        first = (index * self.num_processes + self.process_index) * self.batch_size
        for position in range(first, first + self.batch_size):
            epoch, offset = divmod(position, len(self.dataset))
            row = self._order_of(epoch)[offset]
            ids = self.encoder.document_ids(self.dataset[row])[: self.max_length]
            if len(ids) < SHORTEST_TEXT:
                raise ValueError(
                    f"ptx_dataset row {row} has {len(ids)} token, of which none can be predicted. Drop such rows."
                )
            rows.append(ids)
        padded, mask = pad_ids(rows, self.encoder.pad_id, left=False)
        return {"input_ids": padded, "attention_mask": mask}

    def _order_of(self, epoch: int) -> list[int]:
        """Order of the rows in an epoch, kept until another is read."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[1]


def ptx_batches(dataset: Dataset, encoder: TextEncoder, args: Any) -> PTXBatches:
    """The batches of a process of a run with these `PPOMaxConfig` arguments."""
    return PTXBatches(
        dataset,
        encoder,
        batch_size=args.per_device_train_batch_size,
        max_length=args.ptx_max_length,
        seed=args.seed,
        process_index=args.process_index,
        num_processes=args.world_size,
    )
