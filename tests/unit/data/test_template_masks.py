"""Which tokens have a loss, compared with TRL's training templates and with texts written out."""

import json

import pytest

from megatrain.data.template.base import Template
from megatrain.errors import ConfigError, DataError
from tests.unit.data.template_cases import (
    MISTRAL,
    THINKING,
    TOOL_USE,
    TOOLS,
    TWO_TURNS,
    labelled_texts,
    runs,
    tokenizer_for,
    trl_template,
)

TRL_LABELS_MORE = {
    "llama3": ("", ""),
    "cohere": ("", ""),
    "gemma": ("", "\n"),
    "gemma3": ("", "\n"),
    "phi3": ("", "\n"),
    "phi3_5": ("", "\n"),
    "lfm2": ("", "\n"),
    "lfm2_v2": ("", "\n"),
    "qwen2_5": ("\n", "\n"),
    "qwen2_5_vl": ("", "\n"),
    "qwen3_instruct_2507": ("", "\n"),
    "deepseekv3": ("<\uff5cAssistant\uff5c>", ""),
    "gptoss": ("<|start|>assistant", ""),
    "muse_glimmer": ("<|start|>assistant", ""),
}
"""What TRL's training template labels before and behind what the model writes: pieces of the
generation prompt, and the line break behind the end of turn."""

TRL_LABELS_MORE_OF_THINKING = {
    "qwen3": ("", "\n"),
    "qwen3_5_think": ("<think>\n", "\n"),
    "qwen3_6": ("<think>\n", "\n"),
    "nemotron_3_nano": ("<think>\n", "\n"),
    "nemotron_3_ultra": ("<think>\n", "\n"),
    "gptoss": ("<|start|>assistant", ""),
}

ALL = sorted({*TRL_LABELS_MORE, *TRL_LABELS_MORE_OF_THINKING})


def compare_with_trl(name, messages, tools, more):
    tokenizer = tokenizer_for(trl_template(name))
    ours = Template(tokenizer=tokenizer).encode({"messages": messages, "tools": tools})
    theirs = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=trl_template(f"{name}_training"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ours["input_ids"] == theirs["input_ids"]
    before, behind = more
    expected = [before + text + behind for text in labelled_texts(tokenizer, ours)]
    if name.startswith("phi3"):  # it ends every text with an end of sequence, which TRL labels
        expected[-1] += tokenizer.eos_token
    assert runs(tokenizer, theirs["input_ids"], theirs["assistant_masks"]) == expected


@pytest.mark.parametrize("name", TRL_LABELS_MORE)
def test_the_mask_of_a_plain_template_is_that_of_trls_training_template(name):
    compare_with_trl(name, TWO_TURNS, None, TRL_LABELS_MORE[name])


@pytest.mark.parametrize("name", TRL_LABELS_MORE_OF_THINKING)
def test_the_mask_of_a_thinking_turn_is_that_of_trls_training_template(name):
    # TRL's variants of these keep the thinking of earlier turns, so one turn is compared.
    compare_with_trl(name, THINKING, None, TRL_LABELS_MORE_OF_THINKING[name])


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5", "phi3"])
def test_content_in_parts_is_the_text_of_its_parts(name):
    template = Template(tokenizer=tokenizer_for(trl_template(name)))
    cut = [
        {
            **m,
            "content": [{"type": "text", "text": t} for t in (m["content"][:3], m["content"][3:])],
        }
        for m in TWO_TURNS
    ]
    assert (
        template.encode({"messages": cut})["labels"]
        == (template.encode({"messages": TWO_TURNS})["labels"])
    )
    prompts = [template.encode({"messages": each[:3]}, True) for each in (cut, TWO_TURNS)]
    assert prompts[0]["input_ids"] == prompts[1]["input_ids"]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507"])
def test_the_mask_of_tool_calls_is_that_of_trls_training_template(name):
    more = {**TRL_LABELS_MORE, **TRL_LABELS_MORE_OF_THINKING}[name]
    compare_with_trl(name, TOOL_USE, TOOLS, more)


@pytest.mark.parametrize("name", [name for name in ALL if name != "deepseekv3"])
def test_the_last_turns_labels_begin_where_its_prompt_ends(name):
    """A model sees exactly the prompt's tokens when it has to write the first label.

    Not so for DeepSeek's template: its prompt opens <think>, which it leaves out of every turn.
    """
    tokenizer = tokenizer_for(trl_template(name))
    template = Template(tokenizer=tokenizer, loss_on="last")
    messages = THINKING if name in TRL_LABELS_MORE_OF_THINKING else TWO_TURNS
    whole = template.encode({"messages": messages})
    prompt = template.encode({"messages": messages[:-1]}, add_generation_prompt=True)
    first = next(at for at, label in enumerate(whole["labels"]) if label != -100)
    assert whole["input_ids"][:first] == prompt["input_ids"]
    assert set(prompt["labels"]) == {-100}
    assert prompt["num_labels"] == 0


@pytest.mark.parametrize("name", ALL)
def test_the_tokens_are_those_of_transformers(name):
    tokenizer = tokenizer_for(trl_template(name))
    encoded = Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS})
    expected = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=True)
    assert encoded["input_ids"] == expected["input_ids"]
    assert encoded["length"] == len(expected["input_ids"])
    kept = [label for label in encoded["labels"][1:] if label != -100]
    assert encoded["num_labels"] == len(kept)


