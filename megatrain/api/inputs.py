"""From what a script passes as inputs to model inputs: conversations encoded, rows reduced."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.config.plugins import build
from megatrain.data.input_processor import InputProcessor
from megatrain.errors import DataError
from megatrain.types import LazyRow


class Inputs:
    """The template and the processor of one adapter."""

    def __init__(self) -> None:
        self.template: Any = None
        self.processor: Any = InputProcessor()

    def set_template(self, spec: Any, model_id: str, options: Mapping[str, Any]) -> None:
        """Choose the template; a class or name gets `model_id`, whose tokenizer it uses."""
        built = hasattr(spec, "encode") and not isinstance(spec, type)
        self.template = build(
            "template", spec, options if built else {"model_id": model_id, **options}
        )

    def set_processor(self, spec: Any, options: Mapping[str, Any]) -> None:
        """Choose what turns rows into model inputs."""
        self.processor = build("processor", spec, options)

    def __call__(self, rows: Any) -> Any:
        """Return model inputs.  Raises DataError."""
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
            return rows  # the trainer says what is wrong with it
        return self.processor([self._encode(index, row) for index, row in enumerate(rows)])

    def _encode(self, index: int, row: Any) -> Any:
        if isinstance(row, LazyRow) or not isinstance(row, Mapping):
            return row  # asking it what it has would read it
        if "messages" not in row or "input_ids" in row:
            return row
        if self.template is None:
            raise DataError(
                f"datum {index} is a conversation, and the model has no template",
                hint="call model.set_template('Template'), or encode the dataset",
            )
        encoded = self.template.encode(row)
        if encoded is None:
            raise DataError(f"datum {index} is too long, and the template would leave it out")
        return encoded
