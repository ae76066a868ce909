"""Every public method of the official client's classes, called against a live service.

Methods are found by inspection: one that is new has no entry in CALLS, and the test fails.

    python -m tests.service.sdk_table     # writes the table of the record into README.md
"""

import asyncio
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker

from tests.service.sdk_calls import CALLS, LIMIT_S, Arguments, World, datum

RECORD = Path(__file__).with_name("sdk_table.json")
README = Path(__file__).parents[2] / "README.md"
IN_README = re.compile(r"(?<=<!-- tinker -->\n).*?(?=<!-- /tinker -->)", re.DOTALL)
CLASSES = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
    tinker.AdminClient,
    tinker.APIFuture,
)


def public_methods() -> list[str]:
    """Return `Class.method` of all; properties are no methods."""
    return [
        f"{each.__name__}.{name}"
        for each in CLASSES
        for name, member in inspect.getmembers(each)
        if not name.startswith("_") and callable(member)
    ]


def arguments_of(method: str) -> Callable[[World], Arguments] | None:
    """Return what makes the arguments of a method or of its twin; None if nobody wrote it."""
    return CALLS.get(method) or CALLS.get(method.removesuffix("_async"))


def run_table(connect: Callable[[], Any], methods: list[str]) -> dict[str, str]:
    """Call all methods; return `works` or `refused: REASON` for each.

    `connect` returns a new ServiceClient.
    """
    world = World(connect())
    # What ends a client comes on one of its own.
    return {each: _outcome(_target(world, each, connect), each, world) for each in methods}


def _target(world: World, method: str, connect: Callable[[], Any]) -> Any:
    kind = method.split(".")[0]
    if method == "ServiceClient.close":
        return connect()
    return {
        "ServiceClient": lambda: world.service,
        "TrainingClient": lambda: world.training,
        "SamplingClient": lambda: world.sampling,
        "RestClient": lambda: world.rest,
        "AdminClient": lambda: tinker.AdminClient(world.service.holder),
        "APIFuture": lambda: world.training.forward([datum()], "cross_entropy"),
    }[kind]()


def _outcome(target: Any, method: str, world: World) -> str:
    made = arguments_of(method)
    assert made is not None, method
    args, options = made(world)
    try:
        asyncio.run(asyncio.wait_for(_finish(target, method.split(".")[1], args, options), LIMIT_S))
    except Exception as error:  # noqa: BLE001 - the table says which
        return f"refused: {_reason(error, world)}"
    return "works"


async def _finish(target: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Call a method, then await or ask for results until one is no future any more."""
    got = await asyncio.to_thread(getattr(target, name), *args, **options)
    while True:
        if inspect.isawaitable(got):
            got = await got
        elif hasattr(got, "result") and callable(got.result):
            got = await asyncio.to_thread(got.result, LIMIT_S)
        else:
            return


def _reason(error: Exception, world: World) -> str:
    """Return the first line of what was said, without names that differ from run to run."""
    body = getattr(error, "body", None)  # of an answer that is no success
    said = body["detail"] if isinstance(body, dict) and "detail" in body else str(error)
    lines = said.strip().splitlines() or [type(error).__name__]
    return lines[0].replace(world.session, "SESSION")[:200]


def markdown(record: dict[str, dict[str, str]]) -> str:
    """Return the table of README: a row for each class, and for each group of commands."""
    rows = ["| | works | refused, and why |", "| --- | --- | --- |"]
    for group, outcomes in _groups(record).items():
        works = [_shown(name) for name, outcome in outcomes.items() if outcome == "works"]
        others = [
            f"{_shown(name)}: {outcome.removeprefix('refused: ')}"
            for name, outcome in outcomes.items()
            if outcome != "works"
        ]
        rows.append(f"| `{group}` | {' '.join(works)} | {'; '.join(others)} |")
    counts = [
        f"{list(outcomes.values()).count('works')} of {len(outcomes)} {kind}"
        for kind, outcomes in sorted(record.items(), reverse=True)
    ]
    return "\n".join([*rows, "", f"{' and '.join(counts)} work."]) + "\n"


def _groups(record: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return names and outcomes by class or group; `_async` twins of one outcome are one name."""
    groups: dict[str, dict[str, str]] = {}
    for method, outcome in sorted(record["methods"].items()):
        kind, name = method.split(".")
        base = name.removesuffix("_async")
        names = groups.setdefault(kind, {})
        if base != name and names.get(base) == outcome:
            names[f"{base}[_async]"] = names.pop(base)
        else:
            names[name] = outcome
    for command, outcome in sorted(record["commands"].items()):
        kind, _, name = command.rpartition(" ")
        groups.setdefault(f"tinker {kind}".strip(), {})[name] = outcome
    return groups


def _shown(name: str) -> str:
    return f"`{name}`"


def read_record() -> dict[str, dict[str, str]]:
    """Return the record of the last time that it was written, by kind: methods, commands."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}  # type: ignore[no-any-return]


def write_readme() -> None:
    """Put the table of the record where README.md has it."""
    table = markdown(read_record())
    README.write_text(IN_README.sub(lambda _: table, README.read_text()))


if __name__ == "__main__":
    write_readme()
