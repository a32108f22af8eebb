"""vLLM in the trainer's own process, and its weights as the trainer's base: one copy for both. Experimental.

The engine loads first. Its fused layers are the trainer's one behind the other, so each weight of the trainer's base is
a slice of an engine's tensor (of packed bytes in 4 bits, where the engine's state is shared too), and no weight is held
twice. `InProcess` then stands where a client of a server stands: adapters are loaded and unloaded, never merged.

Between two calls the memory of the KV cache is given back. vLLM's sleep mode does not serve for this: level 1 takes
the weights away from the trainer too, and level 2 loses the states of 4 bits. The storages of the cache's tensors are
emptied and filled again instead, in the allocator that the trainer takes its own memory from.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from trl_ext.generation.vllm_server import (
    Completion,
    Prompt,
    SamplingParameters,
    UnknownModelError,
    VLLMError,
    completions_of,
    remedy,
)
from trl_ext.roles import load_base_config, lora_config, quantization_method
from trl_ext.roles.base import dtype_of_base
from trl_ext.roles.held import HeldWeights, empty_base

BASE = "base"
GIB = 2**30
PASSED_ON = {"revision", "trust_remote_code", "attn_implementation", "device_map"}  # or of no matter to an engine
RANKS = (8, 16, 32, 64, 128, 256, 512)  # what vLLM takes for max_lora_rank


class InProcess:
    """A vLLM of this process, with what `VLLMEngine` asks of a server.

    Args:
        llm: `vllm.LLM` with adapters, which runs in this process.

    Attributes:
        url: Names it in errors.
        timeout: Not used.
        model: The engine's own.
    """

    url = "the vLLM of this process"

    def __init__(self, llm: Any):
        import vllm
        from vllm.lora.request import LoRARequest

        self.llm, self.timeout = llm, 0.0
        self._vllm, self._request = vllm, LoRARequest
        self._adapters: dict[str, Any] = {}
        self._count = 0
        (self.model,) = llm.apply_model(lambda model: model)
        (self.cache,) = llm.collective_rpc(lambda worker: list(worker.model_runner.kv_caches))
        self._sizes = {tensor.untyped_storage(): tensor.untyped_storage().nbytes() for tensor in self.cache}
        self._rest()

    # ------------------------------------------------------------------ what there is

    def wait_until_healthy(self) -> None:
        """It is there as long as this process is."""

    def version(self) -> str | None:
        """Of vLLM."""
        return str(self._vllm.__version__)

    def models(self) -> list[dict[str, Any]]:
        """As `VLLMServer.models`."""
        length = self.llm.llm_engine.model_config.max_model_len
        base = {"id": BASE, "parent": None, "max_model_len": length}
        return [base, *({"id": name, "parent": BASE, "root": each.lora_path} for name, each in self._adapters.items())]

    def tokenize(self, text: str) -> list[int] | None:
        """As `VLLMServer.tokenize`."""
        return list(self.llm.get_tokenizer().encode(text, add_special_tokens=False))

    # ------------------------------------------------------------------ adapters

    def load(self, name: str, path: str) -> None:
        """Load an adapter under a name that it has not had before.

        Raises:
            VLLMError: The engine did not.
        """
        self._count += 1
        request = self._request(name, self._count, path)  # a number that came before would keep the old adapter
        try:
            loaded = self.llm.llm_engine.add_lora(request)
        except Exception as error:  # whatever the engine finds wrong with an adapter
            raise VLLMError(f"{self.url} did not load the adapter {path}: {error} {remedy(400, str(error))}") from error
        if not loaded:
            raise VLLMError(f"{self.url} did not load the adapter {path}.")
        self._adapters[name] = request

    def unload(self, name: str) -> None:
        """Unload an adapter; one that the engine does not have is no error."""
        request = self._adapters.pop(name, None)
        if request is not None:
            self.llm.llm_engine.remove_lora(request.lora_int_id)

    # ------------------------------------------------------------------ completions

    def complete(
        self,
        model: str,
        prompts: Sequence[Prompt],
        parameters: SamplingParameters,
        stop: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """As `VLLMServer.complete`, in one batch of the engine.

        Raises:
            UnknownModelError, VLLMError: As there.
        """
        if model != BASE and model not in self._adapters:
            raise UnknownModelError(f"{self.url} knows no model or adapter {model!r}.")
        fields = self._vllm.SamplingParams.__struct_fields__
        common = {name: value for name, value in parameters.body().items() if name in fields} | {"detokenize": False}
        sampling = [self._vllm.SamplingParams(**common, n=prompt.count, seed=prompt.seed) for prompt in prompts]
        asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        with self._awake():
            try:
                outputs = self.llm.generate(asked, sampling, lora_request=self._adapters.get(model), use_tqdm=False)
            except ValueError as error:
                raise VLLMError(f"{self.url} refused: {error}") from error
        return [
            completions_of(_answer(output), prompt, parameters) for output, prompt in zip(outputs, prompts, strict=True)
        ]

    # ------------------------------------------------------------------ the memory of the KV cache

    @contextmanager
    def _awake(self) -> Iterator[None]:
        try:
            for storage, size in self._sizes.items():
                storage.resize_(size)
            for tensor in self.cache:
                tensor.zero_()
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for storage in self._sizes:
            storage.resize_(0)


def _answer(output: Any) -> dict[str, Any]:
    """What /v1/completions would have said."""
    choices = [
        {
            "index": each.index,
            "token_ids": list(each.token_ids),
            "prompt_token_ids": output.prompt_token_ids,
            "logprobs": {
                "token_logprobs": [
                    found[token].logprob for found, token in zip(each.logprobs, each.token_ids, strict=True)
                ]
            },
            "finish_reason": each.finish_reason,
        }
        for each in output.outputs
    ]
    return {"choices": choices}


# ---------------------------------------------------------------------- the engine first, then the base


def engine_first(
    model_name_or_path: str,
    adapter: Any,
    options: Any,
    *,
    quantization_config: Any = None,
    dtype: str | torch.dtype = "auto",
    longest: int | None = None,
    **model_init_kwargs: Any,
) -> HeldWeights:
    """Start vLLM in this process, and take its weights for `load_base`.

    Args:
        model_name_or_path: The base.
        adapter: `LoraConfig` of the policy; None: the project's own.
        options: A configuration with the fields of `VLLMRolloutOptions`, and `seed`.
        quantization_config: `BitsAndBytesConfig` for a base in 4 bits.
        dtype: As that of `load_base`.
        longest: Tokens of the longest prompt and its completion. Default: what the model takes.
        model_init_kwargs: Those of `load_base`; `revision` and `trust_remote_code` go to vLLM too.

    Returns:
        The base's weights, held by an `InProcess`.

    Raises:
        ImportError: No vLLM beside the trainer.
        ValueError: Several processes; quantisation that the engine does not have; weights that do not fit ours.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            f"vllm_one_copy=True with {PartialState().num_processes} processes: it is for one. Use vllm_server_url."
        )
    unknown = sorted(set(model_init_kwargs) - PASSED_ON)
    if unknown:
        raise ValueError(
            f"vllm_one_copy=True: {', '.join(unknown)} of model_init_kwargs would not reach the engine. Leave it "
            "out, or use vllm_server_url."
        )
    config = load_base_config(model_name_or_path, **model_init_kwargs)
    method = quantization_method(config)
    if method is not None:
        raise ValueError(
            f"vllm_one_copy=True: {model_name_or_path} is quantised by {method} already. Give the checkpoint that is "
            "not, with load_in_4bit."
        )
    quantised = quantization_config is not None
    if quantised:
        check_nf4(quantization_config)
    resolved = dtype_of_base(config, dtype, quantised=quantised)
    if resolved == "auto":
        resolved = config.dtype or torch.float32
    if quantised and resolved == torch.float32:
        raise ValueError(
            "vllm_one_copy=True in 4 bits with a checkpoint in float32: vLLM refuses it. Set dtype to bfloat16, or "
            "save the checkpoint in that type."
        )
    trusted = bool(model_init_kwargs.get("trust_remote_code", False))
    adapter = adapter or lora_config()
    rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    llm = _start(
        model=model_name_or_path,
        revision=model_init_kwargs.get("revision"),
        trust_remote_code=trusted,
        dtype=str(resolved).removeprefix("torch."),
        quantization="bitsandbytes" if quantised else None,
        max_lora_rank=next((each for each in RANKS if each >= rank), rank),
        max_model_len=longest,
        kv_cache_memory_bytes=int(options.vllm_kv_cache_gib * GIB),
        seed=options.seed,
    )
    engine = InProcess(llm)
    shapes = {name: weight.shape for name, weight in empty_base(config, trusted).named_parameters()}
    return HeldWeights(weights_of(engine.model, shapes), resolved, engine)  # type: ignore[arg-type]


