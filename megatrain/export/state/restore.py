"""Go on from a saved state: on any layout and number of ranks, each rank reads its own slices."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError
from megatrain.export.rank_zero import broadcast_text, on_rank_zero
from megatrain.export.state.record import FOLDER, GRADIENTS, MASTER, StateRecord, read_record
from megatrain.export.state.retention import usable_state, verify_state
from megatrain.model.tensor_slice import TensorPart, TrainedParameter
from megatrain.parallel.groups import Groups
from megatrain.train.sharded import ShardedParameters
from megatrain.train.step import Trained, Trainer


def open_state(
    checkpoint: Path, groups: Groups, *, use_previous: bool = False
) -> tuple[Path, StateRecord]:
    """Return the checkpoint and its record, all its files verified by rank 0.  Collective.

    Raises CheckpointError on every rank; it names the file, and an older checkpoint if one is
    complete.  With `use_previous` that one is taken instead, with a warning.
    """
    chosen = [Path(checkpoint)]

    def verify() -> None:
        if use_previous:
            chosen[0] = usable_state(chosen[0])
        else:
            verify_state(chosen[0])

    on_rank_zero(verify, groups, lambda text, hint: CheckpointError(text, hint=hint))
    found = Path(broadcast_text(str(chosen[0]), groups))
    return found, read_record(found)


def restore(trainer: Trainer, name: str, checkpoint: Path, record: StateRecord) -> None:
    """Set weights, optimizer, schedule, gradients and counters as saved.  Collective.

    What is trained must be there, and fit (fits.py).  An optimizer or schedule that is not
    set is made as it was.  Raises CheckpointError on every rank, with weights and optimizer as
    they were, if any rank cannot read its part.
    """
    trained, groups = trainer.trained[name], trainer.network.groups
    folder = checkpoint / FOLDER
    shards = trained.gradients.shards
    new = _read_all(shards, record, folder, groups)
    if record.optimizer is not None and trained.optimizer is None:
        trainer.set_optimizer(name, record.optimizer.kind, dict(record.optimizer.options))
    if record.schedule is not None and trained.schedule is None:
        trainer.set_schedule(name, record.schedule.kind, dict(record.schedule.options))
    for shard, values in zip(shards, new, strict=True):
        _set(shard, trained, record, values)
    if record.schedule is not None and trained.schedule is not None:
        trained.schedule.load_state_dict(record.schedule.state)
    trained.step, trained.grad_norm = record.step, None
    trained.num_calls, trained.num_passes = record.num_calls, record.num_passes
    trainer.seed = record.seed
    _set_gradients(trained, record, folder)


def _read_all(
    shards: list[ShardedParameters], record: StateRecord, folder: Path, groups: Groups
) -> list[dict[str, Tensor]]:
    """Return this rank's share (Q,) of each kind, for each shard.  Collective."""
    kinds = [kind for kind in record.tensors if kind != GRADIENTS]
    failure: CheckpointError | None = None
    result: list[dict[str, Tensor]] = []
    try:
        sources = {kind: SafetensorsFolder(folder / kind) for kind in kinds}
        for shard in shards:
            _check_names(shard, sources[MASTER])
            result.append(
                {kind: shard.shard_of(_read(shard, s)).clone() for kind, s in sources.items()}
            )
    except CheckpointError as error:
        failure = error
    failed = torch.tensor(int(failure is not None))
    dist.all_reduce(failed, group=groups.control)
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{int(failed)} rank(s) could not read their part of {folder}")
    return result


def _read(
    shard: ShardedParameters,
    source: SafetensorsFolder,
    wanted: Callable[[TrainedParameter], bool] = lambda _: True,
) -> Tensor:
    """Return what a folder holds for the entries (P',) of this rank; zero where it has nothing."""
    flat = torch.zeros(max(shard.size, shard.grad_P.numel()), device=shard.device)
    for trained, view in zip(shard.trained, shard.views(flat), strict=True):
        if wanted(trained):
            for part in trained.parts:
                if part.name in source:
                    part.put(view, _slice(source, part))
    return flat


def _check_names(shard: ShardedParameters, source: SafetensorsFolder) -> None:
    missing = {name for trained in shard.trained for name in trained.names if name not in source}
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensor(s) are trained here that {source.folder} has not: "
            f"{', '.join(sorted(missing)[:5])}"
        )


def _slice(source: SafetensorsFolder, part: TensorPart) -> Tensor:
    """Read this rank's slice of a tensor, and no more than its runs of rows or columns."""
    shape = source.shape(part.name)
    if shape != part.full_shape:
        raise CheckpointError(
            f"{part.name} has shape {shape} in {source.folder}, but {part.full_shape} is trained"
        )
    if part.dim is None or part.index is None:
        return source[part.name]
    view, before = source.slice(part.name), (slice(None),) * part.dim
    pieces = [view[(*before, slice(a, b))] for a, b in _runs(part.index)]
    if not pieces:
        return torch.empty([0 if d == part.dim else n for d, n in enumerate(shape)])
    return torch.cat(pieces, part.dim)


def _runs(index: Tensor) -> Iterator[tuple[int, int]]:
    """Cut an index into ranges [a, b) of consecutive numbers."""
    numbers = index.cpu().numpy()
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for run in np.split(numbers, breaks):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1


@torch.no_grad()
def _set(
    shard: ShardedParameters, trained: Trained, record: StateRecord, values: dict[str, Tensor]
) -> None:
    """Set the optimizer's state and the weights.  Collective over the data group."""
    master = values.pop(MASTER)
    if record.optimizer is not None and trained.optimizer is not None:
        shard.load_optimizer_state(trained.optimizer, values, record.optimizer.counters)
    shard.master_Q.copy_(master)
    shard.write_parameters()


def _set_gradients(trained: Trained, record: StateRecord, folder: Path) -> None:
    """Give each entry's sum to one of the ranks that add up, and zeros to the others."""
    gradients = trained.gradients
    gradients.zero()
    if record.gradients is None:
        return
    source = SafetensorsFolder(folder / GRADIENTS)
    for shard in gradients.shards:
        replica = shard.tp_group.rank() > 0

        def wanted(t: TrainedParameter, replica: bool = replica) -> bool:
            return t.tie != 1 and not (t.is_replicated and replica)

        shard.grad_P[shard.mine] = shard.shard_of(_read(shard, source, wanted))
        if record.gradients.is_reduced:
            shard.reduce(1.0)
    gradients.divisor = record.gradients.counts["divisor"]
    gradients.is_sum = bool(record.gradients.counts.get("is_sum", 0.0))
    gradients.is_reduced = record.gradients.is_reduced
