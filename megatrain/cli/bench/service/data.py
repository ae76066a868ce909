"""Data for Tinker's client, drawn at random."""

import random
from typing import Any


def draw_datum(draw: random.Random, num_tokens: int, vocabulary: int) -> Any:
    """Return a datum of `num_tokens` positions."""
    from tinker import types

    ids = [draw.randrange(vocabulary) for _ in range(num_tokens + 1)]
    targets = types.TensorData(data=ids[1:], dtype="int64", shape=[num_tokens])
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": targets},
    )


def new_service_client(url: str, key: str) -> Any:
    """Return Tinker's client.  Raises ConfigError where it is not installed."""
    from megatrain.errors import ConfigError

    try:
        import tinker
    except ImportError as error:
        raise ConfigError("Tinker's client is not installed", hint="pip install tinker") from error
    return tinker.ServiceClient(base_url=url, api_key=key)
