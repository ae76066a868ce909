"""How ranks hear one command and agree: over Gloo, without pickle.

broadcast   one message from rank 0, in one round if it is short
vote        every rank says whether it can, or could; all hear what the others had to say
"""

import torch
import torch.distributed as dist

from megatrain.bus.codec import Failure, decode, encode
from megatrain.export.rank_zero import texts_of_all
from megatrain.parallel.groups import Groups

_INLINE = 4096
"""Bytes of a message that travel with its length."""


class Channel:
    """This rank's end of the control group."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._alone = groups.mesh.world_size == 1
        self._first = torch.zeros(8 + _INLINE, dtype=torch.uint8)
        self._votes = torch.zeros(1, dtype=torch.int32)

    def broadcast(self, message: bytes | memoryview | None) -> memoryview:
        """Return rank 0's message on every rank; others give None.  Collective."""
        if self._alone:
            assert message is not None
            return memoryview(message)
        first = self._first
        if message is not None:
            view = memoryview(message).cast("B")
            first[:8] = torch.frombuffer(
                bytearray(len(view).to_bytes(8, "little")), dtype=torch.uint8
            )
            if inline := view[:_INLINE]:
                first[8 : 8 + len(inline)] = _tensor(inline)
        dist.broadcast(first, 0, group=self.groups.control)
        size = int.from_bytes(bytes(first[:8].numpy()), "little")
        if message is None:
            return self._rest(size)
        if size > _INLINE:
            dist.broadcast(_tensor(view[_INLINE:]), 0, group=self.groups.control)
        return view

    def _rest(self, size: int) -> memoryview:
        """Return a message of `size` bytes whose begin is here."""
        whole = torch.empty(size, dtype=torch.uint8)
        inline = min(size, _INLINE)
        whole[:inline] = self._first[8 : 8 + inline]
        if size > _INLINE:
            dist.broadcast(whole[_INLINE:], 0, group=self.groups.control)
        return memoryview(whole.numpy()).cast("B")

    def vote(self, failure: Failure | None) -> Failure | None:
        """Return None if no rank failed, or else the failure that says most.  Collective."""
        if self._alone:
            return failure
        self._votes.fill_(failure is not None)
        dist.all_reduce(self._votes, group=self.groups.control)
        if not int(self._votes):
            return None
        text = "" if failure is None else encode(failure).hex()
        everyone = [decode(bytes.fromhex(t)) for t in texts_of_all(text, self.groups) if t]
        return min(everyone, key=_says_little)


def _tensor(view: memoryview) -> torch.Tensor:
    """Return bytes as a tensor, without a copy where they can be written to."""
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def _says_little(failure: Failure) -> tuple[bool, int]:
    """Put what speaks of other ranks behind what those ranks say themselves."""
    return "rank(s) [" in failure.message, failure.rank or 0
