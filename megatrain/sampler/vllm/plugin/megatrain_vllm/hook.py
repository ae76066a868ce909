"""Lets only the processes that compute do what workers.py does."""

import importlib
import multiprocessing


def install() -> None:
    """Mend this process; vLLM calls it once in each of its processes."""
    if multiprocessing.parent_process() is not None:  # the API server, which has none, is quick
        importlib.import_module("megatrain_vllm.workers").install()
