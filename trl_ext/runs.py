"""What all trainers ask of a run: its precision, and that it stops before it goes wrong without a word.

`RunGuard` is the callback in which they ask it.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState

from trl_ext.checkpoints import checkpoints_of, flush, make_room
from trl_ext.fields import check_warmup
from trl_ext.ops.precision import best_dtype
from trl_ext.roles.sharding import own_part

FIRST_KL_TOLERANCE = 1e-6
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
BF16_HELP = "Compute in bfloat16. Default, with fp16 unset too: what the card can do, else float16; float32 on a CPU."


class RunStoppedError(RuntimeError):
    """A run was stopped for a fault that it showed; what it had learned before is saved. The message says both."""


def choose_mixed_precision(args: Any) -> None:
    """Set `bf16` and `fp16` of training arguments to what the card does best, where neither was given.

    TRL's default is bfloat16 everywhere; a T4 has none, and a CPU is slower with it.

    Args:
        args: `TrainingArguments` before their `__post_init__`, their default for `bf16` None.
    """
    if args.bf16 is None:
        dtype = torch.float16 if args.fp16 else best_dtype(args.use_cpu)
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16


def check_finite(what: str, terms: dict[str, Tensor], step: int, output_dir: str, model: nn.Module) -> None:
    """Stop before a non-finite loss or gradient reaches the weights.

    Args:
        what: what the terms are, for the error: "loss", "gradient norm".
        terms: scalars by name.
        step: optimizer steps that were taken.
        output_dir: where the run's checkpoints lie.
        model: whose trained weights the error says are whole, or are not.

    Raises:
        RuntimeError: What it is, the step, the terms with their values, and the last good checkpoint.
    """
    values = dict(zip(terms, torch.stack([t.detach().float() for t in terms.values()]).tolist(), strict=True))
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not bad:
        return
    broken = broken_weights(model)
    weights = f"{_some(broken)} are not finite either." if broken else "The weights have not been changed by it."
    raise RuntimeError(
        f"non-finite {what} at step {step}: {bad}. {weights} {last_checkpoint(output_dir)} Lower the learning rate (in "
        "PPO that of the role), or compute in float32 or bfloat16 instead of float16."
    )


def broken_weights(model: nn.Module) -> list[str]:
    """Names of the trained weights that hold NaN or infinity."""
    trained = [(name, own_part(p.detach())) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not trained:
        return []
    finite = torch.stack([tensor.isfinite().all().cpu() for _, tensor in trained]).tolist()
    return [name for (name, _), fine in zip(trained, finite, strict=True) if not fine]


def check_weights(model: nn.Module, step: int, output_dir: str) -> None:
    """Stop before weights that are not finite are saved, evaluated or handed over as a result.

    Raises:
        RuntimeError: Which weights, the step, and the last good checkpoint.
    """
    broken = broken_weights(model)
    if broken:
        raise RuntimeError(
            f"after step {step} {_some(broken)} are not finite: the last update has broken them. "
            f"{last_checkpoint(output_dir)} Lower the learning rate (in PPO that of the role)."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} trained weights ({names[0]}{', ...' if len(names) > 1 else ''})"


def last_checkpoint(output_dir: str | None) -> str:
    """A sentence about the checkpoint that a stopped run can go on from, and later ones whose weights are broken."""
    broken: list[Path] = []
    for path in checkpoints_of(str(output_dir)):
        if weights_are_sound(path):
            skipped = f" The weights in {', '.join(p.name for p in broken)} are missing or broken." if broken else ""
            return f"The last good checkpoint is {path}.{skipped}"
        broken.append(path)
    if broken:
        named = ", ".join(path.name for path in broken)
        return f"There is no good checkpoint: the weights in {named} are missing or broken."
    return "There is no checkpoint yet."


def weights_are_sound(folder: Path) -> bool:
    """Whether a folder holds weights, all of which can be read and are finite."""
    files = sorted(folder.rglob("*.safetensors"))
    try:
        tensors = [tensor for file in files for tensor in load_file(file).values()]
    except (OSError, SafetensorError):
        return False
    return bool(tensors) and all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def check_first_kl(logps: Tensor, reference_logps: Tensor) -> None:
    """Before the first update the policy is the reference; if not, the KL is anchored somewhere else.

    Args:
        logps, reference_logps: log-probabilities of the same tokens, of one shape.

    Raises:
        RuntimeError: They differ.
    """
    worst = float((logps - reference_logps).detach().abs().max())
    if worst > FIRST_KL_TOLERANCE:
        raise RuntimeError(
            f"before the first update the policy's log-probabilities differ from the reference's by up to {worst}: the "
            "KL would be measured from another model. Is dropout on (disable_dropout=False), or was the policy changed "
            "after the SharedBaseModel was made?"
        )


# ---------------------------------------------------------------------- several processes


def check_synchronised(wrapped: nn.Module, accelerator: Any) -> None:
    """Check that the processes train one model: it is wrapped, and its trained weights are equal on all of them.

    Args:
        wrapped: What the trainer calls in a training step (`trainer.model_wrapped`).
        accelerator: `Accelerator`.

    Raises:
        RuntimeError: Each process would train, or has trained, a model of its own.
    """
    if accelerator.num_processes == 1:
        return
    inner = getattr(wrapped, "_orig_mod", wrapped)  # inside torch.compile
    kinds = {kind.__name__ for kind in type(inner).__mro__}
    if not kinds & set(WRAPPERS):
        raise RuntimeError(
            f"{accelerator.num_processes} processes, but the model is a bare {type(inner).__name__}: its gradients "
            "would not be averaged, and each process would train alone. Something has prepared it before training, as "
            "accelerator.prepare_model(model, evaluation_mode=True) does: leave that to the trainer."
        )
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return  # each process holds a part of its own
    trained = [(name, p.detach()) for name, p in inner.named_parameters() if p.requires_grad and p.numel()]
    sums = torch.stack([checksum(tensor) for _, tensor in trained]).to(accelerator.device)
    ranks = accelerator.gather(sums[None])
    different = (ranks != ranks[:1]).any(-1)  # (processes, weights)
    if different.any():
        names = [trained[i][0] for i in different.any(0).nonzero().flatten().tolist()]
        raise RuntimeError(
            f"{_some(names)} differ between the processes {different.any(1).nonzero().flatten().tolist()} and process "
            "0: they have not trained one model. Do all of them see the same data, seed and checkpoint?"
        )


def checksum(tensor: Tensor) -> Tensor:
    """Two whole numbers, (2,) int64, that hang on every byte of a tensor and on its place, however they are summed."""
    bits = tensor.flatten().contiguous().view(torch.uint8).long()
    places = torch.arange(len(bits), device=bits.device) % 65521 + 1
    return torch.stack([bits.sum(), (bits * places).sum()])


# ---------------------------------------------------------------------- the callback


class RunGuard(TrainerCallback):
    """Sees to it, in any trainer, that a run trains what it saves, on all processes, and can be evaluated first.

    At the start the run must be longer than its warm-up and the processes must train one model; before every save and
    evaluation, and at the end, the trained weights must be finite and equal on all processes.

    An evaluation before training is made a part of the run: the trackers are set up as for training, so that they log
    to one place; and what `Trainer` does to the model for it is undone. It would prepare the model for evaluation, and
    accelerate prepares no model twice: training would go on with it, without DistributedDataParallel.

    Add it after the callbacks that decide when to save.

    Args:
        accelerator: The trainer's.
        wrapped: Gives what the trainer calls in a training step: `lambda: trainer.model_wrapped`.
        callbacks: The trainer's list of callbacks, among them the trackers.
    """

    def __init__(self, accelerator: Any, wrapped: Callable[[], nn.Module], callbacks: Iterable[TrainerCallback]):
        self.accelerator, self.wrapped, self.callbacks = accelerator, wrapped, callbacks
        self.training = self.tracking = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = self.tracking = True
        check_warmup(args, state.max_steps)
        check_synchronised(self.wrapped(), self.accelerator)
        # A checkpoint of an earlier version does not know every callback, and `Trainer` looks each up when it saves
        for callback in self.callbacks:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            self._check(args, state, model)
        if control.should_save:
            make_room(args, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            flush(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.training = self.tracking = False
        self._check(args, state, model)

    def _check(self, args: Any, state: Any, model: Any) -> None:
        check_weights(model, state.global_step, str(args.output_dir))
        check_synchronised(self.wrapped(), self.accelerator)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_tracking(args, state, control, **kwargs)

    def start_tracking(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the trackers up for what happens outside training; in training they are, and nothing happens.

        A trainer that logs before the first step of an evaluation is over, as TRL's does about generation, calls it.

        Args:
            args, state, control, kwargs: Those of any event.
        """
        if self.tracking:
            return
        self.tracking = True
        trackers = tuple(get_reporting_integration_callbacks(args.report_to))
        for callback in self.callbacks:
            if isinstance(callback, trackers):
                callback.on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.training:
            release(model, self.accelerator)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control, model)


def release(model: nn.Module, accelerator: Any) -> None:
    """Undo the preparation of a model for evaluation alone, so that the next `prepare` wraps it for training."""
    if "_is_accelerate_prepared" not in vars(model):  # training has wrapped it already
        return
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward without autocast
    del model._is_accelerate_prepared
    accelerator.free_memory()
