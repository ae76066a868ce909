"""What `initialize` refuses before any rank is contacted, in a process of its own."""

import subprocess
import sys

import pytest

CASES = {
    "an unknown mode": ("megatrain.initialize(mode='cloud')", "ConfigError", "cloud"),
    "an unknown platform": ("megatrain.initialize(platform='tpu')", "ConfigError", "tpu"),
    "a platform that is not there": (
        "megatrain.initialize(platform='npu')",
        "PlatformError",
        "npu",
    ),
    "a mesh that is larger than the world": (
        "megatrain.initialize(global_device_mesh=megatrain.DeviceMesh(tp=2))",
        "LayoutError",
        "world=1.*product 2",
    ),
    "an unknown name": ("megatrain.initialise()", "AttributeError", "initialise"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_call_that_cannot_work_is_refused(case):
    call, kind, message = CASES[case]
    code = (
        "import re, megatrain\n"
        "try:\n"
        f"    {call}\n"
        "except Exception as error:\n"
        f"    assert type(error).__name__ == {kind!r}, repr(error)\n"
        f"    assert re.search({message!r}, str(error)), error\n"
        "else:\n"
        "    raise SystemExit('nothing was raised')\n"
        "import sys\n"
        "assert 'megatron.core' not in sys.modules, 'Megatron was imported for nothing'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