def test_thinking_of_earlier_turns_is_not_rendered_by_qwen3_and_has_no_labels():
    tokenizer = tokenizer_for(trl_template("qwen3"))
    messages = [*THINKING, {"role": "user", "content": "Thanks!"}, *THINKING[1:]]
    encoded = Template(tokenizer=tokenizer).encode({"messages": messages})
    assert labelled_texts(tokenizer, encoded) == [
        "sunny<|im_end|>",
        "<think>\nRome, hm\n</think>\n\nsunny<|im_end|>",
    ]


def test_an_empty_thinking_block_belongs_to_the_prompt_only_if_the_prompt_has_it():
    tokenizer = tokenizer_for(trl_template("qwen3"))
    row = {"messages": TWO_TURNS[:2]}
    written = Template(tokenizer=tokenizer).encode(row)
    given = Template(tokenizer=tokenizer, chat_template_kwargs={"enable_thinking": False}).encode(
        row
    )
    words = "hello world, what is it?<|im_end|>"
    assert labelled_texts(tokenizer, written) == [f"<think>\n\n</think>\n\n{words}"]
    assert labelled_texts(tokenizer, given) == [words]


def test_a_turn_rendered_without_thinking_follows_the_prompt_without_thinking():
    # The prompt opens <think>; the earlier turn has "<think></think>" as with enable_thinking off.
    tokenizer = tokenizer_for(trl_template("nemotron_3_nano"))
    encoded = Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS})
    first, _ = labelled_texts(tokenizer, encoded)
    assert first == "hello world, what is it?<|im_end|>"


def test_tool_calls_are_labelled_and_tool_answers_are_not():
    tokenizer = tokenizer_for(trl_template("qwen2_5"))
    encoded = Template(tokenizer=tokenizer).encode({"messages": TOOL_USE, "tools": TOOLS})
    call = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    assert labelled_texts(tokenizer, encoded) == [
        f"<tool_call>\n{call}\n</tool_call><|im_end|>",
        "sunny<|im_end|>",
    ]


def test_tools_and_calls_as_a_table_stores_them_are_the_same_conversation():
    tokenizer = tokenizer_for(trl_template("qwen3"))
    template = Template(tokenizer=tokenizer)
    keys = ("role", "content", "reasoning_content", "tool_calls", "name")
    stored = [{key: message.get(key) for key in keys} for message in TOOL_USE]
    stored[1]["content"] = None
    encoded = template.encode({"messages": stored, "tools": json.dumps(TOOLS)})
    assert encoded["labels"] == template.encode({"messages": TOOL_USE, "tools": TOOLS})["labels"]


