"""Completions by a vLLM server that holds the base and gets the adapter of the role that samples; nothing is merged.

`VLLMEngine` is for everything that samples. `VLLMGeneration` is what TRL's online trainers call in place of their own
vLLM object. The main process alone speaks with the server; what it finds, an error too, reaches every process.
"""

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from trl_ext.generation.vllm_adapters import AdapterVersions
from trl_ext.generation.vllm_ahead import Ahead
from trl_ext.generation.vllm_options import VLLMOptions
from trl_ext.generation.vllm_server import (
    Completion,
    Prompt,
    SamplingParameters,
    UnknownModelError,
    VLLMError,
    VLLMServer,
)
from trl_ext.roles import AdapterWeights, Role, SharedBaseModel
from trl_ext.roles.folders import adapter_digest
from trl_ext.roles.held import held_by

LOGGER = logging.getLogger(__name__)
FOLDER = "vllm_adapters"
T = TypeVar("T")


@dataclass
class Published:
    """An adapter at the server: its name there, a digest of its weights, and these, for a server that lost them."""

    name: str
    digest: str
    adapter: AdapterWeights


class VLLMEngine:
    """A server that samples from the roles of a model. Every process makes every call, at the same time.

    Args:
        model: Policy and reference are sampled from; the server must hold the same base.
        options: A configuration with the fields of `VLLMOptions`, `vllm_server_url` among them.
        folder: Of the run: adapters lie below it unless `vllm_adapter_dir` says otherwise.
        owner: A path by which a run knows what an earlier process of it has left at the server. Default: `folder`.

    Attributes:
        ahead: Whether completions are under way that `begin` asked for.
        base: The base's name at the server.
        max_model_len: Tokens of a prompt and its completion that the server takes; None where it does not say.

    Raises:
        VLLMError: The server does not answer, or serves no base.
        ValueError: `vllm_one_copy` and a model that was not made of an engine's weights.
    """

    def __init__(
        self,
        model: SharedBaseModel,
        options: VLLMOptions | Any,
        folder: str | Path,
        owner: str | Path | None = None,
    ):
        self.model, self.options = model, options
        self.processes: Any = PartialState()
        self.server: Any = None
        if getattr(options, "vllm_one_copy", False):
            self.server = held_by(model).holder
        else:
            self.server = VLLMServer(str(options.vllm_server_url), options.vllm_timeout, options.vllm_wait)
        self.versions: Any = None  # of the main process
        self._published: dict[Role, Published] = {}  # of the main process
        self.ahead = False
        self._ahead: Ahead | None = None  # of the main process
        self.base, self.max_model_len = self.on_main(lambda: self._connect(folder, owner or folder))

    def _connect(self, folder: str | Path, owner: str | Path) -> tuple[str, int | None]:
        self.server.wait_until_healthy()
        bases = [model for model in self.server.models() if model.get("parent") is None]
        if len(bases) != 1:
            raise VLLMError(
                f"{self.server.url} serves {len(bases)} bases, {[base.get('id') for base in bases]}: start it with one "
                "--served-model-name."
            )
        where = self.options.vllm_adapter_dir or Path(folder) / FOLDER
        self.versions = AdapterVersions(self.server, where, owner)
        weakref.finalize(self, self.versions.close)  # also when the process ends
        return str(bases[0]["id"]), bases[0].get("max_model_len")

    # ------------------------------------------------------------------ one process speaks, all know

    def on_main(self, work: Callable[[], T]) -> T:
        """Work on the main process alone, and give its result to all.

        Raises:
            VLLMError: On every process, with the message of the error on the main one.
        """
        if self.processes.num_processes == 1:
            return work()
        outcome: list[Any] = [None]
        error: Exception | None = None
        if self.processes.is_main_process:
            try:
                outcome = [(work(), None)]
            except Exception as caught:  # whatever it is: the others wait for an answer
                error, outcome = caught, [(None, str(caught))]
        broadcast_object_list(outcome)
        result, message = outcome[0]
        if message is not None:
            raise VLLMError(message) from error
        return result

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block the main process works for itself, as at the end of a run, and no other takes part."""
        before, self.processes = self.processes, SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
        try:
            yield
        finally:
            self.processes = before

    # ------------------------------------------------------------------ adapters

    def sync(self, role: Role | None = None) -> None:
        """Bring the server the role's adapter as it is now, if it has another one; old versions are taken away.

        Args:
            role: Policy or reference. Default: the one that is active.

        Raises:
            RuntimeError: A role that scores is active.
            VLLMError: The server did not take it.
        """
        if role is None:
            self.model.check_generates()
            role = self.model.active_role
        adapter = self.model.plain_adapter(role)  # of a sharded model a collective call
        if adapter is not None:
            self.on_main(lambda: self._publish(role, adapter))

    def _publish(self, role: Role, adapter: AdapterWeights) -> None:
        digest = adapter_digest(adapter)
        before = self._published.get(role)
        if before is not None and before.digest == digest:
            return
        self._published[role] = Published(self.versions.publish(adapter), digest, adapter)
        self.versions.retire_all_but({published.name for published in self._published.values()})

    def _publish_again(self, role: Role) -> None:
        """After a restart of the server, under a new name."""
        before = self._published.pop(role)
        self._publish(role, before.adapter)

    # ------------------------------------------------------------------ completions

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        parameters: SamplingParameters,
        count: int = 1,
        role: Role | None = None,
    ) -> list[list[Completion]]:
        """`count` completions of each of this process's prompts, by the version that `sync` brought.

        Args:
            prompts: Token ids; any number, on some processes none.
            seeds: Of the prompts, each below 2**63.
            parameters: The same on every process.
            count: Completions of a prompt; they are drawn with `seed`, `seed + 1` and so on.
            role: As that of `sync`.

        Raises:
            VLLMError: See `VLLMServer.complete`.
        """
        role = role or self.model.active_role
        every, own = self._of_all(prompts, seeds, count)
        return self.on_main(lambda: self._complete(every, parameters, role))[own]

    def _of_all(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], count: int) -> tuple[list[Prompt], slice]:
        """The prompts of all processes, in order, and where this process's are among them."""
        own = [Prompt(tuple(ids), count, seed) for ids, seed in zip(prompts, seeds, strict=True)]
        every = gather_object([own]) if self.processes.num_processes > 1 else [own]
        start = sum(map(len, every[: self.processes.process_index]))
        return [prompt for rows in every for prompt in rows], slice(start, start + len(own))

    def _complete(
        self,
        prompts: list[Prompt],
        parameters: SamplingParameters,
        role: Role,
        stop: threading.Event | None = None,
    ) -> list[list[Completion]]:
        self.versions.wait()  # one at a time: both might find that the server has lost the adapter
        try:
            return self.server.complete(self._name(role), prompts, parameters, stop)
        except UnknownModelError:
            if role not in self._published:
                raise
            self._publish_again(role)
            return self.server.complete(self._name(role), prompts, parameters, stop)

    def _name(self, role: Role) -> str:
        if role in self._published:
            return self._published[role].name
        if self.model.adapter_name(role) is not None:
            raise RuntimeError(f"the {role.value} role was not brought to the server: call sync before sample.")
        return self.base

    # ------------------------------------------------------------------ completions in the background

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], parameters: SamplingParameters, role: Role
    ) -> None:
        """Begin what `sample` does, once for each prompt, and return; `take` gives it.

        The version that `sync` brought last samples, whatever becomes of the role. Whatever else the server is asked
        for waits until this is done.
        """
        every, _ = self._of_all(prompts, seeds, 1)
        self.drop()
        self.ahead = True
        if self.processes.is_main_process:
            self._hold(Ahead(every, lambda stop: self._complete(every, parameters, role, stop)))

    def _hold(self, ahead: Ahead) -> None:
        self._ahead, self.versions.user = ahead, ahead.thread

    def take(self, prompts: Sequence[Sequence[int]]) -> list[list[Completion]] | None:
        """Wait for what `begin` asked for, and give it; each process that of its prompts.

        Returns:
            None where nothing was asked for, or other prompts were.

        Raises:
            VLLMError: As `sample`, on every process.
        """
        if not self.ahead:
            return None
        every, own = self._of_all(prompts, [0] * len(prompts), 1)
        self.ahead = False
        found = self.on_main(lambda: self._taken(every))
        return None if found is None else found[own]

    def _taken(self, prompts: list[Prompt]) -> list[list[Completion]] | None:
        ahead = self._ahead
        assert ahead is not None
        if [prompt.ids for prompt in ahead.prompts] == [prompt.ids for prompt in prompts]:
            self._ahead = None
            return ahead.result()
        LOGGER.warning("the prompts of this rollout are not those that were sampled ahead: it is sampled anew.")
        self._drop()
        return None

    def drop(self) -> None:
        """Want no more what `begin` asked for; requests that are under way are not broken off."""
        self.ahead = False
        if self.processes.is_main_process:
            self._drop()

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead.stop.set()
            self._ahead = None

    def save_ahead(self, path: Path) -> None:
        """Wait for what `begin` asked for, and write it into a file, if there is something. Every process calls."""
        if self.ahead:
            self.on_main(lambda: self._ahead is not None and self._ahead.write(path))

    def load_ahead(self, path: Path) -> None:
        """Let `take` give what `save_ahead` has written, if it has. Every process calls.

        Raises:
            ValueError: It is damaged.
        """
        self.drop()

        def read() -> bool:
            if path.is_file():
                self._hold(Ahead.read(path))
            return path.is_file()

        self.ahead = self.on_main(read)

    def close(self) -> None:
        """Take the adapters away from server and disk; without this it happens when the process ends."""
        self.drop()
        self._published.clear()
        self.on_main(lambda: self.versions.close())


