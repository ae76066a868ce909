"""From a template's rows to what a model takes."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from megatrain.data.pair_row import SIDES, PairRow, side_of
from megatrain.errors import DataError
from megatrain.types import InputFeature, LazyRow

LEFT_OUT = ("messages", "tools", "user_data", "text", "chosen", "rejected")
"""Columns of standard rows that are tokens by now."""


class InputProcessor:
    """Turns the rows of a global batch into data.  A subclass may override `__call__`.

    The conversation itself is left out; the other columns stay, since a loss may take them
    ("label", "weights", ...).  A preference pair becomes two data in a row, chosen before
    rejected: the columns that begin with chosen_ and rejected_, without that.  A row that is not
    read yet (LazyRow) stays so, and no more is read than a rank needs.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[InputFeature]:
        """Return one datum a row, two a pair, in order; DataError for a row that is not encoded."""
        return [datum for index, row in enumerate(rows) for datum in self.read(index, row)]

    def read(self, index: int, row: Any) -> list[InputFeature]:
        """Return the data of one row."""
        if isinstance(row, PairRow):
            return [cast(InputFeature, side) for side in row.sides]
        if isinstance(row, LazyRow):
            return [cast(InputFeature, row)]
        if not isinstance(row, Mapping):
            raise DataError(f"row {index} is not a mapping but {type(row).__name__}")
        if "input_ids" in row:
            kept = {
                name: value
                for name, value in row.items()
                if name not in LEFT_OUT and value is not None
            }
            return [cast(InputFeature, kept)]
        if all(f"{side}_input_ids" in row for side in SIDES):
            return [cast(InputFeature, side_of(row, side)) for side in SIDES]
        raise DataError(
            f"row {index} is not encoded: it has {', '.join(sorted(row)) or 'no columns'}",
            hint="dataset.set_template(...), then dataset.encode()",
        )
