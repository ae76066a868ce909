"""A training state from a PEFT directory: from its two files alone.

The state's factors keep the dtype they are stored in.  Nothing is known of the base; what must fit
it goes into the record, and is compared when training starts.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from megatrain.config.lora import without_expert
from megatrain.export.adapters.canonical import Canonical, canonical
from megatrain.export.adapters.peft_file import PeftFile, base_model_type, read_peft
from megatrain.export.peft_adapter import is_adapter, write_files
from megatrain.export.state.folder import State
from megatrain.export.state.imported import digest
from megatrain.export.state.record import (
    MASTER,
    CarriedRecord,
    ImportedRecord,
    StackRecord,
    StateRecord,
    has_state,
    read_record,
)
from megatrain.model.score import SCORE

CARRIED = "carried"
"""Folder of the base's weights that PEFT put into the file; not trained."""
FILE_BYTES = 1 << 30
README = "README.md"


def import_adapter(
    folder: Path,
    out: Path,
    *,
    model_type: str | None = None,
    seed: int = 0,
    check: Callable[[Path], None] | None = None,
) -> StateRecord:
    """Write `out`: the PEFT directory's files, and `state/` beside them; return the record.

    Training can start from it, on any layout (`resume_from_checkpoint`).  `model_type` is that of
    the base, needed for stacked experts whose config does not tell; `seed` decides the dropout.
    `check` is given the folder before it is at its place, where it never comes if that raises.

    Raises:
        ExportError: a file is damaged, or not what its config says; or `out` is something else, a
            state that was trained included.
        ConfigError: the config asks for what megatrain does not support, or tells another family
            than `model_type`.
    """
    file = read_peft(folder)
    parts = canonical(file, base_model_type(file.config, model_type))
    record = _record(file, parts, seed)

    def also(new: Path) -> None:
        if (folder / README).is_file():
            (new / README).write_bytes((folder / README).read_bytes())
        State(record, _batches(file, parts)).write(new)
        if check is not None:
            check(new)

    write_files(out, file.files, also, may_replace=_may_replace)
    return record


def _may_replace(directory: Path) -> bool:
    """Tell whether a folder holds no training: an adapter, or a state as it was imported."""
    if not is_adapter(directory):
        return False
    return not has_state(directory) or read_record(directory).imported is not None


def _batches(file: PeftFile, parts: Canonical) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what goes into the state's folders, one file after the other."""
    master = dict(parts.tensors) if file.score is None else {**parts.tensors, SCORE: file.score}
    for kind, tensors in ((MASTER, master), (CARRIED, dict(file.carried))):
        batch: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            batch[name] = tensor
            if sum(each.nbytes for each in batch.values()) >= FILE_BYTES:
                yield kind, batch
                batch = {}
        if batch:
            yield kind, batch


def _record(file: PeftFile, parts: Canonical, seed: int) -> StateRecord:
    imported = ImportedRecord(
        config=dict(file.config),
        stacked={
            path: StackRecord(
                owner=each.owner, parts=each.leaves, num_experts=_num_experts(file, path)
            )
            for path, each in parts.stacked.items()
        },
        renamed=dict(parts.renamed),
        embeddings=tuple(each.path for each in file.layers if each.kind == "embedding"),
        shapes=shapes_of(parts.tensors),
        carried={
            key: CarriedRecord(dtype=str(value.dtype).removeprefix("torch."), xxh3=digest(value))
            for key, value in file.carried.items()
        },
    )
    return StateRecord(
        megatrain=version("megatrain"),
        saved_at=time.time(),
        adapter="default",
        lora=asdict(parts.spec),
        base_model=str(file.config.get("base_model_name_or_path")),
        fingerprint=None,
        layout="imported",
        mixed_precision="no",
        seed=seed,
        step=0,
        num_calls=0,
        num_passes=0,
        accumulation_steps=1,
        consumed_train_samples=None,
        optimizer=None,
        schedule=None,
        gradients=None,
        tensors=(MASTER,),
        imported=imported,
    )


def _num_experts(file: PeftFile, path: str) -> int:
    return next(each.num_experts for each in file.layers if each.path == path)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every module with factors, one entry for all experts of a layer."""
    return {
        without_expert(name.removesuffix(".lora_A")): (
            a.shape[1],
            tensors[name.removesuffix("A") + "B"].shape[0],
        )
        for name, a in tensors.items()
        if name.endswith(".lora_A")
    }