class VLLMGeneration:
    """What a trainer of TRL asks for weights and completions where its `use_vllm` is true.

    TRL drops the log-probabilities that completions were sampled with; they are kept here.

    Args:
        engine: Samples from the role that is active.
        parameters: Of completions.
        pad_token_id: Stands in for an empty completion, at which TRL fails.

    Attributes:
        of_training: Whether the next call is for a rollout that is trained on, of which `begin` may have sampled the
            completions ahead.
        lagging: Whether those of the last call were sampled ahead.
        logps: Of the last call, for each completion those of its tokens.
        empty: Of the last call, numbers of the completions without a token.
    """

    def __init__(self, engine: VLLMEngine, parameters: SamplingParameters, pad_token_id: int):
        self.engine, self.parameters, self.pad_token_id = engine, parameters, pad_token_id
        self.of_training = self.lagging = False
        self.logps: list[list[float]] = []
        self.empty: set[int] = set()

    def sync_weights(self) -> None:
        """Bring the server the active role's adapter."""
        self.engine.sync()

    def generate(
        self,
        prompts: list[list[int]],
        images: Any,
        num_generations: int,
        profiler: AbstractContextManager[Any],
    ) -> tuple[list[list[int]], list[list[int]], list[list[float]], None]:
        """Complete each prompt once. Random numbers come from one number of torch's, as those of `generate` would.

        Args:
            prompts: Token ids; TRL has repeated them `num_generations` times.
            images: Refused.
            num_generations: Not used, as they are repeated.
            profiler: Times the call.

        Returns:
            Prompts, completions and log-probabilities, and what TRL has a fourth place for.

        Raises:
            ValueError: Images.
        """
        if images is not None:
            raise ValueError("images cannot be sent to the vLLM server: leave vllm_server_url out.")
        with profiler:
            groups = self.engine.take(prompts) if self.of_training else None
            self.lagging = groups is not None
            if groups is None:
                groups = self.engine.sample(prompts, self._seeds(len(prompts)), self.parameters)
        found = [group[0] for group in groups]
        self.logps = [completion.logps for completion in found]
        self.empty = {i for i, completion in enumerate(found) if not completion.ids}
        ids = [completion.ids or [self.pad_token_id] for completion in found]
        return prompts, ids, self.logps, None

    def begin(self, prompts: list[list[int]]) -> None:
        """Let the policy, as `sync_weights` brought it, complete prompts in the background, for the next rollout."""
        self.engine.begin(prompts, self._seeds(len(prompts)), self.parameters, Role.POLICY)

    def _seeds(self, count: int) -> list[int]:
        return row_seeds(int(torch.randint(2**62, ())), self.engine.processes.process_index, count)


def row_seeds(draw: int, process: int, count: int) -> list[int]:
    """Seeds of some rows: no two of a run are near each other, whatever was drawn for the next call."""
    names = (f"{draw} {process} {row}".encode() for row in range(count))
    return [int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 2 for name in names]
