"""What the service serves, as the OpenAI-compatible endpoints see it."""

import contextlib
from collections.abc import AsyncIterator, Callable

from megatrain.errors import ConfigError, DataError, NotFoundError
from megatrain.sampler.types import Piece, SampleRequest, SampleResult
from megatrain.service.auth.principal import Principal
from megatrain.service.deployment import Deployment
from megatrain.service.hub import Hub
from megatrain.service.openai.ports import Model, Target
from megatrain.service.publish.versions import Version
from megatrain.service.work.ledger import sampled

LATEST = "/latest"
SCHEME = "tinker://"


class Served:
    """A Completer over a hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def models(self, who: Principal) -> list[Model]:
        """Return the bases, and the project's runs that are live in a sampler."""
        began = int(self._hub.began)
        told = [Model(name, began) for name in self._hub.deployments]
        for deployment in self._hub.deployments.values():
            for run in deployment.scheduler.runs.values():
                if run.project == who.project and run.id in deployment.saves.live:
                    told.append(Model(run.id + LATEST, int(run.record.created), who.project))
        return told

    async def resolve(self, who: Principal, model: str) -> Target:
        """Return what a name means.  Raises NotFoundError, DataError."""
        self._hub.check_ready()
        if model in self._hub.deployments:
            return self._target(model, self._hub.deployments[model], None)
        base, _, path = model.rpartition(";")
        if path.startswith(SCHEME):
            deployment, version = await self._saved(who, path)
        else:
            deployment, version = self._live(who, path.removesuffix(LATEST))
        if base and base != deployment.name:
            raise DataError(f"{path} is of {deployment.name}, and not of {base}")
        return self._target(model, deployment, version)

    def _target(self, name: str, deployment: Deployment, version: Version | None) -> Target:
        base, most = deployment.fleet.base, self._hub.config.limits.max_new_tokens
        return Target(name, base.folder, base.max_context_length, most, (deployment, version))

    async def _saved(self, who: Principal, path: str) -> tuple[Deployment, Version]:
        checkpoint = await self._hub.checkpoint(who.project, path)
        if checkpoint.kind == "training":
            raise DataError(
                f"{path} is for training", hint="save_weights_for_sampler makes one for samplers"
            )
        deployment = self._hub.deployment(checkpoint.base_model)
        folder = await self._hub.files.local_folder(checkpoint.location)
        return deployment, await deployment.named_version(checkpoint, folder)

    def _live(self, who: Principal, run_id: str) -> tuple[Deployment, Version]:
        for deployment in self._hub.deployments.values():
            run = deployment.scheduler.runs.get(run_id)
            version = deployment.saves.live.get(run_id)
            if run is not None and run.project == who.project and version is not None:
                return deployment, version
        raise NotFoundError(
            f"there is no model {run_id!r}",
            hint="GET models lists bases and live runs; saved weights have tinker:// paths",
        )

    async def sample(self, who: Principal, target: Target, request: SampleRequest) -> SampleResult:
        """Draw.  Raises DataError, BusyError, SamplerError."""
        deployment, version = target.at
        async with self._admitted(who, deployment, request) as count:
            drawn: SampleResult = await deployment.sampling.sample(version, request)
            count(sum(len(each.tokens) for each in drawn.sequences))
        return drawn

    async def stream(
        self, who: Principal, target: Target, request: SampleRequest
    ) -> AsyncIterator[Piece]:
        """Draw, and tell tokens while they come."""
        deployment, version = target.at
        async with self._admitted(who, deployment, request) as count:
            async for piece in deployment.sampling.stream(version, request):
                count(len(piece.tokens))
                yield piece

    @contextlib.asynccontextmanager
    async def _admitted(
        self, who: Principal, deployment: Deployment, request: SampleRequest
    ) -> AsyncIterator[Callable[[int], None]]:
        """Check a request, count it against the project's day, and wait for its turn.

        What was drawn is to be told; the rest is given back.
        """
        limits = self._hub.config.limits
        _check(deployment, request, limits.max_samples)
        auth, prompt, drawn = self._hub.auth, len(request.prompt), 0
        charge = await auth.spend(who, prompt + request.num_samples * request.max_tokens)

        def count(tokens: int) -> None:
            nonlocal drawn
            drawn += tokens
            deployment.sampled_tokens += tokens

        try:
            async with deployment.sampling.turn(who.project, request, most=limits.max_queued):
                yield count
        finally:
            auth.settle(charge, prompt + drawn if drawn else 0)
            if drawn:
                auth.use(who.project, "", deployment.name, sampled(prompt, drawn))


def _check(deployment: Deployment, request: SampleRequest, max_samples: int) -> None:
    if request.num_samples > max_samples:
        raise DataError(f"n must be from 1 to {max_samples}, not {request.num_samples}")
    if not deployment.can_sample:
        raise ConfigError(
            f"{deployment.name} is served without a sampler that draws tokens",
            hint="serve it with --sampler vllm or --sampler transformers",
        )
    vocab_size = deployment.fleet.base.vocab_size
    if (greatest := max(request.prompt)) >= vocab_size:
        raise DataError(f"the prompt has token {greatest}, and the vocabulary is {vocab_size}")
