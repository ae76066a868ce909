"""Exact versions, the same for uv and for pip.  Run as a script, it writes constraints.txt."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = "# For pip on Linux, with --no-deps: all that pyproject.toml pins.  Generated.\n"
EXACT = re.compile(r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+-]+$")


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _constraints() -> list[str]:
    return _project()["tool"]["uv"]["constraint-dependencies"]


def _text() -> str:
    lines = sorted(_constraints() + _project()["project"]["dependencies"])
    return HEADER + "".join(f"{line}\n" for line in lines)


def test_pip_gets_the_versions_that_uv_gets() -> None:
    assert CONSTRAINTS.read_text() == _text()


def test_every_version_is_exact() -> None:
    project = _project()
    direct = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    loose = [line for line in direct + _constraints() if not EXACT.match(line)]
    assert loose == []


def test_constraints_are_sorted_and_say_nothing_about_direct_dependencies() -> None:
    project = _project()
    direct = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    names = {line.split("==")[0] for line in direct}
    assert _constraints() == sorted(_constraints())
    assert names.isdisjoint(line.split("==")[0] for line in _constraints())


def test_every_locked_package_has_an_exact_version_here() -> None:
    lock = ROOT / "uv.lock"
    if not lock.exists():  # it is not committed; uv writes it
        return
    project = _project()
    direct = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    pinned = dict(line.split("==") for line in direct + _constraints())
    locked = {
        package["name"]: package["version"]
        for package in tomllib.loads(lock.read_text())["package"]
        if package["name"] != "megatrain"
    }
    assert locked == {name: pinned.get(name) for name in locked}


if __name__ == "__main__":
    CONSTRAINTS.write_text(_text())
