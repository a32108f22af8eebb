"""Who judges pairs of answers: a model at an endpoint or on this machine, reward adapters, people at the label page."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_ext.scripts.tables import print_table

HERE = ("127.0.0.1", "localhost", "::1")
SCORED_AT_A_TIME = 32


@dataclass(frozen=True)
class ModelJudge:
    """A chat model that judges.

    Attributes:
        kind: "endpoint" or "local".
        model: Name at the endpoint, or folder or Hub id.
        prompt: "helpful", "harmless", or a text file.
        base_url, api_key_env, timeout, retries, concurrency: Of an endpoint.
        max_tokens, temperature: Of a reply.
        attempts: How often a reply with a verdict is asked for.
    """

    kind: str
    model: str
    prompt: str = "helpful"
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 256
    temperature: float = 0.0
    timeout: float = 60.0
    retries: int = 3
    attempts: int = 3
    concurrency: int = 4


# ---------------------------------------------------------------------- what must be there before a model is loaded


def key_at(base_url: str | None, variable: str, flag: str = "--api_key_env") -> str:
    """The key of an endpoint, from the environment.

    Raises:
        ValueError: It is not set, and the endpoint is not on this machine.
    """
    key = os.environ.get(variable, "").strip()
    if not key and (base_url is None or urlsplit(base_url).hostname not in HERE):
        raise ValueError(
            f"the environment variable {variable} is not set: export the key there, or name another one with {flag}."
        )
    return key or "none"


def judge_kind(recipe: Any) -> str:
    """Of the model that the flags of `trl-ext rlhf` name as judge."""
    return "local" if recipe.judge == "local" else "endpoint"


def model_judge_of(recipe: Any) -> ModelJudge:
    """The judge that the flags of `trl-ext rlhf` name."""
    return ModelJudge(
        judge_kind(recipe),
        str(recipe.judge_model),
        recipe.judge_prompt,
        recipe.judge_base_url,
        recipe.judge_api_key_env,
    )


def check_model_judge(recipe: Any) -> None:
    """Check what a judge by a model needs.

    Raises:
        ValueError: No model, no key, or no such prompt.
        ImportError: The client is missing.
    """
    from trl_ext.feedback.judge import read_judge_prompt
    from trl_ext.feedback.replies import NEED_EXTRA

    if recipe.judge_model is None:
        raise ValueError("--judge_model is missing: the name at the endpoint, or the folder of a local chat model.")
    read_judge_prompt(recipe.judge_prompt)
    if judge_kind(recipe) == "endpoint":
        key_at(recipe.judge_base_url, recipe.judge_api_key_env, "--judge_api_key_env")
        if importlib.util.find_spec("openai") is None:
            raise ImportError(NEED_EXTRA)
    elif recipe.judge_base_url is not None:
        raise ValueError("--judge_base_url: of an endpoint, and the judge is local. Drop it.")


def check_label_page() -> None:
    """Check that the label page can be shown.

    Raises:
        ImportError: Gradio is missing.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the label page needs the package gradio: pip install 'trl_ext[label]'.")


# ---------------------------------------------------------------------- (a), (b): a model


def open_judge(judge: ModelJudge, folder: Path) -> Any:
    """What `judge_pairs` asks, with its cache `replies.jsonl` in the folder.

    Raises:
        ValueError: A local model without a chat template; no key.
    """
    from trl_ext.feedback.local_model import LocalModel
    from trl_ext.feedback.replies import Endpoint, ReplyCache

    cache = ReplyCache(folder / "replies.jsonl")
    if cache.torn:
        print(f"a torn line of {cache.torn} bytes, left by a kill, was removed")
    if judge.kind == "local":
        settings = {"max_tokens": judge.max_tokens, "temperature": judge.temperature}
        return LocalModel(judge.model, cache, local_completion(judge), settings)
    return Endpoint(
        judge.model,
        cache,
        base_url=judge.base_url,
        key=key_at(judge.base_url, judge.api_key_env),
        max_tokens=judge.max_tokens,
        temperature=judge.temperature,
        timeout=judge.timeout,
        retries=judge.retries,
    )


