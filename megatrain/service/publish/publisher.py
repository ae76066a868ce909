"""Brings an adapter to the sampler, and lets it be used only when it computes what was trained."""

import logging
from collections.abc import Sequence

from megatrain.errors import MegatrainError, SamplerError
from megatrain.sampler.types import SampledSequence, Sampler
from megatrain.service.fleet.fleet import Fleet
from megatrain.service.publish.mismatch import MismatchMonitor
from megatrain.service.publish.probe import probe_request, score
from megatrain.service.publish.versions import Version, Versions

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
"""Greatest difference of a token's log-probability where trainer and sampler are float32: a
hundred times what is measured (1e-5)."""


class Publisher:
    """One base model's versions, from the trainer to the sampler."""

    def __init__(self, fleet: Fleet, sampler: Sampler, *, draws: bool) -> None:
        """`draws`: whether the sampler draws tokens; what does not is the trainer itself."""
        self._fleet, self.sampler, self._draws = fleet, sampler, draws
        self.versions = Versions(sampler)
        asked = fleet.served.sampler.probe_tolerance
        self.tolerance = min(asked, FLOAT32_TOLERANCE) if fleet.is_float32 else asked
        self.monitor = MismatchMonitor(self.tolerance)

    async def publish(self, version: Version, adapter: str) -> Version:
        """Load a version and prove it, while the ranks hold what was saved as `adapter`.

        Nothing refers to the version before this returns.  Raises SamplerError, and lets go of it,
        if the sampler cannot load it or computes something else.
        """
        await self.versions.load(version)
        if not self._draws:
            return version
        try:
            await self._prove(version, adapter)
        except BaseException:
            self.versions.retire(version)
            raise
        return version

    async def _prove(self, version: Version, adapter: str) -> None:
        base = self._fleet.base
        request = probe_request(base.vocab_size, version.name)
        sampled = (await self.sampler.sample(request)).sequences[0]
        trainer = await score(self._fleet, adapter, request.prompt, sampled.tokens)
        seen = self.monitor.note(
            version.name, version.source, version.step, sampled.logprobs, trainer
        )
        if not seen.max <= self.tolerance:
            raise SamplerError(
                f"the sampler does not compute what was trained: {version.source} at step "
                f"{version.step} differs by up to {seen.max:.3g} in log-probability, and "
                f"{self.tolerance:.3g} is allowed",
                hint="the version before stays; look at precision and LoRA targets of the sampler",
            )

    async def load_checkpoint(self, version: Version) -> Version:
        """Load a version of a checkpoint whose adapter the ranks may not hold any more."""
        await self.versions.load(version)
        return version

    async def audit(
        self, version: Version, adapter: str, prompt: Sequence[int], sampled: SampledSequence
    ) -> None:
        """Compare a sample that was drawn at temperature 1 with what the trainer says of it."""
        try:
            trainer = await score(self._fleet, adapter, prompt, sampled.tokens)
        except MegatrainError as error:
            logger.debug("an audit was left out: %s", error.message)
            return
        self.monitor.note(version.name, version.source, version.step, sampled.logprobs, trainer)
