"""Rewards: the built-in ones give what they say, one's own are found and looked at, faults are sentences."""

import pytest

from veneer.train import rewards
from veneer.train.rewards import Checked, find


def worth(use, completions, columns=None, **options):
    return find(use, options)(["q"] * len(completions), completions, **(columns or {}))


def test_exact_compares_with_a_column_after_taking_a_part_out():
    said = ["  Blue ", "<answer>blue</answer>", "red", "the answer is blue"]
    assert worth("exact", said, {"answer": ["blue"] * 4}) == [1, 0, 0, 0]
    assert worth("exact", said, {"colour": ["blue"] * 4}, column="colour", extract="<answer>(.*?)</answer>") == [
        0,
        1,
        0,
        0,
    ]
    assert worth("exact", ["Blue"], {"answer": ["blue"]}, case=True) == [0]


def test_number_reads_the_last_one():
    said = ["3 + 4 = 7", "it is 1,234.50 in all", "seven", "7 or 8"]
    assert worth("number", said, {"answer": ["#### 7", 1234.5, 7, 7]}) == [1, 1, 0, 0]


def test_regex_length_and_json():
    assert worth("regex", ["so: yes", "yes"], pattern="yes$") == [1, 1]
    assert worth("regex", ["so: yes", "yes\n"], pattern="yes", whole=True) == [0, 1]
    assert worth("length", ["a b c", "a b c d e f", "a", ""], least=2, most=4) == [1.0, 0.5, 0.5, 0.0]
    assert worth("json", ['{"a": 1}', "[1]", "{a"], keys=["a"]) == [1.0, 0.5, 0.0]


def test_one_s_own_function_sees_texts_and_the_columns_it_asks_for(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def close(prompts, completions, answer, tolerance=1):\n"
        "    return [float(abs(len(c) - a) <= tolerance) for c, a in zip(completions, answer)]\n"
    )
    reward = Checked("mine.py:close", find("mine.py:close", {"tolerance": 2}, tmp_path))
    turns = [[{"role": "assistant", "content": "abc"}], [{"role": "assistant", "content": "abcdefgh"}]]
    assert reward(prompts=["q", "q"], completions=turns, answer=[5, 5], completion_ids=[[1], [2]]) == [1.0, 0.0]
    assert reward.__name__ == "mine_py_close"
    assert find("json:loads", {}) is not None  # a module's function


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("exakt", {}, "no reward 'exakt'; did you mean exact"),
        ("exact", {"colum": "a"}, "'exact' has no option 'colum'; did you mean column"),
        ("regex", {}, "'regex' needs the option 'pattern'"),
        ("no_such_module:f", {}, "'no_such_module:f' cannot be imported"),
        ("json:load_s", {}, "json has no function 'load_s'; did you mean loads"),
        ("none.py:f", {}, "no file 'none.py' with a reward function"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(use, options, message):
    with pytest.raises(ValueError, match=message):
        find(use, options)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ([1.0], "a list of 2 numbers, and gave 1 values"),
        (1.0, "a list of 2 numbers, and gave float"),
        (["a", "b"], "must give numbers"),
        ([1.0, float("nan")], "no finite number"),
    ],
)
def test_a_reward_that_gives_nonsense_is_stopped(gives, message):
    with pytest.raises(ValueError, match=message):
        Checked("mine", lambda prompts, completions: gives)(prompts=["a", "b"], completions=["a", "b"])
    assert Checked("mine", lambda prompts, completions: [None, 1])(prompts=["a", "b"], completions=["a", "b"]) == [
        None,
        1,
    ]


@pytest.mark.parametrize(
    ("use", "message"), [("model", "needs the option 'path'"), ("judge", "needs the option 'model'")]
)
def test_a_reward_that_loads_a_model_is_checked_before(use, message):
    with pytest.raises(ValueError, match=message):
        rewards.check(use, {})


def test_a_column_that_is_missing_is_named():
    with pytest.raises(ValueError, match="'exact' reads the column 'answer', and the rows have answers; did you mean"):
        worth("exact", ["a"], {"answers": ["a"]})


def test_all_built_in_ones_say_what_they_do():
    assert all(function.__doc__ for function in rewards.BUILT_IN.values())
