"""No key comes into a log, whoever writes it."""

import io
import logging
from collections.abc import Iterator

import pytest

from megatrain.service.auth.key import new_key
from megatrain.service.auth.redact import clean_record, keep_secrets_out, redacted

KEY, _ = new_key("p", "n", ("train",))
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger far from any of ours, in a process that keeps secrets out."""
    before = logging.getLogRecordFactory()
    keep_secrets_out()
    keep_secrets_out()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("somebody.elses")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, stream
    logger.removeHandler(handler)
    logger.propagate = True
    logging.setLogRecordFactory(before)


@pytest.mark.parametrize("secret", [KEY, f"Bearer {KEY}", "Bearer abcd.efgh", JWT])
def test_secrets_are_taken_out_of_messages_and_arguments(
    log: tuple[logging.Logger, io.StringIO], secret: str
) -> None:
    logger, stream = log
    logger.warning("headers were %s", {"x-api-key": secret, "path": "/api/v1/asample"})
    logger.warning(f"it sent {secret} to us")
    said = stream.getvalue()
    assert secret not in said
    assert secret.split()[-1] not in said
    assert said.count("[secret]") == 2
    assert "/api/v1/asample" in said


def test_secrets_are_taken_out_of_tracebacks(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    try:
        raise ValueError(f"the key {KEY} was refused")
    except ValueError:
        logger.exception("a request failed")
    said = stream.getvalue()
    assert KEY not in said
    assert "ValueError: the key [secret] was refused" in said
    assert "a request failed" in said


def test_what_holds_no_secret_stays_as_it_is(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    logger.warning("run %s at step %d, a bearer of news", "tml", 3)
    try:
        raise ValueError("plain")
    except ValueError:
        logger.exception("failed")
    assert "WARNING run tml at step 3, a bearer of news\n" in stream.getvalue()
    assert "ValueError: plain" in stream.getvalue()


@pytest.mark.usefixtures("log")
def test_a_message_that_does_not_fit_its_arguments_is_left_to_its_handler() -> None:
    make = logging.getLogRecordFactory()
    record = make("x", logging.INFO, "f", 1, "two %s %s", ("one",), None)
    assert (record.msg, record.args) == ("two %s %s", ("one",))


def test_the_filter_does_the_same_on_one_handler() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "key %s", (KEY,), None)
    clean_record(record)
    assert record.getMessage() == "key [secret]"
    assert redacted(f"a {KEY} b {JWT}") == "a [secret] b [secret]"
