"""What one benchmark of conversions is: a checkpoint of so many bytes, and places.  Torch-free."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatrain.cli.bench.shapes import Lengths, Shape
from megatrain.errors import ConfigError

SHARD_BYTES = 250_000_000
LARGE: dict[str, Any] = {
    "vocab_size": 64_000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Of the checkpoint that is converted first, so that nothing is imported while it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertJob:
    """Everything that the processes of one run must agree on."""

    folder: Path
    """Logs and results of this run."""
    checkpoint: Path
    gigabytes: float
    """0 for a checkpoint of less than a megabyte."""
    workers: int = 1
    repeats: int = 1
    dtype: str = "bf16"
    seed: int = 0
    load_before: float = 0.0
    """Load average of the machine before the run."""

    def __post_init__(self) -> None:
        for name in ("workers", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1: {getattr(self, name)}")
        if not 0 <= self.gigabytes < 1000:
            raise ConfigError(f"--gigabytes must be between 0 and 1000: {self.gigabytes:g}")

    @property
    def shape(self) -> Shape:
        """A Qwen3 with as many layers as make the size."""
        fields = LARGE if self.gigabytes else SMALL
        layers = round((self.gigabytes * 1e9 / 2 - _ends(fields)) / _layer(fields))
        fields = {**fields, "num_hidden_layers": max(2, layers), "tie_word_embeddings": False}
        no_data = Lengths(count=1, shortest=1, longest=1)
        return Shape(config_class="Qwen3Config", fields=fields, lengths=no_data)

    @property
    def fused_bytes(self) -> int:
        """Of the largest parameter that Megatron fuses: gate and up."""
        return (
            2 * 2 * int(self.shape.fields["hidden_size"] * self.shape.fields["intermediate_size"])
        )

    def write(self) -> Path:
        """Write the job for the processes to read; return the file's path."""
        path = self.folder / "convert-job.json"
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"folder": str(self.folder), "checkpoint": str(self.checkpoint)}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote."""
        values = json.loads(Path(path).read_text())
        places = {"folder": Path(values["folder"]), "checkpoint": Path(values["checkpoint"])}
        return cls(**values | places)


def _ends(fields: dict[str, Any]) -> int:
    """Return the entries of embedding and head."""
    return 2 * int(fields["vocab_size"] * fields["hidden_size"])


def _layer(fields: dict[str, Any]) -> int:
    """Return the entries of a layer's matrices."""
    heads = 2 * fields["num_attention_heads"] + 2 * fields["num_key_value_heads"]
    rows = heads * fields["head_dim"] + 3 * fields["intermediate_size"]
    return int(rows * fields["hidden_size"])
