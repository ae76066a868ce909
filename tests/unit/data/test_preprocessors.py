"""Rows of known data sets to standard rows, and what is said about rows of other shapes."""

import pytest

from megatrain.data.preprocessors.alpaca import AlpacaProcessor
from megatrain.data.preprocessors.countdown import CountdownProcessor
from megatrain.data.preprocessors.gsm8k import GSM8KProcessor
from megatrain.data.preprocessors.messages import MessagesProcessor
from megatrain.data.preprocessors.preference import PreferenceProcessor
from megatrain.data.preprocessors.self_cognition import SelfCognitionProcessor
from megatrain.data.preprocessors.text import TextProcessor
from megatrain.errors import ConfigError, DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def test_messages_are_kept_with_their_tools_and_other_keys():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    row = {"messages": [user("a"), {**call, "name": None}], "tools": [{}], "id": 3}
    assert MessagesProcessor()(row) == {"messages": [user("a"), call], "tools": [{}]}


def test_sharegpt_conversations_become_messages():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    expected = {"messages": [system("s"), user("a"), assistant("b")]}
    assert MessagesProcessor()({"conversations": turns, "system": "s"}) == expected
    turns[1]["from"] = "bard"
    processor = MessagesProcessor(column="dialog", roles={"bard": "assistant"})
    assert processor({"dialog": turns}) == {"messages": [user("a"), assistant("b")]}


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "a"]]}
    assert AlpacaProcessor(system="s")(row) == {
        "messages": [system("s"), user("q"), assistant("a"), user("Add.\n1 2"), assistant("3")]
    }
    assert AlpacaProcessor()({"instruction": "Hi", "input": "", "output": "Ho"}) == {
        "messages": [user("Hi"), assistant("Ho")]
    }


def test_self_cognition_fills_in_the_names_of_the_rows_language():
    processor = SelfCognitionProcessor(("小铁", "Mega"), model_author=("我们", "Us"))
    row = {"query": "Who are you?", "response": "{{NAME}} by {{AUTHOR}}"}
    answer = processor({**row, "tag": "zh"})["messages"][1]["content"]
    assert answer == "小铁 by 我们"
    assert processor(row)["messages"] == [user("Who are you?"), assistant("Mega by Us")]
    chinese = processor({"query": "你是谁", "response": "我是{{NAME}}"})
    assert chinese["messages"][1] == assistant("我是小铁")
    one_name = SelfCognitionProcessor("Mega", "Us")
    assert one_name({**row, "tag": "zh"})["messages"][1] == assistant("Mega by Us")


def test_self_cognition_refuses_other_tags_and_half_a_pair():
    row = {"query": "q", "response": "r", "tag": "fr"}
    with pytest.raises(DataError, match="tag must be one of zh, en, not 'fr'"):
        SelfCognitionProcessor("a", "b")(row)
    with pytest.raises(ConfigError, match="model_author must be one name, or a pair"):
        SelfCognitionProcessor("a", ("b",))


def test_gsm8k_keeps_the_number_behind_the_marks_for_the_reward():
    row = {"question": "How many?", "answer": "1,000 + 234 #### no\n#### 1,234"}
    standard = GSM8KProcessor()(row)
    assert standard["user_data"] == [{"ground_truth": "1234"}]
    assert standard["messages"][-1] == user("How many?")
    assert "\\boxed" in standard["messages"][0]["content"]
    assert GSM8KProcessor(system=None)(row)["messages"] == [user("How many?")]
    with pytest.raises(DataError, match="does not end with '#### number': 'forty'"):
        GSM8KProcessor()({"question": "q", "answer": "forty"})


def test_countdown_asks_as_tinyzero_and_keeps_target_and_numbers():
    expected_data = [{"target": 10, "nums": [1, 4, 5]}]
    standard = CountdownProcessor()({"target": 10, "nums": [1, 4, 5]})
    assert standard["user_data"] == expected_data
    asked = standard["messages"][-1]["content"]
    assert asked.startswith(
        "Using the numbers [1, 4, 5], create an equation that equals 10. You can use basic "
        "arithmetic operations (+, -, *, /) and each number can only be used once."
    )
    assert (
        CountdownProcessor()({"numbers": [1, 4, 5], "response": 10})["user_data"] == expected_data
    )
    with pytest.raises(DataError, match="nums must be a list of whole numbers"):
        CountdownProcessor()({"target": 10, "nums": "1 4 5"})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": [assistant("good")], "rejected": assistant("bad")},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": "bad"},
        {"prompt": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"},
    ],
)
def test_pairs_of_every_shape_become_two_conversations(row):
    assert PreferenceProcessor(system="s")(row) == {
        "chosen": [system("s"), user("q"), assistant("good")],
        "rejected": [system("s"), user("q"), assistant("bad")],
    }


