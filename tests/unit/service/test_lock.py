"""A folder is one service's."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.errors import StateError
from megatrain.service.lock import lock


def test_a_second_service_is_refused_until_the_first_is_gone(tmp_path: Path):
    code = "import sys, pathlib; from megatrain.service.lock import lock; "
    code += "held = lock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other, other.stdin, other.stdout:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StateError, match="another service uses"):
            lock(tmp_path)
        other.kill()
        other.wait()
        lock(tmp_path).close()
