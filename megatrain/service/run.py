"""The service as a process: binds, says where it is, serves, and ends in an orderly way."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
import uvloop

from megatrain.config.service import ServiceConfig
from megatrain.errors import ConfigError, MegatrainError
from megatrain.service.app import create_app
from megatrain.service.auth.redact import keep_secrets_out, redacted
from megatrain.service.hub import Hub
from megatrain.service.observe.logs import setup_logs
from megatrain.service.observe.tracing import Tracing, make_tracing

logger = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections that may wait: clients poll with thousands at once."""
LAST_ANSWERS_S = 5
"""Seconds that open connections get at the end."""


def serve(config: ServiceConfig, *, prepare: Callable[[], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status.

    What runs then is finished, or done after the next start; a second signal ends all at once, and
    then too.  `prepare` runs after the address was told, before the models are loaded.  Raises
    ConfigError if the address is taken, or traces are asked for that cannot be sent.
    """
    setup_logs(config.log_format, redacted)
    keep_secrets_out()
    tracing = make_tracing(os.environ)
    try:
        with _bind(config) as listener:
            doing = _serve(config, listener, prepare, tracing)
            return asyncio.run(doing, loop_factory=uvloop.new_event_loop)
    finally:
        if tracing is not None:
            tracing.close()


def _bind(config: ServiceConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened on: {error}",
            hint="--port 0 takes any that is free",
        ) from error
    listener.listen(BACKLOG)
    return listener


async def _serve(
    config: ServiceConfig,
    listener: socket.socket,
    prepare: Callable[[], None] | None,
    tracing: Tracing | None,
) -> int:
    hub = Hub(config)
    first_key = await hub.open()
    _announce(config, listener.getsockname(), first_key)
    server = uvicorn.Server(_uvicorn_config(hub, config, tracing))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    stopped = _stopped_by_signals(hub)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    starting = asyncio.ensure_future(_start(hub, prepare))
    ending = asyncio.ensure_future(stopped.wait())
    status = 0
    try:
        await asyncio.wait({serving, starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.cancelled() and starting.exception() is None:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        elif starting.done():
            status = _say(starting.exception())
    finally:
        starting.cancel()
        await hub.drain()
        server.should_exit = True
        await serving
        await hub.close()
    if starting.cancelled():
        # What loads models cannot be interrupted; ranks end with this process.
        logging.shutdown()
        os._exit(status)
    return status


def _stopped_by_signals(hub: Hub) -> asyncio.Event:
    """Return what the first signal sets; a second one ends the process."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(number: int) -> None:
        if stopped.is_set():
            # As safe as a kill: what is not done is in the database and the journals.
            logger.warning("a second signal: ending at once")
            os._exit(128 + number)
        logger.info("ending; a second signal ends at once")
        hub.is_draining = True
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return stopped


async def _start(hub: Hub, prepare: Callable[[], None] | None) -> None:
    if prepare is not None:
        await asyncio.to_thread(prepare)
    await hub.start()
    logger.info("the service is ready")


def _say(error: BaseException | None) -> int:
    if isinstance(error, MegatrainError | OSError):
        sys.stderr.write(f"megatrain serve: {type(error).__name__}: {error}\n")
    else:
        logger.error("the service could not start", exc_info=error)
    return 1


def _uvicorn_config(hub: Hub, config: ServiceConfig, tracing: Tracing | None) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(hub, tracing),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        root_path=config.root_path,
    )


def _announce(config: ServiceConfig, address: tuple[object, ...], first_key: str | None) -> None:
    """Say where the service is, with what key, and how it is used."""
    host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
    url = config.public_url or f"http://{host}:{address[1]}"
    key = first_key or ("tml-any" if not config.keys else "YOUR KEY (megatrain keys create)")
    model = config.models[0]
    create = f'client.create_lora_training_client(base_model="{model.name}", rank=16)'
    if model.full_parameters:
        create = f'megatrain.tinker.create_full_training_client(client, "{model.name}")'
    lines = [
        f"megatrain serves {', '.join(each.name for each in config.models)} at {url}",
        f"API key: {key}",
        "",
        "    import megatrain.tinker, tinker" if model.full_parameters else "    import tinker",
        f'    client = tinker.ServiceClient(base_url="{url}", api_key="{key}")',
        f"    training = {create}",
        "",
    ]
    print("\n".join(lines), flush=True)  # noqa: T201 - what the command says