def test_without_a_header_the_answer_begins_behind_the_users_turn():
    tokenizer = tokenizer_for(MISTRAL)
    encoded = Template(tokenizer=tokenizer).encode({"messages": TWO_TURNS})
    end = tokenizer.eos_token
    assert labelled_texts(tokenizer, encoded) == [
        f" hello world, what is it?{end}",
        f" sunny,\n\n  21 degrees{end}",
    ]


def test_generation_blocks_are_taken_as_they_are():
    tokenizer = tokenizer_for(trl_template("qwen3_training"))
    row = {"messages": [*THINKING, *TWO_TURNS]}
    ours = Template(tokenizer=tokenizer).encode(row)
    theirs = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in ours["labels"]] == theirs["assistant_masks"]


def test_a_turn_may_end_with_the_token_that_starts_the_next(tmp_path):
    """GLM-4's models stop at <|user|> and <|observation|>, which the next turn begins with."""
    tokenizer = tokenizer_for(trl_template("glm4moe"))
    stops = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    template = Template(str(tmp_path))
    row = {"messages": [*TOOL_USE, *TWO_TURNS[:2]], "tools": TOOLS}
    texts = labelled_texts(tokenizer, template.encode(row))
    assert texts[0].endswith("</tool_call><|observation|>")
    assert texts[1].endswith("sunny<|user|>")
    assert texts[2].endswith("what is it?")


def test_a_template_that_joins_all_messages_says_that_no_mask_can_be_derived():
    joined = "{{ messages | map(attribute='content') | join('\n') }}"
    template = Template(tokenizer=tokenizer_for(joined))
    with pytest.raises(ConfigError, match="message 1 is not rendered by a loop") as raised:
        template.encode({"messages": TWO_TURNS})
    assert "{% generation %}" in raised.value.hint


def test_a_tools_answer_inside_the_assistants_turn_is_refused():
    template = Template(tokenizer=tokenizer_for(trl_template("gemma4")))
    with pytest.raises(ConfigError, match=r"message 2 \(tool\) is written within another's turn"):
        template.encode({"messages": TOOL_USE, "tools": TOOLS})


def test_a_template_that_leaves_out_tool_calls_is_refused():
    template = Template(tokenizer=tokenizer_for(trl_template("llama3")))
    with pytest.raises(ConfigError, match="does not write the tool calls of message 1"):
        template.encode({"messages": TOOL_USE})


def test_a_template_that_changes_the_words_is_refused():
    shouting = trl_template("llama3").replace("| trim", "| upper")
    template = Template(tokenizer=tokenizer_for(shouting))
    with pytest.raises(ConfigError, match="message 1 is not written as it is"):
        template.encode({"messages": TWO_TURNS})


def test_a_loop_whose_text_is_captured_and_changed_is_refused():
    captured = (
        "{% set text %}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% endset %}{{ text | replace('hello', 'bye') | length }}"
    )
    template = Template(tokenizer=tokenizer_for(captured))
    with pytest.raises(ConfigError, match="does not write what the chat template writes"):
        template.encode({"messages": TWO_TURNS})


def test_what_the_template_raises_is_an_error_of_the_data():
    template = Template(tokenizer=tokenizer_for(trl_template("gemma")))
    system = {"role": "system", "content": "Be kind."}
    with pytest.raises(DataError, match="System role not supported"):
        template.encode({"messages": [system, *TWO_TURNS]})


def test_arguments_of_a_form_that_the_template_does_not_take_are_an_error_of_the_data():
    template = Template(tokenizer=tokenizer_for(trl_template("deepseekv3")))
    with pytest.raises(
        DataError, match="refuses these messages: can only concatenate str"
    ) as raised:
        template.encode({"messages": TOOL_USE})
    assert "arguments of tool calls" in raised.value.hint
