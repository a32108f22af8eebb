"""Trackers, each end to end where it is installed: curves, a table of completions, and alerts of the guard.

pip install trackio tensorboard wandb && pytest tests/report/test_trackers.py
"""

import json
import uuid

import pytest
from transformers import TrainerCallback

from tests.ppo import tiny

CURVES = ("reward", "kl", "policy_loss", "learning_rate/critic")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


class Alarm(TrainerCallback):
    """An alarm of the guard at the end of the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.guard.alert("repetition", "words")


def run(world, folder, tracker: str, **options):
    alarm = Alarm()
    options |= {"report_to": tracker, "logging_steps": 1, "log_completions": True, "num_completions_to_print": 1}
    trainer = tiny.trainer(world, folder, reward_funcs=tiny.count_words, callbacks=[alarm], **options)
    alarm.guard = trainer.watch.guard
    trainer.train()
    return trainer


def test_tensorboard_gets_the_curves(world, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = run(world, tmp_path / "out", "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in CURVES:
        written = [event.value for event in events.Scalars(f"train/{name}")]
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert written == pytest.approx(logged)


def test_wandb_gets_the_curves_and_the_completions(world, tmp_path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "PROJECT": "test"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(world, tmp_path / "out", "wandb")
    summary = {key: wandb.run.summary[key] for key in wandb.run.summary._as_dict()}
    wandb.finish()
    assert {f"train/{name}" for name in CURVES} <= set(summary)
    (table,) = list((tmp_path / "wandb").glob("offline-run-*/files/media/table/completions_*.table.json"))[-1:]
    content = json.loads(table.read_text())
    assert {"prompt", "completion", "count_words", "advantage"} <= set(content["columns"])
    assert len(content["data"]) == 4


def test_trackio_gets_the_curves_the_completions_and_the_alerts(world, tmp_path) -> None:
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = f"trl-ext-test-{uuid.uuid4().hex}"  # trackio's folder is chosen when it is imported
    try:
        run(world, tmp_path / "out", "trackio", project=project)
        (alert,) = trackio.Api().alerts(project)
        assert (alert["title"], alert["text"], alert["level"]) == ("repetition", "words", "warn")
        (found,) = trackio.Api().runs(project)
        rows = SQLiteStorage.get_logs(project, found.name)
        for name in CURVES:
            assert any(f"train/{name}" in row for row in rows), name
        assert any("completions" in row for row in rows)
    finally:
        SQLiteStorage.get_project_db_path(project).unlink(missing_ok=True)
