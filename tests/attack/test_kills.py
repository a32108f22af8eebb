"""Runs that are killed with SIGKILL again and again, and started with the same command, end as if nothing had been.

`TRL_EXT_KILLS` kills in all (20), spread over the recipes, every other one aimed into the writing of a checkpoint;
`TRL_EXT_KILLS_SEED` draws others.
"""

import os
import random
import re
import signal
from pathlib import Path

import pytest

from tests.attack.recipes import FLAGS, SAVED, Recipe, results_of
from tests.scripts.pairs import write_pairs
from trl_ext.checkpoints import checkpoints_of, what_is_wrong
from trl_ext.toy import build_world

KILLS = int(os.environ.get("TRL_EXT_KILLS", "20"))
SEED = int(os.environ.get("TRL_EXT_KILLS_SEED", "0"))
SIZED = ("optimizer.pt", "adapter_model.safetensors")
NAMES = [*FLAGS, "pipeline"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def pipeline_flags(folder: Path) -> list[str]:
    """A world of conversations, pairs, and the configuration of reward models that save checkpoints."""
    world = build_world(folder / "world", scale=0.02, template="chatml")
    write_pairs(folder)
    (folder / "reward.yaml").write_text(
        "use_cpu: true\ngradient_checkpointing: false\nreport_to: none\nsave_strategy: steps\nsave_steps: 1\n"
        "max_steps: 4\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-2\ndisable_tqdm: true\n"
    )
    return [
        *[f"--model_name_or_path={world.base}", f"--policy_adapter={world.policy_adapter}", "--members=3"],
        *[f"--dataset_name={folder / 'train.jsonl'}", f"--dataset_test_name={folder / 'test.jsonl'}"],
        *[f"--reward_config={folder / 'reward.yaml'}", "--judged_prompts=6", "--max_completion_length=8"],
        *["--max_steps=8", "--per_device_train_batch_size=4", "--steps_per_generation=1", "--critic_warmup_steps=2"],
    ]


@pytest.fixture(scope="module", params=NAMES)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe that has been run without a kill, and the folder of that run."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = pipeline_flags(folder) if request.param == "pipeline" else FLAGS[request.param]
    found = Recipe(request.param, [*flags, *SAVED])
    found.measure(folder / "whole")
    return found, folder


def test_killed_runs_end_as_if_nothing_had_been(recipe: tuple[Recipe, Path]) -> None:
    run, folder = recipe
    number = NAMES.index(run.name)
    count = KILLS // len(NAMES) + (number < KILLS % len(NAMES))
    moments = run.moments(count, random.Random(f"{SEED}-{run.name}"))
    assert run.writes > 20
    world = folder / "whole" / "world"
    outputs = run.survive(folder / "killed", moments, world if world.is_dir() else None)
    print(f"{run.name}: {run.seconds:.0f} s whole, {len(outputs)} starts, {moments}")  # shown by pytest -rP
    assert len(outputs) > count
    assert not any("Traceback" in output for output in outputs)


def test_a_run_that_has_ended_is_started_again(recipe: tuple[Recipe, Path]) -> None:
    """As a scheduler does that has not noticed: no further step, the same files."""
    run, folder = recipe
    status, output = run.run(folder / "whole")
    assert status == 0, output[-4000:]
    assert results_of(folder / "whole") == run.results
    if run.name == "pipeline":
        assert "3 of 3 reward models are there" in output
        assert "Both policies answer" not in output  # and what was judged is not judged again


def test_the_disk_is_full_while_a_checkpoint_is_written(recipe: tuple[Recipe, Path]) -> None:
    """A limit on the size of files: the newest checkpoint cannot be written, those before it are as they were."""
    run, folder = recipe
    out, torn = folder / "full", SIZED[NAMES.index(run.name) % 2]
    if (folder / "whole" / "world").is_dir():
        out.mkdir()
        (out / "world").symlink_to(folder / "whole" / "world")
    status, _ = run.run(out, dies_at=run.writes * 3 // 4)
    assert status == -signal.SIGKILL
    before = whole_checkpoints(out)
    assert before
    sizes = {name: max(path.stat().st_size for path in before if path.name == name) for name in SIZED}
    status, output = run.run(out, largest_file=sizes[torn] * 3 // 4)
    assert status == 1
    assert re.search(r"checkpoint-\d+ could not be written .*Is the disk full\? .* go on with", output)
    assert {path: path.read_bytes() for path in before} == before
    assert not any(what_is_wrong(path) for path in checkpoints_of(out))  # what was torn is gone
    status, output = run.run(out)
    assert status == 0, output[-4000:]
    assert results_of(out) == run.results


def whole_checkpoints(out: Path) -> dict[Path, bytes]:
    """Every file of a run's whole checkpoints, with what is in it."""
    whole = [path for path in checkpoints_of(out) if what_is_wrong(path) is None]
    return {path: path.read_bytes() for folder in whole for path in folder.rglob("*") if path.is_file()}
