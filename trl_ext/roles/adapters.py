"""Read and write LoRA adapters in PEFT's own folder layout, and refuse those that role switching cannot serve."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, TaskType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SCALE_FILE = "reward_scale.json"  # beside a reward adapter: mean and std of its scores on reference responses
HEAD_KEY = "base_model.model.score.weight"  # where PEFT puts the head of a sequence-classification adapter
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these rewrite the base they are put on
SILENT_INITS = (True, "gaussian")  # a fresh adapter computes exactly what its base does
SHARED_MODULES = {"lm_head", "embed_out", "embed_tokens", "wte", "wpe", "embed_in"}
SCALING_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what an adapter computes with
RECORD_KEY = "trl_ext_base"  # of the metadata of the weights: the base that they were trained on


@dataclass(frozen=True)
class RewardScale:
    """What a reward adapter's scores are normalised by, where several models must share a scale: (s - mean) / std.

    Attributes:
        mean, std: Of its scores on reference responses.
        count: How many of them.
    """

    mean: float
    std: float
    count: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean={self.mean} and std={self.std} of a reward must be finite, and std above 0.")


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter remembers of the base that it was trained on; see `roles/identity.py`.

    Attributes:
        model_type: Of its configuration.
        values: A few numbers of some of its weights, by name.
        dtypes: The type that each of these was loaded in.
    """

    model_type: str
    values: dict[str, list[float]]
    dtypes: dict[str, str]


@dataclass
class AdapterWeights:
    """An adapter outside any model.

    Attributes:
        config: Its LoRA configuration, as for a causal language model (no `modules_to_save`).
        weights: PEFT's state dict, keys without the adapter's name; None for a fresh adapter.
        head: (1, H) scalar head of a reward or critic adapter, else None.
        scale: Of a reward adapter whose scores are normalised when a role uses it; plain PEFT computes raw scores.
        trained_on: The base, where that is known.
    """

    config: LoraConfig
    weights: dict[str, torch.Tensor] | None = None
    head: torch.Tensor | None = None
    scale: RewardScale | None = None
    trained_on: BaseRecord | None = None

    def scaled_head(self) -> torch.Tensor | None:
        """The head of a critic that starts here: it predicts on the scale of the normalised score."""
        return self.head if self.head is None or self.scale is None else self.head / self.scale.std


def lora_config(
    task_type: str = "CAUSAL_LM",
    r: int = 16,
    lora_alpha: int | None = None,
    target_modules: str | list[str] = "all-linear",
    **overrides: Any,
) -> LoraConfig:
    """The LoRA configuration this project uses when none is given.

    Rank 16 on every linear layer, `lora_alpha = 2 r`, no dropout: dropout makes the probability ratio of PPO noisy, and
    the KL at step 0 different from 0. `overrides` are `peft.LoraConfig` fields.
    """
    if task_type == "SEQ_CLS":
        overrides.setdefault("modules_to_save", ["score"])
    alpha = 2 * r if lora_alpha is None else lora_alpha
    return LoraConfig(task_type=task_type, r=r, lora_alpha=alpha, target_modules=target_modules, **overrides)


def checked_adapter_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`adapter_dtype` as a `torch.dtype`.

    Raises:
        ValueError: Neither float32 nor bfloat16. float16 gradients cannot be scaled.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16):
        raise ValueError(f"adapter_dtype={dtype!r} must be 'float32' or 'bfloat16'.")
    return found


