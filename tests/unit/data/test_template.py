"""Options of a template: which turns, truncation, pairs, plain text, and bad rows."""

import dill
import pytest

from megatrain.data.template.base import Template
from megatrain.data.template.tokens import covered, labels_of
from megatrain.errors import ConfigError, DataError
from tests.unit.data.template_cases import (
    TWO_TURNS,
    labelled_texts,
    tokenizer_for,
    trl_template,
)

CHATML = trl_template("qwen2_5")
FIRST, LAST = "hello world, what is it?<|im_end|>", "sunny,\n\n  21 degrees<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML)


def texts(tokenizer, row, **options):
    return labelled_texts(tokenizer, Template(tokenizer=tokenizer, **options).encode(row))


def with_loss(**by_index):
    return [
        {**message, "loss": by_index[f"m{index}"]} if f"m{index}" in by_index else message
        for index, message in enumerate(TWO_TURNS)
    ]


def test_the_loss_may_be_on_the_last_turn_or_on_everything(tokenizer):
    row = {"messages": TWO_TURNS}
    assert texts(tokenizer, row) == [FIRST, LAST]
    assert texts(tokenizer, row, loss_on="last") == [LAST]
    everything = Template(tokenizer=tokenizer, loss_on="all").encode(row)
    assert everything["labels"] == everything["input_ids"]
    assert everything["num_labels"] == everything["length"] - 1


def test_a_messages_own_loss_wins(tokenizer):
    assert texts(tokenizer, {"messages": with_loss(m1=False)}) == [LAST]
    assert texts(tokenizer, {"messages": with_loss(m1=True)}, loss_on="last") == [FIRST, LAST]
    everything = texts(tokenizer, {"messages": with_loss(m2=False)}, loss_on="all")
    assert len(everything) == 2
    assert "the weather?" not in "".join(everything)
    assert FIRST in everything[0]


def test_a_kto_row_has_its_loss_on_the_last_turn(tokenizer):
    encoded = Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS, "label": False})
    assert labelled_texts(tokenizer, encoded) == [LAST]
    assert encoded["label"] is False


@pytest.mark.parametrize("label", [1, 0])
def test_a_kto_label_may_be_a_whole_number(tokenizer, label):
    encoded = Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS, "label": label})
    assert labelled_texts(tokenizer, encoded) == [LAST]


@pytest.mark.parametrize("label", [-1, 2, 0.5, "good"])
def test_another_label_is_refused(tokenizer, label):
    with pytest.raises(DataError, match=r"label must be true or false \(1 or 0\), not"):
        Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS, "label": label})


@pytest.mark.parametrize("content", ["", " \n", None, [{"type": "text", "text": " "}], []])
def test_an_empty_answer_is_refused_unless_it_has_no_loss(tokenizer, content):
    empty = {"role": "assistant", "content": content, "tool_calls": None}
    template = Template(tokenizer=tokenizer)
    for row in (
        {"messages": [TWO_TURNS[0], empty]},
        {"messages": [TWO_TURNS[0], empty, *TWO_TURNS[2:]]},
        {"chosen": TWO_TURNS[:2], "rejected": [TWO_TURNS[0], empty]},
    ):
        with pytest.raises(
            DataError, match=r"message 1 (is an empty answer|.assistant. has no content)"
        ):
            template.encode(row)
    if content is not None:
        messages = [TWO_TURNS[0], {**empty, "loss": False}, *TWO_TURNS[2:]]
        assert texts(tokenizer, {"messages": messages}) == [LAST]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_pairs_common_messages_have_no_labels(tokenizer, loss_on):
    other = [*TWO_TURNS[:3], {"role": "assistant", "content": "I think it is"}]
    template = Template(tokenizer=tokenizer, loss_on=loss_on)
    encoded = template.encode({"chosen": TWO_TURNS, "rejected": other})
    for side, expected in (("chosen", LAST), ("rejected", "I think it is<|im_end|>")):
        ids, labels = encoded[f"{side}_input_ids"], encoded[f"{side}_labels"]
        assert labelled_texts(tokenizer, {"input_ids": ids, "labels": labels}) == [expected]
    sides = len(encoded["chosen_input_ids"]), len(encoded["rejected_input_ids"])
    assert encoded["length"] == sum(sides)


