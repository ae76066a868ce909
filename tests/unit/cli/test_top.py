"""`megatrain top`: its frames, on a terminal and without one, and what it says without a driver."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from megatrain.bus.telemetry import running
from megatrain.cli import main
from megatrain.cli.top.figures import count, duration, memory, sparkline
from megatrain.cli.top.lines import to_lines
from megatrain.cli.top.screen import to_screen
from megatrain.cli.top.source import Source, choose_address, normalise
from megatrain.errors import BusError, ConfigError


def rank(number: int, **changes: Any) -> dict[str, Any]:
    row = {"rank": number, "host": "node-1", "pid": 4000 + number, "phase": "backward", "seq": 12}
    row |= {"command": "ForwardBackward", "running_s": 1.25, "failed": False, "silent_s": 0.4}
    return row | {"resident_bytes": 2 << 30, "device_bytes": None} | changes


def status(num_ranks: int = 2) -> dict[str, Any]:
    command = {"name": "ForwardBackward", "done": 12345, "failed": 0, "cancelled": 0}
    return {
        "megatrain_status": 1,
        "state": "running",
        "up_s": 75.0,
        "platform": "cuda",
        "layout": {"tp": 2, "dp": 1},
        "queue": {"driver": 4, "ranks": 3},
        "ranks": [rank(number) for number in range(num_ranks)],
        "commands": [{**command, "per_second": 2.5, "p50_s": 0.0421, "p95_s": 3.5}],
        "tokens": {"total": 2_400_000, "per_second": 15_300.0, "history": [0, 5e3, 15e3]},
        "adapters": {"device": 3, "host": 20, "disk": 0},
        "losses": {"total": 1, "last": ["rank 1 (host node-1, pid 9) is gone"]},
        "restarts": {"counted": 1, "allowed": 3},
    }


FRAME = """\
driver    running for 75.0 s · 2 rank(s) on 1 host(s), cuda · tp=2
tokens    15.3 k/s, 2.4 M in all  ▁▃█
queue     4 not answered, 3 of them wait on the ranks
adapters  device 3, host 20, disk 0
losses    1, restarts 1 of 3 allowed
loss      rank 1 (host node-1, pid 9) is gone
rank  host    pid   phase     command             for    memory   beat
0     node-1  4000  backward  ForwardBackward 12  1.2 s  2.0 GiB  0.4 s
1     node-1  4001  backward  ForwardBackward 12  1.2 s  2.0 GiB  0.4 s
command          done    failed  cancelled  /s   p50      p95
ForwardBackward  12.3 k  0       0          2.5  42.1 ms  3.5 s
"""


def test_lines_say_everything():
    assert "\n".join([*to_lines(status()), ""]) == FRAME


def drawn(found: dict[str, Any], *, width: int, height: int | None) -> list[str]:
    console = Console(width=width, height=height, record=True, force_terminal=True, file=Sink())
    console.print(to_screen(found, "http://127.0.0.1:9400", height=height))
    return console.export_text().splitlines()


class Sink:
    """A terminal that nobody sees."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def test_the_screen_says_the_same_in_80_columns():
    text = drawn(status(), width=80, height=24)
    assert max(map(len, text)) <= 80
    for word in ("15.3 k/s", "▁▃█", "device 3", "4001", "ForwardBackward 12", "2.0 GiB", "42.1 ms"):
        assert any(word in line for line in text), word


def test_many_ranks_fit_and_those_in_trouble_are_shown():
    found = status(512)
    found["ranks"][300] = rank(300, silent_s=3.5)
    text = drawn(found, width=100, height=30)
    assert len(text) <= 30
    assert any(line.split()[:1] == ["300"] and "3.5 s" in line for line in text)
    assert any("more" in line for line in text)
    assert len(drawn(found, width=100, height=None)) > 512


