"""The ends of Tinker's clients: they would ask for their sessions, and hold sockets, to the end."""

import gc

CLOSE_S = 30.0


def close_clients() -> None:
    """Close every client of the SDK in this process, and wait until it is closed."""
    from tinker.lib.internal_client_holder import InternalClientHolder

    holders = [each for each in gc.get_objects() if type(each) is InternalClientHolder]
    for holder in holders:
        holder.run_coroutine_threadsafe(holder.aclose()).result(CLOSE_S)
