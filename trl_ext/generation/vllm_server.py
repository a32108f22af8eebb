"""A client of vLLM's HTTP server: adapters are loaded and unloaded, token ids go out, token ids and numbers come back.

What comes back is checked against what was asked, since a wrong number of tokens or of log-probabilities would be
trained on. A request without an effect (a completion, the health) is sent again when the connection breaks or the
answer is torn; loading an adapter never is, because nobody knows whether a lost request was carried out.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from trl_ext.generation.spread import spread

CONNECTIONS = 128  # requests under way at once; the server batches them
TRIES = 3  # of a request without an effect
SECONDS_BETWEEN = 1.0
CONNECT_SECONDS = 10.0
TOLD = 400  # characters of an answer in an error


class VLLMError(RuntimeError):
    """The vLLM server cannot be reached, refuses, or answers something else than was asked; says what to do."""


class UnknownModelError(VLLMError):
    """The server does not know the adapter: it was restarted."""


class BadAnswerError(VLLMError):
    """An answer that is torn, or that does not fit its question."""


@dataclass(frozen=True)
class SamplingParameters:
    """What completions are drawn from. All of it is sent: a server's own defaults may come from the base's files.

    Attributes:
        max_tokens: Longest completion.
        stop_token_ids: What ends one; nothing else does.
        temperature, top_p, top_k, min_p, repetition_penalty: As in transformers; `top_k` 0 is off.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def body(self) -> dict[str, Any]:
        """As fields of a request."""
        return {
            "max_tokens": self.max_tokens,
            "min_tokens": 0,
            "stop": [],
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": True,  # the server's own idea of an end; ours are the stop tokens
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "watermarking": False,
            "use_beam_search": False,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "echo": False,
            "stream": False,
            "logprobs": 0,
            "return_token_ids": True,
        }


@dataclass(frozen=True)
class Prompt:
    """Token ids to complete, how often, and the seed of the random numbers."""

    ids: tuple[int, ...]
    count: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """Token ids up to and with the end token, and the log-probability of each under what sampled it."""

    ids: list[int]
    logps: list[float]


