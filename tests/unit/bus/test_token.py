"""The secret of a TCP connection: where it is, who may read it, and what is too short."""

import logging
import os
import threading
from pathlib import Path

import pytest

from megatrain.bus.address import Address
from megatrain.bus.token import default_file, driving_token, listening_token, read_token
from megatrain.config.bus import BusConfig
from megatrain.errors import ConfigError

TCP, UNIX = Address(host="127.0.0.1", port=1), Address(path="/x")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def test_the_default_is_in_the_users_configuration(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_file() == home / ".config/megatrain/token"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "elsewhere"))
    assert default_file() == home / "elsewhere/megatrain/token"


def test_a_worker_makes_a_token_that_its_user_alone_can_read(home: Path) -> None:
    before = os.umask(0)
    try:
        token = listening_token(TCP, BusConfig())
    finally:
        os.umask(before)
    file = home / ".config/megatrain/token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert len(token) == 64
    assert listening_token(TCP, BusConfig()) == driving_token(TCP, BusConfig()) == token


def test_workers_that_start_together_have_one_token() -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(listening_token(TCP, BusConfig())))
        for _ in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_driver_makes_none_and_says_where_to_get_it(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"token does not exist(.|\n)*copy the file"):
        driving_token(TCP, BusConfig())
    assert not (home / ".config").exists()


def test_a_unix_socket_needs_none(home: Path) -> None:
    config = BusConfig(token_file=home / "missing")
    assert listening_token(UNIX, config) == driving_token(UNIX, config) == b""


def test_a_file_that_is_named_must_be_there(home: Path) -> None:
    for function in (listening_token, driving_token):
        with pytest.raises(ConfigError, match="cannot be read"):
            function(TCP, BusConfig(token_file=home / "missing"))
        with pytest.raises(ConfigError, match="cannot be read"):
            function(TCP, BusConfig(token_file=home))
    assert not (home / "missing").exists()


@pytest.mark.parametrize("content", [b"", b"\n", b"short", b" " * 40, b"x" * 15 + b"\n"])
def test_a_short_one_is_refused(home: Path, content: bytes) -> None:
    (home / "token").write_bytes(content)
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        read_token(home / "token")


def test_white_space_around_it_is_no_part_of_it(home: Path) -> None:
    (home / "token").write_bytes(b"  " + b"x" * 16 + b"\r\n")
    assert read_token(home / "token") == b"x" * 16


def test_one_that_others_can_read_is_warned_of(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = home / "token"
    file.write_bytes(b"x" * 32)
    with caplog.at_level(logging.WARNING):
        file.chmod(0o600)
        read_token(file)
        assert not caplog.records
        file.chmod(0o640)
        read_token(file)
    assert "can be read by others" in caplog.text


def test_an_open_network_without_a_certificate_is_warned_of(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for host in ("127.0.0.1", "localhost", "::1"):
            listening_token(Address(host=host, port=1), BusConfig())
        assert not caplog.records
        listening_token(Address(host="10.0.0.1", port=1), BusConfig())
    assert "not encrypted" in caplog.text


def test_no_message_holds_the_secret(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        token = listening_token(TCP, BusConfig()).decode()
    assert "made a token" in caplog.text
    assert token not in caplog.text
