"""Where actors have come to be, and torchrun's variables for the ranks there.  No torch, no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VISIBLE = {"GPU": "CUDA_VISIBLE_DEVICES", "NPU": "ASCEND_RT_VISIBLE_DEVICES"}
"""By what Ray calls a device."""


@dataclass(frozen=True, slots=True)
class Place:
    """What an actor says of where it is."""

    node: str
    ip: str
    folder: str
    """For files of this start, on its node; its owner's alone."""
    ports: tuple[int, int]
    """Free a moment ago."""
    devices: Mapping[str, Sequence[str]]
    """That Ray has given it, by what Ray calls them."""


def variables(places: Sequence[Place], device: str | None) -> list[dict[str, str]]:
    """Return the variables of each rank.

    Ranks of one node see the devices of all of them in the order of their ranks, so that LOCAL_RANK
    is the number of a rank's own, and neighbours can reach each other's memory.
    """
    master = places[0]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(sum(each.node == place.node for each in places[:rank])),
            "LOCAL_WORLD_SIZE": str(sum(each.node == place.node for each in places)),
            "MASTER_ADDR": master.ip,
            "MASTER_PORT": str(master.ports[0]),
            **_visible([each for each in places if each.node == place.node], device),
        }
        for rank, place in enumerate(places)
    ]


def _visible(neighbours: Sequence[Place], device: str | None) -> dict[str, str]:
    if device is None:
        return {}
    devices = [name for place in neighbours for name in place.devices.get(device, ())]
    return {VISIBLE[device]: ",".join(devices)}