def pair(chosen, prompt="q"):
    """Return the chosen side of a row with this prompt."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": "bad"}
    return PreferenceProcessor()(row)["chosen"]


def test_a_prompt_that_the_answer_repeats_is_there_once():
    asked = [user("q"), assistant("good")]
    assert pair([system("s"), *asked]) == [system("s"), *asked]
    assert pair([user(" q\n"), assistant("good")]) == [user(" q\n"), assistant("good")]
    assert pair(asked, [system("s"), user("q")]) == [system("s"), *asked]
    assert pair([system("s"), *asked], [system("s "), user("q ")]) == [system("s"), *asked]
    assert pair([system("s"), assistant("good")]) == [system("s"), *asked]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (1, "chosen must be a text or a list of messages, not 1"),
        ([], "chosen does not end with a message of the assistant"),
        ([user("q")], "chosen does not end with a message of the assistant"),
        ([user("other"), assistant("good")], "a conversation that does not begin with the prompt"),
        ("", "chosen is an empty answer: ''"),
        ([user("q"), assistant(" ")], "chosen is an empty answer: ' '"),
    ],
)
def test_a_side_that_is_no_answer_to_the_prompt_is_refused(chosen, message):
    with pytest.raises(DataError, match=message):
        pair(chosen)


def test_a_side_with_another_system_message_than_the_prompts_is_refused():
    with pytest.raises(DataError, match="chosen has another system message than its prompt"):
        pair([system("t"), user("q"), assistant("good")], [system("s"), user("q")])


def test_an_empty_output_is_refused():
    with pytest.raises(DataError, match="output is an empty answer: ' '"):
        AlpacaProcessor()({"instruction": "Hi", "output": " "})
    with pytest.raises(DataError, match="completion is an empty answer"):
        PreferenceProcessor()({"prompt": "q", "completion": "", "label": True})


def test_kto_rows_keep_their_label():
    row = {"prompt": "q", "completion": "a", "label": 0}
    assert PreferenceProcessor()(row) == {"messages": [user("q"), assistant("a")], "label": False}
    with pytest.raises(DataError, match="label must be true or false, not 'up'"):
        PreferenceProcessor()({**row, "label": "up"})


def test_an_answer_without_a_prompt_is_refused():
    with pytest.raises(DataError, match="chosen is an answer alone"):
        PreferenceProcessor()({"chosen": "good", "rejected": "bad"})


def test_text_is_taken_from_its_column():
    assert TextProcessor("body")({"body": "abc", "id": 1}) == {"text": "abc"}
    with pytest.raises(DataError, match="text must be text, not int"):
        TextProcessor()({"text": 5})


@pytest.mark.parametrize(
    ("processor", "needed"),
    [
        (MessagesProcessor(), "messages"),
        (AlpacaProcessor(), "instruction, output"),
        (SelfCognitionProcessor("a", "b"), "query, response"),
        (GSM8KProcessor(), "question, answer"),
        (CountdownProcessor(), "nums, target"),
        (PreferenceProcessor(), "chosen, rejected"),
        (TextProcessor(), "text"),
    ],
)
def test_wrong_columns_are_named_with_those_that_are_needed(processor, needed):
    expected = f"{type(processor).__name__} needs the columns {needed}; the row has a, b"
    with pytest.raises(DataError, match=expected):
        processor({"b": 1, "a": 2, "messages": None, "query": None})


def test_turns_that_are_no_messages_are_named():
    with pytest.raises(DataError, match=r"message 1 has no role \(or from\); it has speaker"):
        MessagesProcessor()({"messages": [user("a"), {"speaker": "b"}]})
    with pytest.raises(DataError, match="messages must be a list of messages, not 'hello'"):
        MessagesProcessor()({"messages": "hello"})
