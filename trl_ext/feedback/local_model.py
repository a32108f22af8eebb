"""A chat model on this machine as a judge: asked as an endpoint is, its replies kept on disk when they come."""

import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

from trl_ext.feedback.replies import Reply, ReplyCache


class LocalModel:
    """Asks a function for replies, one at a time, each text only once.

    Args:
        name: Of the model; replies of other models in the cache are not taken for its own.
        cache: Where replies are kept.
        complete: (text, attempt, seed) -> reply. The first attempt is 0; further ones are made when its reply cannot be
            used, and must not repeat it. Raises `ReplyError` where there is none to be had.
        settings: What else decides the replies.

    Attributes:
        input_tokens, output_tokens, requests: Of what was asked in this run.
    """

    where = "this machine"

    def __init__(
        self,
        name: str,
        cache: ReplyCache,
        complete: Callable[[str, int, int], Reply],
        settings: dict[str, Any] | None = None,
    ):
        self.model, self.cache, self._complete, self.settings = name, cache, complete, settings or {}
        self.input_tokens = self.output_tokens = self.requests = 0
        self._lock = threading.Lock()

    def _key(self, text: str, attempt: int) -> str:
        content = json.dumps(["local", self.model, self.settings, text, attempt], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def knows(self, text: str) -> bool:
        """Whether the first reply to a text is in the cache."""
        return self.cache.get(self._key(text, 0)) is not None

    def ask(self, text: str, attempt: int = 0) -> Reply:
        """The reply to a text, from the cache or from the model.

        Raises:
            ReplyError: There is none, as where the text is too long.
        """
        key = self._key(text, attempt)
        with self._lock:
            known = self.cache.get(key)
            if known is not None:
                return known
            reply = self._complete(text, attempt, int(key[:12], 16))
            self.requests += 1
            self.input_tokens += reply.input_tokens
            self.output_tokens += reply.output_tokens
            self.cache.put(key, reply)
        return reply
