"""What makes a run this run and no other: written into its checkpoints, compared when one is gone on from.

Of the configuration everything counts but what `MAY_CHANGE` lists; besides it the base, the tokenizer, the rows of the
datasets, what gives rewards, and the adapters that stay as they are (reference, reward).
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import logging
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trl_ext.checkpoints import STATE_FILE
from trl_ext.roles.base import quantization_method
from trl_ext.roles.folders import frozen_digests
from trl_ext.roles.identity import short_name

LOGGER = logging.getLogger(__name__)
# Fields of a configuration that may differ when a run is resumed. Every other one makes it another run.
MAY_CHANGE: dict[str, tuple[str, ...]] = {
    "length": ("max_steps", "num_train_epochs"),
    # How the batch is shared out; that an optimizer step and a rollout take as many sequences: engines.check_same_batch
    "batch": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "generation_batch_size",
    ),
    "memory": (
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "activation_offloading",
        "per_device_generate_batch_size",
        "per_device_score_batch_size",
        "share_prompts",
        "torch_empty_cache_steps",
        "use_cache",
        "cache_implementation",
        "use_transformers_continuous_batching",
        "use_transformers_paged",
        "transformers_continuous_batching_config",
        "ds3_gather_for_generation",
        "vllm_server_url",
        "vllm_adapter_dir",
        "vllm_timeout",
        "vllm_wait",
        "vllm_max_logp_difference",
        "vllm_one_copy",
        "vllm_kv_cache_gib",
    ),
    # Another card may need them; results differ by rounding. Of `model_init_kwargs` the base is compared, and its bits
    "precision and machine": (
        "bf16",
        "fp16",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "model_init_kwargs",
        "trust_remote_code",
        "use_cpu",
        "local_rank",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
    ),
    "logs": (
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "log_completions",
        "log_multimodal",
        "log_unique_prompts",
        "num_completions_to_print",
        "include_num_input_tokens_seen",
        "skip_memory_metrics",
        "disable_tqdm",
        "debug",
        "report_to",
        "run_name",
        "project",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "write_report",
    ),
    "checkpoints": (
        "output_dir",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "resume_from_checkpoint",
        "restore_callback_states_from_checkpoint",
        "ignore_data_skip",
        "push_to_hub",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
    ),
    "evaluation": (
        "do_train",
        "do_eval",
        "do_predict",
        "eval_strategy",
        "eval_steps",
        "keep_best_policy",
        "eval_delay",
        "eval_on_start",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "batch_eval_metrics",
        "per_device_eval_batch_size",
        "num_generations_eval",
        "prediction_loss_only",
        "include_for_metrics",
        "label_names",
        "bf16_full_eval",
        "fp16_full_eval",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "what is stored with a reward model": ("normalize_rewards", "normalization_samples"),
}
FREE = frozenset(name for names in MAY_CHANGE.values() for name in names)
ROWS_READ = 100_000  # of a larger dataset as many, evenly spread, are read
READ_AT_A_TIME = 1000
DIGITS = 16
BEFORE = ("PPOStateCallback", "config")  # where checkpoints of version 0.1 hold a few fields of the configuration


class RunIdentity(TrainerCallback, ExportableState):
    """Writes the identity of a run into its checkpoints, and says in what a checkpoint's is another one.

    Checkpoints know it by the name of its class.

    Args:
        args: Configuration of the run; read anew whenever it is asked for.
        model: `SharedBaseModel` or `RewardModel`. Its frozen adapters are read once, when training begins.
        facts: What else makes the run, by name; None: not known, and not compared.
    """

    def __init__(self, args: Any, model: Any, facts: dict[str, Any]):
        self.args, self.model = args, model
        self.facts = {name: fact for name, fact in (facts | base_facts(model)).items() if fact is not None}

    @functools.cached_property
    def adapters(self) -> dict[str, str]:
        """Digest of each frozen adapter, by "<name> adapter"."""
        return {f"{name} adapter": digest for name, digest in frozen_digests(self.model).items()}

    def identity(self) -> dict[str, Any]:
        """Everything that makes the run, by name, as it reads in JSON."""
        config = {name: value for name, value in self.args.to_dict().items() if name not in FREE}
        text = json.dumps(config | self.facts | self.adapters, default=lambda value: type(value).__name__)
        return json.loads(text)

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into `trainer_state.json`."""
        return {"args": {}, "attributes": self.identity()}

    def difference(self, folder: str | Path) -> str | None:
        """In what a whole checkpoint was written by another run than this one, and what to do; None: in nothing.

        Of a checkpoint that an earlier version wrote it is not known: that is warned of.
        """
        state = json.loads((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))
        callbacks = state.get("stateful_callbacks") or {}
        saved = attributes_of(callbacks, type(self).__name__)
        if not saved:
            saved = attributes_of(callbacks, BEFORE[0]).get(BEFORE[1]) or {}
            if self.args.process_index == 0:
                LOGGER.warning(
                    "%s was written before checkpoints held the identity of their run: whether configuration, data and "
                    "rewards are those of this run could not be checked.",
                    folder,
                )
        own = self.identity()
        different = [name for name in own if name in saved and name not in FREE and saved[name] != own[name]]
        if not different:
            return None
        found = "; ".join(f"{name}={saved[name]!r}, this run has {name}={own[name]!r}" for name in different)
        fields = self.args.to_dict()
        before = [f"{name}={saved[name]!r}" if name in fields else f"the {name} of then" for name in different]
        return (
            f"it was written with {found}: by another run. Resume with {', '.join(before)}; or start a new run in "
            "another output_dir, from the adapters in the checkpoint"
        )


