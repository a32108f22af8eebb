"""What the trainers of all methods do around `Trainer`'s loop: how a run is gone on from, stopped, saved and evaluated.

`RoleTrainer` comes before TRL's or transformers' trainer in a class statement.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from trl_ext.checkpoints import NotWrittenError, checkpoints_of, explained_writing, make_room
from trl_ext.engines import EngineCallback, is_fsdp, resume_from, zero_stage
from trl_ext.report.cards import CardFacts, write_card
from trl_ext.report.recorder import RunRecorder
from trl_ext.roles.role import Role
from trl_ext.roles.sharding import is_sharded, whole_weights
from trl_ext.run_identity import RunIdentity, tokenizer_facts
from trl_ext.runs import RunGuard, checksum
from trl_ext.signals import StopSignals

LOGGER = logging.getLogger(__name__)


class RolesLoader(TrainerCallback):
    """Loads every role of a checkpoint when `Trainer` has done its own loading, and checks that each equals its file.

    `Trainer` before transformers 5.23 loads no adapter in the folder itself where subfolders hold others: a resumed
    run would go on with the policy that it started from.

    Args:
        zero: Whether DeepSpeed's optimizer holds copies of the weights, which only DeepSpeed's own loading reaches.

    Attributes:
        folder: The checkpoint that the coming training goes on from; None: it begins anew.
    """

    def __init__(self, zero: bool = False):
        self.zero = zero
        self.folder: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.folder is None:
            return
        before = trained_checksums(model) if self.zero else None
        model.load(self.folder)
        if before is not None and not torch.equal(before, trained_checksums(model)):
            raise RuntimeError(
                f"DeepSpeed has not loaded the trained weights that are in {self.folder}, and its optimizer would "
                "write its own over them. Install a version of deepspeed that this package was tested with, or start "
                "anew from the adapters in the checkpoint."
            )


def trained_checksums(model: Any) -> torch.Tensor:
    """(N, 2): `checksum` of each trained weight."""
    return torch.stack([checksum(p.detach()) for p in model.parameters() if p.requires_grad])


class RoleTrainer(Trainer):
    """What a trainer of roles does in its own way, on one process and on many."""

    identity: RunIdentity
    loader: RolesLoader
    stop: StopSignals
    guard: RunGuard
    recorder: RunRecorder
    dataset_name: str | None = None  # of the training data, for the card
    _card: Callable[..., str]  # the card as text; its arguments are those of `create_model_card`
    coming: Any = None  # `of(iterator)` gives the batches of an epoch in the iterator's place
    save_beside: Callable[[Path], None] | None = None  # what else a checkpoint holds; its state is still its last file
    _name: str  # of the method
    # Every method's loss is a mean over its micro-batch, which `Trainer` averages over those of a step. TRL says so of
    # its own trainers since 1.15.
    loss_is_scaled_for_ga: Any = False

    def add_run_callbacks(
        self,
        facts: dict[str, Any],
        at_border: Callable[[Any], bool] = lambda state: True,
        outcome: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Add what every run has, in its order; the constructor of a trainer ends with it.

        Args:
            facts: See `RunIdentity`; tokenizer, base and adapters are added here.
            at_border: See `StopSignals`.
            outcome: See `RunRecorder`.
        """
        model: Any = self.model
        processing_class: Any = self.processing_class
        facts = {"method": self._name} | facts | tokenizer_facts(processing_class)
        self.identity = RunIdentity(self.args, self.model, facts)
        self.loader = RolesLoader(zero_stage(self.accelerator) > 0)
        self.stop = StopSignals(self.accelerator, at_border)
        self.guard = RunGuard(self.accelerator, lambda: self.model_wrapped, self.callback_handler.callbacks)
        engine = EngineCallback(self.args, self.accelerator)
        self.recorder = RunRecorder(
            self.args,
            str(self._name),
            str(model.get_base_model().name_or_path),
            lambda: self.identity.facts | self.identity.adapters,
            outcome,
            lambda: self.stop.stopped_by,
        )
        for callback in (engine, self.identity, self.loader, self.stop, self.guard, self.recorder):
            self.add_callback(callback)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`; `True` resumes from the newest whole checkpoint of this run.

        SIGINT and SIGTERM end it at the next border between rollouts, after a checkpoint: see docs/resuming.md.

        Raises:
            ValueError: There is no such checkpoint, or it is one of another run.
            KeyboardInterrupt, SystemExit: After SIGINT, SIGTERM.
        """
        resume = self.loader.folder = self._checkpoint(resume_from_checkpoint)
        with self.stop.installed():
            try:
                output = super().train(resume, trial, ignore_keys_for_eval)
            except BaseException as error:
                self.recorder.failed(error, self.state.global_step)
                raise
        self.finish()
        return output

    def finish(self) -> None:
        """What comes after training: a run that a signal has stopped leaves."""
        self.stop.leave(self.args, self.state)

    def own_checkpoint(self) -> str | None:
        """The newest whole checkpoint of this run in `output_dir`; None, and a warning where others lie there."""
        if not checkpoints_of(str(self.args.output_dir)):
            return None
        try:
            return self._checkpoint(True)
        except ValueError as error:
            LOGGER.warning("the run begins anew: %s", error)
            return None

    def _checkpoint(self, given: str | bool | None) -> str | None:
        adapters = getattr(self.model, "adapters", {})
        others = [name for name, role in adapters.items() if role is not Role.POLICY]
        return resume_from(given, self.args, self.accelerator, others, self.identity.difference)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step; none once the run has all its steps, as when a finished one is resumed."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        if self.coming is not None:
            epoch_iterator = self.coming.of(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s; of a sharded model the adapters are put together for it, and the base is not."""
        model: Any = self.model
        with explained_writing(output_dir or str(self.args.output_dir)):
            if _internal_call and output_dir is not None and self.save_beside is not None:
                self.save_beside(Path(output_dir))
            if not is_sharded(model):
                super().save_model(output_dir, _internal_call)
                return
            self._save(output_dir, state_dict=whole_weights(model, lambda name: model.owner(name) is not None))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer`'s; one that cannot be written is removed again.

        Raises:
            NotWrittenError: It cannot be written.
        """
        step = self.state.global_step
        try:
            with explained_writing(Path(str(self.args.output_dir)) / f"checkpoint-{step}"):
                super()._save_checkpoint(model, trial)
        except NotWrittenError:
            make_room(self.args, step)
            raise

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Our card, where `push_to_hub` and every checkpoint would write TRL's, or the `Trainer`'s, over it."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self._card(model_name, dataset_name, tags))

    def card_facts(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> CardFacts:
        """What a card of any method says of the run; the arguments are those of `create_model_card`."""
        args, base = self.args, str(self.model.get_base_model().name_or_path)  # type: ignore[union-attr, operator]
        folder = Path(str(args.output_dir)) if self.recorder.begun else None
        named = (model_name, dataset_name or self.dataset_name, tags)
        return CardFacts(args, base, self.state.log_history, folder, self.identity.facts, *named)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer`'s; before training too where the base is whole.

        Raises:
            RuntimeError: Before training, under FSDP, which splits the weights together with the optimizer's.
        """
        model: Any = self.model
        if is_fsdp(self.accelerator) and not is_sharded(model):
            raise RuntimeError(
                "under FSDP a model can be evaluated in training and after it, not before: accelerate splits its "
                "weights together with the optimizer's. Set eval_on_start=True for figures before the first step."
            )
        before = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = before and self.deepspeed is not None  # else it is asked for ZeRO-3's inference
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.is_deepspeed_enabled = before
