"""Data sets as recipes load them without a network: folders with names of the hub, made by code.

A recipe runs in the folder that holds them; both Transformers and datasets take a local folder of
the name first.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
NAMES = ("Ada", "Alan", "Grace", "Linus")
THINGS = ("apples", "books", "coins", "stamps")
MODEL = "Qwen/Qwen3-8B-Base"
"""The name under which recipes know the tiny base."""
GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train.jsonl
  - split: test
    path: main/test.jsonl
---
"""


def question(draw: random.Random) -> tuple[str, int]:
    """Return a question and its answer, one of four."""
    word = draw.choice(sorted(NUMBERS))
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    return f"{name} has {word} {thing}. How many {thing} are there?", NUMBERS[word]


def write_data(folder: Path) -> None:
    """Write all data sets below `folder`; the same bytes every time."""
    _gsm8k(folder / "openai/gsm8k")
    _chats(folder / "HuggingFaceH4/no_robots")
    _preferences(folder / "Anthropic/hh-rlhf")
    draw = random.Random(4)
    rows = ({"question": text, "final_answer": str(answer)} for text, answer in _many(draw, 256))
    _write(folder / "zwhe99/DeepMath-103K/train.jsonl", rows)


def _gsm8k(folder: Path) -> None:
    for split, size, seed in (("train", 1024, 1), ("test", 32, 2)):
        rows = (
            {"question": text, "answer": f"There are {answer}.\n#### {answer}"}
            for text, answer in _many(random.Random(seed), size)
        )
        _write(folder / f"main/{split}.jsonl", rows)
    (folder / "README.md").write_text(GSM8K_CARD)


def _chats(folder: Path) -> None:
    for split, size, seed in (("train", 640, 5), ("test", 160, 6)):
        rows = (
            {"prompt": text, "prompt_id": str(number), "category": "Brainstorm", "messages": chat}
            for number, (text, chat) in enumerate(_turns(random.Random(seed), size))
        )
        _write(folder / f"{split}.jsonl", rows)


def _turns(draw: random.Random, size: int) -> Iterable[tuple[str, list[dict[str, str]]]]:
    for text, answer in _many(draw, size):
        reply = f"Let me see: there are {answer} of them, I am sure."
        yield (
            text,
            [{"role": "user", "content": text}, {"role": "assistant", "content": reply}],
        )


def _preferences(folder: Path) -> None:
    for split, size, seed in (("train", 128, 7), ("test", 32, 8)):
        rows = (
            {
                "chosen": f"\n\nHuman: {text}\n\nAssistant: There are {answer}.",
                "rejected": f"\n\nHuman: {text}\n\nAssistant: I do not know.",
            }
            for text, answer in _many(random.Random(seed), size)
        )
        _write(folder / f"{split}.jsonl", rows)


def _many(draw: random.Random, size: int) -> Iterable[tuple[str, int]]:
    return (question(draw) for _ in range(size))


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