class Answers(BaseHTTPRequestHandler):
    """Says whatever the server was told to say, to every request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.body)  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.body = json.dumps(status()).encode()  # type: ignore[attr-defined]
    thread = threading.Thread(target=found.serve_forever, args=(0.05,))
    thread.start()
    yield found
    if thread.is_alive():
        found.shutdown()
    found.server_close()
    thread.join()


def test_once_prints_one_frame(server, capsys):
    assert main(["top", "--once", f"127.0.0.1:{server.server_port}/metrics"]) == 0
    assert capsys.readouterr().out == FRAME


def test_frames_follow_until_the_driver_ends(server, capsys):
    ended = threading.Timer(0.7, lambda: (server.shutdown(), server.server_close()))
    ended.start()
    assert main(["top", "--every", "0.2", str(server.server_port)]) == 0
    ended.join()
    out = capsys.readouterr().out
    assert out.count("driver    running") > 1
    assert out.endswith(f"the driver at http://127.0.0.1:{server.server_port} has ended\n")


def test_a_driver_that_does_not_answer_for_a_moment_is_shown_as_it_was(server):
    source = Source(str(server.server_port))
    source.read()
    server.body = b"half a sta"
    found = source.read_again()
    assert found["ranks"] == status()["ranks"]
    assert "no answer for" in to_lines(found)[0]


def test_without_a_driver_one_line_says_what_to_do(server, capsys):
    port = server.server_port
    server.body = b"[]"
    assert main(["top", str(port)]) == 1
    assert "is no driver of this version" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    assert main(["top", "--once", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"no driver tells its status at http://127.0.0.1:{port}" in error
    assert "metrics_port=0" in error


def test_letters_that_move_the_cursor_are_left_out(server):
    found = status()
    found["losses"]["last"] = ["\x1b]0;owned\x07\x1b[2Jgone"]
    server.body = json.dumps(found).encode()
    assert Source(str(server.server_port)).read()["losses"]["last"] == [" ]0;owned  [2Jgone"]


@pytest.mark.parametrize("address", ["ftp://127.0.0.1:1", "http://127.0.0.1", "host:many", ""])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="an address must be http://HOST:PORT"):
        normalise(address)


def test_addresses_may_be_short():
    assert normalise("9400") == normalise("http://127.0.0.1:9400/metrics")
    assert normalise("node-1:9400/") == "http://node-1:9400"
    assert normalise("https://[::1]:9400/status") == "https://[::1]:9400"


@pytest.mark.parametrize("seconds", ["0", "nan", "1e9"])
def test_frames_that_come_too_often_are_refused(seconds, capsys):
    assert main(["top", "--every", seconds, "9400"]) == 1
    assert "--every must be between" in capsys.readouterr().err


def test_the_users_driver_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(running.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match="no driver of yours"):
        choose_address(None, None)
    file = running.announce("http://127.0.0.1:1", 1)
    (file.parent / "999999999-1").write_text("http://127.0.0.1:3")  # its process is gone
    assert choose_address(None, None) == "http://127.0.0.1:1"
    other = running.announce("http://127.0.0.1:2", 2)
    with pytest.raises(ConfigError, match="2 drivers run on this host"):
        choose_address(None, None)
    with pytest.raises(ConfigError, match="no driver with pid 1"):
        choose_address(None, 1)
    with pytest.raises(ConfigError, match="twice"):
        choose_address("9400", 1)
    running.withdraw(other)
    assert [each.url for each in running.running_drivers()] == ["http://127.0.0.1:1"]
    file.parent.chmod(0o777)  # anybody might write there where to look
    with pytest.raises(ConfigError, match="no driver of yours"):
        choose_address(None, None)
    assert running.announce("http://127.0.0.1:2", 2) is None


def test_numbers_are_short():
    assert [memory(each) for each in (None, 3 << 20, 3 << 30)] == ["-", "3 MiB", "3.0 GiB"]
    assert [duration(each) for each in (None, 0.00123, 59.95, 600, 7300)] == [
        "-",
        "1.23 ms",
        "60.0 s",
        "10 min",
        "2 h 1 min",
    ]
    assert [count(each) for each in (0, 0.0291, 12, 9999, 25_000, 3e9)] == [
        "0",
        "0.029",
        "12",
        "9999",
        "25.0 k",
        "3.0 G",
    ]
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0, 1, 2]) == "▁▄█"


def test_an_address_where_nothing_listens_is_a_bus_error():
    with pytest.raises(BusError, match="refused"):
        Source("1").read()
