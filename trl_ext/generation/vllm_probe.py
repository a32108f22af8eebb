"""Whether a vLLM server computes what we compute, tried with an adapter that matters before anything is trained.

A fresh LoRA adapter computes what its base does, so a server that ignores adapters, or scales them otherwise, would
pass for right until the policy has moved. The probe publishes the policy's adapter with random numbers in it, lets the
server complete a few prompts of random tokens, and compares the log-probabilities of what comes back with our own.
Where they differ, it tries what else could have given the server's numbers and says what it found.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trl_ext.generation.vllm import VLLMEngine
from trl_ext.generation.vllm_server import Prompt, SamplingParameters, VLLMError
from trl_ext.ops.packing import pack
from trl_ext.roles import Role, SharedBaseModel

LOGGER = logging.getLogger(__name__)
PROMPTS, SHORTEST, LONGEST, TOKENS = 6, 4, 20, 8
MATTERS = 8.0  # times the tolerance: by so much the probe's adapter moves log-probabilities, or it is made larger
SIZE, LARGER, ROUNDS = 0.1, 2.0, 8
NEAR = 0.2  # nats: what another dtype or quantisation of the same weights can make
TEXT = "The quick brown fox isn't 42 years old, naïve?\n"
Rows = list[tuple[list[int], list[int]]]


def checked_engine(
    model: SharedBaseModel,
    options: Any,
    parameters: SamplingParameters,
    tokenizer: Any,
    folder: str | Path,
    *,
    owner: str | Path | None = None,
    longest: int | None = None,
    seed: int = 0,
) -> VLLMEngine:
    """A `VLLMEngine` that computes what the model does; arguments and errors are its and those of `check_server`."""
    engine = VLLMEngine(model, options, folder, owner)
    check_server(engine, parameters, tokenizer, longest, seed)
    return engine


def check_server(
    engine: VLLMEngine, parameters: SamplingParameters, tokenizer: Any, longest: int | None = None, seed: int = 0
) -> float:
    """Compare the server with the model, and leave both as they were. Every process calls it, the main one works.

    Args:
        engine: Of a model that is not split over processes yet.
        parameters: Of the run; the probe samples at its temperature.
        tokenizer: The model's: for tokens that are no special ones, and to say whether the server's is another.
        longest: Tokens of the longest prompt and its completion, where that is known.
        seed: Of the probe's numbers.

    Returns:
        The mean difference of log-probabilities, nats a token.

    Raises:
        VLLMError: What differs, and what to change; on every process.
    """
    return engine.on_main(lambda: _check(engine, parameters, tokenizer, longest, seed))


def _check(engine: VLLMEngine, parameters: SamplingParameters, tokenizer: Any, longest: int | None, seed: int) -> float:
    model, tolerance = engine.model, engine.options.vllm_max_logp_difference
    room = engine.max_model_len
    if room is not None and longest is not None and longest > room:
        raise VLLMError(
            f"the longest prompt and its completion take {longest} tokens, and {engine.server.url} takes {room}: start "
            f"it with --max-model-len {longest}, or lower max_completion_length."
        )
    short = min(TOKENS, parameters.max_tokens)
    parameters = replace(parameters, max_tokens=short, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    prompts = random_prompts(tokenizer, seed, None if room is None else room - short)
    training = model.training
    model.eval()
    try:
        size = SIZE
        for _ in range(ROUNDS):
            with random_adapter(model, seed, size):
                rows, theirs = _sampled(engine, prompts, parameters, seed)
                ours = our_logps(model, rows, parameters.temperature)
                bare = our_logps(model, rows, parameters.temperature, bare=True)
            if difference(ours, bare) >= MATTERS * tolerance:
                break
            size *= LARGER
        found = difference(theirs, ours)
        if not found <= tolerance:
            with random_adapter(model, seed, size):
                raw = our_logps(model, rows, 1.0)
            why = _cause(engine, parameters, tokenizer, prompts, seed, theirs, bare, raw)
            raise VLLMError(
                f"{engine.server.url} (vLLM {engine.server.version()}) gives log-probabilities that are "
                f"{found:.3g} nats a token from ours on average, more than vllm_max_logp_difference={tolerance:g}, for "
                f"a random adapter and {sum(map(len, theirs))} tokens. {why}"
            )
    finally:
        model.train(training)
    LOGGER.info("the vLLM server's log-probabilities are ours to %.2g nats a token on average.", found)
    return found


def _sampled(
    engine: VLLMEngine, prompts: list[list[int]], parameters: SamplingParameters, seed: int, base: bool = False
) -> tuple[Rows, list[list[float]]]:
    """Prompts with the server's completions, and its log-probabilities, under the policy's adapter as it is now."""
    name = engine.base
    if not base:
        adapter = engine.model.plain_adapter(Role.POLICY)
        assert adapter is not None
        name = engine.versions.publish(adapter)
    asked = [Prompt(tuple(ids), 1, seed + i) for i, ids in enumerate(prompts)]
    try:
        found = [each[0] for each in engine.server.complete(name, asked, parameters)]
    finally:
        if not base:
            engine.versions.retire(name)
    if not any(completion.ids for completion in found):
        raise VLLMError(f"{engine.server.url} completes prompts with nothing. Look at its log.")
    rows = [(ids, completion.ids) for ids, completion in zip(prompts, found, strict=True)]
    return rows, [completion.logps for completion in found]


def _cause(
    engine: VLLMEngine,
    parameters: SamplingParameters,
    tokenizer: Any,
    prompts: list[list[int]],
    seed: int,
    theirs: list[list[float]],
    bare: list[list[float]],
    raw: list[list[float]],
) -> str:
    """What would explain the server's numbers, and what to do.

    Args:
        engine, parameters, tokenizer, prompts, seed: Those of the probe.
        theirs: The server's log-probabilities.
        bare: Ours of the same tokens without the adapter.
        raw: Ours at a temperature of 1.
    """
    tolerance = engine.options.vllm_max_logp_difference
    if difference(theirs, bare) <= tolerance:
        return (
            "They are those of the base: the server loads the adapter and ignores it. This engine has no adapters for "
            "the layers in target_modules: name others, or use another version of vLLM."
        )
    if parameters.temperature != 1 and difference(theirs, raw) <= tolerance:
        return (
            f"They are those of temperature 1, and the run samples at {parameters.temperature:g}: start the server "
            "with --logprobs-mode processed_logprobs."
        )
    rows, base_theirs = _sampled(engine, prompts, parameters, seed, base=True)
    of_bases = difference(base_theirs, our_logps(engine.model, rows, parameters.temperature, bare=True))
    if of_bases <= tolerance:
        return (
            f"Without an adapter the difference is {of_bases:.2g}: the base is the same, and the adapter is computed "
            "in another way. Some of its layers may have no adapter in this engine (target_modules), or its type is "
            "coarse: try --lora-dtype, fewer target_modules, or another version of vLLM."
        )
    tokens = engine.server.tokenize(TEXT)
    if tokens is not None and tokens != tokenizer(TEXT, add_special_tokens=False)["input_ids"]:
        return (
            f"Without an adapter they differ too, by {of_bases:.3g}, and so do the tokenizers: the server has another "
            "model. Start it with the base of this run."
        )
    if of_bases <= NEAR:
        return (
            f"Without an adapter they differ too, by {of_bases:.3g}, as another type or quantisation of the weights "
            "makes it: start the server with the --dtype and quantisation of this run, 4 bits from a bfloat16 "
            "checkpoint; or raise vllm_max_logp_difference, and the importance weights make up for it."
        )
    return (
        f"Without an adapter they differ too, by {of_bases:.3g}: the server has another model or revision. Start it "
        "with the base of this run."
    )


# ---------------------------------------------------------------------- ours


@torch.no_grad()
def our_logps(model: SharedBaseModel, rows: Rows, temperature: float, bare: bool = False) -> list[list[float]]:
    """Log-probabilities of completions by the policy; `bare`: by the base alone."""
    parts = pack([[[*prompt, *ids]] for prompt, ids in rows], [[len(prompt)] for prompt, _ in rows], 0, share=False)
    parts = [part.to(model.input_device) for part in parts]
    if bare:
        with _silent(model):
            logps = model(parts=parts, roles=(Role.POLICY,), temperature=temperature)["logps"]
    else:
        logps = model(parts=parts, roles=(Role.POLICY,), temperature=temperature)["logps"]
    return [row[: len(ids)] for row, (_, ids) in zip(logps.tolist(), rows, strict=True)]


def difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Mean of |a - b| over all tokens; infinite where one is no number."""
    pairs = [(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]
    mean = sum(abs(x - y) for x, y in pairs) / max(len(pairs), 1)
    return mean if math.isfinite(mean) else math.inf


def random_prompts(tokenizer: Any, seed: int, room: int | None = None) -> list[list[int]]:
    """Token ids that are no special ones, in rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    usual = [i for i in range(len(tokenizer)) if i not in special]
    longest = LONGEST if room is None else max(min(LONGEST, room), 1)
    rows = []
    for i in range(PROMPTS):
        length = min(SHORTEST + i * (LONGEST - SHORTEST) // max(PROMPTS - 1, 1), longest)
        rows.append([usual[j] for j in torch.randint(len(usual), (length,), generator=generator).tolist()])
    return rows


def _policy_weights(model: SharedBaseModel) -> dict[str, torch.nn.Parameter]:
    named = model.named_parameters()
    return {name: p for name, p in named if "lora_" in name and model.owner(name) is Role.POLICY}


@contextmanager
def random_adapter(model: SharedBaseModel, seed: int, size: float) -> Iterator[None]:
    """Inside the block the policy's adapter holds random numbers: it adds about `size` to unit inputs of a layer."""
    weights = _policy_weights(model)
    generator = torch.Generator().manual_seed(seed)
    with _kept(weights):
        for name, weight in weights.items():
            scale = 1 / math.sqrt(weight.shape[1])
            values = torch.randn(weight.shape, generator=generator) * (scale if "lora_A" in name else scale * size)
            weight.data.copy_(values)
        yield


@contextmanager
def _silent(model: SharedBaseModel) -> Iterator[None]:
    """Inside the block the policy computes what the base does."""
    weights = {name: weight for name, weight in _policy_weights(model).items() if "lora_B" in name}
    with _kept(weights):
        for weight in weights.values():
            weight.data.zero_()
        yield


@contextmanager
def _kept(weights: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(kept[name])
