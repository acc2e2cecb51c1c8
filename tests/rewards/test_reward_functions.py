"""A person's reward function gets what its signature names, and whatever it returns that is not a number is said."""

import functools
import json
from types import GeneratorType

import numpy as np
import pytest
import torch

from solotune.config import RewardConfig
from solotune.errors import ConfigError, RewardError
from solotune.rewards import build_reward, load_function, score

SAMPLES, PROMPTS, OUTPUTS = ["a b", "c d"], ["a", "c"], [" b", " d"]


def run(reward_fn, folder, **metadata):
    return score(reward_fn, SAMPLES, PROMPTS, OUTPUTS, "tokenizer", metadata, folder)


def test_only_the_names_of_the_signature_are_passed(tmp_path):
    seen = {}

    def named(outputs, label):
        seen.update(outputs=outputs, label=label)
        return [1.0, 2.0]

    def everything(**kwargs):
        seen.update(kwargs)
        return [1.0, 2.0]

    def some(samples, *, tokenizer, missing=3, **rest):
        seen.update(samples=samples, tokenizer=tokenizer, rest=sorted(rest), missing=missing)
        return [1.0, 2.0]

    run(named, tmp_path, label=[0, 1], other=[5, 6])
    assert seen == {"outputs": OUTPUTS, "label": [0, 1]}
    seen.clear()
    run(everything, tmp_path, label=[0, 1])
    assert sorted(seen) == ["label", "outputs", "prompts", "samples", "tokenizer"]
    seen.clear()
    run(some, tmp_path, label=[0, 1])
    assert seen == {"samples": SAMPLES, "tokenizer": "tokenizer", "rest": ["label", "outputs", "prompts"], "missing": 3}


def test_a_first_parameter_of_any_name_gets_the_samples(tmp_path):
    class Old:
        def __call__(self, texts, outputs):
            assert (texts, outputs) == (SAMPLES, OUTPUTS)
            return [0, 1]

    def positional(samples, prompts, /):
        assert (samples, prompts) == (SAMPLES, PROMPTS)
        return [0, 1]

    def unnamed(*args):
        assert args == (SAMPLES,)
        return [0, 1]

    def rest(texts, **kwargs):
        assert texts == SAMPLES
        assert "samples" not in kwargs
        return [0, 1]

    for function in (Old(), positional, unnamed, rest, functools.partial(lambda n, texts: [n, n], 1)):
        assert len(run(function, tmp_path)) == 2


def test_a_parameter_without_a_value_is_named(tmp_path):
    with pytest.raises(RewardError, match=r"'label'.*samples, prompts, outputs"):
        run(lambda samples, label: [0, 0], tmp_path)


