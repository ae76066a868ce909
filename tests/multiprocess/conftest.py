"""A small model and rows of every kind, for runs of `megatrain train`."""

import json
import random
from pathlib import Path

import pytest

from megatrain.data.template.base import Template
from tests.fixtures.small_model import make_small_model

NUMBERS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Files of rows of every kind."""
    folder, order = tmp_path_factory.mktemp("rows"), random.Random(0)
    chats, pairs, rated = [], [], []
    for number in range(24):
        prompt = " ".join(order.choices(NUMBERS, k=order.randint(2, 9)))
        good, bad = "I am a small model.", "Who are you? two"
        turn = {"role": "user", "content": prompt}
        messages = [turn, {"role": "assistant", "content": good}]
        chats.append({"messages": messages})
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        wanted = number % 2 == 0
        rated.append({"prompt": prompt, "completion": good if wanted else bad, "label": wanted})
    write(folder / "chats.jsonl", chats)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "ratings.jsonl", rated)
    write(folder / "texts.jsonl", [{"text": chat["messages"][0]["content"]} for chat in chats])
    write(folder / "taught.jsonl", [taught(chat, Template(str(base))) for chat in chats])
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def taught(row: dict, template: Template) -> dict:
    """Return a conversation with a teacher who is all but certain of each label."""
    labels = [label for label in template.encode(row)["labels"][1:] if label != -100]
    tokens = [[label, (label + 1) % 300] for label in labels]
    return row | {"teacher_tokens": tokens, "teacher_logps": [[-0.01, -5.0]] * len(labels)}
