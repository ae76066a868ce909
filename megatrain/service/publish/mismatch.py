"""How far the sampler's log-probabilities are from the trainer's, by version.

k3 is Schulman's estimator of the Kullback-Leibler divergence of sampler from trainer,
exp(d) - 1 - d with d = trainer - sampler ("Approximating KL Divergence", 2020).
"""

import collections
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatrain.sampler.types import FloatArray

logger = logging.getLogger(__name__)

KEPT = 1000
"""Versions that are remembered."""


@dataclass(slots=True)
class Mismatch:
    """What was seen of one version."""

    version: str
    source: str
    step: int
    tokens: int = 0
    mean: float = 0.0
    """Mean absolute difference."""
    max: float = 0.0
    k3: float = 0.0
    """Mean of the estimator."""
    when: float = 0.0


class MismatchMonitor:
    """Keeps what was seen, and warns of what is too far."""

    def __init__(self, tolerance: float) -> None:
        """`tolerance`: greatest difference of one token that is no reason to warn."""
        self.tolerance = tolerance
        self._seen: collections.OrderedDict[str, Mismatch] = collections.OrderedDict()

    def note(
        self, version: str, source: str, step: int, sampler: FloatArray, trainer: FloatArray
    ) -> Mismatch:
        """Take in log-probabilities of the same tokens, [T] each; return the version's figures."""
        seen = self._seen.setdefault(version, Mismatch(version, source, step))
        difference = trainer.astype(np.float64) - sampler.astype(np.float64)
        finite = difference[np.isfinite(difference)]
        biggest = float(np.abs(finite).max(initial=0.0))
        if finite.size < difference.size:
            biggest = float("inf")
        count, new = seen.tokens, int(finite.size)
        if new:
            k3 = np.expm1(np.clip(finite, -50, 50)) - finite
            seen.mean = (seen.mean * count + float(np.abs(finite).sum())) / (count + new)
            seen.k3 = (seen.k3 * count + float(k3.sum())) / (count + new)
        seen.tokens, seen.when = count + new, time.time()
        seen.max = max(seen.max, min(biggest, 1e30))
        if biggest > self.tolerance:
            logger.warning(
                "sampler and trainer differ by up to %.3g in log-probability for version %s of %s "
                "(tolerance %.3g)",
                *(biggest, version, source, self.tolerance),
            )
        while len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return seen

    def figures(self, source: str | None = None) -> list[dict[str, Any]]:
        """Return what was seen, the newest version last."""
        return [
            asdict(seen) for seen in self._seen.values() if source is None or seen.source == source
        ]
