"""K responses to every prompt of a dataset, from the policy and from the dataset itself, scored for RRHF or not."""

import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset
from tqdm.auto import tqdm

from trl_ext.fields import above, above_to, at_least, check_fields, whole
from trl_ext.generation.seeded import generate_responses, prompt_generator
from trl_ext.generation.vllm import VLLMEngine
from trl_ext.roles import SharedBaseModel, max_positions
from trl_ext.rrhf.data import RankedRow
from trl_ext.rrhf.response_log import Record, ResponseLog, read_records
from trl_ext.scoring import ResponseScorer
from trl_ext.text import TextEncoder, check_prompt, end_token_ids, message_text

METHODS = ("temperature", "nucleus", "beam", "diverse")
BY_SERVER = ("temperature", "nucleus")  # those of them that a vLLM server can be asked for
WRITTEN = ("index", "responses", "scores", "sources", "truncated")


@dataclass
class SamplingConfig:
    """How responses are sampled, and which the dataset brings."""

    sampling_methods: list[str] = field(
        default_factory=lambda: ["temperature:4"],
        metadata={"help": "method:count, any of temperature, nucleus, beam, diverse: temperature:4 beam:2"},
    )
    sampling_temperature: Annotated[float, above(0)] = field(
        default=1.0, metadata={"help": "Temperature of temperature, nucleus and diverse."}
    )
    sampling_top_p: Annotated[float, above_to(0, 1)] = field(
        default=0.9, metadata={"help": "Probability mass of nucleus sampling."}
    )
    diversity_penalty: Annotated[float, at_least(0)] = field(
        default=1.0,
        metadata={
            "help": "Diverse sampling takes this off a token's log-probability for every earlier response to the "
            "prompt that has the token at the same place."
        },
    )
    max_new_tokens: Annotated[int, whole(1)] = field(
        default=256, metadata={"help": "Longest response; what it cuts is marked truncated."}
    )
    sampling_batch_size: Annotated[int, whole(1)] = field(
        default=64, metadata={"help": "Responses sampled and scored at once."}
    )
    sampling_seed: Annotated[int, whole(0)] = field(
        default=0, metadata={"help": "Every prompt has random numbers of its own from it."}
    )
    response_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of the dataset with further responses (human, other models), one or a list each."},
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if sum(self.counts.values()) == 0 and not self.response_columns:
            raise ValueError("sampling_methods is empty and response_columns too: there would be no responses.")

    @property
    def counts(self) -> dict[str, int]:
        """Method -> responses of it.

        Raises:
            ValueError: An unknown method, one that is named twice, or a count that is no whole number above 0.
        """
        found: dict[str, int] = {}
        for spec in self.sampling_methods:
            method, _, count = spec.partition(":")
            if method not in METHODS or method in found or not count.isdecimal() or int(count) < 1:
                raise ValueError(
                    f"sampling_methods holds {spec!r}: give method:count, each method once, of {', '.join(METHODS)}."
                )
            found[method] = int(count)
        return found

    def check_server(self) -> None:
        """Check that a vLLM server can sample so.

        Raises:
            ValueError: A method that it is not asked for.
        """
        refused = [method for method in self.counts if method not in BY_SERVER]
        if refused:
            raise ValueError(
                f"sampling_methods={self.sampling_methods} has {', '.join(refused)}, which no vLLM server is asked "
                f"for: use {' and '.join(BY_SERVER)}, or leave vllm_server_url out."
            )

    def options(self, method: str) -> dict[str, Any]:
        """What `generate_responses` needs to know of a method."""
        if method == "beam":
            return {}
        options: dict[str, Any] = {"temperature": self.sampling_temperature}
        if method == "nucleus":
            options["top_p"] = self.sampling_top_p
        if method == "diverse":
            options["diversity_penalty"] = self.diversity_penalty
        return options


