"""Which network interface ranks of several hosts talk over.  No torch."""

import os
import socket

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Gloo's own: without it, Gloo takes the address that the host's name stands for, which in
containers is often one that no other host can reach."""


def gloo_interface(master: str | None, *, is_one_host: bool) -> tuple[str, str] | None:
    """Return an interface and the reason for it; None to leave the choice to Gloo.

    `master` is the host of rank 0: the interface is the one that leads there.
    """
    names = {name for _, name in socket.if_nameindex()}
    if is_one_host:
        return ("lo", "all ranks are on this host") if "lo" in names else None
    if not master or (address := _address_towards(master)) is None:
        return None
    import psutil  # noqa: PLC0415 - not needed on one host

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name, f"its address {address} is the one that leads to {master}"
    return None


def is_one_host(world_size: int) -> bool:
    """Tell whether torchrun's variables say that all ranks are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size


def _address_towards(host: str) -> str | None:
    """Return this host's address on the way to another one; nothing is sent."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None