def test_plain_text_is_labelled_to_its_end_of_sequence(tokenizer):
    encoded = Template(tokenizer=tokenizer).encode({"text": "hello world"})
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["input_ids"] == [
        *tokenizer("hello world")["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_truncation_keeps_the_beginning_or_the_end(tokenizer):
    row = {"messages": TWO_TURNS}
    whole = Template(tokenizer=tokenizer).encode(row)
    size = whole["length"] - 5
    left = Template(tokenizer=tokenizer, max_length=size, truncation_strategy="left").encode(row)
    right = Template(tokenizer=tokenizer, max_length=size, truncation_strategy="right").encode(row)
    assert left["input_ids"] == whole["input_ids"][5:]
    assert left["labels"] == whole["labels"][5:]
    assert right["input_ids"] == whole["input_ids"][:-5]
    assert right["num_labels"] == sum(label != -100 for label in whole["labels"][1:-5])
    assert right["length"] == size


def test_a_row_that_is_too_long_is_refused_or_left_out(tokenizer):
    row = {"messages": TWO_TURNS}
    with pytest.raises(DataError, match=r"tokens, more than max_length 8"):
        Template(tokenizer=tokenizer, max_length=8).encode(row)
    for strategy in ("delete", "right"):  # eight tokens from the left hold no label
        template = Template(tokenizer=tokenizer, max_length=8, truncation_strategy=strategy)
        assert template.encode(row) is None
    assert template.batch_encode([row, {"text": "hello"}])[1]["length"] > 1


def test_a_prompt_is_never_cut_at_its_end(tokenizer):
    row = {"messages": TWO_TURNS[:1]}
    left = Template(tokenizer=tokenizer, max_length=6, truncation_strategy="left")
    assert tokenizer.decode(left.encode(row, True)["input_ids"]) == "stant\n"
    with pytest.raises(DataError, match="cut off the generation prompt"):
        Template(tokenizer=tokenizer, max_length=6, truncation_strategy="right").encode(row, True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "at least one message"),
        (
            {"messages": [{"role": "boss", "content": "hi"}]},
            "message 0 has the unknown role 'boss'",
        ),
        ({"messages": [*TWO_TURNS, {"role": "user", "content": None}]}, "message 4 .user. has no"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no token with a loss"),
        ({"messages": ["hi"]}, "message 0 must be a mapping"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 0: content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "message 0: a part of type text has no text",
        ),
        ({"messages": with_loss(m1="yes")}, "message 1: loss must be true or false"),
        ({"messages": TWO_TURNS, "tools": "{"}, "tools: not JSON"),
        (
            {"chosen": TWO_TURNS, "rejected": TWO_TURNS},
            "chosen has no assistant message of its own",
        ),
        ({"text": ""}, "text must be a text that is not empty"),
        ({"query": "a", "response": "b"}, "it has query, response"),
    ],
)
def test_a_bad_row_is_refused_by_what_is_wrong_with_it(tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        Template(tokenizer=tokenizer).encode(row)


def test_a_prompt_that_is_answered_already_is_refused(tokenizer):
    with pytest.raises(DataError, match="leaves nothing to generate"):
        Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS}, add_generation_prompt=True)
    with pytest.raises(DataError, match="plain text is no prompt"):
        Template(tokenizer=tokenizer).encode({"text": "hello"}, add_generation_prompt=True)


def test_bad_options_are_refused(tokenizer, tmp_path):
    for options, message in (
        ({"truncation_strategy": "middle"}, "truncation_strategy 'middle' is not one of"),
        ({"loss_on": "user"}, "loss_on 'user' is not one of assistant, all, last"),
        ({"max_length": 1}, "max_length 1"),
        ({"chat_template": str(tmp_path / "absent.jinja")}, "no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            Template(tokenizer=tokenizer, **options)
    with pytest.raises(ConfigError, match="either model_id or tokenizer"):
        Template()


def test_a_jinja_file_stands_for_the_tokenizers_template(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role + '=' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    template = Template(tokenizer=tokenizer, chat_template=path)
    encoded = template.encode({"messages": TWO_TURNS})
    assert labelled_texts(tokenizer, encoded) == [FIRST, LAST]
    assert template.decode(encoded["input_ids"]).startswith("user=hello\nassistant=hello")


class Shouting(Template):
    """A format of one's own: one line a message."""

    def render(self, messages, tools=None, add_generation_prompt=False):
        return "".join(f"{m['role']}> {m['content']}\n" for m in messages)

    def message_spans(self, conversation, text):
        spans, at = [], 0
        for message in conversation.messages:
            end = at + len(f"{message['role']}> {message['content']}\n")
            spans.append([(at + len(message["role"]) + 2, end)])
            at = end
        return spans


def test_a_subclass_may_render_in_its_own_way(tokenizer):
    encoded = Shouting(tokenizer=tokenizer).encode({"messages": TWO_TURNS[:2]})
    assert labelled_texts(tokenizer, encoded) == ["hello world, what is it?\n"]


class HalfShouting(Template):
    """Renders, but does not say where the assistant's words are."""

    render = Shouting.render


def test_a_subclass_that_only_renders_is_told_what_is_missing(tokenizer):
    with pytest.raises(ConfigError, match="does not write what the chat") as raised:
        HalfShouting(tokenizer=tokenizer).encode({"messages": TWO_TURNS})
    assert "message_spans" in raised.value.hint


def test_a_template_travels_to_another_process(tokenizer):
    # As `datasets` sends it to the processes of map().
    template = Template(tokenizer=tokenizer, max_length=200, loss_on="last")
    row = {"messages": TWO_TURNS}
    assert dill.loads(dill.dumps(template)).encode(row) == template.encode(row)


def test_a_tokens_leading_spaces_are_its_own():
    # "a", " b", "  " trimmed to nothing, "c": as a tokenizer with trim_offsets gives them.
    offsets = [(0, 1), (2, 3), (5, 5), (5, 6)]
    assert covered(offsets) == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert labels_of([7, 8, 9, 10], offsets, [(1, 2), (4, 5)]) == [-100, 8, 9, -100]


def test_each_token_of_a_character_that_is_many_bytes_has_a_label():
    assert labels_of([7, 8, 9], [(0, 1), (0, 1), (1, 2)], [(0, 1)]) == [7, 8, -100]
