"""Which rows the filters keep."""

import pytest

from megatrain.data.filters import EmptyFilter, LengthFilter
from megatrain.errors import ConfigError, DataError

USER = {"role": "user", "content": "hello"}


def answered(content, **more):
    return {"messages": [USER, {"role": "assistant", "content": content, **more}]}


def test_rows_without_words_are_left_out():
    keep = EmptyFilter()
    assert keep(answered("hi"))
    assert keep(answered(None, tool_calls=[{"function": {"name": "f"}}]))
    assert keep(answered([{"type": "text", "text": "hi"}]))
    assert not keep(answered(" \n"))
    assert not keep({"messages": [USER]})
    assert not keep({"messages": []})
    assert not keep({"messages": None})
    assert keep({"text": "a"})
    assert not keep({"text": "  "})
    good, bad = answered("a")["messages"], answered("")["messages"]
    assert keep({"chosen": good, "rejected": good})
    assert not keep({"chosen": good, "rejected": bad})


def test_what_the_template_refuses_as_an_empty_answer_is_left_out():
    keep, empty = EmptyFilter(), answered("")["messages"]
    assert not keep({"messages": [*empty, *answered("hi")["messages"]]})
    assert keep({"messages": [*answered("", loss=False)["messages"], *answered("a")["messages"]]})
    assert keep(answered("", reasoning_content="hm"))


def test_a_prompt_needs_no_answer():
    assert EmptyFilter(prompts=True)({"messages": [USER]})
    assert not EmptyFilter(prompts=True)({"messages": [{"role": "user", "content": ""}]})


def test_length_is_in_tokens_once_a_row_is_encoded():
    keep = LengthFilter(maximum=6, minimum=2)
    assert keep({"length": 6, "messages": [USER] * 10})
    assert not keep({"length": 7})
    assert not keep({"length": 1})


def test_length_is_in_characters_before_and_of_a_pairs_longer_side():
    keep = LengthFilter(maximum=7)
    assert keep(answered("hi"))
    assert not keep(answered("hey"))
    assert not keep({"chosen": answered("a")["messages"], "rejected": answered("abc")["messages"]})
    assert not keep({"text": ""})


def test_bad_bounds_and_raw_rows_are_refused():
    with pytest.raises(ConfigError, match="maximum 3 is below minimum 4"):
        LengthFilter(maximum=3, minimum=4)
    with pytest.raises(DataError, match="the row has query, response"):
        LengthFilter(maximum=3)({"query": "a", "response": "b"})