def check_lora_config(config: Any, name: str, fresh: bool = False) -> LoraConfig:
    """Refuse what cannot be switched per role on one base.

    Args:
        config: A `peft.LoraConfig`.
        name: Whose configuration it is, for errors.
        fresh: No trained weights replace the initial ones, so they must leave the base's outputs as they are.

    Raises:
        TypeError: Not a `peft.LoraConfig`.
        ValueError: DoRA, trained biases, saved or token-wise trained modules, an adapter on the LM head or the
            embeddings, or an initialisation that changes the base or a fresh role, with what to do instead.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"{name}: roles need a peft.LoraConfig, got {type(config).__name__}. Use LoRA adapters.")
    refused = {
        "use_dora": (config.use_dora, "train it with use_dora=False"),
        "bias": (config.bias != "none", "train it with bias='none': the base's biases are shared by all roles"),
        "lora_bias": (config.lora_bias, "train it with lora_bias=False"),
        "trainable_token_indices": (config.trainable_token_indices, "the embeddings are shared by all roles"),
        "target_parameters": (config.target_parameters, "target linear layers by `target_modules` instead"),
        "layer_replication": (config.layer_replication, "it rebuilds the base's layers, which are the reference's too"),
        "alora_invocation_tokens": (config.alora_invocation_tokens, "its offsets do not reach the passes of the roles"),
        "init_lora_weights": (
            str(config.init_lora_weights).lower().startswith(MUTATING_INITS),
            "it rewrites the base, which is the reference; use init_lora_weights=True",
        ),
    }
    if fresh and not refused["init_lora_weights"][0]:
        refused["init_lora_weights"] = (
            config.init_lora_weights not in SILENT_INITS,
            "a fresh policy must start as the base, which is its reference; use init_lora_weights=True",
        )
    for field, (bad, remedy) in refused.items():
        if bad:
            raise ValueError(f"{name}: {field}={getattr(config, field)!r} cannot be served on a shared base; {remedy}.")
    for field, value in (("r", config.r), *(("rank_pattern", value) for value in (config.rank_pattern or {}).values())):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: {field} has {value!r}, it must be a whole number of at least 1.")
    alphas = ("lora_alpha", config.lora_alpha), *(("alpha_pattern", v) for v in (config.alpha_pattern or {}).values())
    for field, value in alphas:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name}: {field} has {value!r}, it must be a finite number.")
    extra = [m for m in config.modules_to_save or [] if m not in ("score", "classifier")]
    if extra:
        raise ValueError(
            f"{name}: modules_to_save={extra} cannot be served on a shared base: a full copy of a module is not an "
            "adapter. Train with LoRA on these layers instead."
        )
    targets = config.target_modules or []
    names = [targets] if isinstance(targets, str) else targets
    hit = [target for target in names if target.split(".")[-1] in SHARED_MODULES]
    if hit:
        raise ValueError(
            f"{name}: target_modules={sorted(hit)} puts an adapter on the LM head or the embeddings, which all roles "
            "share and whose log-probabilities are computed without it. Remove it from target_modules."
        )
    return config


def causal_config(config: LoraConfig, base_name: str | None = None) -> LoraConfig:
    """A copy of an adapter's configuration, as for a causal language model; `base_name` if it names no base."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = config.base_model_name_or_path or base_name
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, False
    return config


