"""A training state as files inside a checkpoint folder that is being written."""

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatrain.export.shards import write_shards
from megatrain.export.state.record import FOLDER, RECORD, StateRecord, write_record


@dataclass
class State:
    """What `collect` returned: the batches can be gone through once."""

    record: StateRecord
    batches: Iterable[tuple[str, dict[str, Tensor]]]

    def finish(self) -> None:
        """Go through what is left: other ranks must get rid of what they have to send."""
        for _ in self.batches:
            pass

    def keep(self) -> None:
        """Gather everything now, into rank 0's memory.  Collective."""
        self.batches = iter(list(self.batches))

    def write(self, checkpoint: Path) -> None:
        """Write `state/` into a folder whose other files are there already.

        A folder of safetensors for each kind of tensor, and at last state.json with the checksum
        of every file.
        """
        folder = checkpoint / FOLDER
        folder.mkdir()
        for kind, batches in itertools.groupby(self.batches, key=operator.itemgetter(0)):
            (folder / kind).mkdir()
            write_shards(folder / kind, (batch for _, batch in batches))
        write_record(checkpoint, self.record)


def is_state_folder(folder: Path) -> bool:
    """Tell whether a folder is `state/` of a checkpoint, so that it may be replaced with it."""
    return folder.is_dir() and folder.name == FOLDER and (folder / RECORD).is_file()
