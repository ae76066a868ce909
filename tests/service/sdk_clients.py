"""Tinker's clients in tests: made, fed, and closed."""

import gc
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tinker
from tinker import types
from tinker.lib.internal_client_holder import InternalClientHolder

if TYPE_CHECKING:
    from tests.service.server import Server

CLOSE_S = 30.0


def holders() -> list[InternalClientHolder]:
    """Return what every client of the SDK in this process is a face of."""
    return [each for each in gc.get_objects() if type(each) is InternalClientHolder]


def close_clients(but: Sequence[InternalClientHolder] = ()) -> None:
    """Close every client of the SDK in this process, and wait until it is closed.

    One that is left asks for its session, and holds sockets, to the end of the process.
    """
    for holder in holders():
        if all(holder is not each for each in but):
            holder.run_coroutine_threadsafe(holder.aclose()).result(CLOSE_S)
            del holder
    with warnings.catch_warnings():
        # A client whose connection broke takes a new pool, and leaves the old one to the collector.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def client(server: "Server", key: str | None = None, **more: Any) -> tinker.ServiceClient:
    warnings.simplefilter("ignore")
    return tinker.ServiceClient(base_url=server.url, api_key=key or server.key, **more)


def tokens(seed: int, size: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 100) for _ in range(size)]


def datum(seed: int, size: int = 12, **inputs: list[float]) -> types.Datum:
    ids = tokens(seed, size + 1)
    targets = types.TensorData(data=ids[1:], dtype="int64", shape=[size])
    floats = {
        name: types.TensorData(data=values, dtype="float32", shape=[len(values)])
        for name, values in inputs.items()
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": targets, **floats},
    )


def logprobs(result) -> list[list[float]]:
    return [list(each["logprobs"].data) for each in result.loss_fn_outputs]
