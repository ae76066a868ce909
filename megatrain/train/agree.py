"""All ranks have the same batch, or none goes on."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatrain.errors import DataError
from megatrain.parallel.groups import Groups


def agree(data: Sequence[bytes] | None, groups: Groups) -> None:
    """Return if every rank has data of the same digests; `None` says that this one refused them.

    Raises DataError on all ranks otherwise (a rank that refused raises its own).  Collective over
    all ranks: one small sum of digests over Gloo.
    """
    world = groups.mesh.world_size
    if world == 1:
        return
    digests = torch.zeros(world, dtype=torch.int64)
    digests[groups.rank] = _REFUSED if data is None else _digest(data)
    dist.all_reduce(digests, group=groups.control)
    if data is None:
        return
    refused = (digests == _REFUSED).nonzero().flatten().tolist()
    if refused:
        raise DataError(f"rank(s) {refused} refused their batch, so no rank goes on")
    others = (digests != digests[0]).nonzero().flatten().tolist()
    if others:
        raise DataError(
            f"a batch must be the same on every rank: rank(s) {others} have another than rank 0",
            hint="give every rank the global batch; megatrain deals it out over its ranks",
        )


_REFUSED = -1


def _digest(data: Sequence[bytes]) -> int:
    """Return 62 bits of a hash of all digests."""
    digest = hashlib.blake2b(b"".join(data), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 2
