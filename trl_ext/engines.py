"""Accelerate's engines: which of them can serve roles on one base, and what a run under them must mind.

DistributedDataParallel and DeepSpeed's ZeRO stages 1 and 2 keep the base whole on every process. FSDP2 (`fully_shard`)
splits it: see `roles.sharding`. What cannot work is refused before training, by `check_engine`, with what to set.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trl_ext.checkpoints import STATE_FILE, TRAINING_FILES, checkpoint_to_resume, checkpoints_of
from trl_ext.roles.folding import unfold
from trl_ext.roles.sharding import gather_in_calls

DATA_PARALLEL, FSDP2, ZERO = "data parallelism", "FSDP2", "DeepSpeed"
OPTIMIZER_FILES = {  # where each keeps what it goes on from, beside the adapters
    DATA_PARALLEL: TRAINING_FILES,
    FSDP2: ("optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt"),
    ZERO: ("global_step*/*optim_states.pt",),
}
WHOLE = "data parallelism, or DeepSpeed stage 2 (`--config_file zero2_2`)"
ZERO_3 = (
    "DeepSpeed stage 3 is not served: of a model with adapters `Trainer` then puts together and saves trained weights "
    "only, so that checkpoints would lack the reference and the reward adapter, and processes with fewer passes would "
    "be waited for forever. FSDP2 splits the same weights (`--config_file fsdp2_2`); or use stage 2."
)


def is_fsdp(accelerator: Any) -> bool:
    """Whether FSDP, of either version, splits the weights of this run."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)) == "FSDP"


def zero_stage(accelerator: Any) -> int:
    """The stage of DeepSpeed's ZeRO; 0 without it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def engine_name(accelerator: Any) -> str:
    """One of DATA_PARALLEL, FSDP2 and ZERO."""
    if is_fsdp(accelerator):
        return FSDP2
    return ZERO if zero_stage(accelerator) > 0 else DATA_PARALLEL


def check_engine(accelerator: Any, model: nn.Module, optim: Any = None, unsplit: str | None = None) -> None:
    """Refuse engines, and options of engines, under which the roles would compute something else or wait forever.

    Args:
        accelerator: `Accelerator`.
        model: With the base, to check what its weights are stored in.
        optim: The optimizer's name, `TrainingArguments.optim`.
        unsplit: What this trainer does that cannot be done on split weights, for the error; None: nothing.

    Raises:
        ValueError: What cannot work, why, and what to set.
    """
    if zero_stage(accelerator) == 3:
        raise ValueError(ZERO_3)
    if not is_fsdp(accelerator):
        return
    if unsplit is not None:
        raise ValueError(f"FSDP splits the base over the processes, and {unsplit} needs it whole: use {WHOLE}.")
    plugin = accelerator.state.fsdp_plugin
    refused = {
        "fsdp_version": (
            plugin.fsdp_version != 2,
            "version 1 flattens trained and frozen weights of a layer into one. Set fsdp_version: 2",
        ),
        "fsdp_state_dict_type": (
            "FULL_STATE_DICT" not in str(plugin.state_dict_type),
            "split checkpoints hold the policy without its critic. Set fsdp_state_dict_type: FULL_STATE_DICT; of the "
            "weights only adapters are saved, so these checkpoints are small",
        ),
        "fsdp_activation_checkpointing": (
            bool(plugin.activation_checkpointing),
            "accelerate's checkpointing recomputes under whatever role is active then, and the gradients would be "
            "wrong. Set it to false, and gradient_checkpointing: true in the training arguments",
        ),
        "fsdp_cpu_ram_efficient_loading": (
            bool(plugin.cpu_ram_efficient_loading),
            "processes other than the first would put adapters on an empty base. Set it to false",
        ),
    }
    for name, (bad, reason) in refused.items():
        if bad:
            raise ValueError(f"FSDP: {name}: {reason}. The documentation says more: scale.")
    name = str(getattr(optim, "value", optim))
    if any(part in name for part in ("8bit", "bnb", "paged", "ademamix")):
        raise ValueError(
            f"FSDP: optim={name!r} is bitsandbytes', which steps whole tensors and no split ones. Set "
            "optim=adamw_torch: each card holds its part of the states only."
        )
    packed = [p for p in model.parameters() if is_packed(p)]
    if packed:
        raise ValueError(
            f"FSDP: {len(packed)} weights in 4 or 8 bits are stored as {packed[0].dtype}, which is not split: every "
            "card would hold all of them. Load the base with bnb_4bit_quant_storage equal to its dtype "
            "(BitsAndBytesConfig), bfloat16 for most. The documentation says more: scale."
        )


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether a weight is quantised and stored as integers."""
    return not (parameter.is_floating_point() or parameter.is_complex())


def keep_untrained(optimizer: Any, role: str, waits: bool, waited: bool) -> None:
    """Let ZeRO's optimizer leave a role without gradient alone, as torch's leaves weights without one.

    ZeRO gives a weight without gradient one of zeros: Adam would count steps for it, and its first real step would be
    about half as long; weight decay would shrink it. Call it before every step under ZeRO.

    Args:
        optimizer: The trainer's, its groups named by "role".
        role: Whose group.
        waits, waited: Whether it has no gradient in the step that comes, and had none in the one before.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        if group.get("role") != role:
            continue
        group.setdefault("own_weight_decay", group["weight_decay"])
        group["weight_decay"] = 0.0 if waits else group["own_weight_decay"]
        for parameter in group["params"] if waits or waited else ():
            step = optimizer.state.get(parameter, {}).get("step")
            if step is not None:
                step.zero_()


# ---------------------------------------------------------------------- checkpoints


class EngineCallback(TrainerCallback, ExportableState):
    """Makes a sharded model ready for the roles, and writes the batch of the run into its checkpoints.

    Checkpoints know it by the name of its class.

    Args:
        args: The trainer's configuration.
        accelerator: The trainer's.
    """

    def __init__(self, args: Any, accelerator: Any):
        self.args, self.accelerator = args, accelerator

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into `trainer_state.json`."""
        return {"args": {}, "attributes": batch_of(self.args, self.accelerator)}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gather_in_calls(model)
        if zero_stage(self.accelerator) > 0:
            for layer in model.modules():
                unfold(layer)


