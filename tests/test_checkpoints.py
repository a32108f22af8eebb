"""Which checkpoints are whole; runs that go on from the newest one that is, of every trainer."""

import errno
import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.ppo import tiny
from tests.reward import runs
from tests.rrhf import ranked
from trl_ext import Role
from trl_ext.checkpoints import (
    NotWrittenError,
    checkpoint_to_resume,
    checkpoints_of,
    explained_writing,
    make_room,
    newest_whole,
    what_is_wrong,
)

FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


def reward_run(world, folder, **options):
    return runs.trainer(world / "base", folder, **options)


def rrhf_run(world, folder, **options):
    return ranked.trainer(world, folder, **options)


KINDS = {"ppo": tiny.trainer, "reward": reward_run, "rrhf": rrhf_run}
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Method -> folder with four checkpoints."""
    folders = {}
    for name, make in KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make(world, folders[name], **SAVED).train()
    return folders


@pytest.fixture
def copy_of(saved, tmp_path):
    def copied(name):
        shutil.copytree(saved[name], tmp_path / name)
        return tmp_path / name

    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_is_missing_or_torn_is_named(copy_of, kind):
    folder = copy_of(kind) / "checkpoint-4"
    roles = ["critic", "reference", "reward"] if kind == "ppo" else []
    assert what_is_wrong(folder, roles) is None
    files = [*FILES, "trainer_state.json", *(f"{role}/{file}" for role in roles for file in FILES[:2])]
    for name in files:
        path, content = folder / name, (folder / name).read_bytes()
        path.unlink()
        assert what_is_wrong(folder, roles) == f"{name} is missing"
        for length in (0, 1, len(content) // 2, len(content.rstrip()) - 1):
            path.write_bytes(content[:length])
            assert str(what_is_wrong(folder, roles)).startswith(f"{name} is torn or damaged"), (name, length)
        path.write_bytes(content)
    assert what_is_wrong(folder, roles) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors"])
def test_a_torn_checkpoint_is_skipped_and_the_run_ends_as_if_nothing_had_happened(
    saved, copy_of, world, kind, file, caplog
):
    folder = copy_of(kind)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-3" / file).write_bytes(b"{")
    run = KINDS[kind](world, folder, **SAVED)
    run.train(resume_from_checkpoint=True)
    assert f"going on from {folder / 'checkpoint-2'}" in caplog.text
    assert f"checkpoint-3: {file} is torn or damaged" in caplog.text
    for name in ("checkpoint-3", "checkpoint-4"):
        ended, expected = folder / name / FILES[0], saved[kind] / name / FILES[0]
        assert ended.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_a_file_is_refused_by_name(copy_of, world, kind):
    folder = copy_of(kind)
    for file in ("optimizer.pt", "adapter_model.safetensors"):  # the second comes first in the order of checking
        (folder / "checkpoint-3" / file).unlink()
        with pytest.raises(ValueError, match=f"checkpoint-3.*not a whole checkpoint of this run: {file} is missing"):
            KINDS[kind](world, folder, **SAVED).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_a_critic_that_is_missing_is_an_error(copy_of, world):
    folder = copy_of("ppo")
    shutil.rmtree(folder / "checkpoint-4" / "critic")
    run = tiny.trainer(world, folder, **SAVED)
    before = tiny.role_weights(run.model, Role.POLICY)
    with pytest.raises(ValueError, match=r"critic/adapter_config\.json is missing"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert tiny.same(before, tiny.role_weights(run.model, Role.POLICY))


def test_where_there_is_nothing_to_resume_a_run_starts_anew_and_says_so(tmp_path, caplog):
    assert checkpoint_to_resume(None, tmp_path) is None
    assert checkpoint_to_resume(False, tmp_path) is None
    assert caplog.text == ""
    assert checkpoint_to_resume(True, tmp_path) is None
    assert f"starting anew: {tmp_path} holds no whole checkpoint to go on from\n" in caplog.text
    (tmp_path / "checkpoint-7").mkdir()
    caplog.clear()
    assert checkpoint_to_resume(True, tmp_path) is None
    assert "folders that are not were skipped: checkpoint-7: adapter_config.json is missing" in caplog.text
    assert newest_whole(tmp_path)[0] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_torn_checkpoints_alone_starts_anew(saved, copy_of, world, kind, caplog):
    folder = copy_of(kind)
    for path in checkpoints_of(folder):
        (path / "trainer_state.json").write_bytes(b"")
    KINDS[kind](world, folder, **SAVED).train(resume_from_checkpoint=True)
    assert "starting anew" in caplog.text
    ended, expected = folder / "checkpoint-4" / FILES[0], saved[kind] / "checkpoint-4" / FILES[0]
    assert ended.read_bytes() == expected.read_bytes()


def test_every_process_has_its_random_state_in_a_whole_checkpoint(copy_of):
    folder = copy_of("reward") / "checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"]["EngineCallback"]["attributes"]["processes"] = 2
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert what_is_wrong(folder) == "rng_state_1.pth is missing"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert what_is_wrong(folder) is None


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("[enforce fail at inline_container.cc:672]")]
)
def test_a_checkpoint_that_cannot_be_written_is_named_and_gone(world, tmp_path, monkeypatch, error):
    run = reward_run(world, tmp_path, **SAVED)
    whole = torch.save

    def full(found, path, *args, **kwargs):
        whole(found, path, *args, **kwargs)
        if str(path).endswith("checkpoint-2/scheduler.pt"):
            raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NotWrittenError, match=r"checkpoint-2 could not be written .* Is the disk full\?"):
        run.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1"]
    assert what_is_wrong(tmp_path / "checkpoint-1") is None


def test_adapters_for_which_there_is_no_room_are_named_too(tmp_path):
    """What safetensors raises is no OSError."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(NotWrittenError, match=r"File too large.*Is the disk full\?"), explained_writing(tmp_path):
            save_file({"weight": torch.zeros(1000)}, tmp_path / "adapter_model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_other_errors_while_writing_stay_what_they_are(tmp_path):
    for error in (
        SafetensorError("HeaderTooLarge"),
        RuntimeError("other"),
        OSError("the Hub"),
        ConnectionRefusedError(errno.ECONNREFUSED, "no"),
    ):
        with pytest.raises(type(error)) as found, explained_writing(tmp_path):
            raise error
        assert found.value is error


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


def test_a_checkpoint_is_never_written_over_an_older_one(copy_of, world):
    """Killed half-way, a folder that another run had filled would look whole: weights of one, state of the other."""
    folder = copy_of("reward")
    run = reward_run(world, folder, **SAVED)
    left = folder / "checkpoint-1" / "of_an_older_run"
    left.touch()
    run.train()
    assert not left.exists()
    assert torch.load(folder / "checkpoint-1" / "optimizer.pt", weights_only=True)
    make_room(run.args, 1)
    assert not (folder / "checkpoint-1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_version_without_engines_is_gone_on_from(saved, copy_of, world, kind):
    folder = copy_of(kind)
    shutil.rmtree(folder / "checkpoint-4")
    path = folder / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["EngineCallback"]
    path.write_text(json.dumps(state))
    KINDS[kind](world, folder, **SAVED).train(resume_from_checkpoint=True)
    ended, expected = folder / "checkpoint-4" / FILES[0], saved[kind] / "checkpoint-4" / FILES[0]
    assert ended.read_bytes() == expected.read_bytes()
