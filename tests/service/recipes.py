"""Recipes of tinker-cookbook, unmodified, each in a process of its own against a live service."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.service import offline
from tests.service.cookbook import cookbook_python
from tests.service.server import Server
from tests.service.trained_base import trained_base

LIMIT_S = 400.0


@contextmanager
def live_recipes(folder: Path) -> Iterator["Recipes"]:
    """Serve the tiny base under the name that recipes know, and let them run against it."""
    named = ("--name", offline.MODEL, "--sampler", "transformers")
    server = Server(trained_base(), folder / "service", *named)
    server.start()
    try:
        recipes = Recipes(server, folder / "work")
        recipes.prepare()
        yield recipes
    finally:
        status = server.stop()
    assert status == 0, server.log[-3000:]


@dataclass(frozen=True)
class Recipes:
    """The folder recipes run in, and the service they use."""

    server: Server
    folder: Path

    def prepare(self) -> None:
        """Write the data sets, and the tokenizer under the model's name."""
        self.folder.mkdir()
        offline.write_data(self.folder)
        model = self.folder / offline.MODEL
        model.parent.mkdir(parents=True)
        model.symlink_to(trained_base(), target_is_directory=True)

    def run(
        self, name: str, log: str, *options: str, version: str = "0.6.1", fails: bool = False
    ) -> list[dict[str, float]]:
        """Run a recipe to its end and return its metrics, one dict a step.

        With `fails` it must end with an error.  What it says is in `output(log)`.
        """
        command = [str(cookbook_python(version)), "-m", f"tinker_cookbook.recipes.{name}"]
        command += [f"model_name={offline.MODEL}", f"log_path={self.folder / log}", *options]
        with self._said(log).open("wb") as said:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self._environment(log),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=LIMIT_S,
            )
        assert (done.returncode != 0) == fails, self.output(log)[-6000:] + self.server.log[-3000:]
        return self.metrics(log)

    def metrics(self, log: str) -> list[dict[str, float]]:
        """Return what was logged: one dict a step."""
        path = self.folder / log / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def checkpoints(self, log: str) -> list[dict[str, str]]:
        """Return what the recipe says it has saved."""
        lines = (self.folder / log / "checkpoints.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def cut(self, log: str, *, checkpoints: int) -> None:
        """Make the folder that of a run that was ended after so many checkpoints."""
        path = self.folder / log / "checkpoints.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:checkpoints]))
        (self.folder / log / "metrics.jsonl").unlink()

    def output(self, log: str) -> str:
        """Return what the recipe printed."""
        return self._said(log).read_text(errors="replace")

    def _said(self, log: str) -> Path:
        return self.folder / f"{log}.out"

    def _environment(self, log: str) -> dict[str, str]:
        # Data sets that were cached by another run might be older than the files.
        cache = {"HF_HOME": "hf", "HF_DATASETS_CACHE": f"hf/{log}"}
        own = {name: str(self.folder / path) for name, path in cache.items()}
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return (
            kept
            | own
            | {
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "WANDB_MODE": "disabled",
                "TINKER_BASE_URL": self.server.url,
                "TINKER_API_KEY": self.server.key,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            }
        )