def local_completion(judge: ModelJudge) -> Callable[[str, int, int], Any]:
    """Replies of a chat model on this machine, which is loaded when the first one is asked for.

    Raises:
        ValueError: It has no chat template.
    """
    import torch

    from trl_ext.feedback.replies import Reply, ReplyError
    from trl_ext.roles import load_base, max_positions
    from trl_ext.scripts.models import placed
    from trl_ext.text import load_tokenizer

    tokenizer = load_tokenizer(judge.model)
    if not tokenizer.chat_template:
        raise ValueError(f"--judge_model {judge.model} has no chat template: name a chat model.")
    loaded: list[Any] = []

    def complete(text: str, attempt: int, seed: int) -> Any:
        if not loaded:
            loaded.append(placed(load_base(judge.model).eval()))
        model = loaded[0]
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        count, limit = asked["input_ids"].shape[1], max_positions(model.config)
        if limit is not None and count + judge.max_tokens > limit:
            raise ReplyError(f"too long: {count} tokens and {judge.max_tokens} of a reply; the model has {limit}")
        sampled = attempt > 0 or judge.temperature > 0
        options = {"do_sample": True, "temperature": judge.temperature or 1.0} if sampled else {"do_sample": False}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            written = model.generate(
                **asked,
                **options,
                max_new_tokens=judge.max_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )[0, count:]
        return Reply(tokenizer.decode(written, skip_special_tokens=True), count, len(written))

    return complete


def ask_model(judge: ModelJudge, pairs: Sequence[Any], asked: Any) -> list[Any]:
    """Verdicts of a model on all pairs, in both orders, with a progress bar."""
    from tqdm.auto import tqdm

    from trl_ext.feedback.judge import judge_pairs, read_judge_prompt

    total = 2 * sum(pair.a.strip() != pair.b.strip() for pair in pairs)
    concurrency = 1 if judge.kind == "local" else judge.concurrency
    with tqdm(total=total, unit="reply") as bar:
        return judge_pairs(
            pairs,
            read_judge_prompt(judge.prompt),
            asked,
            attempts=judge.attempts,
            concurrency=concurrency,
            progress=bar.update,
        )


# ---------------------------------------------------------------------- (c): reward adapters


def adapter_scores(
    base: Any, encoder: Any, folders: Sequence[str | Path], pairs: Sequence[Any], path: Path
) -> list[tuple[float, float] | None]:
    """Scores of both answers of each pair, the mean over reward adapters; kept in a file when they come.

    What another base, other adapters or another `RewardScale` gave stays in the file and is not used.

    Args:
        base: Without adapters, and so afterwards.
        encoder: Of its tokenizer.
        folders: Of the adapters.
        pairs: With answers as texts.
        path: Of the file of scores.

    Returns:
        One for each pair; None where an answer is longer than the model's positions.
    """
    import torch

    from trl_ext import SharedBaseModel
    from trl_ext.feedback.replies import Reply, ReplyCache
    from trl_ext.roles import max_positions, read_adapter
    from trl_ext.roles.folders import adapter_digest
    from trl_ext.scripts.models import facts_of_base
    from trl_ext.text import pad_ids

    adapters = [read_adapter(each, "judge_adapter") for each in folders]
    known = json.dumps([facts_of_base(base), *map(adapter_digest, adapters)])
    cache, limit = ReplyCache(path), max_positions(base.config)
    rows, keys = {}, []
    for pair in pairs:
        both = []
        for text in (pair.a, pair.b):
            ids = encoder.rendered_ids(pair.prompt, encoder.completion(pair.prompt, text))
            key = hashlib.sha256(f"{known} {ids}".encode()).hexdigest()
            both.append(None if limit is not None and len(ids) > limit else key)
            if both[-1] is not None and cache.get(key) is None:
                rows[key] = ids
        keys.append(both)
    waiting = sorted(rows.items(), key=lambda item: len(item[1]))
    if waiting:
        judges = SharedBaseModel(base, None, adapters, with_critic=False).eval()
        for start in range(0, len(waiting), SCORED_AT_A_TIME):
            part = waiting[start : start + SCORED_AT_A_TIME]
            ids, mask = pad_ids([row for _, row in part], encoder.pad_id, left=False, device=judges.input_device)
            with torch.no_grad():
                scores = judges.score(ids, mask)
            for (key, _), score in zip(part, scores.tolist(), strict=True):
                cache.put(key, Reply(repr(score)))
        judges.unload()
    found: list[tuple[float, float] | None] = []
    for a, b in keys:
        replies = (cache.get(a or ""), cache.get(b or ""))
        found.append(None if None in replies else tuple(float(reply.text) for reply in replies))  # type: ignore[union-attr, arg-type]
    return found


