"""What a saved state says of itself: `state/state.json`, with the checksum of every file beside it.

Written last, so a folder without a valid record is no state.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatrain.errors import CheckpointError

FOLDER = "state"
"""Inside a checkpoint folder, beside the files of PEFT or Transformers."""
RECORD = "state.json"
MASTER, GRADIENTS = "master", "gradients"
"""Kinds of tensors beside an optimizer's own."""
VERSION = 2
"""Of the format; a reader refuses a later one.  1 had neither base_config nor imported."""


class FileRecord(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int
    """Bytes."""
    sha256: str


class OptimizerRecord(BaseModel):
    """An optimizer without its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    options: dict[str, Any]
    """As set_optimizer got them."""
    counters: dict[str, Any]
    """What is not a tensor of a parameter's shape: steps, and options as they are now."""


class ScheduleRecord(BaseModel):
    """A learning rate schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    options: dict[str, Any]
    state: dict[str, Any]


class GradientRecord(BaseModel):
    """Gradients that were not stepped on yet."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    counts: dict[str, Any]
    """What the sums are to be divided by."""
    is_reduced: bool
    """Divided and clipped already, by clip_grad_norm."""


class StackRecord(BaseModel):
    """Where a stacked pair of factors went."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    owner: str
    """`...mlp.experts`, in the checkpoint's names."""
    parts: tuple[str, ...]
    """Leaves of each expert's modules, in the order of B's rows: gate_proj, up_proj."""
    num_experts: int


class CarriedRecord(BaseModel):
    """A weight of the base, to compare with the base that training goes on with."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: str
    """As torch calls it: `float32`."""
    xxh3: str
    """XXH3-64 of its bytes, in hexadecimal."""


class ImportedRecord(BaseModel):
    """What a PEFT directory held besides factors, of a state that was made from one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    config: dict[str, Any]
    """Its adapter_config.json."""
    stacked: dict[str, StackRecord]
    """By PEFT's key of the layer: a parameter of all experts that was stacked in the file."""
    renamed: dict[str, str]
    """PEFT's path of other modules, by the checkpoint's name, where the two differ."""
    embeddings: tuple[str, ...]
    """Modules whose factors PEFT calls lora_embedding_A and B."""
    shapes: dict[str, tuple[int, int]]
    """(in, out) of every adapted module; one entry, without a number, for all experts."""
    carried: dict[str, CarriedRecord]
    """Weights of the base that PEFT put into the file, by PEFT's key; they are in `carried/`."""


class StateRecord(BaseModel):
    """Everything of a saved state that is not a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["megatrain state"] = "megatrain state"
    version: int = VERSION
    megatrain: str
    """Version that wrote it."""
    saved_at: float
    """Seconds since 1970."""
    adapter: str
    """Name in the run; empty if all parameters are trained."""
    lora: dict[str, Any] | None
    base_model: str
    fingerprint: dict[str, Any] | None
    """Of the base: its sizes, and a checksum of its tensors' names and shapes.  None if no base
    was at hand: then `imported` says what must fit."""
    base_config: dict[str, Any] | None = None
    """The base's config.json, by which an adapter can be exported without the base."""
    imported: ImportedRecord | None = None
    """Of a state that was made from a PEFT directory, and not trained since."""
    layout: str
    """It was written on; for information."""
    mixed_precision: str
    seed: int
    """Random numbers depend on it, the adapter, the step and the pass alone."""
    step: int
    num_calls: int
    """Of clip_grad_and_step since the last step."""
    num_passes: int
    """Of forward_backward since the last step."""
    accumulation_steps: int
    consumed_train_samples: int | None
    optimizer: OptimizerRecord | None
    schedule: ScheduleRecord | None
    gradients: GradientRecord | None
    tensors: tuple[str, ...]
    """Kinds of tensors; each is a folder of safetensors files."""
    files: dict[str, FileRecord] = {}
    """By path inside the checkpoint folder, this one excepted."""


def write_record(checkpoint: Path, record: StateRecord) -> None:
    """Write the record with checksums of all files that are in the checkpoint now."""
    files = {
        str(path.relative_to(checkpoint)): FileRecord(
            size=path.stat().st_size, sha256=checksum(path)
        )
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    content = record.model_copy(update={"files": files}).model_dump(mode="json")
    content["checksum"] = _checksum_of(content)
    (checkpoint / FOLDER / RECORD).write_text(json.dumps(content, indent=1) + "\n")


def weights_alone(record: StateRecord) -> StateRecord:
    """Return a record of the same state as if nothing but the weights had been saved."""
    nothing = {"optimizer": None, "schedule": None, "gradients": None}
    counts = {"step": 0, "num_calls": 0, "num_passes": 0}
    return record.model_copy(update=nothing | counts | {"tensors": (MASTER,)})


def read_record(checkpoint: Path) -> StateRecord:
    """Return a checkpoint's record.

    Raises CheckpointError if there is none, or it is not as it was written.
    """
    path = Path(checkpoint) / FOLDER / RECORD
    try:
        content = json.loads(path.read_text())
        expected = content.pop("checksum")
    except OSError as error:
        raise CheckpointError(
            f"no training state in {checkpoint}: {error}",
            hint="save with save_optimizer=True writes one; a PEFT adapter alone is none",
        ) from error
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"cut short or altered: {path}: {error}") from error
    if content.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{path} has format version {content['version']}; this megatrain reads up to {VERSION}",
            hint="resume with the megatrain that wrote it, or a later one",
        )
    if _checksum_of(content) != expected:
        raise CheckpointError(f"altered: {path} does not have the checksum it was written with")
    try:
        return StateRecord.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"not a record of a training state: {path}: {error}") from error


def has_state(checkpoint: Path) -> bool:
    """Tell whether a folder holds a training state, be it damaged or not."""
    return (checkpoint / FOLDER / RECORD).is_file()


def check_files(checkpoint: Path, record: StateRecord, *, contents: bool = True) -> None:
    """Raise CheckpointError, naming the file, if one is missing, cut short or altered.

    contents=False looks at sizes only.
    """
    for name, expected in record.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"missing: {path}")
        size = path.stat().st_size
        if size != expected.size:
            raise CheckpointError(
                f"cut short or altered: {path} has {size} bytes; {expected.size} were written"
            )
        if contents and checksum(path) != expected.sha256:
            raise CheckpointError(f"altered: {path} does not have the checksum it was written with")


def checksum(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
