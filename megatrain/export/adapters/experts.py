"""Which experts' parameters Transformers fuses while it loads a family, and from which tensors.

Asked of Transformers' own table, by model_type: no configuration is needed and no model is built.
"""

from dataclasses import dataclass

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatrain.errors import ExportError

OLD_MLP, NEW_MLP = ".block_sparse_moe.", ".mlp."


@dataclass(frozen=True)
class ExpertParts:
    """What one expert's part of a stacked parameter is in the checkpoint."""

    owner: str
    """`...mlp.experts`, in the checkpoint's names."""
    leaves: tuple[str, ...]
    """In the order of the parameter's rows: gate_proj, up_proj."""

    def modules(self, expert: int) -> list[str]:
        """Return the names of an expert's modules."""
        return [f"{self.owner}.{expert}.{leaf}" for leaf in self.leaves]


def parts_of(model_type: str, owner: str, parameter: str) -> ExpertParts:
    """Return what a stacked parameter of Transformers' model is made of.

    A family whose checkpoint is stacked as well has one part, of the parameter's own name.
    Raises ExportError if Transformers has no such family.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ExportError(
            f"Transformers has no model_type {model_type!r}", hint="it is in the base's config.json"
        )
    name = f"{owner}.{parameter}"
    for entry in get_checkpoint_conversion_mapping(model_type) or ():
        if not isinstance(entry, WeightConverter) or not any(
            isinstance(each, MergeModulelist) for each in entry.operations
        ):
            continue
        if any(name.endswith(target) for target in entry.target_patterns):
            sources = [each.removesuffix(".weight").split(".") for each in entry.source_patterns]
            return ExpertParts(
                name_in_checkpoint(model_type, owner), tuple(each[-1] for each in sources)
            )
    return ExpertParts(owner, (parameter,))


def name_in_checkpoint(model_type: str | None, path: str) -> str:
    """Return a module's path in the checkpoint's names.

    Checkpoints of Mixtral and its kin are older than Transformers' name for their MLP.
    """
    for entry in get_checkpoint_conversion_mapping(model_type or "") or ():
        if isinstance(entry, WeightRenaming) and OLD_MLP in entry.source_patterns:
            return path.replace(NEW_MLP, OLD_MLP)
    return path


def model_types_of(class_name: str) -> list[str]:
    """Return each model_type of one of Transformers' classes for causal language models."""
    return [
        str(model_type)
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if class_name in ((name,) if isinstance(name, str) else name)
    ]
