"""What one quickstart run is: options, file names, and the shape of its model.  Torch-free.

The command checks it once and writes it to a file; every process that it starts reads it there.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

from megatrain.errors import ConfigError, LayoutError
from megatrain.parallel.layout import DeviceMesh

MARKER = ".megatrain-quickstart"
"""A file of this name says that a directory is ours to write in."""

BASE_MARKER = "quickstart.json"
"""In base/: what the checkpoint was made from.  A rerun that wants the same keeps it."""

RESULTS = ("adapter", "metrics.jsonl", "loss.png", "report.json", "samples.json", "logs")
"""What a run makes anew each time, below its output directory; `base` is kept."""

VERIFIED_CONVERSATIONS = 12
"""Held-out conversations whose log-probabilities the export must reproduce."""

DEFAULT_STEPS, DEFAULT_SEED = 120, 42
MAX_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the small model; Qwen3 without experts, Qwen3-MoE with them."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 0
    experts_per_token: int = 2
    expert_intermediate_size: int = 128


DENSE = ModelShape()
MOE = ModelShape(num_experts=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the processes of one run must agree on."""

    out: Path
    mesh: DeviceMesh
    moe: bool = False
    steps: int = DEFAULT_STEPS
    seed: int = DEFAULT_SEED
    batch_size: int = 16
    """Conversations in a global batch."""
    learning_rate: float = 5e-3
    warmup_steps: int = 5
    lora_rank: int = 16
    lora_alpha: int = 32

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1: steps={self.steps}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"--seed must be between 0 and {MAX_SEED}: seed={self.seed}")
        _check_layout(self.mesh, self.shape, batch_size=self.batch_size)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model that this run makes."""
        return MOE if self.moe else DENSE

    @property
    def base(self) -> Path:
        """The Hugging Face checkpoint."""
        return self.out / "base"

    @property
    def adapter(self) -> Path:
        """The exported PEFT directory."""
        return self.out / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.out / "metrics.jsonl"

    @property
    def held_out(self) -> Path:
        """The trainer's log-probabilities of some held-out conversations."""
        return self.out / "logs" / "held_out.safetensors"

    @property
    def verification(self) -> Path:
        """How far PEFT's log-probabilities are from the trainer's."""
        return self.logs / "verification.json"

    @property
    def samples(self) -> Path:
        """Answers to held-out questions, before and after."""
        return self.out / "samples.json"

    @property
    def base_steps(self) -> int:
        """Optimizer steps that make the base."""
        return 240

    @property
    def base_metrics(self) -> Path:
        """One JSON object per step of the base."""
        return self.logs / "base_metrics.jsonl"

    @property
    def logs(self) -> Path:
        """What the processes said, and this job as they read it."""
        return self.out / "logs"

    def base_fingerprint(self) -> dict[str, object]:
        """Return all that the base depends on."""
        here = Path(__file__).parent
        names = ("base_model.py", "task.py", "tokenizer.py", "job.py")
        digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in names))
        packages = ("torch", "transformers", "tokenizers")
        return {
            "seed": self.seed,
            "moe": self.moe,
            "source": digest.hexdigest(),
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        }

    def has_base(self) -> bool:
        """Say whether a complete base of this run's options is there."""
        files = [self.base / name for name in (BASE_MARKER, "model.safetensors", "tokenizer.json")]
        if not all(file.is_file() for file in files):
            return False
        return bool(json.loads(files[0].read_text()) == self.base_fingerprint())

    def write(self) -> Path:
        """Write the job for the processes to read; return the file's path."""
        path = self.logs / "job.json"
        path.write_text(json.dumps(asdict(self) | {"out": str(self.out)}, indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote."""
        values = json.loads(Path(path).read_text())
        return cls(**values | {"out": Path(values["out"]), "mesh": DeviceMesh(**values["mesh"])})


def check_output_directory(out: Path) -> None:
    """Raise ConfigError when `out` is a file, or a directory with files that are not ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out must be a directory: {out} is a file")
    names = sorted(entry.name for entry in out.iterdir())
    if names and MARKER not in names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ConfigError(
            f"--out must be new, empty, or made by an earlier quickstart: {out} holds {shown}",
            hint="choose another directory with --out",
        )


def _check_layout(mesh: DeviceMesh, shape: ModelShape, *, batch_size: int) -> None:
    """Raise LayoutError when the mesh does not fit the model."""
    if mesh.ep > 1 and not shape.num_experts:
        raise LayoutError(
            f"--ep above 1 needs a model with experts: ep={mesh.ep}", hint="add --moe"
        )
    rules = (
        ("tp", mesh.tp, "attention heads", shape.num_heads),
        ("pp", mesh.pp, "layers", shape.num_layers),
        ("ep", mesh.ep, "experts", shape.num_experts),
    )
    for axis, size, what, count in rules:
        if count % size:
            divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise LayoutError(
                f"--{axis} must divide the model's {count} {what}: {axis}={size}",
                hint=f"choose --{axis} among {', '.join(divisors)}",
            )
    if mesh.dp > batch_size:
        raise LayoutError(
            f"--dp must not exceed the {batch_size} conversations of a batch: dp={mesh.dp}"
        )
