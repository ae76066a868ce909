"""From what a script passes as inputs to model inputs: conversations encoded, rows reduced."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.config.plugins import build
from megatrain.data.input_processor import InputProcessor
from megatrain.errors import ConfigError, DataError
from megatrain.types import LazyRow


class Inputs:
    """The template and the processor of one adapter."""

    def __init__(self) -> None:
        self.template: Any = None
        self.processor: Any = InputProcessor()

    def set_template(
        self, spec: Any, model_id: str | None, options: Mapping[str, Any], *, base: str, trust: bool
    ) -> None:
        """Choose the template; a class or name uses the tokenizer of `model_id`, or of `base`."""
        given = {} if model_id is None else {"model_id": model_id}
        if not isinstance(spec, str | type):
            if given:
                raise ConfigError(
                    f"model_id={model_id!r} has no effect on a template that is built already",
                    hint="give the class, or leave model_id out",
                )
        elif not given and "tokenizer" not in options:
            given = {"model_id": base}
        self.template = build("template", spec, {**given, **options}, trust_remote_code=trust)

    def set_processor(self, spec: Any, options: Mapping[str, Any], *, trust: bool) -> None:
        """Choose what turns rows into model inputs."""
        self.processor = build("processor", spec, options, trust_remote_code=trust)

    def __call__(self, rows: Any) -> Any:
        """Return model inputs.  Raises DataError."""
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
            return rows  # the trainer says what is wrong with it
        return self.processor([self._encode(index, row) for index, row in enumerate(rows)])

    def _encode(self, index: int, row: Any) -> Any:
        if isinstance(row, LazyRow) or not isinstance(row, Mapping):
            return row  # asking it what it has would read it
        is_standard = "messages" in row or "text" in row or {"chosen", "rejected"} <= row.keys()
        if not is_standard or "input_ids" in row or "chosen_input_ids" in row:
            return row
        if self.template is None:
            raise DataError(
                f"datum {index} is not encoded, and the model has no template",
                hint="call model.set_template('Template'), or encode the dataset",
            )
        encoded = self.template.encode(row)
        if encoded is None:
            raise DataError(f"datum {index} is too long, and the template would leave it out")
        return encoded
