"""What makes a run: seen when it changes, not seen when it does not, and compared in every trainer."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from transformers import TrainingArguments
from trl import RewardConfig, RLOOConfig

from tests.ppo import tiny
from tests.reward import runs
from tests.rrhf import ranked
from trl_ext import PPOMaxConfig, RewardModelConfig, RRHFConfig, run_identity
from trl_ext.roles.folders import frozen_digests
from trl_ext.run_identity import FREE, MAY_CHANGE, data_facts, reward_facts
from trl_ext.sources import RewardSources

SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


def reward_run(world, folder, **options):
    return runs.trainer(world / "base", folder, **options)


def online_run(world, folder, **options):
    """RRHF that samples, and is scored by a function; what `ranked.trainer` does otherwise comes first."""
    options = {"online_every_steps": 1, "reward_funcs": ranked.count_w3, "dataset": tiny.prompts()} | options
    return ranked.trainer(world, folder, **options)


KINDS = {"ppo": tiny.trainer, "reward": reward_run, "rrhf": ranked.trainer, "online": online_run}


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Method -> folder with checkpoint-1 and checkpoint-2."""
    folders = {}
    for name, make in KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make(world, folders[name], **SAVED).train()
    return folders


# ---------------------------------------------------------------------- what may change


def test_what_may_change_are_fields_that_there_are():
    known = set()
    for config in (TrainingArguments, RLOOConfig, RewardConfig, PPOMaxConfig, RRHFConfig, RewardModelConfig):
        known |= set(config.__dataclass_fields__)
    assert known >= FREE
    assert len(FREE) == sum(map(len, MAY_CHANGE.values()))  # none twice


def test_what_decides_the_result_may_not_change():
    fixed = set(PPOMaxConfig.__dataclass_fields__) - FREE
    assert fixed >= {"learning_rate", "seed", "beta", "kl_control", "num_generations", "num_iterations", "temperature"}
    assert fixed >= {"lr_scheduler_type", "warmup_steps", "optim", "reward_weights", "max_completion_length"}
    assert set(RRHFConfig.__dataclass_fields__) - FREE >= {"rank_coef", "length_penalty", "online_every_steps"}
    assert set(RewardModelConfig.__dataclass_fields__) - FREE >= {"lm_coef", "label_smoothing", "max_length"}


# ---------------------------------------------------------------------- data


def test_data_is_known_by_its_content_wherever_it_lies(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "score": i / 3, "none": None} for i in range(20)]
    made = Dataset.from_list(rows)
    facts = data_facts("train_dataset", made)
    assert facts["rows of train_dataset"] == 20
    assert facts["columns of train_dataset"] == ["none", "prompt", "score"]
    made.save_to_disk(tmp_path / "disk")
    made.to_json(tmp_path / "rows.jsonl")
    shuffled = Dataset.from_list(rows[::-1]).select(range(19, -1, -1))
    from_json = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    from_disk = Dataset.load_from_disk(str(tmp_path / "disk"))
    others = [Dataset.from_list(rows), from_disk, shuffled, made.with_format("torch"), made.select_columns(
        ["score", "none", "prompt"])]  # fmt: skip
    assert len({other._fingerprint for other in [made, *others]}) > 3
    for other in others:
        assert data_facts("train_dataset", other) == facts
    assert data_facts("train_dataset", from_json)["rows of train_dataset"] == 20


@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_row_that_is_another_is_seen(place):
    rows = [f"q{i}" for i in range(20)]
    before = data_facts("d", Dataset.from_dict({"prompt": rows}))
    rows[place] += " "
    after = data_facts("d", Dataset.from_dict({"prompt": rows}))
    assert [name for name in before if before[name] != after[name]] == ["content of d"]
    assert data_facts("d", Dataset.from_dict({"prompt": rows[::-1]})) != after


