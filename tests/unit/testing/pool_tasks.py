"""What ranks do for test_ranks."""

import os
import time
from typing import Any

import torch.distributed as dist


def who(word: str) -> tuple[int, int, int, str]:
    """Return this process, its rank and world, and what it was told."""
    return os.getpid(), dist.get_rank(), dist.get_world_size(), word


def fail_on_odd_ranks() -> None:
    """Raise on some ranks."""
    if dist.get_rank() % 2:
        raise ValueError("odd")


def sleep_on_rank_1() -> Any:
    """Answer late."""
    if dist.get_rank() == 1:
        time.sleep(30)


def die_on_rank_1() -> Any:
    """End one process at once."""
    if dist.get_rank() == 1:
        os._exit(3)
