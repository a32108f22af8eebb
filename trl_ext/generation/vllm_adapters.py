"""Versions of an adapter at a vLLM server: a new name, id and path for each, the old ones unloaded and removed.

A name that comes twice would keep the adapter that had it first, and a path that comes twice the prefix cache of what
lay there before; neither is an error for the server.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import threading
import uuid
from pathlib import Path

from trl_ext.generation.vllm_server import VLLMError, VLLMServer
from trl_ext.roles import AdapterWeights
from trl_ext.roles.adapters import write_adapter

LOGGER = logging.getLogger(__name__)
PREFIX = "trl-ext"
UNFINISHED = ".unfinished-"
CLOSE_SECONDS = 10.0  # that a server is given to unload at the end of a process


class AdapterVersions:
    """Puts adapters before a server and takes them away again. Names begin with the owner's, so that others stay.

    Args:
        server: Loads and unloads.
        folder: Seen by this process and by the server under the same path.
        owner: Who publishes, the same after a crash: the folder that a run writes to. What an earlier process of this
            owner has left, at the server and on disk, is taken away here.

    Attributes:
        user: A thread that samples from a version. Nothing is loaded or unloaded before it ends: an engine that has
            room for one adapter would push out the one that it computes with.
    """

    def __init__(self, server: VLLMServer, folder: str | Path, owner: str | Path):
        digest = hashlib.sha256(str(Path(owner).resolve()).encode()).hexdigest()[:10]
        self.server, self.prefix = server, f"{PREFIX}-{digest}"
        self.folder = Path(folder).resolve() / self.prefix
        self.count = 0
        self.user: threading.Thread | None = None
        self._loaded: dict[str, Path] = {}  # of this process, by name
        for model in server.models():
            if model.get("parent") is not None and str(model.get("id", "")).startswith(f"{self.prefix}-"):
                self._loaded[str(model["id"])] = self.folder / str(model["id"])
        for name in list(self._loaded):
            self.retire(name)
        if self.folder.is_dir():
            own = re.compile(rf"({re.escape(UNFINISHED)})?{re.escape(self.prefix)}-\d+-[0-9a-f]+")
            for left in self.folder.iterdir():
                if own.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing samples in another thread; False: something still does."""
        if self.user is not None and self.user is not threading.current_thread():
            self.user.join(seconds)
            return not self.user.is_alive()
        return True

    def publish(self, adapter: AdapterWeights) -> str:
        """Write a version, whole or not at all, and load it.

        Returns:
            Its name at the server.

        Raises:
            VLLMError: The server did not load it; it is removed again.
        """
        self.wait()
        self.count += 1
        name = f"{self.prefix}-{self.count}-{uuid.uuid4().hex[:12]}"
        path, aside = self.folder / name, self.folder / f"{UNFINISHED}{name}"
        self._loaded[name] = path  # also where loading fails: nobody knows whether it was carried out
        try:
            write_adapter(aside, adapter)
            os.replace(aside, path)
            self.server.wait_until_healthy()
            self.server.load(name, str(path))
        except BaseException:
            for left in (aside, path):
                shutil.rmtree(left, ignore_errors=True)
            raise
        return name

    def retire(self, name: str) -> None:
        """Unload a version and remove its folder; what the server does not take back now is tried again later."""
        self.wait()
        try:
            self.server.unload(name)
        except VLLMError as error:
            LOGGER.warning("%s It is tried again with the next version.", error)
            return
        path = self._loaded.pop(name, None)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)

    def retire_all_but(self, kept: set[str]) -> None:
        """Retire every version but these."""
        for name in [name for name in self._loaded if name not in kept]:
            self.retire(name)

    def close(self) -> None:
        """Take everything away, and the owner's folder where nothing else is in it; the server may be gone by then.

        What is still sampled from is left to the owner's next process.
        """
        if not self.wait(CLOSE_SECONDS):
            return
        self.server.timeout = min(self.server.timeout, CLOSE_SECONDS)
        for name, path in self._loaded.items():
            with contextlib.suppress(VLLMError):
                self.server.unload(name)
            shutil.rmtree(path, ignore_errors=True)
        self._loaded.clear()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