def test_of_many_rows_an_even_spread_is_read(monkeypatch):
    monkeypatch.setattr(run_identity, "ROWS_READ", 4)
    read = [0, 2, 5, 7]
    for i in range(10):
        rows = [str(k) for k in range(10)]
        before = data_facts("d", Dataset.from_dict({"p": rows}))
        rows[i] = "x"
        assert (before != data_facts("d", Dataset.from_dict({"p": rows}))) == (i in read)


def test_a_stream_has_no_facts():
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    assert data_facts("d", stream) == data_facts("d", None) == {}


# ---------------------------------------------------------------------- rewards


def scaled(prompts, completions, factor=1.0, **kwargs):
    return [factor * len(text) for text in completions]


async def waited(prompts, completions, **kwargs):
    return [1.0] * len(completions)


class Scorer:
    def __call__(self, prompts, completions, **kwargs):
        return [2.0] * len(completions)

    def method(self, prompts, completions, **kwargs):
        return [3.0] * len(completions)


def names_of(*sources):
    return reward_facts(RewardSources(list(sources)).functions)["reward_funcs"]


def test_each_reward_is_known_by_name_and_source():
    listed = [scaled, waited, Scorer(), Scorer().method, functools.partial(scaled, factor=2.0), lambda **k: [1.0], len]
    names = names_of(*listed)
    assert names == names_of(
        scaled, waited, Scorer(), Scorer().method, functools.partial(scaled, factor=2.0), *listed[5:]
    )
    assert len(set(names)) == len(names)
    assert [name.split()[0] for name in names[:3]] == ["scaled", "waited", "Scorer"]
    assert names_of(functools.partial(scaled, factor=3.0)) != names_of(functools.partial(scaled, factor=2.0))
    assert names[-1] == "len"


def source_of(text, tmp_path, name="f"):
    path = tmp_path / f"rewards{len(list(tmp_path.iterdir()))}.py"
    path.write_text(text)
    space = {}
    exec(compile(text, str(path), "exec"), space)
    return names_of(space[name])[0]


def test_a_comment_makes_no_other_reward_and_a_number_does(tmp_path):
    body = "def f(prompts, completions, **kwargs):\n    return [{} for _ in completions]{}\n"
    one = source_of(body.format(1.0, ""), tmp_path)
    assert one == source_of("\n\n" + body.format(1.0, "  # fine"), tmp_path)
    assert one != source_of(body.format(2.0, ""), tmp_path)


def test_a_classifier_is_known_by_its_name(world):
    assert names_of(str(world / "classifier")) == [str(world / "classifier")]


# ---------------------------------------------------------------------- adapters


def test_frozen_adapters_are_known_by_their_numbers(world):
    model = tiny.four_roles(world)
    digests = frozen_digests(model)
    assert digests.keys() == {"reference", "reward"}
    assert frozen_digests(tiny.four_roles(world)) == digests
    model.heads["reward"].weight.data[0, 0] += 1e-6
    assert {n for n, d in frozen_digests(model).items() if d != digests[n]} == {"reward"}
    next(p for n, p in model.named_parameters() if ".reference." in n).data.view(-1)[0] += 1e-6
    assert all(d != digests[n] for n, d in frozen_digests(model).items())
    assert frozen_digests(SimpleNamespace()) == {}


# ---------------------------------------------------------------------- in every trainer


def another_reward(prompts, completions, **kwargs):
    return [1.0] * len(completions)


ANOTHER = [
    ("ppo", {"learning_rate": 2e-2}, "learning_rate=0.01, this run has learning_rate=0.02"),
    ("ppo", {"reward_funcs": another_reward}, "reward_funcs"),
    ("ppo", {"dataset": tiny.prompts(9)}, "rows of train_dataset=8, this run has rows of train_dataset=9"),
    ("ppo", {"dataset": tiny.prompts(extra=list(range(8)))}, "columns of train_dataset"),
    ("ppo", {"lr_scheduler_type": "constant", "kl_target": 1.0}, "lr_scheduler_type=.*kl_target="),
    ("rrhf", {"learning_rate": 2e-2}, "learning_rate"),
    ("rrhf", {"dataset": ranked.ranked().select(range(7, -1, -1))}, "content of train_dataset"),
    ("rrhf", {"length_penalty": 0.5}, "length_penalty"),
    ("online", {"reward_funcs": tiny.count_words}, "reward_funcs"),
    ("online", {"temperature": 0.7}, "temperature"),
    ("reward", {"learning_rate": 2e-2}, "learning_rate"),
    ("reward", {"dataset": runs.pairs(seed=1)}, "content of train_dataset"),
    ("reward", {"label_smoothing": 0.1}, "label_smoothing"),
]


