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
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
EXAMPLE = (
    f"How many r's are in strawberry?{SUFFIX}\n\nAssistant: Let's spell the word out and "
    "number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. We have r's at "
    "positions 3, 8, and 9. \\boxed{3}\n\nUser: "
)
"""What the cookbook puts before a question of gsm8k, and after it."""
CARD = """---
configs:
- config_name: {name}
  data_files:
  - split: train
    path: {name}/train.jsonl
  - split: test
    path: {name}/test.jsonl
---
"""


def question(draw: random.Random) -> tuple[str, int]:
    """Return a question and its answer, one of four."""
    word = draw.choice(sorted(NUMBERS))
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    return f"{name} has {word} {thing}. How many {thing} are there?", NUMBERS[word]


def write_data(folder: Path) -> None:
    """Write all data sets below `folder`; the same bytes every time."""
    write_gsm8k(folder, 1024)
    _chats(folder / "HuggingFaceH4/no_robots")
    _preferences(folder / "Anthropic/hh-rlhf")
    _prompts(folder / "zwhe99/DeepMath-103K")
    _pages(folder / "Salesforce/wikitext")


def write_gsm8k(folder: Path, size: int) -> None:
    """Write the data set that rewards are of, with `size` questions to train on."""
    place = folder / "openai/gsm8k"
    for split, number, seed in (("train", size, 1), ("test", 32, 2)):
        rows = (
            {"question": text, "answer": f"There are {answer}.\n#### {answer}"}
            for text, answer in _many(random.Random(seed), number)
        )
        _write(place / f"main/{split}.jsonl", rows)
    (place / "README.md").write_text(CARD.format(name="main"))


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


def _prompts(folder: Path) -> None:
    """Write questions as `rl_loop` asks them, so that what it made can be a teacher."""
    rows = (
        {"question": f"{EXAMPLE}{text}{SUFFIX}", "final_answer": str(answer)}
        for text, answer in _many(random.Random(4), 256)
    )
    _write(folder / "train.jsonl", rows)


def _pages(folder: Path) -> None:
    """Write a text in which the words are that a recipe counts."""
    name = "wikitext-103-raw-v1"
    words = ("over", "many", "such", "until", "when", "time", *NUMBERS, *NAMES, *THINGS)
    for split, seed in (("train", 9), ("test", 10)):
        draw = random.Random(seed)
        rows = ({"text": " ".join(draw.choices(words, k=12))} for _ in range(200))
        _write(folder / f"{name}/{split}.jsonl", rows)
    (folder / "README.md").write_text(CARD.format(name=name))


def _many(draw: random.Random, size: int) -> Iterable[tuple[str, int]]:
    return (question(draw) for _ in range(size))


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
