"""What a checkpoint, an adapter or a training state says of itself, for a table and for JSON."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatrain.errors import CheckpointError
from megatrain.export.compare.headers import StoredTensor, read_file, read_folder
from megatrain.export.compare.parameters import count, quantisation
from megatrain.export.compare.place import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Place,
    read_json,
)
from megatrain.export.state.record import FOLDER, check_files, read_record


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor of a list."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str
    """Relative to the folder; a number of files where it is cut."""


@dataclass(frozen=True, slots=True)
class Description:
    """What is at a path."""

    what: str
    path: str
    facts: Mapping[str, Any]
    """What a reader wants to know first, by its name, in order."""
    tensors: Sequence[TensorLine] = field(default_factory=tuple)

    @property
    def dtypes(self) -> dict[str, dict[str, int]]:
        """Tensors and bytes by dtype."""
        found: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
        for tensor in self.tensors:
            found[tensor.dtype]["tensors"] += 1
            found[tensor.dtype]["bytes"] += tensor.num_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))

    @property
    def largest(self) -> TensorLine | None:
        """The tensor with the most bytes."""
        return max(self.tensors, key=lambda tensor: tensor.num_bytes, default=None)

    def to_dict(self, *, with_tensors: bool) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        result = {"what": self.what, "path": self.path, **self.facts}
        if self.tensors:
            assert self.largest is not None
            result["tensors"] = len(self.tensors)
            result["tensor_bytes"] = sum(tensor.num_bytes for tensor in self.tensors)
            result["dtypes"] = self.dtypes
            result["largest"] = asdict(self.largest)
        if with_tensors:
            result["all_tensors"] = [asdict(tensor) for tensor in self.tensors]
        return json.loads(json.dumps(result))  # type: ignore[no-any-return]


def describe_checkpoint(place: Place) -> Description:
    """Describe a Hugging Face checkpoint.  Raises CheckpointError for a damaged one."""
    config = read_json(place.path / "config.json")
    tensors = read_folder(place.path)
    facts = {
        **_model_facts(config),
        "quantised": quantisation(config) or "no",
        **_counted(tensors.values(), config),
        **_files(place.path),
    }
    return Description(
        "Hugging Face checkpoint", str(place.path), facts, lines(place.path, tensors)
    )


def describe_adapter(place: Place) -> Description:
    """Describe a PEFT adapter.  Raises CheckpointError for a damaged one."""
    config = read_json(place.path / ADAPTER_CONFIG)
    tensors = read_file(_weights(place.path))
    facts = {
        "peft type": config.get("peft_type", "?"),
        "base model": config.get("base_model_name_or_path"),
        **_lora_facts(config),
        "parameters": sum(tensor.numel for tensor in tensors.values()),
        **_files(place.path),
    }
    return Description("PEFT adapter", str(place.path), facts, lines(place.path, tensors))


def describe_state(place: Place) -> Description:
    """Describe a training state.  Raises CheckpointError for a damaged one."""
    record = read_record(place.path)
    check_files(place.path, record, contents=False)
    facts: dict[str, Any] = {
        "of": "all parameters" if record.lora is None else f"the adapter {record.adapter!r}",
        "written by": f"megatrain {record.megatrain}",
        "base model": record.base_model,
        "architecture": (record.fingerprint or {}).get("model_type"),
        "layout": record.layout,
        "precision": record.mixed_precision,
        "step": record.step,
        "samples seen": record.consumed_train_samples,
        "optimizer": None if record.optimizer is None else record.optimizer.kind,
        "schedule": None if record.schedule is None else record.schedule.kind,
        **_lora_facts(record.lora or {}),
        **_files(place.path),
    }
    tensors: list[TensorLine] = []
    for kind in record.tensors:
        folder = place.path / FOLDER / kind
        found = read_folder(folder) if folder.is_dir() else {}
        if kind == "master":
            facts["parameters"] = sum(tensor.numel for tensor in found.values())
        tensors += [
            TensorLine(f"{kind}: {line.name}", line.dtype, line.shape, line.num_bytes, line.file)
            for line in lines(place.path, found)
        ]
    return Description("megatrain training state", str(place.path), facts, tensors)


def lines(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[TensorLine]:
    """Return tensors as they are listed."""
    return [
        TensorLine(name, each.dtype, each.shape, each.num_bytes, str(each.path.relative_to(folder)))
        for name, each in tensors.items()
    ]


def _weights(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"no {ADAPTER_WEIGHTS} in {folder}", hint="pickled adapters (.bin) are not read"
        )
    return path


def _model_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config") or config
    names = {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden size",
        "num_attention_heads": "heads",
        "num_key_value_heads": "key/value heads",
        "vocab_size": "vocabulary",
    }
    return {
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "model type": config.get("model_type"),
        **{shown: text[name] for name, shown in names.items() if name in text},
        "tied embeddings": bool(
            config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        ),
    }


def _counted(tensors: Iterable[StoredTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    found = count(tensors, config)
    result: dict[str, Any] = {"parameters": found.total}
    if found.active != found.total:
        result["active parameters"] = found.active
    return result


def _lora_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    always = ("r", "lora_alpha", "target_modules")
    more = (
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_dropout",
        "layers_to_transform",
        "task_type",
    )
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
    facts = {names[key]: config.get(key) for key in always if key in config}
    return facts | {key.replace("_", " "): config[key] for key in more if config.get(key)}


def _files(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
