"""Every command of `tinker`, run as its users run it, against a live service."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import tinker

from tests.service.hub_stand_in import Hub, hub
from tests.service.offline import MODEL
from tests.service.recipes import Recipes

LIMIT_S = 120.0
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def command_names() -> list[str]:
    """Return `group command` of all that the installed client has, sorted."""
    from tinker.cli.__main__ import main_cli

    context, names = click.Context(main_cli), []
    for name in main_cli.list_commands(context):
        command: Any = main_cli.get_command(context, name)
        if isinstance(command, click.Group):
            names += [f"{name} {each}" for each in command.list_commands(context)]
        else:
            names.append(name)
    return sorted(names)


def run_commands(recipes: Recipes) -> dict[str, str]:
    """Run all; return `works` or `refused: REASON` for each."""
    with hub() as somebodys:
        shell = Shell(recipes, somebodys)
        outcomes = {name: shell.run(name) for name in command_names()}
        if outcomes["checkpoint push-hf"] == "works":
            assert somebodys.files.keys() >= PEFT_FILES, somebodys.files.keys()
            assert {each.name for each in recipes.folder.glob("downloaded/**/*")} >= PEFT_FILES
    return outcomes


@dataclass
class Shell:
    """A user with a run and two checkpoints, and a home of their own."""

    recipes: Recipes
    hub: Hub
    session: str = field(init=False)
    arguments: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        training = tinker.ServiceClient().create_lora_training_client(base_model=MODEL, rank=2)
        client = training.result()
        path = client.save_state("kept").result().path
        doomed = client.save_state("doomed").result().path
        run = client.get_info().model_id
        self.session = run.split(":")[0]
        end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        self.arguments = {
            "billing usage": [(end - timedelta(hours=2)).isoformat(), end.isoformat()],
            "checkpoint delete": [doomed, "--yes"],
            "checkpoint download": [path, "--output", str(self.recipes.folder / "downloaded")],
            "checkpoint info": [path],
            "checkpoint publish": [path],
            "checkpoint push-hf": [path, "--repo", "somebody/adapter"],
            "checkpoint set-ttl": [path, "--ttl", "7200"],
            "checkpoint unpublish": [path],
            "run info": [run],
            "session export-trace": [self.session],
        }

    def run(self, name: str) -> str:
        """Run a command; return its outcome."""
        done = subprocess.run(
            [sys.executable, "-m", "tinker.cli", *name.split(), *self.arguments.get(name, [])],
            cwd=self.recipes.folder,
            env=self._environment(),
            input=f"{self.recipes.server.key}\n",  # what `auth login` asks for
            start_new_session=True,  # no terminal to ask on
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if done.returncode == 0:
            return "works"
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing said"]
        return f"refused: {lines[-1].strip().replace(self.session, 'SESSION')[:160]}"

    def _environment(self) -> dict[str, str]:
        home = self.recipes.folder / "home"
        home.mkdir(exist_ok=True)
        own = {"HOME": str(home), "HF_ENDPOINT": self.hub.url, "HF_TOKEN": "hf_token"}
        kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        return kept | own | {"HF_HOME": str(home / "hf")}
