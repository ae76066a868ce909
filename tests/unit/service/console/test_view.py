"""What is shown of each kind of thing, and what is not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatrain.bus.beat import Beat
from megatrain.sampler.types import SamplerStatus
from megatrain.service.console.rates import EVERY_S, WINDOW_S, Rates
from megatrain.service.console.view import (
    label,
    mismatch_rows,
    rank_rows,
    run_row,
    sampler_row,
    version_rows,
)
from megatrain.service.publish.mismatch import MismatchMonitor
from megatrain.service.publish.versions import Version
from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.run_state import RunState
from megatrain.service.work.ticket import Result
from tests.unit.service.store import rows


def version(name: str, source: str, step: int = 1, **more: bool) -> Version:
    made = Version(name, source, step, Path(name), is_owned=more.pop("is_owned", True))
    made.retired = more.pop("retired", False)
    return made


def test_a_run_on_the_ranks_is_as_far_as_they_are_and_says_what_went_wrong() -> None:
    record = rows.run("s:train:3")
    state = RunState(record, RunQueue(), step=7)
    state.last_error = Result.of_error(ValueError("inside")).data.decode()
    shown = run_row(record, state, version("v", record.id, 5), None, math.nan)
    assert (shown["step"], shown["live_step"], shown["loss"]) == (7, 5, None)
    assert shown["error"] == "the server failed; its log says why"
    over = run_row(record, None, None, None, 0.5)
    assert (over["step"], over["live_step"], over["loss"], over["error"]) == (0, None, 0.5, "")
    json.dumps(shown, allow_nan=False)


@pytest.mark.parametrize(
    ("metadata", "session", "expected"),
    [
        ({"name": "mine"}, "theirs", "mine"),
        ({}, "theirs", "theirs · 3"),
        ({"lr": "1"}, None, "0123abcd · 3"),
    ],
)
def test_a_run_is_called_as_its_client_or_its_session_calls_it(metadata, session, expected) -> None:
    record = rows.run("0123abcd-4567:train:3")
    record.user_metadata.update(metadata)
    of = None if session is None else rows.session("s", display_name=session)
    assert label(record, of) == expected


def test_ranks_that_are_not_heard_are_told_and_hosts_only_to_who_runs_the_service() -> None:
    beats = [Beat(0, "node-7", 1, command="step", running_s=3.7), Beat(2, "node-8", 2, failed=True)]
    shown = rank_rows(beats, 4, with_hosts=True)
    assert [rank["state"] for rank in shown] == ["busy", "silent", "failed", "silent"]
    assert (shown[0]["running_s"], shown[0]["host"]) == (3, "node-7")
    assert "node" not in json.dumps(rank_rows(beats, 4, with_hosts=False))


def test_names_of_others_adapters_are_not_told() -> None:
    status = SamplerStatus("transformers", True, ["theirs-1", "theirs-2"])
    assert sampler_row(status)["adapters"] == 2
    assert "theirs" not in json.dumps(sampler_row(status))
    versions = [version("a", "mine"), version("b", "theirs"), version("c", "mine", retired=True)]
    shown = version_rows(versions, [versions[0], versions[1]], lambda source: source == "mine")
    assert [(each["name"], each["state"]) for each in shown] == [("c", "draining"), ("a", "live")]


def test_a_mismatch_is_told_newest_first_and_what_is_no_number_as_none() -> None:
    monitor = MismatchMonitor(0.5)
    for name, source in (("a", "mine"), ("b", "theirs"), ("c", "mine")):
        monitor.note(name, source, 1, np.zeros(2, np.float32), np.full(2, 0.25, np.float32))
    shown = mismatch_rows(monitor.figures(), lambda source: source == "mine", 5)
    assert [each["version"] for each in shown] == ["c", "a"]
    assert shown[0]["mean"] == shown[0]["max"] == 0.25
    figures = [{**monitor.figures()[0], "max": math.inf}]
    assert mismatch_rows(figures, lambda source: True, 5)[0]["max"] is None
    assert len(mismatch_rows(monitor.figures(), lambda source: True, 1)) == 1


def test_a_rate_is_of_the_last_seconds_whoever_looks_how_often() -> None:
    rates = Rates()
    assert rates.see("a", 1000, 0.0) == 0.0
    assert rates.see("a", 1100, 1.0) == 100.0
    for look in range(20):
        rates.see("a", 1100, 1.0 + look * EVERY_S / 100)
    assert rates.see("a", 1200, 2.0) == 100.0
    assert rates.see("b", 5, 2.0) == 0.0
    assert rates.see("a", 1200, 2.0 + WINDOW_S) == 0.0
    assert rates.see("a", 9000, 500.0) == 0.0  # nobody has looked for long
