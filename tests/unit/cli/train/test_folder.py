"""What a run does with an output directory that is not empty."""

import pytest

from megatrain.cli.train.folder import RunFolder
from megatrain.errors import ConfigError


def test_an_earlier_run_is_neither_mixed_with_nor_deleted_unless_asked(tmp_path):
    folder = RunFolder(tmp_path / "out")
    folder.prepare(overwrite=False, resume=False)
    (folder.root / "checkpoint-10").mkdir()
    (folder.root / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds an earlier run.*checkpoint-10"):
        folder.prepare(overwrite=False, resume=False)
    folder.prepare(overwrite=False, resume=True)
    assert (folder.root / "checkpoint-10").is_dir()
    folder.prepare(overwrite=True, resume=False)
    assert sorted(path.name for path in folder.root.iterdir()) == ["notes.txt"]