@pytest.mark.parametrize(("kind", "other", "message"), ANOTHER)
def test_a_checkpoint_of_another_run_is_refused_by_name(world, saved, kind, other, message):
    for given in (True, str(saved[kind] / "checkpoint-2")):
        run = KINDS[kind](world, saved[kind], **(SAVED | {"max_steps": 4} | other))
        before = runs.weights(run.model)
        with pytest.raises(ValueError, match=f"(?s)it was written with .*{message}.*Resume with .*another output_dir"):
            run.train(resume_from_checkpoint=given)
        assert tiny.same(before, runs.weights(run.model))
    assert not (saved[kind] / "checkpoint-4").exists()


def test_another_reward_adapter_is_refused_by_name(world, saved, tmp_path):
    model = tiny.four_roles(world)
    model.heads["reward"].weight.data += 1
    run = tiny.trainer(world, tmp_path, model=model, **SAVED)
    with pytest.raises(
        ValueError, match=r"reward adapter='\w+', this run has reward adapter='\w+'.*the reward adapter"
    ):
        run.train(resume_from_checkpoint=str(saved["ppo"] / "checkpoint-1"))


def test_another_base_is_refused_by_its_name(world, saved, tmp_path):
    model = tiny.four_roles(world)
    model.get_base_model().name_or_path = "me/other"
    run = tiny.trainer(world, tmp_path, model=model, **SAVED)
    with pytest.raises(ValueError, match=r"base='base', this run has base='other'"):
        run.train(resume_from_checkpoint=str(saved["ppo"] / "checkpoint-1"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_change_does_not_keep_a_run_from_going_on(world, saved, tmp_path, kind):
    folder = shutil.copytree(saved[kind], tmp_path / "run")
    changed = {"max_steps": 3, "save_steps": 3, "logging_steps": 2, "report_to": "none", "gradient_checkpointing": True}
    changed |= {"per_device_eval_batch_size": 2, "disable_tqdm": True, "run_name": "longer", "save_total_limit": 1}
    if kind == "ppo":
        changed |= {"per_device_score_batch_size": 1, "per_device_generate_batch_size": 2}
    run = KINDS[kind](world, folder, **(SAVED | changed))
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3


@pytest.mark.parametrize("kind", ["ppo", "reward", "rrhf"])
def test_newer_checkpoints_of_another_run_in_the_folder_are_skipped_and_named(world, saved, tmp_path, kind, caplog):
    folder = tmp_path / "run"
    KINDS[kind](world, folder, **(SAVED | {"max_steps": 4, "learning_rate": 5e-3})).train()  # the run before
    KINDS[kind](world, folder, **(SAVED | {"max_steps": 1})).train()  # this one got as far as its first checkpoint
    run = KINDS[kind](world, folder, **SAVED)
    run.train(resume_from_checkpoint=True)
    assert f"going on from {folder / 'checkpoint-1'}" in caplog.text
    assert "checkpoint-4: it was written with learning_rate=0.005, this run has learning_rate=0.01" in caplog.text
    assert run.state.global_step == 2
    expected = KINDS[kind](world, tmp_path / "whole", **(SAVED | {"max_steps": 1}))
    expected.train()
    longer = KINDS[kind](world, tmp_path / "whole", **SAVED)
    longer.train(resume_from_checkpoint=True)
    assert tiny.same(runs.weights(run.model), runs.weights(longer.model))


def without(folder, *callbacks, **state):
    path = folder / "trainer_state.json"
    written = json.loads(path.read_text())
    for name in callbacks:
        del written["stateful_callbacks"][name]
    for name, attributes in state.items():
        written["stateful_callbacks"][name]["attributes"] |= attributes
    path.write_text(json.dumps(written))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_an_earlier_version_is_gone_on_from_with_a_warning(world, saved, tmp_path, kind, caplog):
    folder = shutil.copytree(saved[kind], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-2")
    without(folder / "checkpoint-1", "RunIdentity", "EngineCallback", *(["WatchCallback"] if kind == "ppo" else []))
    KINDS[kind](world, folder, **SAVED).train(resume_from_checkpoint=True)
    assert caplog.text.count("could not be checked") == 1
    assert (folder / "checkpoint-2" / ADAPTER).read_bytes() == (saved[kind] / "checkpoint-2" / ADAPTER).read_bytes()
    state = tiny.read_state(folder / "checkpoint-2")  # from here on it is known
    assert state["stateful_callbacks"]["RunIdentity"]["attributes"]["learning_rate"] == 0.01


def test_what_version_0_1_wrote_of_its_configuration_is_compared(world, saved, tmp_path):
    folder = shutil.copytree(saved["ppo"], tmp_path / "run")
    without(folder / "checkpoint-2", "RunIdentity", PPOStateCallback={"config": {"beta": 0.05, "seed": 42}})
    other = tiny.trainer(world, folder, **(SAVED | {"max_steps": 3, "beta": 0.1}))
    with pytest.raises(ValueError, match=r"written with beta=0\.05, this run has beta=0\.1.*Resume with beta=0\.05"):
        other.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    tiny.trainer(world, folder, **(SAVED | {"max_steps": 3})).train(str(folder / "checkpoint-2"))
    assert (folder / "checkpoint-3").is_dir()


# ---------------------------------------------------------------------- roles equal their files


def loaded_by_nobody(self, resume_from_checkpoint, model=None):
    """`Trainer._load_from_checkpoint`, loading nothing."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_role_is_that_of_the_checkpoint_whatever_the_library_loads(world, saved, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("transformers.Trainer._load_from_checkpoint", loaded_by_nobody)
    folder = shutil.copytree(saved[kind], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-2")
    KINDS[kind](world, folder, **SAVED).train(resume_from_checkpoint=True)
    for name in [ADAPTER, *(["critic/" + ADAPTER, "reward/" + ADAPTER] if kind == "ppo" else [])]:
        ended, expected = folder / "checkpoint-2" / name, saved[kind] / "checkpoint-2" / name
        assert ended.read_bytes() == expected.read_bytes(), name


def test_a_role_that_does_not_equal_its_file_is_an_error_that_names_both(world, saved, tmp_path, monkeypatch):
    from trl_ext.roles import folders

    real = folders.load_role

    def not_the_critic(model, folder, name):
        if name != "critic":
            real(model, folder, name)

    monkeypatch.setattr(folders, "load_role", not_the_critic)
    run = tiny.trainer(world, tmp_path, **SAVED)
    with pytest.raises(RuntimeError, match=r"checkpoint-1/critic: the critic adapter: .* other numbers"):
        run.train(resume_from_checkpoint=str(saved["ppo"] / "checkpoint-1"))


def test_weights_that_deepspeed_has_not_loaded_are_an_error(world, saved):
    from trl_ext.training import RolesLoader

    loader, model = RolesLoader(zero=True), tiny.four_roles(world)
    loader.folder = str(saved["ppo"] / "checkpoint-2")
    with pytest.raises(RuntimeError, match=r"DeepSpeed has not loaded the trained weights .*checkpoint-2"):
        loader.on_train_begin(None, None, None, model=model)
    loader.on_train_begin(None, None, None, model=model)  # now they are there
