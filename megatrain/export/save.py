"""Save what was trained: an adapter as a PEFT directory, a whole model as a checkpoint folder.

Rank 0 writes, at once or in the background; if it fails, every rank raises.  A training state goes
into the same folder, in the same step.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from megatrain.errors import ExportError
from megatrain.export.checkpoint import write_checkpoint
from megatrain.export.gather import gather, stream
from megatrain.export.peft_adapter import AdapterFiles, prepare_adapter, write_files
from megatrain.export.rank_zero import on_rank_zero
from megatrain.export.state.folder import State
from megatrain.export.state.writer import BackgroundWriter
from megatrain.model.adapter import Adapter
from megatrain.model.tensor_slice import TensorSlice
from megatrain.parallel.groups import Groups

_writer = BackgroundWriter()
"""One checkpoint at a time is written behind this process's back."""


def save_adapter(
    directory: Path,
    adapter: Adapter,
    groups: Groups,
    *,
    base_model: str,
    folder: Path,
    state: State | None = None,
    background: bool = False,
) -> None:
    """Write the adapter as a verified PEFT directory.  Collective over all ranks.

    `base_model` is the name that goes into adapter_config.json, `folder` the checkpoint itself.
    Raises ExportError on every rank if rank 0 could not write or verify the file; in the
    background, at the next save or finish_save.
    """
    finish_save(groups)
    tensors = gather(adapter.slices(), groups)
    files: list[AdapterFiles] = []

    def prepare() -> None:
        assert tensors is not None
        hf_config = json.loads((folder / "config.json").read_text())
        files.append(
            prepare_adapter(adapter.spec, tensors, base_model=base_model, hf_config=hf_config)
        )

    def write() -> None:
        write_files(directory, files[0], None if state is None else state.write)

    on_rank_zero(prepare, groups, _nothing_saved(directory))
    _finish(write, state, groups, directory, background=background)


def save_checkpoint(
    directory: Path,
    slices: Iterable[TensorSlice],
    groups: Groups,
    *,
    folder: Path,
    has_score: bool = False,
    state: State | None = None,
    background: bool = False,
) -> None:
    """Write the whole model as a Hugging Face checkpoint, sharded and verified.  Collective.

    `slices` are what this rank holds of it; with `has_score` it is one of Transformers' models for
    sequence classification.  Configuration and tokenizer are carried along from `folder`.  In the
    background, rank 0 holds all of it in memory meanwhile.  Raises ExportError as save_adapter
    does.
    """
    finish_save(groups)
    batches = stream(slices, groups)
    if background or groups.rank != 0:
        batches = iter(list(batches))

    def write() -> None:
        try:
            also = None if state is None else state.write
            write_checkpoint(directory, batches, source=folder, has_score=has_score, also=also)
        finally:
            for _ in batches:  # the other ranks must get rid of what they have to send
                pass

    _finish(write, state, groups, directory, background=background)


def finish_save(groups: Groups) -> None:
    """Wait for what is being written in the background.  Collective.

    Raises ExportError on every rank if it failed.
    """
    on_rank_zero(
        _writer.wait,
        groups,
        lambda text, hint: ExportError(
            f"the last save in the background failed: {text}", hint=hint
        ),
    )


def _finish(
    write: Callable[[], None],
    state: State | None,
    groups: Groups,
    directory: Path,
    *,
    background: bool,
) -> None:
    """Write on rank 0 while the others send, or gather first and leave the writing to a thread."""
    if state is not None and (background or groups.rank != 0):
        state.keep()
    if background:
        if groups.rank == 0:
            _writer.start(write)
        return

    def write_all() -> None:
        try:
            write()
        finally:
            if state is not None:
                state.finish()

    on_rank_zero(write_all, groups, _nothing_saved(directory))


def _nothing_saved(directory: Path) -> Callable[[str, str | None], ExportError]:
    return lambda text, hint: ExportError(f"nothing was saved to {directory}: {text}", hint=hint)
