"""Every command of `tinker`, run as its users run it, against a live service."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import tinker

from tests.service.offline import MODEL
from tests.service.recipes import Recipes

LIMIT_S = 60.0
NEEDS_A_STRANGER = {
    "auth login": "asks for a key on a terminal and keeps it",
    "auth logout": "deletes this machine's credentials",
    "checkpoint push-hf": "sends files to the Hugging Face Hub",
}
"""Commands that are not run, and why."""


def command_names() -> list[str]:
    """Return `group command` of all that the installed client has."""
    from tinker.cli.__main__ import main_cli

    context, names = click.Context(main_cli), []
    for name in main_cli.list_commands(context):
        command: Any = main_cli.get_command(context, name)
        if isinstance(command, click.Group):
            names += [f"{name} {each}" for each in command.list_commands(context)]
        else:
            names.append(name)
    return names


def run_commands(recipes: Recipes) -> dict[str, str]:
    """Run all; return `works` or `refused: REASON` for each."""
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model=MODEL, rank=2).result()
    path = training.save_state("kept").result().path
    doomed = training.save_state("doomed").result().path
    run = training.get_info().model_id
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    hours = [(end - timedelta(hours=2)).isoformat(), end.isoformat()]
    arguments: dict[str, list[str]] = {
        "billing usage": hours,
        "checkpoint delete": [doomed, "--yes"],
        "checkpoint download": [path, "--output", str(recipes.folder / "downloaded")],
        "checkpoint info": [path],
        "checkpoint publish": [path],
        "checkpoint set-ttl": [path, "--ttl", "7200"],
        "checkpoint unpublish": [path],
        "run info": [run],
        "session export-trace": [run.split(":")[0]],
    }
    return {
        name: _outcome(name, arguments.get(name, []), recipes)
        if name not in NEEDS_A_STRANGER
        else f"not run: {NEEDS_A_STRANGER[name]}"
        for name in command_names()
    }


def _outcome(name: str, arguments: list[str], recipes: Recipes) -> str:
    command = [sys.executable, "-m", "tinker.cli", *name.split(), *arguments]
    done = subprocess.run(
        command,
        cwd=recipes.folder,
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode == 0:
        return "works"
    lines = (done.stderr or done.stdout).strip().splitlines() or ["nothing said"]
    return f"refused: {lines[0][:160]}"
