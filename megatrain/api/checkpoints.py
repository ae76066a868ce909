"""What a model writes and reads: adapters, checkpoints, states to go on from."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatrain.bus import commands


class Checkpoints(ABC):
    """The part of MegatronModel that saves and loads."""

    @abstractmethod
    def _call(self, command: Any, /, **fields: Any) -> Any:
        """Have a command done, on this rank or on others, and return its result."""

    def save(
        self,
        name: str,
        output_dir: str | Path = "output",
        save_optimizer: bool = False,
        consumed_train_samples: int | None = None,
        *,
        adapter_name: str | None = None,
        background: bool = False,
    ) -> str:
        """Write what is trained to `output_dir/name`, verify it, return its path.  Collective.

        An adapter becomes a PEFT directory; a model that is trained as a whole, a Hugging Face
        checkpoint.  `save_optimizer` adds all that `resume_from_checkpoint` needs, on any layout,
        in the subfolder `state`; `consumed_train_samples` is kept there for it.  With `background`
        files are written while training goes on; the next save, `wait_for_save` and the end of the
        process wait for them.

        Raises ExportError, and leaves what was there before, if the file does not hold what was
        trained; also for a save in the background that failed before.
        """
        directory: str = self._call(
            commands.Save,
            adapter=adapter_name,
            directory=str(Path(output_dir) / name),
            save_optimizer=save_optimizer,
            consumed_train_samples=consumed_train_samples,
            background=background,
        )
        return directory

    def wait_for_save(self) -> None:
        """Wait for a save in the background.  Raises ExportError if it failed.  Collective."""
        self._call(commands.WaitForSave)

    def load(self, adapter: str | Path, *, adapter_name: str | None = None) -> None:
        """Start from an adapter in PEFT's format: a folder, a hub's id or a URL.  Collective.

        An adapter that is not there yet is made with the options of the file, as "default" unless
        `adapter_name` says another; one that is there must have the same.  Steps begin at 0; an
        optimizer is chosen as for a new adapter.  A whole training state, with its optimizer and
        step, is for `resume_from_checkpoint`.

        Raises CheckpointError or ConfigError, before anything has changed, for a file that is
        damaged, that does not fit the base, or that asks for what is not supported (DoRA).
        """
        self._call(commands.Load, adapter=adapter_name, place=str(adapter))

    def resume_from_checkpoint(
        self,
        resume_from_checkpoint: str | Path,
        *,
        adapter_name: str | None = None,
        use_previous: bool = False,
    ) -> dict[str, Any]:
        """Go on from what `save(save_optimizer=True)` wrote, on any layout.  Collective.

        Returns cur_step, the steps taken, and consumed_train_samples (None if it was not given).
        Adapter, optimizer and schedule are made as they were saved unless they are set already;
        then they must be of the same kind, and options set here count.

        Raises CheckpointError, before anything has changed, for a file that is missing, cut short
        or altered, another base model or other LoRA options; with `use_previous`, damage means
        that the complete checkpoint before it in the same folder is taken, with a warning.
        Raises ConfigError for an optimizer or schedule of another kind.
        """
        place: dict[str, Any] = self._call(
            commands.Resume,
            adapter=adapter_name,
            checkpoint=str(resume_from_checkpoint),
            use_previous=use_previous,
        )
        return place