def member_scores(
    base: Any, encoder: Any, rewards: Sequence[str | Path], prompts: Sequence[Any], answers: Sequence[str]
) -> tuple[Any, Any]:
    """Normalised scores of N answers by each of M reward models, (N, M), and what makes them raw again, (M,)."""
    import torch

    from trl_ext import SharedBaseModel
    from trl_ext.roles import read_adapter
    from trl_ext.scripts.pipeline import judge_scores

    adapters = [read_adapter(each, "reward_adapter") for each in rewards]
    model = SharedBaseModel(base, None, adapters, with_critic=False).eval()
    rows = [encoder.rendered_ids(p, encoder.completion(p, a)) for p, a in zip(prompts, answers, strict=True)]
    scores = judge_scores(model, encoder, rows)
    model.unload()
    return scores, torch.tensor([1.0 if each.scale is None else each.scale.std for each in adapters])


# ---------------------------------------------------------------------- (d): people


def differing(pairs: Sequence[Any]) -> list[Any]:
    """Pairs that people can be asked about: with two answers that are not empty and not equal."""
    return [pair for pair in pairs if pair.a.strip() != pair.b.strip() and pair.a.strip() and pair.b.strip()]


def wait_for_people(pairs: Sequence[Any], folder: Path, port: int, seed: int) -> None:
    """Show the label page until each pair has a label, or has been skipped, by at least one annotator.

    Ctrl-C ends it; labels stay, and the next call goes on.

    Args:
        pairs: To be labelled.
        folder: Of the annotators' files.
        port: Of the page, on 127.0.0.1.
        seed: Of the sides on which answers stand.

    Raises:
        ValueError: The port is taken.
    """
    from trl_ext.feedback.desk import Desk
    from trl_ext.feedback.labels import LabelFile
    from trl_ext.feedback.page import CRITERIA, serve

    ids = {pair.id for pair in pairs}

    def all_said() -> bool:
        seen: set[str] = set()
        for path in folder.glob("*.jsonl"):
            file = LabelFile(folder, path.stem, ids)
            seen |= {*file.labels, *file.skipped}
        return seen >= ids

    folder.mkdir(parents=True, exist_ok=True)
    if all_said():
        return
    desk = Desk(list(pairs), folder, seed)
    print(f"{len(ids):,} pairs wait for people; labels go to {folder.resolve()}", flush=True)
    serve(
        desk, CRITERIA.read_text(encoding="utf-8"), port=port, tell=lambda line: print(line, flush=True), until=all_said
    )
    if not all_said():
        raise SystemExit("the label page was stopped before all pairs had a label: the same command goes on.")


# ---------------------------------------------------------------------- the result


def show_result(judged: Sequence[Any], title: str, resamples: int, seed: int) -> tuple[dict[str, Any], Any]:
    """A table of wins and rates, and the failures below it; returns them for result.json, and the `WinRate`."""
    from dataclasses import asdict

    from trl_ext.feedback.judge import count_failures
    from trl_ext.feedback.win_rate import win_rate

    result, failures = win_rate(judged, resamples, seed), count_failures(judged)
    print_table(title, ("", "value"), result.rows())
    for kind, count in failures.counts.items():
        print(f"failed, {kind}: {count:,} replies, as {failures.examples[kind]}")
    return asdict(result) | {"failures": dict(failures.counts)}, result