def resume_from(
    given: str | bool | None,
    args: Any,
    accelerator: Any,
    adapters: Iterable[str] = (),
    difference: Callable[[Path], str | None] = lambda folder: None,
) -> str | None:
    """The checkpoint that a run goes on from, written by the same engine and in the same batch.

    With another number of processes a run goes on as itself where an optimizer step and a rollout take as many
    sequences as before; not under ZeRO, whose checkpoints hold the optimizer in as many parts as there were processes.

    Args:
        given, adapters, difference: See `checkpoints.checkpoint_to_resume`.
        args: Configuration of the run that goes on.
        accelerator: `Accelerator`.

    Raises:
        ValueError: The one given is not whole, or it cannot be gone on from; it says what to set.
    """
    engine = engine_name(accelerator)
    newest = checkpoints_of(args.output_dir)[:1] if given is True else [Path(given)] if given else []
    for path in newest:  # first of all: to another engine a whole checkpoint looks torn
        check_written_under(path, engine)

    def differs(path: Path) -> str | None:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        saved = (state.get("stateful_callbacks") or {}).get(EngineCallback.__name__)
        try:  # before `difference`, which would name fields whose defaults follow from the batch
            check_same_batch(saved.get("attributes", {}) if isinstance(saved, dict) else {}, args, accelerator)
        except ValueError as error:
            return str(error).removesuffix(".")
        return difference(path)

    return checkpoint_to_resume(given, str(args.output_dir), adapters, OPTIMIZER_FILES[engine], differs)


def check_written_under(folder: Path, engine: str) -> None:
    """Check that a checkpoint holds what an engine keeps its optimizer in.

    Raises:
        ValueError: It holds that of another engine.
    """
    missing = [name for name in OPTIMIZER_FILES[engine] if not list(folder.glob(name))]
    written = [name for name, files in OPTIMIZER_FILES.items() if all(list(folder.glob(file)) for file in files)]
    if missing and written:
        raise ValueError(
            f"{folder} holds no {missing[0]}, where {engine} keeps its optimizer: it was written under {written[0]}. "
            "Launch with that, or start anew from its adapters (policy_adapter, critic_adapter)."
        )


def batch_of(args: Any, accelerator: Any) -> dict[str, int]:
    """What decides which sequences an optimizer step takes, over all processes."""
    processes = accelerator.num_processes
    batch = {
        "processes": processes,
        "sequences_per_step": processes * args.per_device_train_batch_size * args.gradient_accumulation_steps,
    }
    if getattr(args, "steps_per_generation", None) is None:  # without rollouts that batches share
        return batch
    return batch | {"generation_batch_size": args.generation_batch_size}


def check_same_batch(saved: dict[str, int], args: Any, accelerator: Any) -> None:
    """A checkpoint's batches against those of the run that goes on from it.

    Args:
        saved: `batch_of` the run that wrote it.
        args: Configuration of the run that goes on.
        accelerator: Of that run.

    Raises:
        ValueError: They differ, or the optimizer's parts do not fit; it says what to set.
    """
    now, processes = batch_of(args, accelerator), accelerator.num_processes
    if zero_stage(accelerator) > 0 and saved.get("processes", processes) != processes:
        raise ValueError(
            f"DeepSpeed keeps the optimizer in one part for each process: the checkpoint has {saved['processes']} "
            f"parts, this run {processes} processes. Launch with {saved['processes']} processes."
        )
    different = [name for name in now if name != "processes" and name in saved and saved[name] != now[name]]
    if not different:
        return
    differences = ", ".join(f"{name} {saved[name]} -> {now[name]}" for name in different)
    raise ValueError(
        f"the checkpoint was written by {saved['processes']} processes, this run has {processes}, and its batch is "
        f"another one ({differences}): it would go on as another run. {remedy(saved, args, processes)}"
    )


def remedy(saved: dict[str, int], args: Any, processes: int) -> str:
    """What to set so that a run with this many processes has the batch of the checkpoint."""
    rows = args.per_device_train_batch_size * processes
    for per_device in range(args.per_device_train_batch_size, 0, -1):
        rows = per_device * processes
        if saved["sequences_per_step"] % rows == 0 and saved.get("generation_batch_size", 0) % rows == 0:
            break
    else:
        return f"{saved['sequences_per_step']} sequences cannot be shared out over {processes} processes: use fewer."
    options = {
        "per_device_train_batch_size": rows // processes,
        "gradient_accumulation_steps": saved["sequences_per_step"] // rows,
    }
    if getattr(args, "steps_per_generation", None) is not None and "generation_batch_size" in saved:
        options["steps_per_generation"] = saved["generation_batch_size"] // rows
    return f"Set {', '.join(f'{name}={value}' for name, value in options.items())}."
