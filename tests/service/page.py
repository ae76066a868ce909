"""The service's page in headless Chromium, and a run to look at."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tinker
from tinker import types

from megatrain.tinker import log_points
from tests.service.sdk_clients import datum
from tests.service.server import NAME, Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 20_000


class Trained:
    """A run of Tinker's client: what it was told by the client, step by step."""

    def __init__(self, server: Server, service: tinker.ServiceClient, name: str) -> None:
        self._server = server
        self.training = service.create_lora_training_client(
            base_model=NAME, rank=4, seed=1, user_metadata={"name": name}
        ).result()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rewards: list[float] = []

    @property
    def id(self) -> str:
        return str(self.training.model_id)

    def step(self) -> None:
        number = len(self.losses) + 1
        passed = self.training.forward_backward([datum(number)], "cross_entropy")
        stepped = self.training.optim_step(types.AdamParams(learning_rate=1e-2))
        self.losses.append(passed.result().metrics["loss:sum"])
        metrics = stepped.result().metrics
        assert metrics is not None
        self.norms.append(metrics["grad_norm"])
        self.rewards.append(number / 8)
        log_points(
            self.id,
            number,
            {"reward": number / 8},
            base_url=self._server.url,
            api_key=self._server.key,
        )


class Seen:
    """A page that a key has signed in to, and what is wrong with it."""

    def __init__(self, browser, server: Server, **how) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **how)
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.origin = urlsplit(server.url).netloc
        self.wrong: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(f"{error}"))
        self.page.on("request", self._asked)
        self.page.goto(server.url)

    def _heard(self, message) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def _asked(self, request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("blob", "data") and address.netloc != self.origin:
            self.wrong.append(f"asked {request.url}")

    def sign_in(self, key: str) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.keyboard.press("Enter")
        expect(self.page.locator("#connection")).to_have_text("live", timeout=WAIT_MS)

    def close(self) -> None:
        self.context.close()
        assert self.wrong == []
