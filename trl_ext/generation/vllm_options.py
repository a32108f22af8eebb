"""Options of sampling through a vLLM server, the same for everything that samples."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any
from urllib.parse import urlsplit

from trl_ext.fields import Rule, above, at_least, is_whole


@dataclass
class VLLMOptions:
    """Where the server is, how it gets the adapter, and what is an error."""

    vllm_server_url: str | None = field(
        default=None,
        metadata={
            "help": "Sample through the vLLM server at this address, http://host:port, which gets the adapter of every "
            "rollout and never a merged weight (documentation: generation). Default: transformers' generate."
        },
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which the server gets adapters; both sides must see it under this path. Default: "
            "a folder below the one that the run writes to."
        },
    )
    vllm_timeout: Annotated[float, above(0)] = field(
        default=600.0, metadata={"help": "Seconds that one request to the vLLM server may take."}
    )
    vllm_wait: Annotated[float, at_least(0)] = field(
        default=300.0, metadata={"help": "Seconds to wait for a vLLM server that does not answer, as when it restarts."}
    )
    vllm_max_logp_difference: Annotated[float, above(0)] = field(
        default=0.05,
        metadata={
            "help": "Largest mean difference, nats a token, between the log-probabilities of the vLLM server and ours, "
            "at the start and in every rollout; above it the run ends with the likely cause."
        },
    )


@dataclass
class VLLMRolloutOptions(VLLMOptions):
    """The same for a method that is told the log-probabilities which its completions were sampled with."""

    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={
            "help": "Weigh the policy's loss on each token by its probability under the trainer over that under the "
            "vLLM server that sampled it."
        },
    )
    vllm_importance_sampling_clip_max: Annotated[float, above(0)] = field(
        default=3.0, metadata={"help": "The largest such weight; what is above is cut to it."}
    )

    rollout_lag: Annotated[int, Rule("0 or 1", lambda value: is_whole(value) and 0 <= value <= 1)] = field(
        default=0,
        metadata={
            "help": "1: the vLLM server samples the next rollout batch while the present one is trained on, so that "
            "neither waits for the other; its policy is then one update old, which the importance weights make up for."
        },
    )
    vllm_one_copy: bool = field(
        default=False,
        metadata={
            "help": "Experimental, not run on a card: instead of a server, vLLM in the trainer's own process, with one "
            "copy of the base for both. One process, and vLLM in the trainer's environment."
        },
    )
    vllm_kv_cache_gib: Annotated[float, above(0)] = field(
        default=1.0,
        metadata={"help": "GiB of the KV cache with vllm_one_copy; they are given back while nothing is sampled."},
    )


CORRECTION = ("vllm_importance_sampling_correction", "vllm_importance_sampling_clip_max", "rollout_lag")
OF_ONE_COPY = ("vllm_kv_cache_gib",)
OF_A_SERVER = ("vllm_timeout", "vllm_wait", "rollout_lag")


def uses_vllm(args: Any) -> bool:
    """Whether vLLM samples, in a server or in this process."""
    return args.vllm_server_url is not None or getattr(args, "vllm_one_copy", False)


def check_vllm_options(args: Any, others: tuple[str, ...] = ()) -> None:
    """Check the address, and that no option is given that only a server gives a meaning.

    Args:
        args: A configuration with the fields of `VLLMOptions`.
        others: Names of further fields that need the server.

    Raises:
        ValueError: What is wrong, and what to write.
    """
    url, one_copy = args.vllm_server_url, getattr(args, "vllm_one_copy", False)
    if one_copy and url is not None:
        raise ValueError(f"vllm_one_copy=True and vllm_server_url={url!r} do not go together: drop one.")
    if one_copy:
        _refuse_given(args, OF_A_SERVER, "belongs to a server, and vllm_one_copy=True has none: leave it out.")
        return
    _refuse_given(args, OF_ONE_COPY, "does nothing without vllm_one_copy: set that, or leave it out.")
    if url is None:
        names = [*(f.name for f in fields(VLLMOptions)), *others]
        _refuse_given(args, names, "does nothing without vllm_server_url: set that, or leave it out.")
        return
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.path.strip("/") or parts.query)
        good = good and parts.port != 0
    except ValueError:  # no address at all, or a port that is none
        good = False
    if not good:
        raise ValueError(
            f"vllm_server_url={url!r} must be the address of a server alone: http://localhost:8000, without a path."
        )


def _refuse_given(args: Any, names: Iterable[str], why: str) -> None:
    defaults = {f.name: f.default for f in fields(args)}
    for name in names:
        if getattr(args, name, defaults.get(name)) != defaults.get(name):
            raise ValueError(f"{name}={getattr(args, name)!r} {why}")
