"""What is no pass: an adapter's beginning and end, its steps, and the weights that it is given."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.bus.commands import AddAdapter, ClipGradAndStep, Resume
from megatrain.config.lora_parts import targets
from megatrain.errors import ConfigError, DataError
from megatrain.service.fleet.fleet import Fleet
from megatrain.service.fleet.loaded import Loaded
from megatrain.service.store import points, runs
from megatrain.service.store.records import Point
from megatrain.service.store.store import Change
from megatrain.service.wire.schema import AdamParams
from megatrain.service.work.run_state import RunState
from megatrain.service.work.tally import Tally
from megatrain.service.work.ticket import Result, Ticket

LORA_ALPHA = 32.0
"""The API has no alpha; 32 is what other services of it take."""
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-12, "weight_decay": 0.0}),
    "dimuon": (
        "Muon",
        {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
    ),
}
"""Of the API's families: ours, with the options that hold until the first step says others."""
CURVES = frozenset({"loss", "loss:sum", "grad_norm", "lr", "tokens", "tokens_per_s"})
"""What is kept of every step."""

Done = tuple[Result, Sequence[Change]]
Fetch = Callable[[RunState, str], Awaitable[Path]]
"""Returns the local folder of a checkpoint that the run's project may read."""
AfterStep = Callable[[RunState], Awaitable[None]]


class Operations:
    """Does requests that are no pass and write no files."""

    def __init__(self, fleet: Fleet, fetch: Fetch, after_step: AfterStep, loaded: Loaded) -> None:
        """`after_step` hears of every step, while the next request waits if it has to."""
        self._fleet, self._fetch, self._after_step = fleet, fetch, after_step
        self._loaded = loaded

    async def create(self, run: RunState, ticket: Ticket) -> Done:
        """Make a run's adapter, or begin to train all parameters."""
        self._fleet.whole.check(is_lora=run.record.is_lora)
        optimizer = OPTIMIZERS[run.record.optimizer["type"]]
        if run.record.is_lora:
            await self._add_adapter(run, ticket, optimizer)
        else:
            await self._fleet.whole.begin(run.id, optimizer, ticket.id)
        said = {"model_id": run.id, "type": "create_model"}
        return Result.of_json(said), [runs.set_state(run.id, "live")]

    async def _add_adapter(
        self, run: RunState, ticket: Ticket, optimizer: tuple[str, dict[str, Any]]
    ) -> None:
        lora = run.record.lora
        fields = targets(
            attn=lora["train_attn"], mlp=lora["train_mlp"], unembed=lora["train_unembed"]
        )
        command = AddAdapter(
            adapter=run.adapter,
            lora={"r": run.record.lora_rank, "lora_alpha": LORA_ALPHA, **fields},
            seed=lora.get("seed"),
            optimizer=optimizer,
            tag=ticket.id,
        )
        await self._fleet.do(command, ticket.id)

    async def load(self, run: RunState, ticket: Ticket) -> Done:
        """Give a run the weights of a checkpoint; make its adapter if it has none."""
        content, whole = ticket.content, self._fleet.whole
        whole.check(is_lora=run.record.is_lora)
        folder = await self._fetch(run, content["path"])
        folder = await asyncio.to_thread(self._loaded.link, ticket.id, folder)
        command = Resume(
            adapter=run.adapter,
            checkpoint=str(folder),
            with_optimizer=content["optimizer"],
            optimizer=OPTIMIZERS[run.record.optimizer["type"]],
            tag=ticket.id,
        )
        if run.record.is_lora:
            place = await self._fleet.do(command, ticket.id)
        else:
            place = await self._load_whole(run, command)
        run.step = int(place["cur_step"])
        said = {"path": content["path"], "model_id": run.id, "type": "load_weights"}
        return Result.of_json(said), [runs.set_state(run.id, "live")]

    async def _load_whole(self, run: RunState, command: Resume) -> Any:
        whole = self._fleet.whole
        if whole.owner == run.id:  # what is refused leaves it as it was
            return await self._fleet.do(command, command.tag)
        return await whole.make(run.id, command, command.tag)

    async def step(self, run: RunState, ticket: Ticket) -> Done:
        """Let the optimizer change the adapter, with the options that this step names."""
        tally = run.begin_step()
        clip, options = step_options(run, ticket.content)
        command = ClipGradAndStep(
            adapter=run.adapter, max_grad_norm=clip, options=options, tag=ticket.id
        )
        norm = await self._fleet.do(command, ticket.id)
        run.step += 1
        metrics = {"grad_norm": float(norm), "step": float(run.step)}
        await tally.settled()
        changes = _points(run, metrics | {"lr": options["lr"]}, tally)
        await self._after_step(run)
        return Result.of_json({"metrics": metrics, "type": "optim_step"}), changes

    async def unload(self, run: RunState, ticket: Ticket) -> Done:
        """Take a run off the ranks; its checkpoints stay."""
        await self._fleet.let_go(run.record, ticket.id)
        run.closed = True
        said = {"model_id": run.id, "type": "unload_model"}
        return Result.of_json(said), [runs.set_state(run.id, "released")]


def step_options(run: RunState, content: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return max_grad_norm and the optimizer's options.

    Raises DataError for the other family, and for values that no optimizer takes.
    """
    family = run.record.optimizer["type"]
    given = content.get("optimizer_params") or content.get("adam_params") or {}
    kind = given.get("type", "adamw")
    if kind != family:
        raise DataError(
            f"this run was created with the optimizer {family!r}, and the step has parameters of "
            f"{kind!r}"
        )
    try:
        params = AdamParams.model_validate(given)  # optimizer_params come unchecked
    except ValidationError as error:
        wrong = ", ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise DataError(f"the step's parameters will not do: {wrong[:500]}") from None
    clip, lr = max(0.0, params.grad_clip_norm), params.learning_rate
    if family == "dimuon":
        return clip, {"lr": lr, "momentum": params.beta1}
    return clip, {
        "lr": lr,
        "betas": [params.beta1, params.beta2],
        "eps": params.eps,
        "weight_decay": params.weight_decay,
    }


def check_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer_config that this service has.  Raises ConfigError."""
    kind = config.get("type", "adamw")
    if kind not in OPTIMIZERS:
        raise ConfigError(
            f"the optimizer {kind!r} is not known here; known: {', '.join(OPTIMIZERS)}"
        )
    return {"type": kind} if kind == "adamw" else {"type": kind, "version": 1}


def _points(run: RunState, metrics: dict[str, float], tally: Tally) -> list[Change]:
    """Return what a step, and the passes before it, add to the run's curves."""
    values = dict(metrics)
    values.pop("step", None)
    if tally.tokens:
        values["loss"] = tally.loss / tally.tokens
        values["loss:sum"] = tally.loss
        values["tokens_per_s"] = tally.tokens / max(tally.seconds, 1e-9)
        values["tokens"] = float(tally.tokens)
    now = time.time()
    return [points.add([Point(run.id, run.step, now, name, values[name]) for name in values])]
