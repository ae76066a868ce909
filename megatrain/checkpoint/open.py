"""The one door to a checkpoint's weights, whatever form they are in."""

from pathlib import Path

from megatrain.checkpoint.pickle_folder import UNPICKLE, PickleFolder
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError


def open_checkpoint(folder: Path, *, allow_pickle: bool = False) -> SafetensorsFolder:
    """Return a checkpoint's tensors by name, to be read lazily.

    Raises CheckpointError if there are none, or only pickled ones and they are not allowed.
    """
    pickled = sorted(path.name for path in folder.glob(PickleFolder.pattern))
    if pickled and not any(folder.glob(SafetensorsFolder.pattern)):
        if not allow_pickle:
            raise CheckpointError(
                f"weights are read from safetensors only; {folder} has {', '.join(pickled[:5])}",
                hint=UNPICKLE,
            )
        return PickleFolder(folder)
    return SafetensorsFolder(folder)
