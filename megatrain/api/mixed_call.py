"""A call that names an adapter for each datum: taken apart by adapter, and put together again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatrain.errors import ConfigError, DataError, MegatrainError
from megatrain.types import AdapterBatch, FloatArray, StepOutput


class MixedCall:
    """The data of one call, by adapter, and where each belongs."""

    def __init__(
        self,
        adapters: Sequence[str],
        inputs: Any,
        loss_inputs: Mapping[str, Any],
        encode: Callable[[str], Callable[[Any], Any]],
    ) -> None:
        """`encode` gives what makes model inputs of an adapter's rows.

        Raises ConfigError unless there is one adapter, and one entry of each input, a datum.
        """
        names = list(adapters)
        if not names:
            raise DataError("a batch must be a list of at least one datum: got none")
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"adapter_name must be names, one a datum: got {name!r}")
        columns = {name: values for name, values in loss_inputs.items() if values is not None}
        _check_lengths(names, inputs, columns)
        self._places: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._places.setdefault(name, []).append(index)
        self.batches = [
            AdapterBatch(
                name,
                _encoded(name, [inputs[i] for i in places], encode),
                {
                    column: [values[i] for i in places]
                    for column, values in columns.items()
                    # None for all of an adapter's data: its loss does not take this input.
                    if any(values[i] is not None for i in places)
                },
            )
            for name, places in self._places.items()
        ]

    def output(self, results: Mapping[str, StepOutput | MegatrainError]) -> StepOutput:
        """Return one result in request order.  Raises an adapter's error if all of them failed."""
        outputs = {name: each for name, each in results.items() if isinstance(each, StepOutput)}
        errors = {name: each for name, each in results.items() if isinstance(each, MegatrainError)}
        if not outputs:
            raise next(iter(errors.values()))
        divisor = sum(each.divisor for each in outputs.values())
        loss_sum = sum(each.loss * each.divisor for each in outputs.values())
        counts, statistics = _means(list(outputs.values()))
        return StepOutput(
            loss=loss_sum / divisor if divisor else 0.0,
            logps=self._in_order(outputs),
            num_tokens=sum(each.num_tokens for each in outputs.values()),
            divisor=divisor,
            statistics=statistics,
            counts=counts,
            squares=sum(each.squares for each in outputs.values()),
            adapters=outputs,
            errors={name: error.message for name, error in errors.items()},
        )

    def _in_order(self, outputs: Mapping[str, StepOutput]) -> list[FloatArray]:
        found: dict[int, FloatArray] = {}
        for batch in self.batches:
            places, output = self._places[batch.adapter], outputs.get(batch.adapter)
            for number, place in enumerate(places):
                size = len(batch.inputs[number]["input_ids"])
                nothing = np.full(size, np.nan, dtype=np.float32)
                found[place] = nothing if output is None else output.logps[number]
        return [found[place] for place in sorted(found)]


def _encoded(name: str, rows: list[Any], encode: Callable[[str], Callable[[Any], Any]]) -> Any:
    try:
        return encode(name)(rows)
    except MegatrainError as error:
        raise type(error)(f"adapter {name!r}: {error.message}", hint=error.hint) from error


def _check_lengths(names: Sequence[str], inputs: Any, columns: Mapping[str, Any]) -> None:
    for what, values in {"inputs": inputs, **columns}.items():
        is_list = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)
        if not is_list or len(values) != len(names):
            found = len(values) if is_list else type(values).__name__
            raise ConfigError(
                f"with an adapter for each of {len(names)} data, {what} must have as many entries: "
                f"got {found}",
                hint="None where the loss of a datum's adapter does not take an input",
            )


def _means(outputs: Sequence[StepOutput]) -> tuple[dict[str, float], dict[str, float]]:
    """Return counts, and means over all, of what every output reports."""
    names = set.intersection(*(set(each.statistics) for each in outputs))
    counts = {name: sum(each.counts[name] for each in outputs) for name in sorted(names)}
    sums = {
        name: sum(each.statistics[name] * each.counts[name] for each in outputs) for name in counts
    }
    return counts, {name: sums[name] / counts[name] for name in counts}
