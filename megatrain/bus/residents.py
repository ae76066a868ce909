"""Which adapters are on the device, in this host's memory, or on its disk, by least recent use.

Every rank moves the same adapters to and from its device at the same time; memory and disk are each
rank's own affair.
"""

import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatrain.bus.adapter_record import AdapterRecord, copied, put_back, take_down
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss
from megatrain.train.step import BASE, Trainer

logger = logging.getLogger(__name__)


class Residents:
    """The adapters of one model on one rank."""

    def __init__(
        self, trainer: Trainer, *, seed: int, max_loras: int | None, max_cpu_loras: int | None
    ) -> None:
        self._trainer, self._seed = trainer, seed
        self._max_loras, self._max_cpu_loras = max_loras, max_cpu_loras
        self.names: list[str] = []
        """All, in the order in which they were added."""
        self._used: dict[str, None] = {}
        """Those on the device, the least recently used first."""
        self._in_memory: dict[str, AdapterRecord] = {}
        """The longest there first."""
        self._on_disk: dict[str, Path] = {}
        self._folder: Path | None = None
        self._losses: dict[str, Loss] = {}
        """Of adapters that are not on the device."""

    def tiers(self) -> dict[str, list[str]]:
        """Return names by where they are."""
        return {
            "device": list(self._used),
            "host": list(self._in_memory),
            "disk": list(self._on_disk),
        }

    def bring(self, names: Sequence[str]) -> None:
        """Have these on the device; others make room.  Collective.

        Raises ConfigError if there is no room for so many.
        """
        if self._max_loras is not None and len(names) > self._max_loras:
            raise ConfigError(
                f"{len(names)} adapters are needed at once, and max_loras is {self._max_loras}"
            )
        for name in names:
            if name in self._used:
                self._used[name] = self._used.pop(name)
        for name in names:
            if name not in self._used:
                self._make_room(keep=names)
                try:
                    put_back(self._trainer, name, self.record(name), seed=self._seed)
                except BaseException:
                    if name in self._trainer.trained:
                        self._trainer.delete(name)
                    raise
                self._forget_copy(name)
                if (loss := self._losses.pop(name, None)) is not None:
                    self._trainer.trained[name].loss = loss
                self._used[name] = None

    def added(self) -> None:
        """Note what has been made since the last time, and let others make room for it."""
        for name in self._trainer.trained:
            if name not in self.names:
                self.names.append(name)
            self._used.setdefault(name, None)
        self._make_room(keep=list(self._used)[-1:], more=0)

    def removed(self, name: str) -> None:
        """Forget an adapter, wherever it is."""
        self.names.remove(name)
        if name in self._used:
            del self._used[name]
            self._trainer.delete(name)
        self._losses.pop(name, None)
        self._forget_copy(name)

    def adopt(self, name: str, record: AdapterRecord) -> None:
        """Take an adapter in that is on no device yet; the base goes there at once.  Collective."""
        self.names.append(name)
        if name == BASE:
            put_back(self._trainer, name, record, seed=self._seed)
            self._used[name] = None
            return
        self._in_memory[name] = record
        self._spill()

    def loss(self, name: str) -> Loss:
        """Return what an adapter minimises, wherever it is."""
        return self._losses[name] if name in self._losses else self._trainer.trained[name].loss

    def record(self, name: str) -> AdapterRecord:
        """Return an adapter as it is now, its tensors perhaps not copies."""
        if name in self._used:
            return take_down(self._trainer, name)
        if name in self._in_memory:
            return self._in_memory[name]
        return _read(self._on_disk[name])

    def _make_room(self, keep: Sequence[str], more: int = 1) -> None:
        """Take adapters off the device until `more` fit on it."""
        if self._max_loras is None:
            return
        while len(self._used) + more > self._max_loras:
            name = next(each for each in self._used if each not in keep)
            record = copied(take_down(self._trainer, name))
            del self._used[name]
            self._losses[name] = self._trainer.trained[name].loss
            self._trainer.delete(name)
            self._in_memory[name] = record
            self._spill()

    def _spill(self) -> None:
        """Write to the disk what is too many for memory; on a full disk it stays."""
        while self._max_cpu_loras is not None and len(self._in_memory) > self._max_cpu_loras:
            name = next(iter(self._in_memory))
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="megatrain-adapters-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            path = self._folder / name
            try:
                _write(path, self._in_memory[name])
            except (OSError, TypeError, ValueError) as error:
                shutil.rmtree(path, ignore_errors=True)
                logger.warning("adapter %r stays in memory: %s", name, error)
                return
            del self._in_memory[name]
            self._on_disk[name] = path

    def _forget_copy(self, name: str) -> None:
        self._in_memory.pop(name, None)
        if (path := self._on_disk.pop(name, None)) is not None:
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, record: AdapterRecord) -> None:
    path.mkdir(mode=0o700)
    try:
        save_file(record.tensors, path / "tensors.safetensors")
    except SafetensorError as error:  # its own error for a full disk
        raise OSError(str(error)) from error
    (path / "values.json").write_text(json.dumps(record.values))


def _read(path: Path) -> AdapterRecord:
    values = json.loads((path / "values.json").read_text())
    return AdapterRecord(values, load_file(path / "tensors.safetensors"))
