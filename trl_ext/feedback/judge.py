"""Two policies compared by a chat model, at an endpoint or on this machine: every pair in both orders.

A judge prefers what stands first, or last (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena",
arXiv 2306.05685, section 3.3): a verdict that changes with the order is a tie here, and counted as inconsistent.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trl_ext.data.reading import read_json_rows
from trl_ext.data.rows import RowError, is_list, shorten
from trl_ext.feedback.desk import show_conversation
from trl_ext.feedback.pairs import Pair, Prompt, pair_id
from trl_ext.feedback.replies import EndpointError, Reply, ReplyError

PROMPTS = Path(__file__).parent / "judges"
PLACEHOLDERS = ("{conversation}", "{first}", "{second}")
ANSWER_COLUMNS = ("answer", "response", "completion")
SAID = ("first", "second", "tie")
FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)
GIVE_UP = 5  # requests that fail one after another before any has succeeded
CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate


class Asks(Protocol):
    """What is asked: `replies.Endpoint` or `local_model.LocalModel`."""

    def ask(self, text: str, attempt: int = 0) -> Reply: ...
    def knows(self, text: str) -> bool: ...


@dataclass(frozen=True)
class Judged:
    """What the judge said of a pair.

    Attributes:
        pair: With the answers of A and B.
        verdict: "a", "b", "tie"; "failed" where one of the two orders has no verdict.
        consistent: Whether both orders say the same; True for equal answers, which nobody is asked about.
        said: In the order (A first, B first): "a", "b", "tie", or None where it failed.
        failures: Why an order has no verdict.
    """

    pair: Pair
    verdict: str
    consistent: bool
    said: tuple[str | None, str | None]
    failures: tuple[str, ...] = ()


@dataclass
class Estimate:
    """What a run will need, before it starts.

    Attributes:
        requests: That are not in the cache.
        input_tokens: About, by characters.
        output_tokens: At most, if no request has to be repeated.
        cost: In the currency of the prices; None without them.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "cost unknown without prices" if self.cost is None else f"cost about {self.cost:.2f}"
        tokens = f"about {self.input_tokens:,} tokens in, at most {self.output_tokens:,} out"
        return f"{self.requests:,} requests, {tokens}; {cost}"


# ---------------------------------------------------------------------- answers


def read_answers(path: str | Path) -> dict[str, tuple[Prompt, str]]:
    """Answers of a policy: prompt, as a key -> prompt and answer.

    A row of the jsonl file has `prompt` and `answer` (or `response`, `completion`, or `responses` with one).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row without them, or a prompt that is there twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {Path(path).resolve()}: name a jsonl file with prompt and answer.")
    found: dict[str, tuple[Prompt, str]] = {}
    for number, row in enumerate(read_json_rows(path)):
        try:
            if isinstance(row, RowError):
                raise row
            prompt, answer = _answered(row)
        except RowError as error:
            raise ValueError(f"{path}, row {number}: {error}. Mend or remove the line.") from error
        key = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
        if key in found:
            raise ValueError(
                f"{path}, row {number}: its prompt is there twice. Each prompt has one answer: remove one."
            )
        found[key] = (prompt, answer)
    if not found:
        raise ValueError(f"{path} has no answers: give at least one row.")
    return found


def _answered(row: Any) -> tuple[Prompt, str]:
    prompt = row.get("prompt")
    messages = is_list(prompt) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt)
    if not prompt or not (isinstance(prompt, str) or messages):
        raise RowError("no prompt", f"prompt is {shorten(prompt)}, neither a text nor messages")
    if not isinstance(prompt, str):
        prompt = [{"role": str(m.get("role")), "content": m["content"]} for m in prompt]
    answer: Any = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    responses: Any = row.get("responses")
    if answer is None and is_list(responses) and len(responses) == 1:
        answer = responses[0]
    if is_list(answer) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    if not isinstance(answer, str):
        raise RowError("no answer", f"the row has {sorted(row)}; give the text as {', '.join(ANSWER_COLUMNS)}")
    return prompt, answer


def match_answers(a: dict[str, tuple[Prompt, str]], b: dict[str, tuple[Prompt, str]]) -> tuple[list[Pair], int]:
    """Pairs of the answers of A and of B to the same prompts, in A's order; and how many prompts only one has.

    Raises:
        ValueError: No prompt is in both.
    """
    pairs = [Pair(pair_id(p, x, b[key][1]), p, x, b[key][1]) for key, (p, x) in a.items() if key in b]
    if not pairs:
        raise ValueError("the two files of answers have no prompt in common: sample both from the same prompts.")
    return pairs, len(a) + len(b) - 2 * len(pairs)


# ---------------------------------------------------------------------- the judge


def read_judge_prompt(name: str) -> str:
    """The text of a judge: the name of one that is there, or a file of one's own.

    Raises:
        ValueError: There is none, or {conversation}, {first} or {second} is missing or there twice.
    """
    path = Path(name) if Path(name).suffix else PROMPTS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in PROMPTS.glob("*.txt")))
        raise ValueError(f"judge_prompt={name!r}: there is no file {path}. Use {known}, or a text file of your own.")
    text = path.read_text(encoding="utf-8")
    for placeholder in PLACEHOLDERS:
        if text.count(placeholder) != 1:
            raise ValueError(f"{path} has {placeholder} {text.count(placeholder)} times: it must stand there once.")
    return text


def fill_prompt(template: str, prompt: Prompt, first: str, second: str) -> str:
    """The judge's prompt for two answers; what looks like a placeholder inside them stays text."""
    values = dict(zip(PLACEHOLDERS, (show_conversation(prompt), first, second), strict=True))
    return re.sub("|".join(map(re.escape, PLACEHOLDERS)), lambda match: values[match.group()], template)