def check_nf4(quantization_config: Any) -> None:
    """Check that the trainer's quantisation is the one that vLLM has.

    Raises:
        ValueError: Another.
    """
    given = quantization_config.to_dict()
    if not given.get("load_in_4bit") or given.get("bnb_4bit_quant_type") != "nf4":
        raise ValueError(
            "vllm_one_copy=True: vLLM quantises to NF4 alone: use load_in_4bit with bnb_4bit_quant_type='nf4', or no "
            "quantisation."
        )


def _start(**options: Any) -> Any:
    """`vllm.LLM` in this process, which leaves random numbers as they were."""
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                f"vllm_one_copy=True needs vLLM in the trainer's own environment ({error}); documentation: generation. "
                "With vllm_server_url it is in another."
            ) from error
        with torch.random.fork_rng(), _plain_layers(vllm):
            return vllm.LLM(
                enable_lora=True,
                max_loras=1,
                enforce_eager=True,  # a captured graph would keep the addresses of the KV cache
                enable_prefix_caching=False,  # of a cache that is emptied
                logprobs_mode="processed_logprobs",
                **{name: value for name, value in options.items() if value is not None},
            )
    finally:
        if before is None:
            del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        else:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@contextmanager
def _plain_layers(vllm: Any) -> Iterator[None]:
    """Inside the block vLLM leaves a CPU's weights as they are, which it would pack for oneDNN."""
    if not vllm.platforms.current_platform.is_cpu():
        yield
        return
    import vllm._custom_ops as operations

    before = operations._supports_onednn
    operations._supports_onednn = False
    try:
        yield
    finally:
        operations._supports_onednn = before


