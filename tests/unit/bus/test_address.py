"""Addresses, the sockets they make, and encryption by a certificate."""

import os
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from megatrain.bus.address import Address, server_context
from megatrain.bus.link import Link
from megatrain.bus.server import Server
from megatrain.config.bus import BusConfig
from megatrain.errors import BusError, ConfigError
from tests.fixtures.bus_server import welcome


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:29400", Address(host="127.0.0.1", port=29400)),
        ("tcp://a.b-c.example:1", Address(host="a.b-c.example", port=1)),
        ("tcp://[::1]:80", Address(host="::1", port=80)),
        ("tcp://0.0.0.0:0", Address(host="0.0.0.0", port=0)),
        ("unix:/run/x.socket", Address(path="/run/x.socket")),
        ("unix:///run/x.socket", Address(path="/run/x.socket")),
    ],
)
def test_an_address_is_parsed(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:80",
        "tcp://:80",
        "tcp://host",
        "tcp://host:",
        "tcp://host:port",
        "tcp://host:65536",
        "tcp://host:-1",
        "http://host:80",
        "/run/x.socket",
        "unix:",
        "unix://",
    ],
)
def test_what_is_no_address_says_how_one_looks(text: str) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT or unix:/path"):
        Address.parse(text)


def test_a_unix_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Address(path=str(tmp_path / "s")).listen():
            assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_a_socket_that_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "s"))
    address.listen().close()
    with address.listen(), address.connect(BusConfig(), 1.0):
        pass


def test_nobody_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Address(path=str(tmp_path / "s")).connect(BusConfig(), 1.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(OSError):
        Address(host="127.0.0.1", port=port).connect(BusConfig(), 1.0)


def test_a_port_in_use_is_an_os_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        Address(host="127.0.0.1", port=taken.getsockname()[1]).listen()


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate that signs itself, and its key, with openssl."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"openssl makes no certificate here: {error}")
    return certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: make_certificate(folder, name) for name in ("ranks", "others")}


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_bytes(b"x" * 32)
    file.chmod(0o600)
    return file


@pytest.fixture
def encrypted(certificates: dict[str, tuple[Path, Path]], token: Path) -> Server:
    certificate, key = certificates["ranks"]
    config = BusConfig(token_file=token, certificate=certificate, private_key=key)
    return Server(Address(host="127.0.0.1", port=0), config, welcome("e"))


def test_a_driver_with_the_certificate_is_let_in(
    encrypted: Server, certificates: dict[str, tuple[Path, Path]], token: Path
) -> None:
    config = BusConfig(token_file=token, certificate=certificates["ranks"][0])
    link = Link(encrypted.address, config, "session")
    assert link.welcome.epoch == "e-session"
    assert isinstance(link._frames._socket, ssl.SSLSocket)
    link.close()
    encrypted.close()


def test_another_certificate_is_not_accepted(
    encrypted: Server, certificates: dict[str, tuple[Path, Path]], token: Path
) -> None:
    config = BusConfig(token_file=token, certificate=certificates["others"][0])
    with pytest.raises(OSError, match="certificate verify failed"):
        Link(encrypted.address, config, "session")
    encrypted.close()


def test_a_driver_in_the_clear_is_not_let_in(
    encrypted: Server, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.bus.link.HANDSHAKE_S", 0.5)
    with pytest.raises(BusError):
        Link(encrypted.address, BusConfig(token_file=token), "session")
    encrypted.close()


def test_an_encrypting_driver_does_not_talk_to_ranks_in_the_clear(
    certificates: dict[str, tuple[Path, Path]], token: Path
) -> None:
    server = Server(Address(host="127.0.0.1", port=0), BusConfig(token_file=token), welcome())
    config = BusConfig(token_file=token, certificate=certificates["ranks"][0])
    with pytest.raises(OSError):
        Link(server.address, config, "session")
    server.close()


def test_a_worker_needs_the_key_of_its_certificate(
    certificates: dict[str, tuple[Path, Path]],
) -> None:
    assert server_context(BusConfig()) is None
    with pytest.raises(ConfigError, match="needs its private key"):
        server_context(BusConfig(certificate=certificates["ranks"][0]))


@pytest.mark.parametrize("bad", ["missing", "empty", "wrong key"])
def test_a_certificate_that_cannot_be_used_is_a_config_error(
    certificates: dict[str, tuple[Path, Path]], tmp_path: Path, bad: str
) -> None:
    certificate, key = certificates["ranks"]
    if bad == "missing":
        certificate = tmp_path / "missing.crt"
    elif bad == "empty":
        certificate = tmp_path / "empty.crt"
        certificate.touch()
    else:
        key = certificates["others"][1]
    with pytest.raises(ConfigError, match="certificate"):
        server_context(BusConfig(certificate=certificate, private_key=key))


def test_a_socket_takes_the_place_of_nothing_but_a_dead_socket(tmp_path):
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        Address(path=str(path)).listen()
    assert path.read_text() == "precious"
    address = Address(path=str(tmp_path / "s"))
    first = address.listen()
    with pytest.raises(ConfigError, match="listens"):
        address.listen()
    first.close()
    address.listen().close()
