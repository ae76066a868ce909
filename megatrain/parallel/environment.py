"""The environment of ranks that are started on this host.  No torch."""

import os
import sys


def rank_environment(num_ranks: int) -> dict[str, str]:
    """Return this process's environment, with threads shared out unless it says how many."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of small ops starve a shared machine
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | os.environ


def import_variables() -> dict[str, str]:
    """Return what lets a rank import what this process can, and find files by the same paths."""
    paths = [path or os.getcwd() for path in sys.path]
    return {"PYTHONPATH": os.pathsep.join(paths), "PWD": os.getcwd()}


def rank_variables(rank: int, num_ranks: int) -> dict[str, str]:
    """Return torchrun's variables of one of the ranks that are all on this host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
