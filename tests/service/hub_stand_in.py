"""As much of the Hugging Face Hub as an upload needs, for `tinker checkpoint push-hf`."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast


class Hub(ThreadingHTTPServer):
    """Keeps what was committed to it in `files`, by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub() -> Iterator[Hub]:
    """Run a hub in a thread."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["content-length"])))

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, body: bytes) -> None:
        answer = self._reply(set(self.path.split("?")[0].split("/")), body)
        said = json.dumps(answer or {"error": "there is no such thing"}).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    def _reply(self, asked: set[str], body: bytes) -> dict[str, Any] | None:
        """Return what is said to a path of these parts; None: there is no such thing."""
        server = cast(Hub, self.server)
        repo = f"{server.url}/somebody/adapter"
        if "whoami-v2" in asked:
            return {"type": "user", "name": "somebody", "orgs": []}
        if "create" in asked:
            return {"url": repo}
        if "validate-yaml" in asked:
            return {"errors": [], "warnings": []}
        if "preupload" in asked:
            return _as_blobs(json.loads(body))
        if "commit" in asked:
            server.files |= _committed(body)
            return {"commitUrl": f"{repo}/commit/1", "commitOid": "1", "success": True}
        return None


def _as_blobs(asked: dict[str, Any]) -> dict[str, Any]:
    """Ask for all files within the commit."""
    modes = {"uploadMode": "regular", "shouldIgnore": False}
    return {"files": [{"path": each["path"], **modes} for each in asked["files"]]}


def _committed(body: bytes) -> dict[str, bytes]:
    lines = [json.loads(line) for line in body.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {each["path"]: base64.b64decode(each["content"]) for each in files}
