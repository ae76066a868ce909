"""The tensors that two places are compared by: by Hugging Face's names, or by PEFT's factors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatrain.errors import CheckpointError
from megatrain.export.compare.headers import StoredTensor, read_file, read_folder
from megatrain.export.compare.place import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Place, read_json
from megatrain.export.state.record import FOLDER, check_files, read_record

MASTER = "master"
"""Kind of a state's tensors that are the weights, in float32."""
DECIDING = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "layers_to_transform",
    "bias",
    "fan_in_fan_out",
)
"""Keys of an adapter's configuration that decide what it computes."""
_PEFT_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_((?P<factor>[AB])\.weight|embedding_(?P<row>[AB]))"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One side of a comparison."""

    place: Place
    is_adapter: bool
    tensors: Mapping[str, StoredTensor]
    is_master: bool = False
    """Float32 masters of a state, which are compared after rounding to the other side's dtype."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of an adapter: DECIDING, lists sorted, without what is empty."""


def open_source(place: Place) -> Source:
    """Return the tensors at a place.

    Raises CheckpointError for a damaged one, and for a kind that has no tensors under these names.
    """
    match place.kind:
        case "hugging face":
            return Source(place, False, read_folder(place.path))
        case "adapter":
            tensors = read_file(place.path / ADAPTER_WEIGHTS)
            options = _options(read_json(place.path / ADAPTER_CONFIG))
            return Source(place, True, tensors, options=options)
        case "state":
            return _open_state(place)
        case "torch_dist" | "dataset":
            raise CheckpointError(
                f"verify compares Hugging Face checkpoints, adapters and training states; "
                f"{place.path} is of the kind {place.kind}",
                hint="megatrain convert export makes a Hugging Face checkpoint of a Megatron one",
            )


def align(first: Source, second: Source) -> tuple[Source, Source]:
    """Return both under names that can be compared: a state's, if one side is a state's factors.

    Raises CheckpointError for an adapter beside a model.
    """
    if first.is_adapter != second.is_adapter:
        adapter, model = (first, second) if first.is_adapter else (second, first)
        raise CheckpointError(
            f"an adapter has other tensors than a model: {adapter.place.path} is an adapter, "
            f"{model.place.path} is a model",
            hint="--text FILE --adapter DIR compares what a model computes with an adapter",
        )
    if first.is_adapter and (first.is_master != second.is_master):
        return _as_factors(first), _as_factors(second)
    return first, second


def _open_state(place: Place) -> Source:
    record = read_record(place.path)
    check_files(place.path, record, contents=False)
    folder = place.path / FOLDER / MASTER
    tensors = read_folder(folder) if folder.is_dir() else {}
    options = {} if record.lora is None else _options(record.lora)
    return Source(place, record.lora is not None, tensors, is_master=True, options=options)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in DECIDING:
        value = config.get(key)
        if value and value != "none":
            found[key] = sorted(map(str, value)) if isinstance(value, list | tuple) else value
    return found


def _as_factors(source: Source) -> Source:
    """Return PEFT's keys as canonical ones: `<module>.lora_A`."""
    if source.is_master:
        # Its options name targets by pattern, an exported adapter by module.
        options = {k: v for k, v in source.options.items() if not k.startswith("target_")}
        return Source(source.place, True, source.tensors, is_master=True, options=options)
    tensors = {}
    for name, tensor in source.tensors.items():
        found = _PEFT_KEY.fullmatch(name)
        factor = found and (found["factor"] or found["row"])
        tensors[f"{found['path']}.lora_{factor}" if found else name] = tensor
    options = {k: v for k, v in source.options.items() if not k.startswith("target_")}
    return Source(source.place, True, tensors, options=options)
