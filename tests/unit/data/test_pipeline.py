"""The whole way from a file to batches, with the library's own template and preprocessors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.data.dataset import Dataset
from megatrain.data.loader import DataLoader
from megatrain.data.meta import DatasetMeta
from megatrain.data.packed_dataset import PackingDataset
from megatrain.errors import DataError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "model"
    build_tokenizer(["who are you? I am"], vocab_size=300).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("template_first", [True, False])
def test_self_cognition_is_packed_and_batched(
    tmp_path: Path, model: Path, template_first: bool
) -> None:
    rows = [
        {"query": f"who are you? {index}", "response": "I am {{NAME}} by {{AUTHOR}}", "tag": "en"}
        for index in range(40)
    ]
    meta = DatasetMeta(write(tmp_path / "self.jsonl", rows), data_slice=range(1000))
    dataset = PackingDataset(meta)
    options = {"model_name": "megatrain", "model_author": "its authors"}
    if template_first:
        dataset.set_template("Template", model_id=str(model), max_length=256)
        dataset.map("SelfCognitionProcessor", num_proc=2, **options)
    else:
        dataset.map("SelfCognitionProcessor", num_proc=2, **options)
        dataset.set_template("Template", model_id=str(model), max_length=256)
    dataset.encode(num_proc=2)
    dataset.pack_dataset()
    texts = []
    for batch in DataLoader(dataset, batch_size=2):
        for row in batch:
            labels = [label for label in row["labels"] if label != -100]
            texts += dataset.template.decode(labels).split("<|im_end|>")[:-1]
    assert [text.strip() for text in texts] == ["I am megatrain by its authors"] * 40


def test_prompts_keep_what_rewards_need(tmp_path: Path, model: Path) -> None:
    rows = [{"question": "1 + 1?", "answer": "One and one.\n#### 2"}]
    dataset = Dataset(DatasetMeta(write(tmp_path / "gsm8k.jsonl", rows)))
    dataset.set_template("Template", model_id=str(model), max_length=2048)
    dataset.map("GSM8KProcessor")
    dataset.encode(add_generation_prompt=True)
    row = dataset[0]
    assert row["num_labels"] == 0
    assert "2" in json.dumps(row["user_data"])
    assert row["messages"][-1]["role"] == "user"
    assert dataset.template.decode(row["input_ids"]).endswith("<|im_start|>assistant\n")


def test_pairs_lose_their_text_and_are_not_packed(tmp_path: Path, model: Path) -> None:
    prompt = {"role": "user", "content": "who are you?"}
    rows = [
        {
            "chosen": [prompt, {"role": "assistant", "content": "I am"}],
            "rejected": [prompt, {"role": "assistant", "content": "you are you"}],
        }
    ]
    dataset = PackingDataset(DatasetMeta(write(tmp_path / "pairs.jsonl", rows)))
    dataset.set_template("Template", model_id=str(model), max_length=200)
    dataset.encode()
    assert dataset.template.encode(rows[0]).items() >= dict(dataset._encoded.row(0)).items()  # type: ignore[union-attr]
    assert "chosen" not in dataset._encoded.row(0)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="a chosen and a rejected answer cannot be packed"):
        dataset.pack_dataset()


RANK = """
import sys
from pathlib import Path
from megatrain.data.dataset import Dataset

def count(row):
    with open(sys.argv[2], "a") as file:
        file.write("x")
    return {"n": row["n"] + 1}

print(sum(row["n"] for row in Dataset(sys.argv[1]).map(count)))
"""


@pytest.mark.slow
def test_of_several_processes_one_does_the_work(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"n": index} for index in range(100)])
    calls = tmp_path / "calls"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", RANK, str(path), str(calls)]
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [rank.communicate(timeout=200)[0].strip() for rank in ranks] == ["5050"] * 3
    assert len(calls.read_text()) == 100
