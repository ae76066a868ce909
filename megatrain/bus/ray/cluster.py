"""The Ray cluster of this process: the one that it has joined, or one that starts and ends here."""

import importlib
import logging
import os
import secrets
import sys
import threading
from typing import Any

from megatrain.errors import BusError, ConfigError, PlatformError

logger = logging.getLogger(__name__)

OURS = {
    # Ray's hook for `uv run` would pack the working folder and make an environment for each rank;
    # ranks of this host have both already.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray listens on all interfaces and runs what it is told: by whoever knows this secret.
    "RAY_AUTH_MODE": "token",
}
"""Variables of a cluster that is started here, unless they are set."""


def import_ray() -> Any:
    """Return Ray, told how a cluster that starts here is to be.  Raises PlatformError without it.

    Ray reads some of its variables when it is imported, and its secret once in a process.
    """
    loaded = sys.modules.get("ray")
    if not os.environ.get("RAY_ADDRESS") and not (loaded and loaded.is_initialized()):
        for name, value in OURS.items():
            os.environ.setdefault(name, value)
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # By default Ray would leave it in a file that others of this host can read.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise PlatformError(
            f"mode 'ray' needs Ray, which cannot be imported: {error}",
            hint="pip install 'megatrain[ray]'",
        ) from error


class Cluster:
    """Ray, as long as somebody here holds it; what was joined or started here is left at the end.

    It is held by whoever makes it, who must release it.
    """

    def __init__(self, *, num_cpus: int) -> None:
        """Join the cluster of RAY_ADDRESS, or start one of at least `num_cpus` on this host.

        One that the script has joined before is used and left as it is.
        """
        self.ray = import_ray()
        self._holders, self._lock = 1, threading.Lock()
        self._leaves = not self.ray.is_initialized()
        self.is_local = self._leaves and not os.environ.get("RAY_ADDRESS")
        if self.is_local:
            self._start(num_cpus)
        elif self._leaves:
            self._join()
        if self.ray.util.client.ray.is_connected():
            self.release()
            raise ConfigError(
                "the driver must run on a node of the cluster, not over ray://: it talks to the "
                "ranks itself",
                hint="ray job submit -- python script.py",
            )

    def _start(self, num_cpus: int) -> None:
        # On processors more ranks than cores are slow, but nothing to refuse.
        cores = max(os.cpu_count() or 1, num_cpus)
        self.ray.init(address="local", num_cpus=cores, include_dashboard=False)

    def _join(self) -> None:
        try:
            self.ray.init()
        except ConnectionError as error:
            raise BusError(
                f"there is no Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}",
                hint="unset RAY_ADDRESS to start one on this host",
            ) from error

    @property
    def is_there(self) -> bool:
        """Tell whether the connection to it still is."""
        return bool(self.ray.is_initialized())

    @property
    def resources(self) -> dict[str, float]:
        """All that its nodes have."""
        return dict(self.ray.cluster_resources())

    @property
    def home(self) -> str:
        """Name of the node on which this process runs."""
        return str(self.ray.get_runtime_context().get_node_id())

    def hold(self) -> None:
        """Keep it until `release` is called once more."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Leave it if nobody else here holds it."""
        with self._lock:
            self._holders -= 1
            if self._holders or not self._leaves or not self.is_there:
                return
            self.ray.shutdown()
        logger.info("left the Ray cluster")
