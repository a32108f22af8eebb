"""Reward functions as people write them: one finite number or None for each completion, or an error that names it."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.attack.clear import problem_of, refused
from trl_ext.scoring import RewardSources
from trl_ext.scripts.inputs import load_reward_function, load_reward_functions

pytestmark = pytest.mark.slow

NAN, INF = math.nan, math.inf
CALL = {"prompts": ["a", "b"], "completions": ["x", "y"], "completion_ids": [[6, 1], [7, 1]], "label": [1, 2]}
ODD = {
    "none": None,
    "float": 0.5,
    "int": 1,
    "bool": True,
    "text": "ab",
    "bytes": b"ab",
    "dict": {"x": 1.0, "y": 2.0},
    "dict of numbers": {0: 1.0, 1: 2.0},
    "set": {1.0},
    "empty": [],
    "one": [1.0],
    "three": [1.0, 2.0, 3.0],
    "nan": [1.0, NAN],
    "inf": [INF, 1.0],
    "minus inf": [1.0, -INF],
    "texts": ["1", "2"],
    "a text": [1.0, "good"],
    "bytes inside": [b"1", 1.0],
    "lists": [[1.0], [2.0]],
    "tuples": [(1.0,), (2.0,)],
    "dicts": [{"r": 1.0}, {"r": 2.0}],
    "complex": [1j, 2j],
    "objects": [object(), object()],
    "0-d tensor": torch.tensor(1.0),
    "2-d tensor": torch.ones(2, 1),
    "2-d row": torch.ones(1, 2),
    "empty tensor": torch.ones(0),
    "nan tensor": torch.tensor([NAN, 1.0]),
    "0-d array": np.array(1.0),
    "2-d array": np.ones((2, 2)),
    "array of objects": np.array(["a", "b"], dtype=object),
    "array of texts": np.array(["1", "2"]),
    "nan array": np.array([1.0, np.nan]),
    "generator that is short": (each for each in [1.0]),
    "a function": len,
    "a class": int,
    "an error": ValueError("x"),
    "a pair of lists": ([1.0, 2.0], [1.0, 2.0]),
    "nothing but a big number": 10**400,
    "too big": [10**400, 1.0],
}
FINE = {
    "list": [1.0, 2.0],
    "ints": [1, 2],
    "bools": [True, False],
    "none inside": [None, 2.0],
    "tuple": (1.0, 2.0),
    "tensor": torch.tensor([1.0, 2.0]),
    "half tensor": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "array": np.array([1.0, 2.0], dtype=np.float32),
    "numbers of numpy": [np.float32(1.0), np.int64(2)],
    "0-d tensors": [torch.tensor(1.0), torch.tensor(2.0)],
    "generator": (float(each) for each in (1, 2)),
    "map": map(float, (1, 2)),
}


def returning(value: Any):
    def reward(prompts, completions, **kwargs):
        return value

    return reward


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("wait", [False, True], ids=["", "async"])
def test_what_is_no_list_of_numbers_is_refused(name: str, wait: bool) -> None:
    value = ODD[name]
    if name.startswith("generator"):
        value = iter([1.0])

    async def reward(completions, **kwargs):
        return value

    refused(lambda: RewardSources(reward if wait else returning(value))(**CALL), "'reward'")


@pytest.mark.parametrize("value", FINE.values(), ids=FINE)
def test_any_sequence_of_numbers_is_taken(value: Any) -> None:
    found = RewardSources(returning(value))(**CALL)
    assert found.shape == (2, 1)
    assert found.dtype == torch.float64


def no_arguments():
    return [1.0, 2.0]


def completions_only(completions):
    return [1.0, 2.0]


def positional(prompts, completions, extra, /):
    return [1.0, 2.0]


def wants_another(completions, answer, **kwargs):
    return [1.0, 2.0]


class NotCallable:
    pass


class Narrow:
    def __call__(self, completions):
        return [1.0, 2.0]


@pytest.mark.parametrize(
    "function",
    [
        no_arguments,
        completions_only,
        positional,
        wants_another,
        Narrow(),
        functools.partial(completions_only),
        lambda: [1.0],
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_a_function_that_cannot_be_called_is_told_how_to_be(function: Any) -> None:
    refused(lambda: RewardSources(function)(**CALL), "cannot be called", "**kwargs")


@pytest.mark.parametrize("source", [3, 1.5, NotCallable(), {"a": len}, b"x", [[len]]], ids=repr)
def test_what_is_no_source_is_refused(source: Any) -> None:
    refused(lambda: RewardSources(source), "reward_funcs")


@pytest.mark.parametrize(
    "weights", [[], [1.0, 2.0], [NAN], [INF], ["x"], [None], 1.0, "1", {0: 1.0}, [[1.0]]], ids=repr
)
def test_weights_are_one_finite_number_for_each(weights: Any) -> None:
    refused(lambda: RewardSources(returning([1.0, 2.0]), weights), "reward_weights")


@pytest.mark.parametrize(
    "error", [KeyError("x"), ZeroDivisionError("x"), TypeError("my own"), RuntimeError("x")], ids=repr
)
def test_an_error_of_a_function_stays_its_own(error: Exception) -> None:
    def reward(completions, **kwargs):
        raise error

    with pytest.raises(type(error)) as found:
        RewardSources(reward)(**CALL)
    assert found.value is error


SOURCES = {
    "a syntax error": ("def f(:\n", "f"),
    "an import that there is not": ("import nothing_of_this_name\n", "f"),
    "an error while it is imported": ("1 / 0\n", "f"),
    "an exit while it is imported": ("import sys\nsys.exit(3)\n", "f"),
    "no such function": ("def g(**kwargs):\n    return []\n", "f"),
    "no function": ("f = 3\n", "f"),
    "nothing": ("", "f"),
    "no name": ("def f(**kwargs):\n    return []\n", ""),
    "zeros": ("\x00\x00", "f"),
    "two names": ("def f(**kwargs):\n    return []\n", "f:g"),
    "a dotted name": ("def f(**kwargs):\n    return []\n", "f.g"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_without_a_function_is_named(name: str, tmp_path: Path) -> None:
    text, function = SOURCES[name]
    (tmp_path / "mine.py").write_text(text)
    spec = f"{tmp_path / 'mine.py'}:{function}"
    with pytest.raises(BaseException) as found:
        load_reward_function(spec)
    assert problem_of(found.value, ["--reward_funcs", "mine.py"], remedy=False) is None


def test_a_file_in_latin_1_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_bytes("def f(**kwargs):\n    return 'é'\n".encode("latin-1"))
    refused(lambda: load_reward_function(f"{tmp_path / 'mine.py'}:f"), "mine.py")


@pytest.mark.parametrize(("specs", "weights"), [(["a/b"], [1.0, 2.0]), (None, [1.0]), (["a/b", "c/d"], [1.0])])
def test_weights_on_the_command_line(specs: Any, weights: Any) -> None:
    refused(lambda: load_reward_functions(specs, weights), "--reward_weights")
