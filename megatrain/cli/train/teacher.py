"""Rows of a distillation: conversations with what a teacher said of each label."""

from collections.abc import Mapping
from typing import Any

from megatrain.data.preprocessors.base import need
from megatrain.data.preprocessors.messages import MessagesProcessor
from megatrain.errors import DataError

COLUMNS = ("teacher_tokens", "teacher_logps")


class TeacherProcessor(MessagesProcessor):
    """{"messages", "teacher_tokens", "teacher_logps"}: K numbers for each label, in their order.

    Tokens are ids of the student's tokenizer; log-probabilities are natural logarithms at
    temperature 1.  Raises DataError for a row without them, or with another shape.
    """

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the conversation with both columns."""
        tokens, logps = need(row, *COLUMNS, who=self)
        shapes = [[len(label) for label in column] for column in (tokens, logps)]
        if shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
            raise DataError(
                "teacher_tokens and teacher_logps must have K numbers for each label: they have "
                f"{len(tokens)} and {len(logps)} labels, K from {min(shapes[0], default=0)} to "
                f"{max(shapes[0], default=0)}",
                hint="K is the same for all labels",
            )
        return super().__call__(row) | {"teacher_tokens": tokens, "teacher_logps": logps}
