"""`megatrain keys`: makes, lists and revokes the service's API keys.

megatrain keys create --project alice --name laptop --scopes train,sample --expires 30d
megatrain keys list
megatrain keys revoke 3
"""

import argparse
import time
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError, NotFoundError

UNITS_S = {"h": 3600.0, "d": 86400.0, "w": 604800.0}


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "keys",
        help="API keys of the service: create, list, revoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the service's folder")
    parser.add_argument("--database", metavar="URL", help="its database, if it is not in there")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; it is shown once")
    create.add_argument("--project", default="default", help="whose it is (default: %(default)s)")
    create.add_argument("--name", default="", help="to tell it from others")
    create.add_argument(
        "--scopes",
        default="train,sample",
        help="of train, sample, metrics, admin (default: %(default)s)",
    )
    create.add_argument("--expires", metavar="30d", help="after so many h, d or w")
    actions.add_parser("list", help="what keys there are")
    revoke = actions.add_parser("revoke", help="end a key")
    revoke.add_argument("id", type=int, help="as `list` shows it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit status.  Raises ConfigError, NotFoundError, StateError."""
    import asyncio  # `--help` should answer at once

    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    # `--help` should answer at once.
    from megatrain.config.service import ServiceConfig
    from megatrain.service.store.store import Store

    folder = (args.data or ServiceConfig.model_fields["data"].default).expanduser()
    if args.database is None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = await Store.open(args.database or f"sqlite:///{folder / 'service.db'}")
    try:
        action = {"create": _create, "list": _list, "revoke": _revoke}[args.action]
        await action(store, args)
    finally:
        await store.close()
    return 0


async def _create(store: Any, args: argparse.Namespace) -> None:
    from megatrain.service.auth.key import new_key
    from megatrain.service.store import keys
    from megatrain.service.store.records import Project

    scopes = tuple(scope.strip() for scope in args.scopes.split(",") if scope.strip())
    expires_s = None if args.expires is None else seconds_of(args.expires)
    key, record = new_key(args.project, args.name, scopes, expires_in_s=expires_s)
    project = Project(id=args.project, name=args.project, created=time.time())
    await store.write(keys.add_project(project), keys.add(record))
    print(key)


async def _list(store: Any, args: argparse.Namespace) -> None:
    from megatrain.service.store import keys

    now = time.time()
    for key in await store.read(keys.all_keys()):
        state = "revoked" if key.revoked is not None else "valid"
        if key.expires is not None and key.expires < now:
            state = "expired"
        scopes = ",".join(key.scopes)
        print(f"{key.id}\t{key.prefix}...\t{key.project}\t{key.name or '-'}\t{scopes}\t{state}")


async def _revoke(store: Any, args: argparse.Namespace) -> None:
    from megatrain.service.store import keys

    if args.id not in {key.id for key in await store.read(keys.all_keys())}:
        raise NotFoundError(f"there is no key {args.id}", hint="megatrain keys list")
    await store.write(keys.revoke(args.id, time.time()))


def seconds_of(text: str) -> float:
    """Return a time such as 30d in seconds.  Raises ConfigError."""
    unit = UNITS_S.get(text[-1:])
    number = text[:-1]
    if unit is None or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"a time must be a number with h, d or w behind it: {text!r}")
    return int(number) * unit
