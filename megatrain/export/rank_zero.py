"""Work that rank 0 does for all ranks, who hear how it went."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatrain.errors import MegatrainError
from megatrain.parallel.groups import Groups


def on_rank_zero(
    work: Callable[[], None], groups: Groups, fail: Callable[[str, str | None], MegatrainError]
) -> None:
    """Do the work on rank 0; if it raises, every rank raises what `fail` makes of it.  Collective.

    `fail` gets the error's text and its hint.
    """
    failure, hint = "", ""
    cause: Exception | None = None
    if groups.rank == 0:
        try:
            work()
        except MegatrainError as error:
            failure, hint, cause = error.message, error.hint or "", error
        except Exception as error:  # noqa: BLE001 - the other ranks wait to hear of any failure
            failure, cause = f"{type(error).__name__}: {error}", error
    failure = broadcast_text(failure, groups)
    if failure:
        raise fail(failure, broadcast_text(hint, groups) or None) from cause


def broadcast_text(text: str, groups: Groups) -> str:
    """Return rank 0's text on every rank.  Collective."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    dist.broadcast(size, 0, group=groups.control)
    if groups.rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group=groups.control)
    return bytes(data.numpy()).decode().rstrip("\0")


def texts_of_all(text: str, groups: Groups) -> list[str]:
    """Return every rank's text, by rank.  Collective."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(groups.mesh.world_size)]
    dist.all_gather(sizes, torch.tensor([data.numel()]), group=groups.control)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=groups.control)
    return [bytes(part.numpy()).decode().rstrip("\0") for part in parts]
