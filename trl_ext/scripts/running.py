"""What recipes do around a training: checks at the start, the progress bar, resuming, evaluation with a seed."""

import contextlib
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

TRUE = ("true", "1", "yes")
ANSWERED_AT_A_TIME = 32  # prompts
WATCHED, MOMENTS = 8, 6  # held-out prompts that are completed on the way, and how often


def quiet_libraries() -> None:
    """Hide two messages about libraries below us that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def printer() -> Callable[..., None]:
    """`print` in the main process, nothing in the others."""
    return print if PartialState().is_main_process else (lambda *_, **__: None)


def start_run(training: Any) -> str | bool | None:
    """What comes before anything is loaded: the output folder, the seed, the checkpoint to go on from.

    Args:
        training: `TrainingArguments`; `resume_from_checkpoint` may be "true", for the last whole one in `output_dir`.

    Returns:
        As `checkpoint_to_resume`.

    Raises:
        ValueError: An output folder that cannot be written, or no such folder to go on from.
    """
    check_output_dir(training.output_dir)
    set_seed(training.seed)  # fresh adapters come from it, the same on every process
    return checkpoint_to_resume(training)


def check_output_dir(folder: str | Path, flag: str = "--output_dir") -> None:
    """Write a file to the output folder and remove it: a run must not find out at its end that it cannot save.

    Raises:
        ValueError: The folder cannot be made or written; names the flag and the folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise ValueError(f"{flag} {folder} cannot be written: {error}. Name another folder.") from error


def checkpoint_to_resume(training: Any) -> str | bool | None:
    """What `--resume_from_checkpoint` means: a folder, True for the newest whole one, None without the flag.

    With True a run starts anew where there is none: the trainer knows which files a whole one has, and says so.

    Raises:
        ValueError: There is no such folder.
    """
    wanted = training.resume_from_checkpoint
    if not wanted or str(wanted).lower() in ("false", "0", "no"):
        return None
    if str(wanted).lower() not in TRUE:
        if not Path(wanted).is_dir():
            raise ValueError(f"--resume_from_checkpoint {wanted}: there is no such folder.")
        return str(wanted)
    return True


class ProgressWithMetrics(ProgressCallback):
    """Transformers' progress bar, with the metrics that matter beside it instead of every metric below it."""

    def __init__(self, shown: dict[str, str]):
        super().__init__()
        self.shown = shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        bar: Any = self.training_bar
        if bar is not None:
            bar.set_description("training", refresh=False)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        began = self.prediction_bar is None
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        bar: Any = self.prediction_bar
        if began and bar is not None:
            bar.set_description("evaluating", refresh=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None and logs:
            values = {label: f"{logs[key]:.3g}" for key, label in self.shown.items() if logs.get(key) is not None}
            if values:
                bar.set_postfix(values)


def show_progress(trainer: Any, shown: dict[str, str]) -> None:
    """Replace a trainer's bar and printed logs by one bar with these metrics, logged name -> label."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressWithMetrics(shown))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's random numbers from a seed of their own; on leaving they go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class SeededEvaluation:
    """Makes every evaluation of a trainer draw the same random numbers: before and after differ by the policy alone."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        with seeded(trainer.args.seed + trainer.args.process_index):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]


class EvaluationAtStart(TrainerCallback):
    """Leaves out the evaluation before training where a run goes on: its checkpoint's log has it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.eval_on_start = args.eval_on_start and state.global_step == 0
        if args.eval_on_start:
            printer()("Evaluating the policy before training ...", flush=True)


class HeldOutSamples(TrainerCallback):
    """Completes a few held-out prompts now and then in a PPO run without evaluations on its way, for its report.

    Every time with the same random numbers, which the training knows nothing of; reward functions are called for them.

    Args:
        trainer: `PPOMaxTrainer`.
        prompts: Of the evaluation; the first few are taken, as many on every process.
    """

    def __init__(self, trainer: Any, prompts: Any):
        self.trainer = trainer
        processes, index = trainer.accelerator.num_processes, trainer.accelerator.process_index
        count = min(WATCHED, len(prompts)) // processes
        self.rows = [prompts[index * count + i] for i in range(count)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every, stride = max(state.max_steps // (MOMENTS + 1), 1), args.steps_per_update
        due = state.global_step // every != (state.global_step - stride) // every
        if not self.rows or not due or args.eval_strategy != "no" or state.global_step >= state.max_steps:
            return
        if args.at_border(state.global_step, state.max_steps):
            with seeded(args.seed + args.process_index), everything_seeded(args.seed):
                self.trainer.complete_and_keep(self.rows)


@contextlib.contextmanager
def everything_seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's random numbers from a seed of their own, as `seeded` does PyTorch's."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def first_evaluation(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The logged evaluation of step 0 that has `key`; empty where there is none."""
    return next((entry for entry in history if key in entry and entry.get("step") == 0), {})


def write_json(path: Path, content: Any) -> None:
    """A result in a file, readable by people too; whole, or not there."""
    aside = path.with_name(f".unfinished-{path.name}")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(path)


def options_of(*parts: Any) -> dict[str, Any]:
    """The fields of a command's dataclasses, for `run.json`; paths of files and folders that there are, whole."""
    found = {each.name: getattr(part, each.name) for part in parts for each in fields(part)}
    return {name: _whole(value) for name, value in found.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if not isinstance(value, str) or not value:
        return value
    path, colon, function = value.rpartition(".py:")
    if colon and Path(f"{path}.py").is_file():
        return f"{Path(path).resolve()}.py:{function}"
    known = Path(value).is_file() or ("/" in value and Path(value).exists())
    return str(Path(value).resolve()) if known else value


def answers(trainer: Any, encoder: Any, prompts: Sequence[Any]) -> tuple[list[Any], ...]:
    """Token ids of the prompts, and of an answer to each by the reference and by the policy, as they were generated.

    Every prompt has random numbers of its own: the two policies differ by themselves alone. The main process calls it;
    a vLLM server samples where the run's do.
    """
    from trl_ext import Role
    from trl_ext.generation.seeded import generate_responses, prompt_generator

    args = trainer.args
    engine = None if trainer.vllm_generation is None else trainer.vllm_generation.engine
    prompt_ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    written: list[list[list[int]]] = []
    for role in (Role.REFERENCE, Role.POLICY):
        responses: list[list[int]] = []
        for start in range(0, len(prompts), ANSWERED_AT_A_TIME):
            batch = prompt_ids[start : start + ANSWERED_AT_A_TIME]
            with contextlib.nullcontext() if engine is None else engine.alone():
                groups = generate_responses(
                    trainer.model,
                    batch,
                    [prompt_generator(args.seed, start + i) for i in range(len(batch))],
                    1,
                    args.max_completion_length or 1,
                    eos_token_ids=encoder.end_ids,
                    pad_token_id=encoder.pad_id,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    role=role,
                    engine=engine,
                )
            responses += [group[0] for group in groups]
        written.append(responses)
    return prompt_ids, *written
