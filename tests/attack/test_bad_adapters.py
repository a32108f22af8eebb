"""Adapters and bases as a copy that was cut, or another run, has left them: refused by the file, before the weights."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.attack.clear import refused
from tests.ppo import tiny
from trl_ext import SharedBaseModel
from trl_ext.roles import shared_model

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG, SCALE = "adapter_model.safetensors", "adapter_config.json", "reward_scale.json"
KINDS = {"policy_adapter": "policy", "reward_adapter": "reward", "critic_adapter": "reward"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own, whose base must not be loaded."""

    def load_base(*args, **kwargs):
        raise AssertionError("the base was loaded before the adapter was looked at")

    monkeypatch.setattr(shared_model, "load_base", load_base)
    shutil.copytree(sound, tmp_path / "w")
    return tmp_path / "w"


def load(world: Path, flag: str):
    return SharedBaseModel.from_pretrained(str(world / "base"), **{flag: world / KINDS[flag]})


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


def change_config(folder: Path, **options) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | options))


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(name for name in tensors if "lora_A" in name)[0]


@pytest.mark.parametrize("flag", KINDS)
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("length", [0, 1, 8, 100, 0.5, -1])
def test_a_file_that_was_cut_is_named(world: Path, flag: str, file: str, length: float) -> None:
    path = world / KINDS[flag] / file
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    refused(lambda: load(world, flag), flag, file)


@pytest.mark.parametrize("flag", KINDS)
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_file_that_is_not_there_is_named(world: Path, flag: str, file: str) -> None:
    (world / KINDS[flag] / file).unlink()
    refused(lambda: load(world, flag), flag, file)


@pytest.mark.parametrize("flag", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(world: Path, flag: str, value: float) -> None:
    names = []

    def spoil(tensors):
        names.append(first(tensors))
        tensors[names[0]][0, 0] = value

    change_weights(world / KINDS[flag], spoil)
    refused(lambda: load(world, flag), flag, WEIGHTS, names[0])


SHAPES = {
    "wider": lambda tensors: tensors.update({first(tensors): torch.zeros(4, 99)}),
    "another rank": lambda tensors: tensors.update({first(tensors): torch.zeros(5, 16)}),
    "one dimension": lambda tensors: tensors.update({first(tensors): torch.zeros(16)}),
    "no rows": lambda tensors: tensors.update({first(tensors): torch.zeros(0, 16)}),
    "one missing": lambda tensors: {name: t for name, t in tensors.items() if name != first(tensors)},
    "one too many": lambda tensors: tensors.update({first(tensors).replace("s.0", "s.9"): torch.zeros(4, 16)}),
    "other names": lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()},
    "embeddings": lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.zeros(18, 16)}),
    "a stranger": lambda tensors: tensors.update({"surprise": torch.zeros(3)}),
}


@pytest.mark.parametrize("flag", KINDS)
@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_weights_that_do_not_fit_are_named(sound: Path, tmp_path: Path, flag: str, change) -> None:
    shutil.copytree(sound, tmp_path / "w")
    change_weights(tmp_path / "w" / KINDS[flag], change)
    refused(lambda: load(tmp_path / "w", flag), flag.split("_")[0])


HEADS = {
    "none": lambda tensors: {name: t for name, t in tensors.items() if "score" not in name},
    "two labels": lambda tensors: tensors.update({name: torch.zeros(2, 16) for name in tensors if "score" in name}),
    "wider": lambda tensors: tensors.update({name: torch.zeros(1, 17) for name in tensors if "score" in name}),
    "one dimension": lambda tensors: tensors.update({name: torch.zeros(16) for name in tensors if "score" in name}),
    "nan": lambda tensors: tensors.update({n: torch.full((1, 16), math.nan) for n in tensors if "score" in n}),
}


@pytest.mark.parametrize("flag", ["reward_adapter", "critic_adapter"])
@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_a_head_that_is_no_scalar_one_is_refused(world: Path, flag: str, change) -> None:
    change_weights(world / "reward", change)
    refused(lambda: load(world, flag), flag)


def test_adapters_of_another_task_are_refused(world: Path) -> None:
    for flag, folder in (("policy_adapter", "reward"), ("reward_adapter", "policy")):
        options = {flag: world / folder}
        refused(lambda options=options: SharedBaseModel.from_pretrained(str(world / "base"), **options), flag)


CONFIGS = {
    "another method": {"peft_type": "IA3"},
    "no method": {"peft_type": None},
    "an unknown method": {"peft_type": "MAGIC"},
    "rank 0": {"r": 0},
    "rank as text": {"r": "four"},
    "negative rank": {"r": -1},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "the head as target": {"target_modules": ["lm_head"]},
    "alpha nan": {"lora_alpha": math.nan},
    "alpha as text": {"lora_alpha": "x"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_roles_cannot_serve_is_refused(sound: Path, tmp_path: Path, options: dict) -> None:
    shutil.copytree(sound, tmp_path / "w")
    change_config(tmp_path / "w" / "policy", **options)
    refused(lambda: load(tmp_path / "w", "policy_adapter"), "policy")


SCALES = [
    "",
    "{",
    "[]",
    "{}",
    '{"mean": 1}',
    '{"mean": "x", "std": 1, "count": 2}',
    '{"mean": 0, "std": 0, "count": 2}',
]
SCALES += ['{"mean": 0, "std": NaN, "count": 2}', '{"mean": 0, "std": -1, "count": 2}']


@pytest.mark.parametrize("text", SCALES)
def test_a_scale_that_is_none_is_named(world: Path, text: str) -> None:
    (world / "reward" / SCALE).write_text(text)
    refused(lambda: load(world, "reward_adapter"), SCALE)
