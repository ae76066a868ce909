"""A signed URL opens one file for a while, and nobody else can make one."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.errors import DeniedError
from megatrain.service.files import signed
from megatrain.service.files.signed import Signer


def test_a_ticket_opens_its_file_and_works_after_a_restart(tmp_path: Path) -> None:
    ticket, _ = Signer(tmp_path).sign("run/weights/one", "a.safetensors")
    assert Signer(tmp_path).check(ticket) == ("run/weights/one", "a.safetensors")


def test_a_ticket_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed, "LASTS_S", -1.0)
    ticket, _ = Signer(tmp_path).sign("run", "a")
    with pytest.raises(DeniedError, match="expired"):
        Signer(tmp_path).check(ticket)


def test_another_services_ticket_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ticket, _ = Signer(tmp_path / "a").sign("run", "a")
    with pytest.raises(DeniedError, match="not one that this service has signed"):
        Signer(tmp_path / "b").check(ticket)


def test_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    Signer(tmp_path)
    (secret,) = tmp_path.iterdir()
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32


def test_every_altered_character_spoils_a_ticket(tmp_path: Path) -> None:
    signer = Signer(tmp_path)
    ticket, _ = signer.sign("run", "a")
    for place, character in enumerate(ticket[:-1]):  # the last may carry bits that do not count
        other = "A" if character != "A" else "B"
        with pytest.raises(DeniedError):
            signer.check(ticket[:place] + other + ticket[place + 1 :])


@settings(max_examples=50)
@given(st.text(max_size=80))
def test_nonsense_is_refused_and_nothing_else_happens(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    signer = Signer(tmp_path_factory.getbasetemp())
    with pytest.raises(DeniedError):
        signer.check(text)