@dataclass(slots=True)
class SamplingReport:
    """What is in a file of responses, and how fast it came."""

    prompts: int = 0
    resumed: int = 0  # prompts that were there already
    torn: int = 0  # bytes of a torn line that were removed
    responses: Counter = field(default_factory=Counter)  # by source, as the next three
    truncated: Counter = field(default_factory=Counter)
    empty: Counter = field(default_factory=Counter)
    duplicates: Counter = field(default_factory=Counter)  # of an earlier response to the same prompt
    score_sums: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    sampled_per_second: float = 0.0

    def add(self, record: Record) -> None:
        """Count one line of the file."""
        self.prompts += 1
        seen = set()
        scores = record.get("scores", [math.nan] * len(record["responses"]))
        rated = zip(record["responses"], scores, record["sources"], record["truncated"], strict=True)
        for text, score, source, cut in rated:
            self.responses[source] += 1
            self.truncated[source] += cut
            self.empty[source] += not text.strip()
            self.duplicates[source] += text.strip() in seen
            self.score_sums[source] += score
            seen.add(text.strip())

    def rows(self) -> list[tuple[str, ...]]:
        """For a table: source, responses, mean score, truncated, duplicates, empty."""
        counters = (self.truncated, self.duplicates, self.empty)
        return [
            (source, f"{n:,}", self._mean_score(source), *(f"{counter[source]:,}" for counter in counters))
            for source, n in self.responses.items()
        ]

    def _mean_score(self, source: str) -> str:
        mean = self.score_sums[source] / self.responses[source]
        return "-" if math.isnan(mean) else f"{mean:.3f}"


