"""Two policies compared on held-out prompts: by a model, by reward adapters, or by people; every pair in both orders.

    trl-ext judge --answers_a after.jsonl --answers_b before.jsonl --judge_model NAME \\
        --output_dir out/judge --price_input 0.15 --price_output 0.6
    trl-ext judge --policy_a out/ppo --policy_b out/sft --prompts held_out.jsonl --judge local --judge_model CHAT_MODEL
    trl-ext judge --policy_a out/ppo --policy_b base --prompts held_out.jsonl --judge adapter --judge_adapter out/rm5
    trl-ext judge --policy_a out/ppo --answers_b gpt.jsonl --prompts held_out.jsonl --judge people

A side is a file of answers (`prompt` and `answer` a line), or a policy: a LoRA adapter, the folder of a finished run,
or `base`. Policies answer first, into `output_dir`. The key of an endpoint is read from the environment
(OPENAI_API_KEY), and written nowhere. Answers, replies, scores and labels are on disk when they come: start it again to
go on. `--dry_run true` shows what a model will cost, and stops.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.scripts.arguments import LORA, check_model_flags, names_of
from trl_ext.scripts.judging import (
    ModelJudge,
    adapter_scores,
    ask_model,
    check_label_page,
    differing,
    key_at,
    open_judge,
    show_result,
    wait_for_people,
)
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries, write_json

JUDGES = ("endpoint", "local", "adapter", "people")
ENDPOINT = ("base_url", "api_key_env", "timeout", "retries", "concurrency", "price_input", "price_output")
MODEL = ("judge_model", "judge_prompt", "max_tokens", "temperature", "attempts", "dry_run")
SAMPLING = ("prompts", "max_prompts", "max_new_tokens", "sampling_temperature")
BASE = "base"
UNFINISHED = ("running", "failed", "interrupted")  # outcomes in run.json


@dataclass
class JudgeArguments:
    """Whose answers, which judge, and how it is asked."""

    answers_a: str | None = field(default=None, metadata={"help": "Answers of policy A: jsonl with prompt, answer."})
    answers_b: str | None = field(default=None, metadata={"help": "Answers of policy B to the same prompts."})
    policy_a: str | None = field(
        default=None, metadata={"help": "In place of answers_a: an adapter, a finished run, or base."}
    )
    policy_b: str | None = field(default=None, metadata={"help": "In place of answers_b."})
    prompts: str | None = field(
        default=None, metadata={"help": "Prompts that policies answer: Hub id, folder, or file with a column `prompt`."}
    )
    max_prompts: int = field(default=256, metadata={"help": "Only so many of them, from the first one on."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer of a policy, tokens."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of the policies."})
    judge: str = field(
        default="endpoint",
        metadata={"help": "endpoint, local (a chat model here), adapter (reward models), or people."},
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "Name of the model at the endpoint; of local: folder or Hub id."}
    )
    judge_adapter: list[str] | None = field(
        default=None, metadata={"help": "Reward adapters that judge by the mean of their scores; not those of PPO."}
    )
    port: int = field(default=7860, metadata={"help": "Of the label page, on 127.0.0.1, where people judge."})
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
    seed: int = field(default=0, metadata={"help": "Of the resamples, and of the policies' answers."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse(arguments: list[str]) -> tuple[JudgeArguments, ModelConfig, Given]:
    """Flags over config file.

    Raises:
        ValueError: What is missing, a number out of its range, or a flag that would be dropped.
    """
    recipe, model_args, given = FlagParser((JudgeArguments, ModelConfig), "judge").parse(arguments)
    if recipe.judge not in JUDGES:
        raise ValueError(f"--judge {recipe.judge} is unknown: use one of {', '.join(JUDGES)}.")
    for side in "ab":
        named = [getattr(recipe, f"{kind}_{side}") for kind in ("answers", "policy")]
        if named.count(None) != 1:
            what = "is missing" if None in named else "and --policy_" + side + " are both there"
            raise ValueError(f"--answers_{side} {what}: a side is a file of answers or a policy. See --help.")
    for name in ("max_tokens", "attempts", "concurrency", "resamples", "max_prompts", "max_new_tokens"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be at least 1.")
    for name in ("retries", "temperature"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be at least 0.")
    for name in ("timeout", "sampling_temperature"):
        if not getattr(recipe, name) > 0:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be above 0.")
    if (recipe.price_input is None) != (recipe.price_output is None):
        raise ValueError("--price_input and --price_output: give both, or none.")
    check_flags(recipe, model_args, given)
    return recipe, model_args, given


def check_flags(recipe: JudgeArguments, model_args: ModelConfig, given: Given) -> None:
    """Check that every flag has an effect with this judge and these sides.

    Raises:
        ValueError: One that would be dropped, or what is missing.
        ImportError: People judge, and the label page is not installed.
    """
    why = f"--judge {recipe.judge} has no use for it. Drop it."
    if recipe.judge != "endpoint":
        given.refuse(ENDPOINT, why)
    if recipe.judge in ("adapter", "people"):
        given.refuse(MODEL, why)
    elif recipe.judge_model is None:
        raise ValueError("--judge_model is missing: the name at the endpoint, or the folder of a local chat model.")
    if recipe.judge != "adapter":
        given.refuse(["judge_adapter"], why)
    elif not recipe.judge_adapter:
        raise ValueError("--judge_adapter is missing: one or several reward adapters, which PPO has not seen.")
    if recipe.judge != "people":
        given.refuse(["port"], why)
    else:
        given.refuse(["labels"], "people judge here, and their labels are in output_dir/pairs.labels. Drop it.")
        check_label_page()
    policies = recipe.policy_a or recipe.policy_b
    if not policies:
        given.refuse(SAMPLING, "both sides are files of answers, and no policy answers. Drop it.")
    elif recipe.prompts is None:
        raise ValueError("--prompts is missing: what the policies answer, as a file with a column `prompt`.")
    given.refuse([*LORA, "use_peft"], "nothing is trained here. Drop it.")
    if policies or recipe.judge == "adapter":
        check_model_flags(given, model_args)
    else:
        given.refuse(names_of(ModelConfig), "no policy answers here, and no adapter judges. Drop it.")


def key_of(recipe: JudgeArguments) -> str:
    """The key, from the environment: see `judging.key_at`."""
    return key_at(recipe.base_url, recipe.api_key_env)


# ---------------------------------------------------------------------- sides


def check_policy(path: str) -> Any:
    """The adapter of a side; None for the base.

    Raises:
        ValueError: It is none, or the run that it belongs to is not finished.
    """
    from trl_ext.roles import read_adapter

    if path == BASE:
        return None
    run = Path(path) / "run.json"
    outcome = json.loads(run.read_text(encoding="utf-8")).get("outcome") if run.is_file() else "finished"
    if outcome in UNFINISHED:
        raise ValueError(f"{path}: the run is not finished ({outcome}). Wait, or name one of its checkpoints.")
    return read_adapter(path, "policy")


def check_prompts_differ(prompts: Iterable[Any], name: str) -> None:
    """Check that no prompt is there twice: answers of two policies are matched by their prompt.

    Raises:
        ValueError: One is, with its rows.
    """
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        first = seen.setdefault(json.dumps(prompt, ensure_ascii=False, sort_keys=True), number)
        if first != number:
            raise ValueError(f"{name}, row {number}: its prompt stands in row {first} too. Remove one of them.")


def sides_of(recipe: JudgeArguments, model_args: ModelConfig, folder: Path) -> tuple[list[Any], Any, Any]:
    """Answers of both sides; the base and its encoder, where one was needed, which is loaded once.

    Raises:
        ValueError: A file, an adapter or prompts that cannot be used, before the base is loaded.
    """
    from trl_ext.data import load_split
    from trl_ext.feedback.judge import read_answers
    from trl_ext.roles import read_adapter
    from trl_ext.scripts.inputs import check_prompt_rows
    from trl_ext.scripts.models import encoder_by_name, load_placed_base, tokenizer_of

    named = {side: getattr(recipe, f"policy_{side}") for side in "ab"}
    adapters = {side: check_policy(path) for side, path in named.items() if path is not None}
    judges = [read_adapter(path, "--judge_adapter") for path in recipe.judge_adapter or ()]
    files = {side: read_answers(getattr(recipe, f"answers_{side}")) for side in "ab" if named[side] is None}
    prompts = None
    if adapters:
        prompts = load_split(str(recipe.prompts), "train")
        check_prompt_rows(prompts, str(recipe.prompts))
        prompts = prompts.select(range(min(recipe.max_prompts, len(prompts)))).select_columns(["prompt"])
        check_prompts_differ(prompts["prompt"], str(recipe.prompts))
    if not adapters and not judges:
        return [files["a"], files["b"]], None, None
    brought = [adapter for adapter in [*adapters.values(), *judges] if adapter is not None]
    name = model_args.model_name_or_path or (brought[0].config.base_model_name_or_path if brought else None)
    if name is None:
        raise ValueError("--model_name_or_path is missing: the base, which no adapter names.")
    model_args.model_name_or_path = name
    tokenizer = tokenizer_of(model_args, recipe, padding_side="left")
    encoder = encoder_by_name(tokenizer, model_args, recipe)
    base = load_placed_base(model_args, recipe)
    found = []
    for side in "ab":
        if named[side] is None:
            found.append(files[side])
            continue
        path = folder / f"answers_{side}.jsonl"
        sample(recipe, base, encoder, adapters[side], prompts, path, named[side])
        found.append(read_answers(path))
    return found, base, encoder


def sample(
    recipe: Any, base: Any, encoder: Any, adapter: Any, prompts: Any, path: Path, named: str, count: int = 1
) -> None:
    """Answers of a policy to each prompt, in a file that is gone on with; prompts of both sides share their seeds.

    A file that another policy or another base has begun is refused.

    Args:
        recipe: With `sampling_temperature`, `max_new_tokens` and `seed`.
        base: Without adapters, and so afterwards.
        encoder: Of its tokenizer.
        adapter: Of the policy; None: the base answers.
        prompts: A dataset.
        path: The file.
        named: The policy, as it was named.
        count: Answers to each prompt.
    """
    from trl_ext import SharedBaseModel
    from trl_ext.roles.folders import adapter_digest
    from trl_ext.rrhf import SamplingConfig, sample_responses
    from trl_ext.scripts.models import facts_of_base

    args = SamplingConfig(
        [f"temperature:{count}"],
        sampling_temperature=recipe.sampling_temperature,
        max_new_tokens=recipe.max_new_tokens,
        sampling_seed=recipe.seed,
    )
    settings = {"policy": BASE if adapter is None else adapter_digest(adapter), **facts_of_base(base)}
    model = SharedBaseModel(base, adapter, with_critic=False)
    print(f"{named} answers {len(prompts):,} prompts ...", flush=True)
    sample_responses(model, encoder, prompts, path, args, None, settings)
    model.unload()


# ---------------------------------------------------------------------- the judgement


def main(arguments: list[str] | None = None) -> None:
    """Let policies answer, estimate, ask, and show who wins."""
    quiet_libraries()
    recipe, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.feedback.judge import match_answers, read_judge_prompt
    from trl_ext.feedback.labels import read_labels
    from trl_ext.feedback.pairs import write_rows
    from trl_ext.feedback.verdicts import judge_by_people, judge_by_scores

    by_model = recipe.judge in ("endpoint", "local")
    if by_model:
        read_judge_prompt(recipe.judge_prompt)
    if recipe.judge == "endpoint":
        key_of(recipe)
    people = read_labels(recipe.labels) if recipe.labels else None
    folder = Path(recipe.output_dir)
    if recipe.policy_a or recipe.policy_b:
        check_output_dir(folder)
    sides, base, encoder = sides_of(recipe, model_args, folder)
    pairs, alone = match_answers(*sides)
    check_output_dir(folder)
    print(
        f"{len(pairs):,} pairs" + (f"; {alone:,} prompts that only one policy answered are left out" if alone else "")
    )
    asked = differing(pairs)
    write_rows(folder / "pairs.jsonl", [{"prompt": p.prompt, "answer_a": p.a, "answer_b": p.b} for p in asked])
    judge = None
    if recipe.judge == "adapter":
        scores = adapter_scores(base, encoder, recipe.judge_adapter or (), pairs, folder / "scores.jsonl")
        judged = judge_by_scores(pairs, scores)
    elif recipe.judge == "people":
        wait_for_people(asked, folder / "pairs.labels", recipe.port, recipe.seed)
        judged = judge_by_people(pairs, read_labels(folder / "pairs.labels"))
        empty = sum(bool(pair.a.strip()) != bool(pair.b.strip()) for pair in pairs)
        if empty:
            print(f"{empty:,} pairs with one empty answer: nobody was asked, the other answer has won")
    else:
        judge, model = open_model(recipe, pairs, folder)
        if recipe.dry_run:
            return
        judged = ask_model(model, pairs, judge)
    write_rows(
        folder / "verdicts.jsonl",
        [{"pair": r.pair.id, "verdict": r.verdict, "consistent": r.consistent, "said": r.said} for r in judged],
    )
    show(recipe, judged, people, judge)


def open_model(recipe: JudgeArguments, pairs: list[Any], folder: Path) -> tuple[Any, ModelJudge]:
    """A judge by a model, and what it will take, which is shown."""
    from trl_ext.feedback.judge import estimate_cost, read_judge_prompt

    model = ModelJudge(
        recipe.judge,
        str(recipe.judge_model),
        recipe.judge_prompt,
        recipe.base_url,
        recipe.api_key_env,
        recipe.max_tokens,
        recipe.temperature,
        recipe.timeout,
        recipe.retries,
        recipe.attempts,
        recipe.concurrency,
    )
    judge, template = open_judge(model, folder), read_judge_prompt(recipe.judge_prompt)
    prices = (recipe.price_input, recipe.price_output) if recipe.judge == "endpoint" else (0.0, 0.0)
    print(f"before it starts: {estimate_cost(pairs, template, judge, recipe.max_tokens, *prices)}", flush=True)
    return judge, model


def show(recipe: JudgeArguments, judged: list[Any], people: list[Any] | None, judge: Any) -> None:
    """The result as a table, and in result.json."""
    from trl_ext.feedback.pairs import without_nan
    from trl_ext.feedback.win_rate import agreement_with_people

    a, b = (getattr(recipe, f"answers_{side}") or getattr(recipe, f"policy_{side}") for side in "ab")
    content, result = show_result(judged, f"A: {a}, B: {b}, by {recipe.judge}", recipe.resamples, recipe.seed)
    content |= {"judge": recipe.judge, "judge_model": recipe.judge_model, "judge_adapter": recipe.judge_adapter}
    if judge is not None:
        content["judge_prompt"] = recipe.judge_prompt
    if people is not None:
        content["people"] = agreement_with_people(judged, people)
    write_json(Path(recipe.output_dir) / "result.json", without_nan(content))
    if people is not None:
        same = content["people"]
        print(
            f"people: the judge says the same on {same['same']:.0%} of {same['pairs']:,} pairs; where both prefer one, "
            f"on {same['same_where_decided']:.0%} of {same['decided']:,}"
        )
    if judge is not None:
        print(f"{judge.requests:,} requests in this run: {judge.input_tokens:,} tokens in, {judge.output_tokens:,} out")
    if not result.judged:
        raise ValueError("no pair has a verdict: see the failures above, and the judge's prompt.")