def test_changing_the_arguments_changes_nothing_outside(tmp_path):
    metadata = {"label": [1, 2]}

    def vandal(samples, outputs, label):
        samples.clear()
        outputs.append("x")
        label[0] = 9
        return [0.0, 0.0]

    score(vandal, SAMPLES, PROMPTS, OUTPUTS, None, metadata, tmp_path)
    assert (SAMPLES, OUTPUTS, metadata) == (["a b", "c d"], [" b", " d"], {"label": [1, 2]})


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.0],
        (1.0, 2),
        torch.tensor([1.0, 2.0], requires_grad=True),
        torch.tensor([1, 2]),
        np.array([1.0, 2.0], dtype=np.float16),
        [np.float32(1), torch.tensor(2.0)],
        [np.int64(1), np.array(2.0)],
        (float(i) for i in (1, 2)),
        [True, 2],
    ],
    ids=lambda returned: "generator" if isinstance(returned, GeneratorType) else str(returned),
)
def test_numbers_of_every_kind_become_floats(tmp_path, returned):
    values = run(lambda samples: returned, tmp_path)
    assert values == [1.0, 2.0]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize(
    "rows", [[[1, 2.0], [3]], [torch.tensor([1.0, 2.0]), np.array([3])], [[torch.tensor(1), 2], (3,)]]
)
def test_a_list_per_sample_is_a_number_per_token(tmp_path, rows):
    assert run(lambda samples: rows, tmp_path) == [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "1 values for 2 samples"),
        ([1.0, 2.0, 3.0], "3 values for 2 samples"),
        ([1.0, float("nan")], "nan for sample 1"),
        (torch.tensor([float("inf"), 0.0]), "inf for sample 0"),
        ([0.5, "high"], "'high' .str. for sample 1"),
        (["0.5", 1.0], "'0.5' .str. for sample 0"),
        ("ab", "'ab' .str."),
        (None, "None .NoneType."),
        ([None, 1.0], "None .NoneType. for sample 0"),
        (0.5, "0.5 .float."),
        (torch.tensor(0.5), "tensor"),
        ({"a": 1, "b": 2}, "dict"),
        ([[1.0], 2.0], "a number for sample 1 and a list for sample 0"),
        ([[1.0], [2.0, float("nan")]], "nan for sample 1, token 1"),
        ([[1.0], [[2.0]]], "sample 1, token 0"),
        ([1j, 1.0], "complex"),
    ],
)
def test_anything_else_is_said_and_the_samples_are_kept(tmp_path, returned, said):
    folder = tmp_path / "run"

    def my_reward(samples):
        return returned

    with pytest.raises(RewardError, match=said) as caught:
        run(my_reward, folder, label=[7, 8])
    message = str(caught.value)
    assert "reward: my_reward" in message
    assert str(folder / "reward_failure.jsonl") in message
    rows = [json.loads(line) for line in (folder / "reward_failure.jsonl").read_text().splitlines()]
    assert rows[:2] == [
        {"index": i, "sample": SAMPLES[i], "prompt": PROMPTS[i], "output": OUTPUTS[i], "label": 7 + i} for i in (0, 1)
    ]


def test_an_exception_is_chained_and_the_samples_are_kept(tmp_path):
    cause = KeyError("score")

    def broken(samples):
        samples.clear()
        raise cause

    with pytest.raises(RewardError, match=r"broken raised KeyError: 'score'.*reward_failure") as caught:
        run(broken, tmp_path)
    assert caught.value.__cause__ is cause
    assert len((tmp_path / "reward_failure.jsonl").read_text().splitlines()) == 2


def test_columns_of_other_lengths_do_not_reach_the_function(tmp_path):
    with pytest.raises(ValueError, match="label has 3 values for 2 samples"):
        run(lambda samples: [0, 0], tmp_path, label=[1, 2, 3])


def test_a_function_comes_from_its_file_and_its_neighbours(tmp_path, caplog):
    (tmp_path / "neighbour.py").write_text("BONUS = 2.0")
    path = tmp_path / "rewards.py"
    path.write_text("from neighbour import BONUS\ndef length(outputs):\n    return [len(o) + BONUS for o in outputs]\n")
    with caplog.at_level("INFO"):
        function = build_reward(RewardConfig(function=f"{path}:length"))
    assert "rewards.py" in caplog.text
    assert run(function, tmp_path) == [4.0, 4.0]


def test_a_function_that_cannot_be_loaded_is_named(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def length(outputs): return []\nvalue = 3\n")
    with pytest.raises(ConfigError, match="no file"):
        load_function(f"{tmp_path / 'none.py'}:length")
    with pytest.raises(ConfigError, match=r"no function 'size'; it has length"):
        load_function(f"{path}:size")
    with pytest.raises(ConfigError, match="no function 'value'"):
        load_function(f"{path}:value")
    path.write_text("1 / 0")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        load_function(f"{path}:length")


@pytest.mark.parametrize("name", ["<lambda>", "main.<locals>.score"])
def test_a_function_without_a_name_of_its_own_is_not_looked_for(tmp_path, name):
    """What a run started from Python has saved: running its script for it would start that run anew."""
    (tmp_path / "script.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(ConfigError, match=r"started from Python.*resume_from_checkpoint"):
        load_function(f"{tmp_path / 'script.py'}:{name}")
