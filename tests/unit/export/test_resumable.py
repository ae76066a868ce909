"""A folder that is written file by file: interruptions, a full disk, two writers at once."""

import json
import os

import pytest
import xxhash

from megatrain.errors import ExportError
from megatrain.export.resumable import JOURNAL, Journal, ResumableFolder, check_space


def never(path):
    return False


def text(content):
    def make(path):
        path.write_text(content)
        return xxhash.xxh3_64(content.encode()).hexdigest(), {"words": len(content.split())}

    return make


def unreachable(path):
    raise AssertionError(f"{path} was whole already")


def test_files_that_are_whole_are_kept_and_the_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "out"
    with ResumableFolder(target, {"source": 1}, may_replace=never) as place:
        Journal(place.folder).write("a", text("one two"))
    assert not target.exists()
    with ResumableFolder(target, {"source": 1}, may_replace=never) as place:
        journal = Journal(place.folder, worker=1)
        assert journal.done["a"]["words"] == 2
        journal.write("a", unreachable)
        journal.write("deep/b", text("three"))
        place.finish(Journal(place.folder).done)
    assert (target / "a").read_text() == "one two"
    assert sorted(p.name for p in target.rglob("*")) == ["a", "b", "deep"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_file_that_was_altered_or_half_journalled_is_written_again(tmp_path):
    with ResumableFolder(tmp_path / "out", {}, may_replace=never) as place:
        journal = Journal(place.folder)
        journal.write("a", text("one"))
        journal.write("b", text("two"))
        (place.folder / "a").write_text("two")
        with (place.folder / f"{JOURNAL}.0").open("a") as file:
            file.write('{"name": "c", "size"')
        assert set(Journal(place.folder).done) == {"b"}


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    with ResumableFolder(tmp_path / "out", {}, may_replace=never) as place:
        journal = Journal(place.folder)
        journal.write("a", text("one"))
        journal.write("b", text("two"))
        lines = (place.folder / f"{JOURNAL}.0").read_bytes()
        (place.folder / f"{JOURNAL}.0").write_bytes(lines[:-20])
        again = Journal(place.folder)
        assert set(again.done) == {"a"}
        again.write("b", text("two"))
        again.write("c", text("three"))
        assert set(Journal(place.folder).done) == {"a", "b", "c"}


def test_a_journal_that_names_files_elsewhere_is_not_believed(tmp_path):
    (tmp_path / "outside").write_text("x")
    with ResumableFolder(tmp_path / "out", {}, may_replace=never) as place:
        names = ["../outside", str(tmp_path / "outside")]
        entries = [{"name": name, "size": 1, "xxh3": "0"} for name in names]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (place.folder / f"{JOURNAL}.0").write_text(lines)
        assert Journal(place.folder).done == {}


def test_another_identity_is_refused_and_restart_throws_it_away(tmp_path):
    with ResumableFolder(tmp_path / "out", {"dtype": "bf16"}, may_replace=never) as place:
        Journal(place.folder).write("a", text("one"))
    other = {"dtype": "fp32"}
    with (
        pytest.raises(ExportError, match="dtype differ"),
        ResumableFolder(tmp_path / "out", other, may_replace=never),
    ):
        pass
    with ResumableFolder(tmp_path / "out", other, may_replace=never, restart=True) as place:
        assert Journal(place.folder).done == {}


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        ResumableFolder(tmp_path / "out", {}, may_replace=never),
        pytest.raises(ExportError, match="another process is writing"),
        ResumableFolder(tmp_path / "out", {}, may_replace=never),
    ):
        pass


def test_a_disk_that_fills_up_is_named_and_what_is_whole_stays(tmp_path):
    """/dev/full answers as a full disk does."""
    with ResumableFolder(tmp_path / "out", {}, may_replace=never) as place:
        journal = Journal(place.folder)
        journal.write("a", text("one"))
        (place.folder / f"b.{os.getpid()}.part").symlink_to("/dev/full")
        with pytest.raises(ExportError, match="the disk is full"):
            journal.write("b", text("two " * 10_000))
        assert sorted(path.name for path in place.folder.glob("[!.]*")) == ["a"]
        assert set(Journal(place.folder).done) == {"a"}
        journal.write("b", text("two"))
        place.finish(journal.done)
    assert json.loads(f'"{(tmp_path / "out" / "b").read_text()}"') == "two"


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ExportError, match=r"1,000,000,000,000\.0 MB needed, [\d,.]+ MB free"):
        check_space(tmp_path / "not" / "there", 10**18)
    check_space(tmp_path, 1)


def test_a_file_that_nobody_wrote_keeps_the_folder_back(tmp_path):
    with (
        ResumableFolder(tmp_path / "out", {}, may_replace=never) as place,
        pytest.raises(ExportError, match="not all files were written: a"),
    ):
        place.finish(["a"])
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_half_written_is_removed_and_nobody_else_writes_into_it(
    tmp_path,
):
    def make(path):
        assert path.name not in ("a.part", "a.1.part")
        return text("one")(path)

    with ResumableFolder(tmp_path / "out", {}, may_replace=never) as place:
        (place.folder / "deep").mkdir()
        for left in (place.folder / "a.1.part", place.folder / "deep" / "b.1.part"):
            left.write_text("half")
    with ResumableFolder(tmp_path / "out", {}, may_replace=never) as place:
        assert not list(place.folder.rglob("*.part"))
        (place.folder / "a.1.part").write_text("of one that is still there")
        Journal(place.folder).write("a", make)
        place.finish(["a"])
    assert (tmp_path / "out" / "a").read_text() == "one"
    assert not list((tmp_path / "out").rglob("*.part"))
