"""SIGINT and SIGTERM in training: the run stops at its next border between rollouts, and can be gone on from there."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(TrainerCallback):
    """Ends training at the next border after a SIGINT or SIGTERM, with a checkpoint unless `save_strategy` is "no".

    A second signal does what it would have done without this: it ends the process, or calls the handler that was
    installed before. On several processes all stop at the same border, whichever of them the signal has reached.

    Add it after the callbacks that hold checkpoints back, and before `RunGuard`.

    Args:
        accelerator: The trainer's.
        at_border: Whether a checkpoint can be written after the step of this `TrainerState`; alike on all processes.

    Attributes:
        stopped_by: The signal at which training has ended; 0: none.
        how_to_go_on: What a user is told to do with the checkpoint.
    """

    how_to_go_on = "go on with resume_from_checkpoint=True (in a recipe --resume_from_checkpoint true)"

    def __init__(self, accelerator: Any, at_border: Callable[[Any], bool]):
        self.accelerator, self.at_border = accelerator, at_border
        self.received = self.stopped_by = 0
        self.saved: Path | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block signals are waited with. In another thread than the main one nothing is changed.

        A signal that is ignored stays so: in the background of a script a shell lets SIGINT be ignored.
        """
        self.received = self.stopped_by = 0
        self.saved = None
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
            before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
        process = os.getpid()

        def receive(number: int, frame: FrameType | None) -> None:
            if self.received or os.getpid() != process:  # the second; or in a child, as loaders of data are
                signal.signal(number, before[number])
                if callable(before[number]):
                    before[number](number, frame)
                else:
                    os.kill(os.getpid(), number)
                return
            self.received = number
            if self.accelerator.is_main_process:  # not by print: it may be this that was interrupted
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: training stops at the end of this rollout; once more ends it now.\n".encode())

        try:
            for number in before:
                signal.signal(number, receive)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.at_border(state):
            return
        self.stopped_by = self._agreed()
        if self.stopped_by:
            control.should_training_stop = True
            control.should_log |= args.logging_strategy != "no"  # the means since the last log are in no checkpoint

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, unless this step was. `Trainer` comes here where training stops within an epoch, too."""
        if self.stopped_by:
            control.should_evaluate &= _at_end_of_epoch(state)
            control.should_save = args.save_strategy != "no" and (control.should_evaluate or self.saved is None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped_by:
            self.saved = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

    def leave(self, args: Any, state: Any) -> None:
        """When training is over: nothing without a signal, else say what was saved and how to go on, and end.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, with 128 + 15.
        """
        number = self.stopped_by or self._agreed()  # one that came after the last border
        if not number:
            return
        self.accelerator.wait_for_everyone()  # each has written its part: a launcher ends all when one has ended
        if self.accelerator.is_main_process:
            done = f"{signal.Signals(number).name}: training ended after step {state.global_step} of {state.max_steps}."
            print(f"{done} {self._saved(args)}", flush=True)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _saved(self, args: Any) -> str:
        if args.save_strategy == "no":
            return "Nothing was saved: save_strategy is 'no'."
        if self.saved is None:
            return f"Nothing more was saved: go on from the last checkpoint in {args.output_dir}, if there is one."
        if args.save_only_model:
            return f"Saved {self.saved}, without optimizer: save_only_model=True."
        return f"Saved {self.saved}: {self.how_to_go_on}."

    def _agreed(self) -> int:
        """The signal that has reached any process, 0 for none."""
        if self.accelerator.num_processes == 1:
            return self.received
        mine = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())


def _at_end_of_epoch(state: Any) -> bool:
    epoch = state.epoch or 0.0
    return abs(epoch - round(epoch)) < 1e-6
