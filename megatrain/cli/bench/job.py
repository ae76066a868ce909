"""What one benchmark is: model, batch, precision, threads, layout.  Torch-free.

The command checks it once and writes it to a file; every process that it starts reads it there.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatrain.cli.bench.data import draw_batch
from megatrain.cli.bench.shapes import SHAPES, Shape
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh
from megatrain.types import InputFeature

DTYPES = {"float32": "no", "bf16": "bf16"}
"""--dtype, and MegatronModel's word for it."""

BYTES = {"float32": 4, "bf16": 2}
"""Of one entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the processes of one run must agree on."""

    folder: Path
    """Logs, results and the adapter of this run."""
    checkpoint: Path
    shape_name: str
    dtype: str
    threads: int
    """Of each system, in all its processes together."""
    mesh: DeviceMesh
    repeats: int = 5
    rank: int = 16
    """Of LoRA, on all linears."""
    max_tokens: int = 4096
    """Of a micro-batch, with padding where there is any."""
    backend: str = "auto"
    recompute: bool = False
    seed: int = 0
    learning_rate: float = 1e-4
    load_before: float = 0.0
    """Load average of the machine before the run."""

    def __post_init__(self) -> None:
        for name in ("threads", "repeats", "rank", "max_tokens"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} must be at least 1: {getattr(self, name)}")
        if self.mesh.ep > 1 and not self.shape.is_moe:
            raise ConfigError(f"--ep above 1 needs a model with experts: ep={self.mesh.ep}")

    @classmethod
    def asked(
        cls, args: argparse.Namespace, folder: Path, mesh: DeviceMesh, *, seed: int = 0, **more: Any
    ) -> Self:
        """Return the job that --shape, --dtype and --cache ask for.  Raises ConfigError."""
        dtype = args.dtype or SHAPES[args.shape].dtype
        cache = folder if args.cache is None else args.cache.resolve()
        return cls(
            folder=folder,
            checkpoint=cache / f"{args.shape}-{dtype}-seed{seed}",
            shape_name=args.shape,
            dtype=dtype,
            mesh=mesh,
            seed=seed,
            **more,
        )

    @property
    def shape(self) -> Shape:
        """The model and its batch."""
        return SHAPES[self.shape_name]

    @property
    def adapter(self) -> Path:
        """The PEFT directory that both systems train from."""
        return self.folder / "adapter"

    @property
    def threads_per_rank(self) -> int:
        """Threads of one of our processes."""
        return max(1, self.threads // self.mesh.world_size)

    def batch(self) -> list[InputFeature]:
        """Return the batch; the same in every process."""
        fields = self.shape.fields
        return draw_batch(self.shape.lengths, vocab_size=fields["vocab_size"], seed=self.seed)

    def lengths(self) -> list[int]:
        """Return the tokens of each datum."""
        return [len(item["input_ids"]) for item in self.batch()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a file or a report."""
        paths = {"folder": str(self.folder), "checkpoint": str(self.checkpoint)}
        return asdict(self) | paths

    def write(self) -> Path:
        """Write the job for the processes to read; return the file's path."""
        path = self.folder / "job.json"
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote."""
        values = json.loads(Path(path).read_text())
        places = {"folder": Path(values["folder"]), "checkpoint": Path(values["checkpoint"])}
        return cls(**values | places | {"mesh": DeviceMesh(**values["mesh"])})
