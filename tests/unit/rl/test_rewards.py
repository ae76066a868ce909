"""Rewards on what models write, and on what they should not be able to break."""

import time
from fractions import Fraction

import pytest

from megatrain.errors import ConfigError, DataError
from megatrain.rl.arithmetic import evaluate
from megatrain.rl.rewards import (
    AccuracyReward,
    CountdownReward,
    FormatReward,
    GSM8KAccuracyReward,
    GSM8KFormatReward,
)


def said(text, **data):
    """Return a trajectory whose assistant said this."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    return {"messages": messages, "user_data": [data]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think><answer>1</answer>", 1.0),
        ("<think>a</think> 1", 0.0),
        ("<answer>1</answer>", 0.0),
        ("<think>a<answer>1</answer>", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_format_wants_think_and_answer_tags(text, expected):
    assert FormatReward()([said(text)], []) == [expected]


def test_format_tags_can_be_chosen():
    assert FormatReward(["plan"])([said("<plan>x</plan>")]) == [1.0]
    with pytest.raises(ConfigError, match="tags"):
        FormatReward("plan")


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("so #### 42", "42", 1.0),
        ("#### 1 then #### 42", "42", 1.0),
        ("#### $1,234.50", "1234.5", 1.0),
        ("#### -3", -3, 1.0),
        ("\\boxed{42} but #### 1", "42", 1.0),
        ("\\boxed{\\text{yes}}", "\\text{yes}", 1.0),
        ("\\boxed{42", "42", 0.0),
        ("42", "42", 0.0),
        ("#### 43", "42", 0.0),
        ("#### 42", "He has 40 + 2 #### 42", 1.0),
        ("#### 42", "", 0.0),
        ("#### 42", None, 0.0),
        ("\\boxed{1e999999999}", "1", 0.0),
        ("\\boxed{NaN}", "NaN0", 0.0),
    ],
)
def test_gsm8k_compares_the_last_number(text, truth, expected):
    assert GSM8KAccuracyReward()([said(text, ground_truth=truth)]) == [expected]


def test_the_truth_may_be_pairs_or_a_dict_or_given_apart():
    trajectory = said("#### 5")
    for user_data in ([("ground_truth", "5")], {"ground_truth": 5}, [{"ground_truth": "5.0"}]):
        assert GSM8KAccuracyReward()([trajectory | {"user_data": user_data}]) == [1.0]
    assert GSM8KAccuracyReward()([trajectory], ["5"]) == [1.0]
    assert GSM8KAccuracyReward()([trajectory], [said("2 + 3 #### 5") | {"user_data": None}]) == [
        1.0
    ]
    with pytest.raises(DataError, match="one ground truth"):
        GSM8KAccuracyReward()([trajectory], ["5", "6"])


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3, 4", "34", 0.0),
        ("4 2", "42", 0.0),
        ("1_000", "1000", 0.0),
        ("1,00", "100", 0.0),
        ("0", "0.000001", 0.0),
        ("0.000001", "0.0000010000001", 1.0),
        ("0", "0.0", 1.0),
        ("0.333333", "0.33333333", 1.0),
        ("50\\%", "50", 1.0),
        ("\\$1,234.50", "1234.5", 1.0),
        ("1{,}000", "1000", 1.0),
        ("-$5", "-5", 1.0),
        ("--5", "5", 0.0),
        ("2e3", "2000", 1.0),
        ("\u0664\u0662", "42", 0.0),
    ],
)
def test_only_a_number_written_as_one_is_a_number(answer, truth, expected):
    assert AccuracyReward()([said(f"\\boxed{{{answer}}}", ground_truth=truth)]) == [expected]


@pytest.mark.parametrize("tail", ["3, 4", "3,4", "3/4", "3e4", "34,5"])
def test_more_than_a_number_behind_the_hashes_is_not_its_first_digits(tail):
    for truth in ("3", "34", "345"):
        assert GSM8KAccuracyReward()([said(f"#### {tail}", ground_truth=truth)]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 20_000,
        "<answer>" * 20_000,
        "</answer>" * 20_000 + "<answer>",
        "#### " * 20_000,
        "#" * 100_000,
        "####" + " " * 100_000,
        "#### " + "," * 100_000,
        "#### " + "1," * 50_000,
        "\\boxed{$" + " " * 100_000 + "x}",
        "\\boxed{" + "1" * 100_000 + " " * 100_000 + "x}",
    ],
)
@pytest.mark.parametrize(
    "reward", [FormatReward(), AccuracyReward(), GSM8KFormatReward(), CountdownReward()]
)
def test_long_texts_are_read_in_time_that_grows_as_they_do(reward, text):
    before = time.process_time()
    reward([said(text, ground_truth="1", nums=[1], target=1)])
    assert time.process_time() - before < 1.0  # a quadratic search takes many seconds


def test_the_last_whole_tag_counts():
    texts = [
        "<answer>1</answer><answer>2</answer>",
        "<answer>2</answer></answer>",
        "<answer>2</answer><answer>3",
        "<answer>1 <answer>2</answer>",
    ]
    assert AccuracyReward()([said(text, ground_truth="2") for text in texts]) == [1.0] * 4


def test_accuracy_reads_an_answer_tag_too():
    assert AccuracyReward()([said("<answer> Paris. </answer>", ground_truth="paris")]) == [1.0]
    assert AccuracyReward()([said("Paris", ground_truth="paris")]) == [0.0]
    parts = said([{"type": "text", "text": "<answer>Par"}, {"type": "text", "text": "is</answer>"}])
    assert AccuracyReward()([parts], ["Paris"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "expected"), [("#### 1", 1.0), ("\\boxed{x}", 1.0), ("1", 0.0), ("####", 0.0)]
)
def test_gsm8k_format_wants_an_answer_that_can_be_read(text, expected):
    assert GSM8KFormatReward()([said(text)]) == [expected]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(25 - 4) * 3 + 7", 1.0),
        ("(25 - 4) * 3 + 7 = 70", 1.0),
        ("\n 7 + 3*(25-4) \n", 1.0),
        ("(25 - 4) * 3", 0.0),  # not every number
        ("(25 - 4) * 3 + 7 + 7 - 7", 0.0),  # one of them three times
        ("70", 0.0),
        ("25 - 4 * 3 + 7", 0.0),
        ("7 + 3*(25-4", 0.0),
        ("__import__('os').getpid()", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_wants_the_target_from_each_number_once(answer, expected):
    trajectory = said(f"<think>x</think><answer>{answer}</answer>", nums=[25, 3, 7, 4], target=70)
    assert CountdownReward()([trajectory], []) == [expected]


@pytest.mark.parametrize(
    "task",
    [
        {"target": "1e9999999", "nums": [1, 2]},
        {"target": float("inf"), "nums": [1, 2]},
        {"target": "3/0", "nums": [1, 2]},
        {"target": 3, "nums": [float("inf")]},
        {"target": 3, "nums": [1.9, 2]},
        {"target": 3, "nums": "12"},
        {"target": 3, "nums": 12},
        {"target": 3, "nums": [1, None, 2]},
        {"target": [3], "nums": [1, 2]},
    ],
)
def test_a_countdown_row_without_a_task_is_worth_nothing(task):
    before = time.process_time()
    assert CountdownReward()([said("<answer>1 + 2</answer>", **task)]) == [0.0]
    assert time.process_time() - before < 1.0


@pytest.mark.parametrize("target", [3, 3.0, "3", "6/2", " 3.0 "])
def test_a_countdown_target_may_be_text_or_a_float(target):
    row = said("<answer>1 + 2</answer>", nums=[1, 2.0], target=target)
    assert CountdownReward()([row]) == [1.0]


def test_countdown_is_exact():
    # In floating point 1 / 3 * 3 and 1 are the same; so are these two, which differ.
    third = said("<answer>9 / 3 * 3 - 8</answer>", nums=[9, 3, 3, 8], target=1)
    near = said("<answer>10000001 / 10000000</answer>", nums=[10000001, 10000000], target=1)
    assert CountdownReward()([third, near]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "1 +",
        "()",
        "1 2",
        "2 ** 9",
        "9 // 2",
        "1 / 0",
        "1 / (3 - 3)",
        "(" * 200 + "1" + ")" * 90,
        "(1)(2)",
        "1, 2",
        "0x10",
        "01",
        "1.5",
        "1_000",
        "१",
        "9" * 301,
        "-" * 299 + "+",
        "True",
        "1 if 2 else 3",
    ],
)
def test_what_is_no_arithmetic_has_no_value(text):
    assert evaluate(text) is None


def test_arithmetic_is_a_fraction():
    assert evaluate("1 / 3 - -2") == (Fraction(7, 3), [1, 3, 2])
    assert evaluate("-" * 200 + "1") == (Fraction(1), [1])


@pytest.mark.parametrize(
    "trajectory",
    [
        {},
        {"messages": []},
        {"messages": None, "user_data": None},
        {"messages": [{"role": "assistant"}], "user_data": [["nums"]]},
        {"messages": [{"role": "assistant", "content": 5}], "user_data": 3},
        said("<answer>1</answer>", nums=["x"], target="y"),
        said("<answer>1</answer>", nums=None, target=None),
        said("\\boxed{" * 1000),
        said("<answer>" + "(" * 10_000 + "</answer>#### " + "9" * 10_000, ground_truth="1"),
    ],
)
@pytest.mark.parametrize(
    "reward",
    [
        FormatReward(["think"]),
        AccuracyReward(),
        GSM8KAccuracyReward(),
        CountdownReward(),
    ],
)
def test_no_trajectory_breaks_a_reward(reward, trajectory):
    assert reward([trajectory]) == [0.0]