class VLLMServer:
    """A vLLM server by its address. Proxies of the environment are not used; `VLLM_API_KEY` is sent where it is set.

    Args:
        url: http://host:port.
        timeout: Seconds that a request may take.
        wait: Seconds to wait for a server that does not answer.
    """

    def __init__(self, url: str, timeout: float = 600.0, wait: float = 300.0):
        self.url, self.timeout, self.wait = url.rstrip("/"), timeout, wait
        self._local = threading.local()

    # ------------------------------------------------------------------ what there is

    def wait_until_healthy(self) -> None:
        """Wait for an answer to /health.

        Raises:
            VLLMError: None came in time.
        """
        end, seen = time.monotonic() + self.wait, "no answer"
        while True:
            try:
                answer = self._session().get(f"{self.url}/health", timeout=(CONNECT_SECONDS, CONNECT_SECONDS))
                if answer.ok:
                    return
                seen = f"status {answer.status_code}"
            except requests.RequestException as error:
                seen = type(error).__name__
            if time.monotonic() >= end:
                raise VLLMError(
                    f"the vLLM server at {self.url} did not answer for {self.wait:g} s ({seen}). Start it "
                    "(`trl-ext vllm-serve` prints the command), correct vllm_server_url, or raise vllm_wait."
                )
            time.sleep(min(SECONDS_BETWEEN, max(end - time.monotonic(), 0.01)))

    def version(self) -> str | None:
        """Of vLLM; None where the server does not say."""
        answer = self._again(lambda: self._get("/version", missing_is_none=True))
        return None if answer is None else str(answer.get("version"))

    def models(self) -> list[dict[str, Any]]:
        """The base and the adapters: `id`, `parent` (None of a base), `root` (where it lies), `max_model_len`."""
        answer = self._again(lambda: self._get("/v1/models"))
        return list((answer or {}).get("data") or [])

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text without special tokens, by the server's tokenizer; None where it does not say."""
        try:
            answer = self._post("/tokenize", {"prompt": text, "add_special_tokens": False})
        except VLLMError:
            return None
        return answer.get("tokens")

    # ------------------------------------------------------------------ adapters

    def load(self, name: str, path: str) -> None:
        """Load an adapter under a name that it has not had before.

        Raises:
            VLLMError: The server did not, or it is not known whether it did.
        """
        try:
            status, text = self._send("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except requests.RequestException as error:
            raise VLLMError(
                f"the connection to {self.url} broke while the adapter {path} was loaded "
                f"({type(error).__name__}): whether it is there is not known. Look at the server's log."
            ) from error
        if status != 200:
            raise VLLMError(f"{self.url} did not load the adapter {path}: {_told(text)} {remedy(status, text)}")

    def unload(self, name: str) -> None:
        """Unload an adapter; one that the server does not have is no error.

        Raises:
            VLLMError: It is there and stays, or the server does not answer.
        """
        try:
            status, text = self._send("/v1/unload_lora_adapter", {"lora_name": name})
        except requests.RequestException as error:
            raise VLLMError(f"{self.url} did not unload {name}: {type(error).__name__}.") from error
        if status not in (200, 404):
            raise VLLMError(f"{self.url} did not unload {name}: {_told(text)}")

    # ------------------------------------------------------------------ completions

    def complete(
        self,
        model: str,
        prompts: Sequence[Prompt],
        parameters: SamplingParameters,
        stop: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """Complete prompts, each in a request of its own, with a seed of its own.

        Args:
            model: Name of an adapter, or of the base.
            prompts: In any number.
            parameters: Of all of them.
            stop: Once it is set no request is begun any more.

        Returns:
            For each prompt, in order, its completions.

        Raises:
            UnknownModelError: The server does not know the adapter.
            VLLMError: It cannot be reached, refuses, or answers something else, after `TRIES` tries; or it was stopped.
        """
        common = parameters.body()

        def ask(prompt: Prompt) -> list[Completion]:
            if stop is not None and stop.is_set():
                raise VLLMError("these completions are not wanted any more.")
            body = common | {"model": model, "prompt": list(prompt.ids), "n": prompt.count, "seed": prompt.seed}
            return self._again(lambda: completions_of(self._post("/v1/completions", body), prompt, parameters))

        return spread(ask, prompts, CONNECTIONS)

    # ------------------------------------------------------------------ requests

    def _again(self, request: Callable[[], Any]) -> Any:
        """Make a request without an effect, again where the connection breaks or the answer is no answer."""
        for left in reversed(range(TRIES)):
            try:
                return request()
            except requests.ReadTimeout as error:
                raise VLLMError(
                    f"{self.url} took more than {self.timeout:g} s for a request. Raise vllm_timeout, or shorten "
                    "completions."
                ) from error
            except requests.RequestException as error:
                if not left:
                    raise VLLMError(
                        f"the connection to {self.url} broke {TRIES} times ({type(error).__name__}: "
                        f"{str(error)[:TOLD]}). Look at the server's log."
                    ) from error
                self.wait_until_healthy()
            except BadAnswerError:
                if not left:
                    raise
                self.wait_until_healthy()
        raise AssertionError("unreachable")

    def _session(self) -> requests.Session:
        """The thread's own: sessions are not made to be shared."""
        if not hasattr(self._local, "session"):
            self._local.session = _new_session()
        return self._local.session

    def _send(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Once, on a new connection: one that was kept may be closed by now, and the request could not be repeated."""
        with _new_session() as session:
            answer = session.post(f"{self.url}{path}", json=body, timeout=(CONNECT_SECONDS, self.timeout))
            return answer.status_code, answer.text

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._session().post(f"{self.url}{path}", json=body, timeout=(CONNECT_SECONDS, self.timeout))
        return self._read(answer, path, body.get("model"))

    def _get(self, path: str, missing_is_none: bool = False) -> Any:
        answer = self._session().get(f"{self.url}{path}", timeout=(CONNECT_SECONDS, self.timeout))
        return None if missing_is_none and answer.status_code == 404 else self._read(answer, path)

    def _read(self, answer: requests.Response, path: str, model: str | None = None) -> Any:
        """The answer's content.

        Raises:
            UnknownModelError, BadAnswerError, VLLMError: It has none.
        """
        if answer.status_code == 404 and model is not None and model in answer.text:
            raise UnknownModelError(f"{self.url} knows no model or adapter {model!r}: {_told(answer.text)}")
        if answer.status_code >= 500:
            raise BadAnswerError(f"{self.url}{path} failed with {answer.status_code}: {_told(answer.text)}")
        if not answer.ok:
            raise VLLMError(f"{self.url}{path} refused with {answer.status_code}: {_told(answer.text)}")
        try:
            content = answer.json()
        except requests.JSONDecodeError as error:
            raise BadAnswerError(f"{self.url}{path} gave no JSON: {_told(answer.text)!r}") from error
        if not isinstance(content, dict):
            raise BadAnswerError(f"{self.url}{path} gave {_told(answer.text)!r} where an object was asked for.")
        return content


def _new_session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    key = os.environ.get("VLLM_API_KEY")
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def completions_of(answer: dict[str, Any], prompt: Prompt, parameters: SamplingParameters) -> list[Completion]:
    """The completions in an answer of /v1/completions, in their order.

    Raises:
        BadAnswerError: Not as many as asked for, or one that no sampling with these parameters gives.
        VLLMError: A server that cannot say token ids, or that sampled with other parameters.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadAnswerError(f"an answer without choices: {_told(str(answer))}")
    by_index = {choice.get("index"): choice for choice in choices}
    if len(choices) != prompt.count or set(by_index) != set(range(prompt.count)):
        raise BadAnswerError(
            f"{prompt.count} completions were asked for, and those numbered {[c.get('index') for c in choices]} came."
        )
    return [_completion(by_index[i], prompt, parameters) for i in range(prompt.count)]


def _completion(choice: dict[str, Any], prompt: Prompt, parameters: SamplingParameters) -> Completion:
    ids, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    read = choice.get("prompt_token_ids")
    if ids is None:
        raise VLLMError("the server gives no token ids (`return_token_ids`): use vLLM 0.10.2 or later.")
    if read is not None and list(read) != list(prompt.ids):
        raise VLLMError(
            f"the server completed a prompt of {len(read)} tokens where one of {len(prompt.ids)} was sent: it cuts "
            "prompts, or adds tokens to them. Start it without options that do."
        )
    if not ids and not logps:
        return Completion([], [])
    if not isinstance(ids, list) or not isinstance(logps, list) or len(ids) != len(logps):
        raise BadAnswerError(
            f"a completion of {len(ids)} tokens with {len(logps) if isinstance(logps, list) else 'no'} "
            "log-probabilities."
        )
    if not all(type(i) is int and i >= 0 for i in ids) or len(ids) > parameters.max_tokens:
        raise BadAnswerError(
            f"a completion of {len(ids)} tokens, at most {parameters.max_tokens} were asked for: {ids}"
        )
    if not all(isinstance(logp, int | float) and math.isfinite(logp) for logp in logps):
        raise BadAnswerError(f"log-probabilities that are no numbers: {logps}")
    reason, ended = choice.get("finish_reason"), ids[-1] in parameters.stop_token_ids
    if reason not in ("stop", "length"):
        raise BadAnswerError(f"a completion that ended with {reason!r}.")
    if any(i in parameters.stop_token_ids for i in ids[:-1]) or (reason == "stop" and not ended):
        raise VLLMError(
            f"a completion that did not end at one of our end tokens {list(parameters.stop_token_ids)} and there only: "
            f"{ids}. The server ends completions by rules of its own (stop strings, another end token): start it "
            "without them."
        )
    if reason == "length" and not ended and len(ids) < parameters.max_tokens:
        raise VLLMError(
            f"a completion was cut after {len(ids)} of {parameters.max_tokens} tokens: prompts and completions do not "
            "fit the server. Start it with a larger --max-model-len, or lower max_completion_length."
        )
    return Completion(list(ids), [float(logp) for logp in logps])


def _told(text: str) -> str:
    """What an answer says, short."""
    found = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    return (found.group(1) if found else text)[:TOLD]


def remedy(status: int, text: str) -> str:
    """What to do about an adapter that was not loaded."""
    said = text.lower()
    if "rank" in said:
        return "Start the server with --max-lora-rank of at least the adapter's largest rank."
    if "target" in said or "unexpected" in said or "supported" in said:
        return "The engine has no adapter for some of the layers: leave them out of target_modules."
    if any(words in said for words in ("no adapter found", "no such file", "does not exist")):
        return "The server must see the folder under the same path: set vllm_adapter_dir to one that both see."
    if status in (404, 405):
        return "Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and --enable-lora."
    return "Its log says more."
