"""`megatrain convert verify --text`: log-probabilities of two checkpoints, and of an adapter."""

import argparse
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatrain.cli.convert import verify
from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.errors import CheckpointError, DataError
from megatrain.export.compare.tokens import random_tokens, read_text

TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def model(checkpoints, tmp_path_factory):
    """A checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(checkpoints("qwen3"), folder)
    build_tokenizer([TEXT], vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """A plain text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def compare(capsys):
    """Return the exit status and the report of `verify ... --json`."""

    def ask(*options):
        parser = argparse.ArgumentParser()
        verify.add_parser(parser.add_subparsers())
        args = parser.parse_args(["verify", *map(str, options), "--json"])
        status = args.run(args)
        return status, json.loads(capsys.readouterr().out)

    return ask


@torch.no_grad()
def logprobs(model, ids):
    logits = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def test_text_is_cut_into_pieces_of_the_tokenizers_own_tokens(model, text):
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    pieces = read_text(text, model, max_length=4)
    assert [i for piece in pieces for i in piece["input_ids"]] == ids
    assert max(len(piece["input_ids"]) for piece in pieces) == 4


def test_messages_go_through_the_chat_template(model, tmp_path):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}) + '\n\n{"text": "three four"}\n')
    tokenizer = AutoTokenizer.from_pretrained(model)
    first, second = read_text(path, model)
    assert list(first["input_ids"]) == tokenizer.apply_chat_template(messages)["input_ids"]
    assert list(second["input_ids"]) == tokenizer("three four")["input_ids"]


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', "3"])
def test_a_line_that_is_no_conversation_is_named(model, tmp_path, line):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "one two"}\n' + line)
    with pytest.raises(DataError, match="line 2 must have `messages` or `text`"):
        read_text(path, model)


def test_a_text_without_tokens_and_a_model_without_tokenizer_are_refused(
    model, checkpoints, tmp_path, text
):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no sequence of two tokens"):
        read_text(tmp_path / "empty.txt", model)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        read_text(text, checkpoints("qwen3"))


def test_random_tokens_are_the_same_every_time(model):
    one, other = random_tokens(model), random_tokens(model)
    assert [list(d["input_ids"]) for d in one] == [list(d["input_ids"]) for d in other]
    assert max(d["input_ids"].max() for d in one) < 512


@pytest.mark.slow
def test_the_largest_difference_of_two_checkpoints_is_that_of_transformers(
    model, text, tmp_path, compare
):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    status, found = compare(model, copy, "--text", text)
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    one, other = (logprobs(AutoModelForCausalLM.from_pretrained(p), ids) for p in (model, copy))
    expected = (one - other).abs()
    assert (status, found["same"]) == (1, False)
    told = found["logprobs"]
    assert told["max_difference"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert told["mean_difference"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert told["position"] == int(expected.argmax()) + 1
    assert told["num_tokens"] == len(ids) - 1


@pytest.mark.slow
def test_a_merged_checkpoint_is_what_base_and_adapter_are(model, text, tmp_path, compare):
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    peft.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    shutil.copytree(model, merged)
    peft.merge_and_unload().save_pretrained(merged)
    adapter = ("--adapter", tmp_path / "adapter")
    status, found = compare(merged, model, "--text", text, *adapter)
    assert (status, found["logprobs"]["how_b"]) == (0, "Transformers with the adapter, float32")
    assert compare(merged, model, "--text", text)[0] == 1


def test_computing_with_something_else_than_a_checkpoint_is_refused(model, text, tmp_path, compare):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="give the checkpoint as A and B"):
        compare(model, tmp_path, "--text", text)
    with pytest.raises(CheckpointError, match="--adapter is no PEFT adapter"):
        compare(model, model, "--text", text, "--adapter", model)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [["--tp", "2"], ["--pp", "2"]])
def test_megatrain_computes_what_transformers_computes(model, text, compare, layout):
    status, found = compare(model, model, "--text", text, "--with", "megatrain", *layout)
    assert (status, found["same"]) == (0, True)
    assert found["logprobs"]["max_difference"] < 1e-5
    assert found["logprobs"]["how_b"] == f"megatrain on layout {layout[0][2:]}2, float32"
