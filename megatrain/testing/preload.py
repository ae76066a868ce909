"""What the rank pool's server process imports before it forks ranks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatrain.platforms.bridge_import import import_megatron

import_megatron()

from megatrain.bus import model_host  # noqa: E402, F401
