"""From encoded rows to model inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.errors import DataError


class InputProcessor:
    """Turns the rows of a batch into the data that a model is given; subclass it for your own.

    A preference row becomes two data, chosen and rejected, one after the other.  All else stays as
    it is: the model takes what it knows of an encoded row, and rows that are read where they are
    needed stay unread.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return model inputs (megatrain.types.InputFeature).  Raises DataError."""
        return [datum for index, row in enumerate(rows) for datum in self.split(index, row)]

    def split(self, index: int, row: Any) -> list[Any]:
        """Return the data that one row becomes."""
        if not isinstance(row, Mapping) or "chosen_input_ids" not in row:
            return [row]
        missing = [key for key in _PAIR if key not in row]
        if missing:
            raise DataError(f"row {index} is a preference pair without {', '.join(missing)}")
        chosen, rejected = ({} for _ in range(2))
        for side, datum in (("chosen", chosen), ("rejected", rejected)):
            datum["input_ids"] = row[f"{side}_input_ids"]
            datum["labels"] = row[f"{side}_labels"]
        return [chosen, rejected]


_PAIR = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
