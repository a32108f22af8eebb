"""docs/watching.md has every metric that a run logs, and no other."""

import re
from pathlib import Path

import pytest

from tests.ppo import tiny
from tests.reward import runs as reward_runs
from tests.rrhf import ranked
from trl_ext import SharedBaseModel
from trl_ext.ppo.guard import FAULTS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "watching.md").read_text()
# Of what the tiny run has none: alarms, and a server
ELSEWHERE = ("guard/", "sampling/")
OF_TRAINERS = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}
LAST_LINE = {"train_runtime", "train_loss", "train_samples_per_second", "train_steps_per_second", "total_flos"}
OF_AN_EVALUATION = {"runtime", "samples_per_second", "steps_per_second"}
COMMON = OF_TRAINERS | LAST_LINE | OF_AN_EVALUATION


def documented(title: str) -> set[str]:
    """Names in the first column of the tables below the headings that begin so."""
    parts = re.split(r"^## ", PAGE, flags=re.M)
    tables = "".join(part for part in parts if part.startswith(title))
    cells = re.findall(r"^\| (`[^|]*`) \|", tables, flags=re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def logged(trainer, **stands_for: str) -> set[str]:
    """What was logged; where a name has a part that is a user's, with the word that stands for it."""
    trainer.train()
    names = {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    return {"/".join(stands_for.get(part, part) for part in name.split("/")) for name in names}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("metrics"))


def test_ppo(world: Path, tmp_path: Path) -> None:
    two_rewards = {"reward_adapter": [world / "reward", world / "reward"], "policy_adapter": world / "policy"}
    run = tiny.trainer(
        world,
        tmp_path,
        model=SharedBaseModel.from_pretrained(str(world / "base"), **two_rewards),
        reward_funcs=[tiny.count_words],
        reward_weights=[0.0],
        eval_dataset=tiny.prompts(4),
        eval_strategy="steps",
        eval_steps=1,
        ptx_dataset=tiny.texts(),
        ptx_coef=0.1,
    )
    names = logged(run, count_words="<source>", reward_role="<source>")
    names = {re.sub(r"^(step/\w+)/(policy|critic)$", r"\1/<role>", name) for name in names}
    page = documented("PPO-Max")
    assert names - page == set()
    assert {name for name in page - names if not name.startswith(ELSEWHERE)} == set()


def test_rrhf(world: Path, tmp_path: Path) -> None:
    run = ranked.trainer(
        world,
        tmp_path,
        model=ranked.tuned(world),
        reward_funcs=ranked.count_w3,
        online_every_steps=1,
        num_online_responses=3,
        beta=0.1,
        eval_dataset=ranked.ranked(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    assert logged(run) - COMMON == documented("RRHF")


def test_reward_models(tmp_path: Path) -> None:
    pairs = reward_runs.pairs(16)
    options = {"lm_coef": 0.1, "eval_dataset": pairs, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    run = reward_runs.trainer(reward_runs.base(tmp_path / "base"), tmp_path / "out", dataset=pairs, **options)
    assert logged(run) - COMMON == documented("Reward models") - COMMON


def test_every_alarm_has_a_row() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "tuning.md").read_text().split("## Alarms")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M)) == set(FAULTS)