def parse_reply(text: str) -> str:
    """The verdict of a reply, "first", "second" or "tie": one JSON object, perhaps in a code fence, and nothing else.

    Raises:
        ReplyError: Prose, half a JSON, or another verdict.
    """
    fenced = FENCE.match(text.strip())
    try:
        content = json.loads(fenced.group(1) if fenced else text)
    except ValueError:
        raise ReplyError(f"no JSON: {shorten(text)}") from None
    verdict = content.get("verdict") if isinstance(content, dict) else None
    if verdict not in SAID:
        raise ReplyError(f"no verdict: {shorten(text)}")
    return verdict


def judge_pairs(
    pairs: Sequence[Pair],
    template: str,
    endpoint: Asks,
    *,
    attempts: int = 3,
    concurrency: int = 4,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Judged]:
    """Ask about every pair in both orders.

    Args:
        pairs: a is the answer of policy A, b of B.
        template: See `read_judge_prompt`.
        endpoint: What is asked, `replies.Endpoint` or `local_model.LocalModel`; replies are kept on disk.
        attempts: How often a reply without a verdict is asked for.
        concurrency: Requests at a time.
        progress: Called with the number of requests that are done since the last call.

    Returns:
        One record a pair, in order.

    Raises:
        EndpointError: The endpoint refuses, or `GIVE_UP` requests failed before any succeeded.
    """
    asked = [pair for pair in pairs if pair.a.strip() != pair.b.strip()]
    texts = [
        fill_prompt(template, pair.prompt, *answers)
        for pair in asked
        for answers in ((pair.a, pair.b), (pair.b, pair.a))
    ]
    outcomes = _ask_all(texts, endpoint, attempts, concurrency, progress)
    sides = {"first": ("a", "b"), "second": ("b", "a"), "tie": ("tie", "tie")}
    judged = {}
    for i, pair in enumerate(asked):
        both = outcomes[2 * i : 2 * i + 2]
        said = tuple(sides[out][order] if out in sides else None for order, (out, _) in enumerate(both))
        judged[pair.id] = _decide(pair, (said[0], said[1]), tuple(why for out, why in both if why))
    return [judged.get(pair.id) or Judged(pair, "tie", True, ("tie", "tie")) for pair in pairs]


def _decide(pair: Pair, said: tuple[str | None, str | None], failures: tuple[str, ...]) -> Judged:
    if None in said:
        return Judged(pair, "failed", False, said, failures)
    same = said[0] == said[1]
    return Judged(pair, str(said[0]) if same else "tie", same, said)


Outcome = tuple[str, str]  # verdict or "", and why there is none


def _ask_all(
    texts: Sequence[str], endpoint: Asks, attempts: int, concurrency: int, progress: Callable[[int], Any]
) -> list[Outcome]:
    """A verdict for each text, or why there is none; a bounded number of requests is under way."""
    outcomes: list[Outcome] = [("", "")] * len(texts)
    waiting = iter(enumerate(texts))
    running: dict[Future[Outcome], int] = {}
    succeeded, lost = False, 0
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while len(running) < concurrency and (following := next(waiting, None)) is not None:
                    index, text = following
                    running[pool.submit(_verdict, text, endpoint, attempts)] = index
                if not running:
                    return outcomes
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    outcomes[index] = future.result()
                    unreached = outcomes[index][1].startswith("no reply")
                    succeeded, lost = succeeded or not unreached, lost + unreached
                    if not succeeded and lost >= min(GIVE_UP, len(texts)):
                        raise EndpointError(
                            f"the judge does not answer: {outcomes[index][1]}. Look at base_url, and at the server."
                        )
                    progress(1)
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _verdict(text: str, endpoint: Asks, attempts: int) -> Outcome:
    why = ""
    for attempt in range(attempts):
        try:
            reply = endpoint.ask(text, attempt)
            return parse_reply(reply.text), ""
        except ReplyError as error:
            why = str(error)
            if why.startswith(("no reply", "too long")):  # the client has tried again already; it stays too long
                break
    return "", why


def estimate_cost(
    pairs: Iterable[Pair],
    template: str,
    endpoint: Asks,
    max_tokens: int,
    price_input: float | None = None,
    price_output: float | None = None,
) -> Estimate:
    """What judging will need.

    Args:
        pairs: To be judged.
        template: Of the judge.
        endpoint: Knows what is in its cache.
        max_tokens: Of a reply.
        price_input, price_output: For a million tokens.
    """
    requests = characters = 0
    for pair in pairs:
        for answers in ((pair.a, pair.b), (pair.b, pair.a)):
            text = fill_prompt(template, pair.prompt, *answers)
            if pair.a.strip() != pair.b.strip() and not endpoint.knows(text):
                requests, characters = requests + 1, characters + len(text)
    tokens_in, tokens_out = characters // CHARACTERS_PER_TOKEN, requests * max_tokens
    cost = None
    if price_input is not None and price_output is not None:
        cost = (tokens_in * price_input + tokens_out * price_output) / 1e6
    return Estimate(requests, tokens_in, tokens_out, cost)


@dataclass
class Failures:
    """Why pairs have no verdict: kind of failure -> how many orders, and one example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def count_failures(judged: Iterable[Judged]) -> Failures:
    """The failures of a run, by kind: "no reply", "no JSON", "no verdict", "too long", "no score", "no label"."""
    found = Failures()
    for record in judged:
        for why in record.failures:
            kind, _, detail = why.partition(":")
            found.counts[kind] += 1
            found.examples.setdefault(kind, detail.strip())
    return found
