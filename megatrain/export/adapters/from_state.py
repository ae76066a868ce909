"""The adapter of a training state, from the state's files alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.config.lora import LoraSpec
from megatrain.errors import ExportError
from megatrain.export.adapters.canonical import from_canonical
from megatrain.export.adapters.experts import ExpertParts
from megatrain.export.adapters.import_adapter import CARRIED
from megatrain.export.layout import PREFIX
from megatrain.export.peft_adapter import (
    AdapterFiles,
    load_config,
    load_weights,
    prepare_adapter,
    same_bytes,
)
from megatrain.export.state.record import FOLDER, MASTER, StateRecord, check_files, read_record
from megatrain.model.score import SCORE


@dataclass(frozen=True)
class SavedAdapter:
    """What a state holds of an adapter."""

    record: StateRecord
    spec: LoraSpec
    tensors: dict[str, Tensor]
    """Factors by canonical names: the values that the forward pass used."""
    carried: dict[str, Tensor]
    """Weights of the base that came with an imported adapter, by PEFT's keys."""


def read_saved(state: Path) -> SavedAdapter:
    """Read the adapter of a checkpoint folder with `state/` in it, every file's checksum compared.

    Raises CheckpointError for a damaged state, ExportError for one of a whole model.
    """
    record = read_record(state)
    if record.lora is None:
        raise ExportError(
            f"the state is of all parameters, not of an adapter: {state}",
            hint="megatrain convert adapter extract makes an adapter of two checkpoints",
        )
    check_files(state, record)
    master = SafetensorsFolder(state / FOLDER / MASTER)
    tensors = {name: _as_used(name, master[name], record) for name in master}
    carried: dict[str, Tensor] = {}
    if record.imported is not None and record.imported.carried:
        folder = SafetensorsFolder(state / FOLDER / CARRIED)
        carried = {key: folder[key] for key in folder}
    return SavedAdapter(record, LoraSpec.from_any(record.lora), tensors, carried)


def _as_used(name: str, tensor: Tensor, record: StateRecord) -> Tensor:
    """Return a master weight as the forward pass saw it: rounded, where training was in bf16."""
    rounded = record.mixed_precision == "bf16" and name != SCORE
    return tensor.to(torch.bfloat16) if rounded else tensor


def for_peft(saved: SavedAdapter, base_config: dict[str, Any] | None = None) -> AdapterFiles:
    """Return the files of a PEFT directory with the adapter of a state.

    An imported adapter keeps its own keys and config.  Another is laid out for its base's config,
    which the record holds; `base_config` is for states that are older than that.

    Raises ExportError if the config is missing, or PEFT would not take exactly these tensors.
    """
    record = saved.record
    if record.imported is not None:
        return AdapterFiles(dict(record.imported.config), _as_imported(saved))
    config = record.base_config or base_config
    if config is None:
        raise ExportError(
            f"the state, of format {record.version}, does not hold its base's config.json",
            hint="--base names the base's folder",
        )
    return prepare_adapter(
        saved.spec, saved.tensors, base_model=record.base_model, hf_config=config
    )


def _as_imported(saved: SavedAdapter) -> dict[str, Tensor]:
    imported = saved.record.imported
    assert imported is not None
    factors = {name: tensor for name, tensor in saved.tensors.items() if name != SCORE}
    stacked = {path: ExpertParts(each.owner, each.parts) for path, each in imported.stacked.items()}
    weights = from_canonical(
        factors, stacked, renamed=imported.renamed, embeddings=imported.embeddings
    )
    weights |= {PREFIX + key: tensor for key, tensor in saved.carried.items()}
    if SCORE in saved.tensors:
        weights[PREFIX + SCORE] = saved.tensors[SCORE]
    return weights


def check_same_as(saved: SavedAdapter, folder: Path) -> str:
    """Compare the export of a state with a PEFT directory, in memory; return what was compared.

    Raises ExportError, naming tensors, if a byte or an option differs.
    """
    files, weights = for_peft(saved), load_weights(folder)
    wrong = sorted(
        key
        for key in weights.keys() | files.weights.keys()
        if key not in weights
        or key not in files.weights
        or not same_bytes(weights[key], files.weights[key])
    )
    if wrong or files.config != load_config(folder):
        raise ExportError(
            f"the state's export is not {folder}: {', '.join(wrong[:5]) or 'its config'} differs"
        )
    return f"{len(weights)} tensors and the configuration, byte for byte"


def embeddings_of(files: AdapterFiles) -> set[str]:
    """Return the modules whose factors PEFT calls lora_embedding_A and B."""
    suffix = ".lora_embedding_A"
    return {
        key.removeprefix(PREFIX).removesuffix(suffix)
        for key in files.weights
        if key.endswith(suffix)
    }
