"""Work in the background is waited for, and its failure is heard once."""

import subprocess
import sys
import threading

import pytest

from megatrain.errors import ExportError
from megatrain.export.state.writer import BackgroundWriter


def test_work_goes_on_behind_and_is_waited_for():
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    writer.start(lambda: (gate.wait(), done.append(1)))
    assert done == []
    gate.set()
    writer.wait()
    assert done == [1]
    writer.wait()


def test_a_failure_comes_up_at_the_next_wait_and_only_there():
    writer = BackgroundWriter()

    def fail():
        raise ExportError("the disk is full")

    writer.start(fail)
    with pytest.raises(ExportError, match="the disk is full"):
        writer.wait()
    writer.wait()
    writer.start(lambda: None)
    writer.wait()


def test_the_end_of_the_process_waits(tmp_path):
    code = (
        "import time, pathlib\n"
        "from megatrain.export.state.writer import BackgroundWriter\n"
        "def work():\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(tmp_path / 'done')!r}).write_text('yes')\n"
        "BackgroundWriter().start(work)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "done").read_text() == "yes"