def read_adapter(path: str | Path, name: str = "adapter", revision: str | None = None) -> AdapterWeights:
    """Read a LoRA adapter that PEFT saved: of a causal LM, or of a sequence classifier with its head.

    Args:
        path: Folder or Hub id.
        name: What errors call it.
        revision: Hub revision.

    Raises:
        FileNotFoundError: Nothing there, or no `adapter_config.json`.
        ValueError: No safetensors weights, a file that is torn or empty, weights that are not finite, a head that is
            not scalar or missing, or an adapter `check_lora_config` refuses.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(str(path), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, SCALE_FILE])
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"{name}: {path} is not a folder, and the Hub has no such adapter or cannot be reached. Give the "
                "folder that PEFT saved, or a Hub id."
            ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{name}: {path} holds no {CONFIG_FILE}. Give the folder that PEFT saved.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{name}: {path} holds no {WEIGHTS_FILE}. Save it again with safe_serialization=True.")
    config = check_lora_config(_read_config(folder, name), f"{name} ({path})")
    tensors, trained_on = _read_weights(folder / WEIGHTS_FILE, name)
    lora = {key: value for key, value in tensors.items() if "lora_" in key}
    rest = {key: value for key, value in tensors.items() if "lora_" not in key}
    head = None
    for key, value in rest.items():
        is_head = key.removesuffix(".weight").split(".")[-1] in ("score", "classifier")
        if not is_head or value.ndim != 2 or value.shape[0] != 1 or len(rest) > 1:
            shapes = {k: tuple(v.shape) for k, v in rest.items()}
            raise ValueError(
                f"{name} ({path}): besides LoRA weights it holds {shapes}. A role can use one scalar head "
                "`score.weight` of shape (1, H): train a reward model with num_labels=1, and any adapter without "
                "resizing the embeddings, which all roles share."
            )
        head = value
    if config.task_type == TaskType.SEQ_CLS and head is None:
        raise ValueError(
            f"{name} ({path}): its task_type is 'SEQ_CLS', but {WEIGHTS_FILE} has no score.weight. Save it again with "
            "its head, or train it with task_type='CAUSAL_LM' if it is a policy."
        )
    return AdapterWeights(causal_config(config), lora, head, read_scale(folder), trained_on)


def _read_config(folder: Path, name: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{name}: {folder / CONFIG_FILE} is no adapter configuration that PEFT can read "
            f"({type(error).__name__}: {error}). It may have been cut while it was written: save the adapter again."
        ) from error


def _read_weights(path: Path, name: str) -> tuple[dict[str, torch.Tensor], BaseRecord | None]:
    """Tensors of an adapter, all finite, and the record of its base if there is one."""
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(RECORD_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        trained_on = None if record is None else BaseRecord(**json.loads(record))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: {path} ({path.stat().st_size} bytes) cannot be read ({error}). It may have been cut while it was "
            "written: save the adapter again, or take an earlier one."
        ) from error
    bad = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise ValueError(
            f"{name}: {len(bad)} of the {len(tensors)} tensors in {path} hold NaN or infinity, first {bad[0]!r}. Take "
            "an earlier one."
        )
    return tensors, trained_on


def read_scale(folder: str | Path) -> RewardScale | None:
    """The `RewardScale` stored beside an adapter, if there is one.

    Raises:
        ValueError: The file is not one that `write_scale` wrote.
    """
    path = Path(folder) / SCALE_FILE
    if not path.is_file():
        return None
    try:
        return RewardScale(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error} It must hold mean, std and count; delete it to use raw scores.") from error


def write_scale(folder: str | Path, scale: RewardScale | None) -> None:
    """Store a scale beside an adapter, or remove the one that is there."""
    path = Path(folder) / SCALE_FILE
    if scale is None:
        path.unlink(missing_ok=True)
    else:
        with _written_aside(path) as aside:
            aside.write_text(json.dumps(asdict(scale), indent=2) + "\n", encoding="utf-8")


def check_same_scaling(saved: LoraConfig, own: LoraConfig, name: str, remedy: str) -> None:
    """Check that weights saved under one configuration compute the same under another.

    Raises:
        ValueError: They are scaled by other numbers.
    """
    for field in SCALING_FIELDS:
        theirs, ours = getattr(saved, field), getattr(own, field)
        if theirs != ours:
            raise ValueError(f"{name} was trained with {field}={theirs!r}, this model has {ours!r}. {remedy}")


def check_equal(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], name: str) -> None:
    """Check that weights which were loaded into a model are there.

    Raises:
        RuntimeError: They are not.
    """
    for key, value in given.items():
        there = own[key].detach()
        if not there.is_meta and not torch.equal(there, value.to(there.device, there.dtype)):
            raise RuntimeError(
                f"{name}: {key} was loaded, but the model has other numbers there. PEFT did not load what it was "
                "given; install a version of peft that this package was tested with."
            )


def write_adapter(folder: str | Path, adapter: AdapterWeights) -> None:
    """Write an adapter as PEFT would: `AutoPeftModelForCausalLM`, or `...ForSequenceClassification` if it has a head.

    Each file is written aside and renamed when it is whole, so that a kill or a full disk leaves the one before. The
    weights come last: where they are, configuration and scale are too.

    Args:
        folder: Made if missing.
        adapter: Its `weights` must be set.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = copy.deepcopy(adapter.config), dict(adapter.weights or {})
    config.inference_mode = True
    if adapter.head is not None:
        config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]
        weights[HEAD_KEY] = adapter.head
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    with _written_aside(folder / CONFIG_FILE) as path, tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        path.write_bytes((Path(made) / CONFIG_FILE).read_bytes())
    write_scale(folder, adapter.scale)
    with _written_aside(folder / WEIGHTS_FILE) as path:
        path.write_bytes(_serialised(weights, adapter.trained_on))


def _serialised(weights: dict[str, torch.Tensor], trained_on: BaseRecord | None) -> bytes:
    """A safetensors file. The record is put in afterwards: safetensors shuffles the metadata it is given."""
    data = save(weights, metadata={"format": "pt"})
    if trained_on is None:
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"][RECORD_KEY] = json.dumps(asdict(trained_on))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it becomes when it is whole."""
    aside = path.with_name(f".unfinished-{path.name}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
