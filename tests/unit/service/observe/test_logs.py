"""JSON lines: one object a record, with what its request is about, and without secrets."""

import json
import logging

import pytest

from megatrain.service.auth.redact import redacted
from megatrain.service.observe.logs import JsonFormatter
from megatrain.service.observe.note import Note, about, serving

KEY = "tml-abcdefghijklmnop"


def line(message: str, *args: object, **options: object) -> dict:
    record = logging.LogRecord("megatrain.x", logging.WARNING, "f", 1, message, args, None)
    for name, value in options.items():
        setattr(record, name, value)
    return json.loads(JsonFormatter(redacted).format(record))


def test_a_record_is_an_object():
    found = line("run %s\nfailed", "r1")
    assert found["message"] == "run r1\nfailed"
    assert (found["level"], found["logger"]) == ("WARNING", "megatrain.x")
    assert found["time"].endswith("Z")
    assert "request" not in found


def test_a_line_tells_what_its_request_is_about():
    with serving(Note("req-1", trace_id="t", span_id="s")):
        about(project="alice", run="r1")
        about(run=None)
        found = line("x")
    assert {name: found[name] for name in ("request", "project", "run", "trace_id", "span_id")} == {
        "request": "req-1", "project": "alice", "run": "r1", "trace_id": "t", "span_id": "s"
    }  # fmt: skip
    assert "request" not in line("after it")


def test_fields_of_a_record_stand_beside_its_message():
    assert line("x", fields={"status": 404})["status"] == 404


@pytest.mark.parametrize("where", ["message", "argument", "request", "exception"])
def test_no_key_is_written(where):
    note, options = Note(), {}
    message, args = "a message of %s", ["b"]
    if where == "message":
        message = f"{KEY} %s"
    if where == "argument":
        args = [KEY]
    if where == "request":
        note = Note(KEY)
    if where == "exception":
        try:
            raise ValueError(KEY)
        except ValueError as error:
            options["exc_info"] = (ValueError, error, error.__traceback__)
    with serving(note):
        found = line(message, *args, **options)
    assert KEY not in json.dumps(found)
    assert "[secret]" in json.dumps(found)
