"""Conversions that are killed go on with the same bytes; a full disk leaves nothing half done."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import conversion_tasks as tasks
from tests.multiprocess import convert_tasks
from tests.multiprocess.conversion_tasks import different

pytestmark = pytest.mark.multiprocess

ORPHANS_MAY_TAKE_S = 20.0
ALSO = {
    "import": ["iter_0000001/.metadata", "hugging_face/tensors.json"],
    "export": ["model.safetensors.index.json", "config.json"],
}
"""Files that are written when all others are there."""


@pytest.fixture
def convert(ranks):
    """Run `megatrain convert ARGUMENTS`; return (status, output, error output)."""

    def run(*arguments):
        given = ["convert", *(str(each) for each in arguments)]
        return ranks.run(convert_tasks.command, None, *given)[0]

    return run


@pytest.fixture
def source(convert, checkpoints, tmp_path):
    """Give what `import` or `export` starts from, large enough to be killed in the middle."""

    def make(kind):
        folder = checkpoints("qwen3", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
        if kind == "export":
            assert convert("import", folder, tmp_path / "middle", "--tp", 2)[0] == 0
            folder = tmp_path / "middle"
        return folder

    return make


def killed_after(num_files, folder, command):
    """Kill a command when so many files are whole; return their journals' lines."""
    process = subprocess.Popen([sys.executable, "-m", "megatrain", "convert", *map(str, command)])

    def lines():
        return [
            line for path in folder.glob(".journal.*") for line in path.read_text().splitlines()
        ]

    while len(lines()) < num_files:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    helpers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(helpers, ORPHANS_MAY_TAKE_S)
    assert left == []
    return helpers, lines()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["import", "export"])
def test_killed_and_called_again_it_writes_the_same_bytes(kind, workers, convert, source, tmp_path):
    folder, straight, killed = source(kind), tmp_path / "straight", tmp_path / "killed"
    option = "--file-size" if kind == "import" else "--shard-size"
    assert convert(kind, folder, straight, option, "200KB")[0] == 0
    hidden = tmp_path / ".killed.converting"
    command = [kind, folder, killed, option, "200KB", "--workers", workers]
    helpers, done = killed_after(5, hidden, command)
    assert len(helpers) >= (workers if workers > 1 else 0)
    assert not killed.exists()
    endings = ("*.distcp", "*.safetensors")
    files = sorted(p.relative_to(straight) for end in endings for p in straight.rglob(end))
    assert len(done) < len(files)
    first = json.loads(done[0])["name"]
    written_at = (hidden / first).stat().st_mtime_ns
    status, _, said = convert(kind, folder, killed, option, "300KB")
    assert status == 1
    assert "_bytes differ" in said
    assert convert(kind, folder, killed, option, "200KB")[0] == 0
    assert (killed / first).stat().st_mtime_ns == written_at
    assert sorted(p.relative_to(killed) for end in endings for p in killed.rglob(end)) == files
    assert not list(killed.rglob("*.part"))
    for file in [*files, *ALSO[kind]]:
        assert (killed / file).read_bytes() == (straight / file).read_bytes(), file
    assert not list(tmp_path.glob(".killed*"))


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of half a megabyte, if this system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_source(convert, checkpoints, tmp_path):
    """Give what `import` or `export` starts from, larger than the small disk."""

    def make(kind):
        folder = checkpoints("qwen3")
        if kind == "export":
            assert convert("import", folder, tmp_path / "middle")[0] == 0
            folder = tmp_path / "middle"
        return folder

    return make


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_disk_that_is_too_full_is_told_before_anything_is_written(
    kind, convert, small_source, small_disk
):
    status, _, said = convert(kind, small_source(kind), small_disk / "out")
    assert status == 1
    assert "the disk is too full for the result: 0.9 MB needed, 0.5 MB free" in said
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_disk_that_fills_up_leaves_whole_files_only_and_work_goes_on_when_there_is_room(
    kind, ranks, small_source, small_disk, checkpoints, tmp_path
):
    task = tasks.import_checkpoint if kind == "import" else tasks.export_checkpoint
    source, out = small_source(kind), small_disk / "out"
    given = [source, out] if kind == "export" else [source, out, DeviceMesh()]
    said = ranks.run(tasks.error_of_conversion, None, task, *given)[0]
    assert "the disk is full" in said
    assert "it goes on where it stopped" in said
    assert [path.name for path in small_disk.iterdir()] == [".out.converting"]
    whole = [
        json.loads(line)["name"]
        for path in small_disk.glob(".out.converting/.journal.*")
        for line in path.read_text().splitlines()
    ]
    left = [path for path in small_disk.rglob("*") if path.is_file() and path.name[0] != "."]
    assert sorted(str(path.relative_to(small_disk / ".out.converting")) for path in left) == sorted(
        whole
    )
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    ranks.run(tasks.in_small_files, None, task, *given)
    if kind == "export":
        assert different(checkpoints("qwen3"), out) == []
    assert [path.name for path in small_disk.iterdir()] == ["out"]