def sample_responses(
    model: SharedBaseModel,
    tokenizer: Any,
    dataset: Dataset,
    path: str | Path,
    args: SamplingConfig,
    scorer: ResponseScorer | None,
    settings: dict[str, Any] | None = None,
    engine: VLLMEngine | None = None,
) -> SamplingReport:
    """Write one line per prompt: `index`, `prompt`, `responses`, `scores`, `sources`, `truncated`, and other columns.

    A run that was killed goes on where it stopped. Each prompt has random numbers of its own, so the responses do not
    depend on where that was; only the rounding of a batch of other shape can tip a draw.

    Args:
        model: The policy samples.
        tokenizer: The model's, or a `TextEncoder` of it, which may have options of the chat template.
        dataset: Column `prompt`, plain or conversational, and `args.response_columns`.
        path: The jsonl file.
        args: How.
        scorer: Scores prompt and response, its end token included. None: lines have no `scores`, for pairs that people
            label; RRHF cannot train on them.
        settings: Whatever else decides the responses (names of model, dataset, scorers), to be the same on resuming.
        engine: A vLLM server that samples in place of the model.

    Raises:
        ValueError: A method that no server is asked for, a file of other settings or prompts, a missing column, or
            a prompt that leaves no room.
    """
    encoder = tokenizer
    if not isinstance(tokenizer, TextEncoder):
        encoder = TextEncoder(tokenizer, end_token_ids(tokenizer, model.generation_config))
    if engine is not None:
        args.check_server()
    missing = [name for name in ("prompt", *args.response_columns) if name not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset has no column {', '.join(missing)}, only {dataset.column_names}.")
    taken = sorted({*WRITTEN} & {*dataset.column_names} - {*args.response_columns})
    if taken:
        raise ValueError(
            f"the dataset has {', '.join(taken)} already, which are written here: name `responses` in response_columns "
            "to keep them as further responses, and remove or rename the others."
        )
    decided = {k: v for k, v in dataclasses.asdict(args).items() if k != "sampling_batch_size"}
    if encoder.chat_template_kwargs:
        decided["chat_template_kwargs"] = encoder.chat_template_kwargs
    if engine is not None:
        decided["sampler"] = "vllm"
    if scorer is None:
        decided["scored"] = False
    log = ResponseLog(path, decided | (settings or {}))
    _check_prompts(log, dataset)
    report = SamplingReport(resumed=len(log.done), torn=log.torn)
    pending = [index for index in range(len(dataset)) if index not in log.done]
    per_batch = max(1, args.sampling_batch_size // max([1, *args.counts.values()]))
    per_prompt = sum(args.counts.values())
    start = time.perf_counter()
    with tqdm(total=len(dataset) * per_prompt, initial=len(log.done) * per_prompt, unit="response") as bar:
        for i in range(0, len(pending), per_batch):
            indices = pending[i : i + per_batch]
            log.append(_sample_batch(model, encoder, dataset, indices, args, scorer, engine))
            bar.update(len(indices) * per_prompt)
    report.seconds = time.perf_counter() - start
    report.sampled_per_second = len(pending) * per_prompt / max(report.seconds, 1e-9)
    log.close()
    for record in log.records():
        report.add(record)
    return report


def load_responses(path: str | Path) -> Dataset:
    """The file of `sample_responses` as RRHF's dataset, in the order of the prompts.

    Raises:
        ValueError: A line that is no record, with its number, or none at all.
    """
    records = sorted(read_records(Path(path)), key=lambda record: record["index"])
    if not records:
        raise ValueError(f"{path} is empty: it has no responses. Sample them again.")
    return Dataset.from_list([{k: v for k, v in record.items() if k != "index"} for record in records])


def _check_prompts(log: ResponseLog, dataset: Dataset) -> None:
    for index, prompt in log.done.items():
        if not 0 <= index < len(dataset) or dataset[index]["prompt"] != prompt:
            raise ValueError(
                f"{log.path} holds another prompt under index {index} than the dataset: it belongs to another dataset. "
                "Name another file."
            )


def _sample_batch(
    model: SharedBaseModel,
    encoder: TextEncoder,
    dataset: Dataset,
    indices: list[int],
    args: SamplingConfig,
    scorer: ResponseScorer | None,
    engine: VLLMEngine | None,
) -> list[Record]:
    """The finished records of some prompts."""
    positions = max_positions(model.config)
    rows = []
    for index in indices:
        columns = dict(dataset[index])
        check_prompt(columns["prompt"], f"row {index}")
        prompt_ids = encoder.prompt_ids(columns["prompt"])
        longest = len(prompt_ids) + args.max_new_tokens + encoder.added_length(columns["prompt"])
        if not prompt_ids or (positions is not None and longest > positions):
            raise ValueError(
                f"row {index}: a prompt of {len(prompt_ids)} tokens and max_new_tokens={args.max_new_tokens} do not "
                f"fit the model's {positions} positions. Lower max_new_tokens, or drop such rows."
            )
        kept = {name: value for name, value in columns.items() if name not in ("prompt", *args.response_columns)}
        rows.append(RankedRow(columns["prompt"], prompt_ids, [], [], kept))
    records: list[Record] = []
    for index, row in zip(indices, rows, strict=True):
        empty: Record = (
            {"responses": []} | ({} if scorer is None else {"scores": []}) | {"sources": [], "truncated": []}
        )
        records.append(row.columns | {"index": index, "prompt": row.prompt} | empty)
    generators = [prompt_generator(args.sampling_seed, index) for index in indices]
    for method, count in args.counts.items():
        groups = generate_responses(
            model,
            [row.prompt_ids for row in rows],
            generators,
            count,
            args.max_new_tokens,
            eos_token_ids=encoder.end_ids,
            pad_token_id=encoder.pad_id,
            method=method,
            engine=engine,
            **args.options(method),
        )
        for row, record, group in zip(rows, records, groups, strict=True):
            for ids in group:
                text = encoder.response_text(row.prompt, row.prompt_ids, ids)
                _add(row, record, ids, text, method, not encoder.ended(ids))
    for index, row, record in zip(indices, rows, records, strict=True):
        room = None if positions is None else positions - len(row.prompt_ids) - encoder.added_length(row.prompt)
        for name in args.response_columns:
            for text in _responses_in(dataset[index][name]):
                ids = encoder.response_ids(row.prompt, text, where=f"row {index}")
                _add(row, record, ids[:room], text, name, False)
    if scorer is not None:
        _score(rows, records, scorer, args.sampling_batch_size)
    return records


def _add(row: RankedRow, record: Record, ids: list[int], text: str, source: str, truncated: bool) -> None:
    row.response_ids.append(ids)
    for name, value in (("responses", text), ("sources", source), ("truncated", truncated)):
        record[name].append(value)


def _responses_in(value: Any) -> list[str]:
    """The responses in a cell of the dataset: none, a text, a list of messages, or a list of either."""
    if value is None:
        return []
    if isinstance(value, str) or (value and isinstance(value[0], dict)):
        return [message_text(value)]
    return [message_text(item) for item in value if item is not None]


def _score(rows: list[RankedRow], records: list[Record], scorer: ResponseScorer, batch_size: int) -> None:
    """Fill in the scores of every record."""
    flat = [(row, ids) for row in rows for ids in row.response_ids]
    scores = [score for i in range(0, len(flat), batch_size) for score in scorer(flat[i : i + batch_size])]
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the scorer gave {[s for s in scores if not math.isfinite(s)][:3]}: scores must be finite.")
    numbers = iter(scores)
    for record in records:
        record["scores"] = [float(next(numbers)) for _ in record["responses"]]
