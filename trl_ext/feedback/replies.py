"""Replies of an OpenAI-compatible endpoint, each kept on disk when it comes, so that a killed run goes on."""

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NEED_EXTRA = "a judge behind an endpoint needs the package openai: pip install 'trl_ext[judge]'."


class ReplyError(ValueError):
    """A request that brought nothing to use: counted, not fatal. The text begins with its kind and a colon."""


class EndpointError(ValueError):
    """The endpoint refuses every request, or does not answer at all."""


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: Of the message.
        input_tokens, output_tokens: As the endpoint counts them; 0 where it does not.
    """

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


class ReplyCache:
    """Key -> reply, in a jsonl file that only grows; a line torn by a kill is cut off when it is opened.

    Args:
        path: The file; made if missing.

    Attributes:
        torn: Bytes that were cut off.

    Raises:
        ValueError: A line before the last that is no reply.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        content = self.path.read_bytes() if self.path.is_file() else b""
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                self._replies[row["key"]] = Reply(row["text"], row["input_tokens"], row["output_tokens"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is no reply: {line[:80]!r}. Delete the line.") from error
        self.torn = len(content) - end
        if self.torn:
            os.truncate(self.path, end)

    def get(self, key: str) -> Reply | None:
        """The reply, if it is there."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; on return it is on disk."""
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False).encode() + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._replies[key] = reply


class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint, through the `openai` client, with a cache.

    Args:
        model: Its name there.
        cache: Where replies are kept.
        base_url: Of the endpoint, as http://127.0.0.1:8000/v1. Default: OpenAI's.
        key: For the endpoint. It is sent, and never written or shown.
        max_tokens: Of a reply.
        temperature: Of the judge.
        timeout: Seconds that a request may take.
        retries: How often the client sends a request again that failed on the way, or that the endpoint was too busy
            for, waiting longer each time.

    Attributes:
        input_tokens, output_tokens: Of what was asked in this run, as the endpoint counts them.
        requests: That brought a reply.

    Raises:
        ImportError: `openai` is missing.
    """

    def __init__(
        self,
        model: str,
        cache: ReplyCache,
        *,
        base_url: str | None = None,
        key: str,
        max_tokens: int = 256,
        temperature: float = 0.0,
        timeout: float = 60.0,
        retries: int = 3,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError(NEED_EXTRA) from error
        self._openai, self._key = openai, key
        self._client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=retries)
        self.model, self.cache = model, cache
        self.settings = {"max_tokens": max_tokens, "temperature": temperature}
        self.where = base_url or "OpenAI"
        self.input_tokens = self.output_tokens = self.requests = 0
        self._lock = threading.Lock()

    def _cache_key(self, text: str, attempt: int) -> str:
        content = json.dumps([self.where, self.model, self.settings, text, attempt], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def knows(self, text: str) -> bool:
        """Whether the first reply to a text is in the cache."""
        return self.cache.get(self._cache_key(text, 0)) is not None

    def ask(self, text: str, attempt: int = 0) -> Reply:
        """The reply to a text, from the cache or from the endpoint.

        Args:
            text: Of the user's message.
            attempt: Replies to the same text are kept apart by it.

        Raises:
            ReplyError: It did not come: time is up, the line is broken, the server failed, or what came is no reply.
            EndpointError: The endpoint refuses: a wrong key, model, address or request.
        """
        key = self._cache_key(text, attempt)
        if (known := self.cache.get(key)) is not None:
            return known
        try:
            create: Any = self._client.chat.completions.create
            answer = create(model=self.model, messages=[{"role": "user", "content": text}], **self.settings)
            content, usage = answer.choices[0].message.content, getattr(answer, "usage", None)
        except self._openai.APIStatusError as error:
            why = self._hide(f"{self.where} answers {error.status_code}: {error.message}")
            if error.status_code in (400, 401, 403, 404, 405, 422):
                raise EndpointError(f"{why}. Correct the model, the address or the key.") from None
            raise ReplyError(f"no reply: {why}") from None
        except self._openai.OpenAIError as error:
            raise ReplyError(self._hide(f"no reply: {self.where}: {error}")) from None
        except (ValueError, AttributeError, IndexError, TypeError) as error:
            raise ReplyError(self._hide(f"no message: {type(error).__name__}: {error}")) from None
        if not isinstance(content, str):
            raise ReplyError(f"no message: the reply of {self.where} has no text")
        reply = Reply(content, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)
        with self._lock:
            self.requests += 1
            self.input_tokens += reply.input_tokens
            self.output_tokens += reply.output_tokens
        self.cache.put(key, reply)
        return reply

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text
