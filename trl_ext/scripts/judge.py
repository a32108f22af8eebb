"""Two policies compared by a model behind an OpenAI-compatible endpoint, every pair in both orders.

    trl-ext judge --answers_a after.jsonl --answers_b before.jsonl --judge_model NAME \\
        --output_dir out/judge --price_input 0.15 --price_output 0.6

A line of the files has `prompt` and `answer`. The key is read from the environment (OPENAI_API_KEY), and written
nowhere. Replies are kept on disk when they come: start it again to go on. `--dry_run true` shows the cost and stops.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries, without_traceback, write_json
from trl_ext.scripts.tables import print_table

HERE = ("127.0.0.1", "localhost", "::1")


@dataclass
class JudgeArguments:
    """Whose answers, which judge, and how it is asked."""

    answers_a: str | None = field(default=None, metadata={"help": "Answers of policy A: jsonl with prompt, answer."})
    answers_b: str | None = field(default=None, metadata={"help": "Answers of policy B to the same prompts."})
    judge_model: str | None = field(default=None, metadata={"help": "Name of the model at the endpoint."})
    base_url: str | None = field(
        default=None, metadata={"help": "Endpoint, as http://127.0.0.1:8000/v1. Default: OpenAI's."}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Environment variable with the key. On this machine it may be unset."},
    )
    judge_prompt: str = field(
        default="helpful",
        metadata={"help": "helpful, harmless, or a text file with {conversation}, {first}, {second}."},
    )
    output_dir: str = field(default="runs/judge", metadata={"help": "Where replies, verdicts and results go."})
    max_tokens: int = field(default=256, metadata={"help": "Of a reply."})
    temperature: float = field(default=0.0, metadata={"help": "Of the judge."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds that a request may take."})
    retries: int = field(default=3, metadata={"help": "Sends a request again so often that failed on the way."})
    attempts: int = field(default=3, metadata={"help": "Asks so often for a reply that has a verdict."})
    concurrency: int = field(default=4, metadata={"help": "Requests at a time."})
    price_input: float | None = field(default=None, metadata={"help": "Of a million tokens in, for the estimate."})
    price_output: float | None = field(default=None, metadata={"help": "Of a million tokens out."})
    dry_run: bool = field(default=False, metadata={"help": "Show what it will cost, and stop."})
    labels: list[str] | None = field(
        default=None, metadata={"help": "People's labels of output_dir/pairs.jsonl: agreement with the judge."}
    )
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples, for intervals."})
    seed: int = field(default=0, metadata={"help": "Of the resamples."})


def parse(arguments: list[str]) -> tuple[JudgeArguments, Given]:
    """Flags over config file.

    Raises:
        ValueError: What is missing, or a number out of its range.
    """
    recipe, given = FlagParser((JudgeArguments,), "judge").parse(arguments)
    for name in ("answers_a", "answers_b", "judge_model"):
        if getattr(recipe, name) is None:
            raise ValueError(f"--{name} is missing. See --help for an example.")
    for name in ("max_tokens", "attempts", "concurrency", "resamples"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be at least 1.")
    for name in ("retries", "temperature"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be at least 0.")
    if not recipe.timeout > 0:
        raise ValueError(f"--timeout {recipe.timeout} must be above 0.")
    if (recipe.price_input is None) != (recipe.price_output is None):
        raise ValueError("--price_input and --price_output: give both, or none.")
    return recipe, given


def key_of(recipe: JudgeArguments) -> str:
    """The key, from the environment.

    Raises:
        ValueError: It is not set, and the endpoint is not on this machine.
    """
    key = os.environ.get(recipe.api_key_env, "").strip()
    if not key and (recipe.base_url is None or urlsplit(recipe.base_url).hostname not in HERE):
        raise ValueError(
            f"the environment variable {recipe.api_key_env} is not set: export the key there, or name another one with "
            "--api_key_env."
        )
    return key or "none"


@without_traceback()
def main(arguments: list[str] | None = None) -> None:
    """Estimate, ask, and show who wins."""
    quiet_libraries()
    recipe, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from tqdm.auto import tqdm

    from trl_ext.feedback.judge import estimate_cost, judge_pairs, match_answers, read_answers, read_judge_prompt
    from trl_ext.feedback.labels import read_labels
    from trl_ext.feedback.pairs import write_rows
    from trl_ext.feedback.replies import Endpoint, ReplyCache

    template = read_judge_prompt(recipe.judge_prompt)
    pairs, alone = match_answers(read_answers(str(recipe.answers_a)), read_answers(str(recipe.answers_b)))
    people = read_labels(recipe.labels) if recipe.labels else None
    key = key_of(recipe)
    check_output_dir(recipe.output_dir)
    folder = Path(recipe.output_dir)
    cache = ReplyCache(folder / "replies.jsonl")
    if cache.torn:
        print(f"a torn line of {cache.torn} bytes, left by a kill, was removed")
    endpoint = Endpoint(
        str(recipe.judge_model),
        cache,
        base_url=recipe.base_url,
        key=key,
        max_tokens=recipe.max_tokens,
        temperature=recipe.temperature,
        timeout=recipe.timeout,
        retries=recipe.retries,
    )
    print(
        f"{len(pairs):,} pairs" + (f"; {alone:,} prompts that only one policy answered are left out" if alone else "")
    )
    estimate = estimate_cost(pairs, template, endpoint, recipe.max_tokens, recipe.price_input, recipe.price_output)
    print(f"before it starts: {estimate}", flush=True)
    differing = [pair for pair in pairs if pair.a.strip() != pair.b.strip() and pair.a.strip() and pair.b.strip()]
    write_rows(folder / "pairs.jsonl", [{"prompt": p.prompt, "answer_a": p.a, "answer_b": p.b} for p in differing])
    if recipe.dry_run:
        return
    total = 2 * sum(pair.a.strip() != pair.b.strip() for pair in pairs)
    with tqdm(total=total, unit="reply") as bar:
        judged = judge_pairs(
            pairs,
            template,
            endpoint,
            attempts=recipe.attempts,
            concurrency=recipe.concurrency,
            progress=bar.update,
        )
    write_rows(
        folder / "verdicts.jsonl",
        [{"pair": r.pair.id, "verdict": r.verdict, "consistent": r.consistent, "said": r.said} for r in judged],
    )
    show(recipe, judged, people, endpoint)


def show(recipe: JudgeArguments, judged: list[Any], people: list[Any] | None, endpoint: Any) -> None:
    """The result as a table, and in result.json."""
    from trl_ext.feedback.judge import count_failures
    from trl_ext.feedback.pairs import without_nan
    from trl_ext.feedback.win_rate import agreement_with_people, win_rate

    result = win_rate(judged, recipe.resamples, recipe.seed)
    failures = count_failures(judged)
    content: dict[str, Any] = asdict(result) | {"judge_model": recipe.judge_model, "judge_prompt": recipe.judge_prompt}
    content["failures"] = dict(failures.counts)
    if people is not None:
        content["people"] = agreement_with_people(judged, people)
    write_json(Path(recipe.output_dir) / "result.json", without_nan(content))
    print_table(f"A: {recipe.answers_a}, B: {recipe.answers_b}", ("", "value"), result.rows())
    for kind, count in failures.counts.items():
        print(f"failed, {kind}: {count:,} replies, as {failures.examples[kind]}")
    if people is not None:
        same = content["people"]
        print(
            f"people: the judge says the same on {same['same']:.0%} of {same['pairs']:,} pairs; where both prefer one, "
            f"on {same['same_where_decided']:.0%} of {same['decided']:,}"
        )
    print(
        f"{endpoint.requests:,} requests in this run: {endpoint.input_tokens:,} tokens in, "
        f"{endpoint.output_tokens:,} out"
    )
    if not result.judged:
        raise ValueError("no pair has a verdict: see the failures above, and the judge's prompt.")
