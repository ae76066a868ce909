"""Plain text for pretraining."""

from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, need
from megatrain.errors import DataError


class TextProcessor(Preprocessor):
    """{column} -> {"text"}."""

    def __init__(self, column: str = "text") -> None:
        self.column = column

    def __call__(self, row: Row) -> dict[str, Any]:
        (text,) = need(row, self.column, who=self)
        if not isinstance(text, str):
            raise DataError(f"{self.column} must be text, not {type(text).__name__}")
        return {"text": text}
