"""The newest complete checkpoint is found, and never removed."""

import os
import time

import pytest

from megatrain.errors import CheckpointError, ConfigError
from megatrain.export.state.retention import latest_state, prune, usable_state
from tests.unit.export.state.made import checkpoint


def damage(place):
    path = place / "state" / "master" / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def run(tmp_path):
    """Four checkpoints, written in the order of their numbers, and what else lies about."""
    for number in range(1, 5):
        checkpoint(tmp_path / f"step-{number}", saved_at=float(number), step=number)
    (tmp_path / "logs").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    checkpoint(tmp_path / ".step-5.0123.partial", saved_at=9.0)
    return tmp_path


def test_the_one_written_last_is_the_latest(run):
    assert latest_state(run) == run / "step-4"
    checkpoint(run / "a-better-name", saved_at=7.0, step=2)
    assert latest_state(run) == run / "a-better-name"


def test_a_damaged_one_is_passed_over_when_asked_and_refused_otherwise(run):
    damage(run / "step-4")
    damage(run / "step-3")
    with pytest.raises(CheckpointError, match="step-4") as caught:
        latest_state(run)
    assert str(run / "step-2") in str(caught.value)
    assert latest_state(run, skip_broken=True) == run / "step-2"
    assert usable_state(run / "step-4") == run / "step-2"
    assert usable_state(run / "step-1") == run / "step-1"


def test_nothing_older_is_nothing_usable(run):
    damage(run / "step-1")
    with pytest.raises(CheckpointError, match="step-1"):
        usable_state(run / "step-1")


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    assert latest_state(tmp_path) is None
    assert latest_state(tmp_path / "not there") is None


def test_pruning_keeps_the_newest_the_spared_and_what_is_not_a_checkpoint(run):
    assert prune(run, 1, spare=("step-1",)) == [run / "step-3", run / "step-2"]
    left = {path.name for path in run.iterdir()}
    assert left == {"step-1", "step-4", "logs", "metrics.jsonl", ".step-5.0123.partial"}


def test_pruning_does_not_count_a_damaged_one_as_the_newest(run):
    damage(run / "step-4")
    prune(run, 1)
    assert (run / "step-3").is_dir()
    assert (run / "step-4").is_dir()
    assert not (run / "step-2").exists()


def test_what_a_killed_process_left_is_removed_after_an_hour(run):
    left, now = run / ".step-5.0123.partial", time.time()
    prune(run, 9)
    assert left.is_dir()
    for path in (left, *left.rglob("*")):
        os.utime(path, (now - 4000, now - 4000))
    prune(run, 9)
    assert not left.exists()


def test_a_folder_that_changes_while_pruning_looks_at_it_is_left_alone(run):
    # What a background save renames away between the listing and the look reads like this link.
    left, now = run / ".step-5.0123.partial", time.time()
    for path in (left, *left.rglob("*")):
        os.utime(path, (now - 4000, now - 4000))
    (left / "shard-0.safetensors").symlink_to(left / "gone")
    prune(run, 1)
    assert left.is_dir()


def test_keeping_none_is_refused(run):
    with pytest.raises(ConfigError, match="keep=0"):
        prune(run, 0)
    assert (run / "step-1").is_dir()