def attributes_of(callbacks: dict[str, Any], name: str) -> dict[str, Any]:
    """What a callback has written into a checkpoint; empty where it has not."""
    written = callbacks.get(name)
    return written.get("attributes", {}) if isinstance(written, dict) else {}


# ---------------------------------------------------------------------- facts


def base_facts(model: Any) -> dict[str, Any]:
    """Name and quantisation of the base under a model, and what its adapters are held in.

    Of the name only the last part counts: folders move. Its weights are compared where adapters are loaded.
    """
    base = model.get_base_model()
    four_bit = getattr(base, "is_loaded_in_4bit", False)
    adapter = next((p.dtype for key, p in model.named_parameters() if "lora_" in key), None)
    return {
        "base": short_name(str(base.name_or_path or "")) or None,
        "quantization of the base": f"{quantization_method(base.config)}{' 4bit' if four_bit else ''}",
        "adapter_dtype": str(adapter).removeprefix("torch."),
    }


def tokenizer_facts(tokenizer: Any) -> dict[str, str]:
    """Digest of what decides the tokens of a row, beside the words: their number, end and padding, the template."""
    facts = [len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template]
    return {"tokenizer": digest_of([json.dumps(facts).encode()])}


def data_facts(name: str, dataset: Any) -> dict[str, Any]:
    """Columns, number and content of a dataset's rows, wherever it lies and however it was made.

    Args:
        name: Of the dataset, in errors.
        dataset: Anything but a `datasets.Dataset` has no facts: None, and an `IterableDataset`, whose rows come once.
    """
    if not isinstance(dataset, Dataset):
        return {}
    rows = len(dataset)
    read = dataset if rows <= ROWS_READ else dataset.select(i * rows // ROWS_READ for i in range(ROWS_READ))
    tables = read.with_format("arrow").iter(READ_AT_A_TIME)  # without decoding of pictures and the like
    content = (json.dumps(row, sort_keys=True, default=repr).encode() for table in tables for row in table.to_pylist())
    return {
        f"rows of {name}": rows,
        f"columns of {name}": sorted(dataset.column_names),
        f"content of {name}": digest_of(content),
    }


def reward_facts(functions: Iterable[Any]) -> dict[str, list[str]]:
    """What gives rewards beside a reward role, in order: functions by name and source, models by name.

    Args:
        functions: `RewardSources.functions`.
    """
    return {"reward_funcs": [_reward_name(getattr(function, "__wrapped__", function)) for function in functions]}


def _reward_name(source: Any) -> str:
    """Of a function its name and a digest of its source, without comments; of a classifier its id or folder."""
    config = getattr(getattr(source, "model", None), "config", None)
    if config is not None:
        return str(config._name_or_path)
    bound = ""
    while isinstance(source, functools.partial):
        given = {str(key): value for key, value in [*enumerate(source.args), *source.keywords.items()]}
        bound += json.dumps(given, sort_keys=True, default=lambda value: type(value).__name__)
        source = source.func
    code = source if inspect.isroutine(source) else type(source)
    try:
        text = textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return f"{code.__qualname__}{bound}"
    with contextlib.suppress(SyntaxError):  # of a lambda in the middle of a statement: compared as it is
        text = ast.unparse(ast.parse(text))
    return f"{code.__qualname__}{bound} {digest_of([text.encode()])}"


def digest_of(parts: Iterable[bytes]) -> str:
    """A short digest of bytes in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:DIGITS]
