"""Configurations of small runs, and what they left behind."""

import json
import sys
from pathlib import Path

import numpy as np

from megatrain.cli.train.history import read_lines
from megatrain.parallel.layout import DeviceMesh

TP2_PP2 = DeviceMesh(tp=2, pp=2)
CP2_DP2 = DeviceMesh(cp=2, dp=2)

FILES = {
    "pt": "texts.jsonl",
    "sft": "chats.jsonl",
    "dpo": "pairs.jsonl",
    "kto": "ratings.jsonl",
    "rm": "pairs.jsonl",
    "distill": "taught.jsonl",
}


def settings(base: Path, rows: Path, out: Path, recipe: str = "sft") -> dict:
    return {
        "recipe": recipe,
        "output_dir": str(out),
        "platform": "cpu",
        "model": {"id": str(base), "mixed_precision": "no"},
        "lora": {"r": 8, "lora_alpha": 16},
        "data": {"train": [{"dataset_id": str(rows)}], "max_length": 128},
        "optimizer": {"lr": 5e-3},
        "schedule": {"name": "none"},
        "train": {"batch_size": 8, "max_steps": 9},
    }


def lines_of(out: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(out / "metrics.jsonl") if key in line]


def mean_of_ends(values: list[float], count: int = 3) -> tuple[float, float]:
    """Return the means of the first and the last few values."""
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatrain", "train", str(config), *arguments]


def write_config(values: dict, path: Path) -> Path:
    """Write TOML; JSON's strings, numbers and booleans are TOML's too."""
    lines = [f"{key} = {json.dumps(v)}" for key, v in values.items() if not isinstance(v, dict)]
    for name, section in values.items():
        if isinstance(section, dict):
            plain = {key: v for key, v in section.items() if not isinstance(v, list)}
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in plain.items())]
            for source in section.get("train", []):
                lines += [f"[[{name}.train]]"]
                lines += [f"{key} = {json.dumps(v)}" for key, v in source.items()]
    path.write_text("\n".join(lines) + "\n")
    return path