def weights_of(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """An engine's weights under the names that a checkpoint has for them, as slices and not as copies.

    Args:
        model: The engine's: a module with `packed_modules_mapping`, which says what a fused layer is made of.
        shapes: Of the trainer's weights.

    Returns:
        As `HeldWeights.tensors`.

    Raises:
        ValueError: A weight that the engine lacks, or holds in another shape.
    """
    own = {name.replace(".base_layer.", "."): weight for name, weight in model.named_parameters()}
    fused = {part: (whole, parts) for whole, parts in model.packed_modules_mapping.items() for part in parts}
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        place, before, total = 0, 0, shape[0]
        weight = own.get(name)
        if weight is None and last in fused:
            whole, parts = fused[last]
            missing = [part for part in parts if f"{parent}.{part}.{kind}" not in shapes]
            if missing:
                raise ValueError(_unlike(f"the engine fuses '{parent}.{whole}', and the base has no {missing[0]!r}"))
            rows = [shapes[f"{parent}.{part}.{kind}"][0] for part in parts]
            place = parts.index(last)
            before, total = sum(rows[:place]), sum(rows)
            weight = own.get(f"{parent}.{whole}.{kind}")
        if weight is None:
            raise ValueError(_unlike(f"the engine has no weight {name!r}"))
        states = getattr(weight, "bnb_quant_state", None)
        if states is not None:
            found |= _packed(name, weight, states, place, shape)
            continue
        padded = before == 0 and total == shape[0] and last in ("embed_tokens", "lm_head") and weight.shape[0] > total
        if tuple(weight.shape[1:]) != tuple(shape[1:]) or (weight.shape[0] != total and not padded):
            raise ValueError(
                _unlike(f"the engine holds {name!r}, {tuple(shape)}, in a weight of {tuple(weight.shape)}")
            )
        found[name] = weight.detach()[before : before + shape[0]]
    return found


def _packed(name: str, weight: Any, states: Any, place: int, shape: Sequence[int]) -> dict[str, Tensor]:
    """A layer's bytes in 4 bits, and its state."""
    state, ends = states[place], weight.bnb_shard_offsets
    if tuple(state.shape) != tuple(shape) or state.nested:
        raise ValueError(_unlike(f"the engine holds {name!r}, {tuple(shape)}, as {tuple(state.shape)} in 4 bits"))
    packed = {name: weight.detach()[int(ends[place]) : int(ends[place + 1])]}
    return packed | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def _unlike(what: str) -> str:
    return f"vllm_one_copy=True: {what}. This model cannot be shared with vLLM: use vllm_server_url."
