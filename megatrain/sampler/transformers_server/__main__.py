"""Serves one base model on a Unix socket, to connections that begin with the token."""

import argparse
import asyncio
import contextlib
import hmac
import logging
import os
import threading
from typing import Any

from megatrain.errors import SamplerError
from megatrain.sampler.frames import TOKEN_VARIABLE, pack, read
from megatrain.sampler.transformers_server.adapters import Adapters
from megatrain.sampler.transformers_server.engine import Engine, told
from megatrain.sampler.transformers_server.network import Network


def main() -> None:
    """Load the model, then work until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-adapters", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    token = os.environ.pop(TOKEN_VARIABLE)
    network = Network(args.model, args.dtype)
    adapters = Adapters(network.model, args.max_adapters)
    engine = Engine(network, adapters, max_batch=args.max_batch)
    listen = threading.Thread(
        target=lambda: asyncio.run(_listen(engine, args.socket, token)), daemon=True
    )
    listen.start()
    engine.run()


async def _listen(engine: Engine, path: str, token: str) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(SamplerError, asyncio.IncompleteReadError, ConnectionError):
                await _converse(engine, reader, writer, token)
        finally:
            writer.close()

    # It has its name only when it listens.
    server = await asyncio.start_unix_server(connected, f"{path}.new")
    os.chmod(f"{path}.new", 0o600)
    os.rename(f"{path}.new", path)
    async with server:
        await server.serve_forever()


async def _converse(
    engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str
) -> None:
    hello = await read(reader)
    if not hmac.compare_digest(str(hello.get("token")).encode(), token.encode()):
        return
    loop = asyncio.get_running_loop()

    def say(message: dict[str, Any]) -> None:
        try:
            frame = pack(message)
        except SamplerError as error:
            frame = pack({"id": message["id"], **told(error)})
        if not writer.is_closing():
            writer.write(frame)

    say({"id": 0, "done": True})
    while True:
        message = await read(reader)
        number = message["id"]

        def answer(content: dict[str, Any], number: int = number) -> None:
            loop.call_soon_threadsafe(say, {"id": number, **content})

        engine.submit(message, answer)


if __name__ == "__main__":
    main()
