"""Global batches in a fixed order, from which training can go on at exactly the next sample."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data.dataset import Dataset
from megatrain.data.global_batch import Choose, GlobalBatch, read_chosen
from megatrain.data.lazy_row import Stopwatch
from megatrain.data.loader_state import LoaderState, check_numbers, check_state
from megatrain.data.prefetch import Prefetch
from megatrain.errors import ConfigError, DataError
from megatrain.parallel.layout import DeviceMesh

type _Place = tuple[int, int, GlobalBatch]
"""An epoch, the samples of it that were handed out, and the last batch of them."""
type Rows = Dataset | Sequence[Mapping[str, Any]]


class DataLoader:
    """Iterates over global batches: lists of rows, the same list in the same order on every rank.

    Rows of an encoded Dataset are not read yet (megatrain.data.lazy_row.Row): a rank reads only
    those that the trainer gives it, and the trainer balances tokens over data-parallel ranks.
    Which these will be is known from the first batch on, and they are read ahead.

    A plan over ranks needs every row's length, which a stream, and encode(lazy=True) in its first
    epoch, have by encoding alone: there each rank encodes the whole global batch, ahead.

    Each `for` loop is one epoch.  With `shuffle` its order depends on `seed` and the epoch's number
    alone; a stream is shuffled within a window.  A loop that was left early is not gone on with:
    the next loop is the next epoch, unless resume_from_checkpoint() says otherwise.
    """

    def __init__(  # noqa: PLR0913 - torch's loader has them too
        self,
        dataset: Rows | Callable[[], Rows],
        batch_size: int,
        min_batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 42,
        drop_last: bool = False,
        prefetch: int = 2,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        """Take `dataset`, or call it to get one.

        An epoch's last batch is smaller where batch_size does not divide the samples; it is left
        out if it has fewer rows than `min_batch_size` (default 1), or with `drop_last` (the same as
        min_batch_size=batch_size).  `prefetch` batches are made ahead in a thread.  With
        `device_mesh`, batches smaller than its data-parallel ranks, some of which would idle at
        every step, are refused.  Raises ConfigError.
        """
        check_numbers(batch_size=batch_size, prefetch=prefetch, seed=seed)
        _check_bools(shuffle=shuffle, drop_last=drop_last)
        if min_batch_size is not None:
            check_numbers(min_batch_size=min_batch_size)
        if drop_last and min_batch_size not in (None, batch_size):
            raise ConfigError(
                f"drop_last=True means min_batch_size={batch_size}: got {min_batch_size}",
                hint="give one of the two",
            )
        least = batch_size if drop_last else 1 if min_batch_size is None else min_batch_size
        _check_sizes(batch_size, least, device_mesh)
        is_factory = callable(dataset) and not hasattr(dataset, "__getitem__")
        self.dataset: Rows = dataset() if is_factory else dataset  # type: ignore[assignment, operator]
        self.batch_size, self.min_batch_size = batch_size, least
        self.shuffle, self.seed = shuffle, seed
        self._prefetch = prefetch
        self._watch = Stopwatch()
        self._choose: Choose | None = None
        self._consumed = self._epoch = self._position = 0
        self._next: tuple[int, int] | None = (0, 0)
        self._check_dataset()

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return self._epoch

    @property
    def wait_seconds(self) -> float:
        """Seconds in which the caller waited for batches, or for rows of theirs to be read."""
        return self._watch.seconds

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch.  Raises TypeError for a stream."""
        whole, tail = divmod(self._num_samples(), self.batch_size)
        return whole + (tail >= self.min_batch_size and tail > 0)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop be this epoch; the place in it is kept if it is the current one."""
        check_numbers(epoch=epoch)
        if self._next is None or self._next[0] != epoch:
            self._next = (epoch, 0)

    def get_state(self) -> LoaderState:
        """Return where the loader stands: what was handed out, never what was read ahead."""
        epoch, position = self._next or (self._epoch, self._position)
        return {
            "consumed_train_samples": self._consumed,
            "epoch": epoch,
            "position": position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_samples": None if self._is_stream else self._num_samples(),
            "fingerprint": self._fingerprint(),
        }

    def resume_from_checkpoint(self, consumed_train_samples: int | Mapping[str, Any]) -> None:
        """Let the next loop go on with the sample after those that were handed out.

        Takes get_state()'s value, or its number alone: then epochs are taken to have been whole,
        with as many samples as an epoch of this loader hands out.  batch_size may be another than
        before; it then must not leave samples out at the end of an epoch, if only the number is
        known.  Raises ConfigError, for another seed, shuffling or other data too.
        """
        if isinstance(consumed_train_samples, Mapping):
            self._resume_state(consumed_train_samples)
            return
        check_numbers(consumed_train_samples=consumed_train_samples)
        consumed = int(consumed_train_samples)
        self._consumed = consumed
        self._next = (0, consumed)
        if not self._is_stream:
            self._next = divmod(consumed, self._without_tail(self._num_samples()))
        self._epoch, self._position = self._next

    def __iter__(self) -> Iterator[GlobalBatch]:
        start = self._next or (self._epoch + 1, 0)
        self._next = None
        self._epoch, self._position = start
        return self._hand_out()

    def _hand_out(self) -> Iterator[GlobalBatch]:
        """Yield batches to the caller, counting what it waits and what it gets."""
        batches = self._batches(self._epoch, self._position)
        with closing(self._read_ahead(batches)) as ready:
            while True:
                with self._watch:
                    item = next(ready, None)
                if item is None:
                    return
                self._epoch, self._position, batch = item
                self._consumed += len(batch)
                yield batch

    def _read_ahead(self, batches: Iterator[_Place]) -> Any:
        """Let a thread make the batches, and read what this rank needs of them."""
        if self._prefetch and isinstance(self.dataset, Dataset):
            return Prefetch(self._with_own_rows(batches), self._prefetch)
        return batches

    def _with_own_rows(self, batches: Iterator[_Place]) -> Iterator[_Place]:
        """Yield batches whose rows are read as far as the trainer said that it reads them here."""
        for place in batches:
            read_chosen(place[2], self._choose)
            yield place

    def _tell(self, choose: Choose) -> None:
        self._choose = choose

    def _batches(self, epoch: int, position: int) -> Iterator[_Place]:
        """Yield (epoch, samples of it handed out, batch) of one epoch from `position` on.

        Where nothing is left after `position`, it is the next epoch's batches.
        """
        is_resumed = position > 0
        epoch, position, rows = self._open(epoch, position)
        while True:
            before = position
            while batch := GlobalBatch(itertools.islice(rows, self.batch_size), self._tell):
                if len(batch) < self.min_batch_size:
                    break
                position += len(batch)
                yield epoch, position, batch
            if not is_resumed or position > before:
                return
            is_resumed = False
            epoch, position, rows = self._open(epoch + 1, 0)

    def _open(self, epoch: int, position: int) -> tuple[int, int, Iterator[Mapping[str, Any]]]:
        """Return the rows of an epoch from `position` on, and the epoch and the position.

        A stream tells its length when it is read: a `position` behind its end is counted on in the
        next epoch.
        """
        if not self._is_stream:
            order = self._order(epoch)[position:]
            return epoch, position, (self._row(int(index)) for index in order)
        while True:
            rows = self.dataset.stream(self.seed if self.shuffle else None, epoch)  # type: ignore[union-attr]
            skipped = sum(1 for _ in itertools.islice(rows, position))
            if skipped == position:
                return epoch, position, rows
            handed_out = self._without_tail(skipped)
            if not handed_out:
                raise DataError(f"a stream of {skipped} rows has no batch of {self.min_batch_size}")
            epoch, position = epoch + 1, position - handed_out

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self._num_samples())
        return np.random.default_rng([self.seed, epoch]).permutation(self._num_samples())

    def _row(self, index: int) -> Mapping[str, Any]:
        if isinstance(self.dataset, Dataset) and self.dataset.is_encoded:
            return self.dataset.row(index, self._watch)
        return self.dataset[index]

    def _num_samples(self) -> int:
        return len(self.dataset)

    def _without_tail(self, num_samples: int) -> int:
        """Return how many samples an epoch of `num_samples` hands out."""
        tail = num_samples % self.batch_size
        return num_samples - (tail if tail < self.min_batch_size else 0)

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.dataset, Dataset) and self.dataset.streaming

    def _resume_state(self, state: Mapping[str, Any]) -> None:
        check_state(state, self.get_state())
        epoch, position = state["epoch"], state["position"]
        if not self._is_stream and not self._without_tail(self._num_samples() - position):
            epoch, position = epoch + 1, 0
        self._consumed = state["consumed_train_samples"]
        self._next = self._epoch, self._position = epoch, position

    def _fingerprint(self) -> str | None:
        """Return what the stored rows are; code that encodes rows later may change and be right."""
        dataset = self.dataset
        if isinstance(dataset, Dataset) and dataset.is_encoded and not dataset.is_read_at_once:
            return dataset.fingerprint
        return None

    def _check_dataset(self) -> None:
        dataset = self.dataset
        if self._is_stream:
            return
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"dataset must be a Dataset or a sequence of rows: got {type(dataset).__name__}",
                hint="make a Dataset, or a list",
            )
        num_samples = len(dataset)
        if not self._without_tail(num_samples):
            raise ConfigError(
                f"{num_samples} samples make no batch of at least {self.min_batch_size}",
                hint="lower batch_size or min_batch_size, or keep the last batch",
            )
        if isinstance(dataset, Dataset) and dataset.is_encoded and not dataset.is_read_at_once:
            dataset.row(0)  # a PackingDataset that is not packed says so now


def _check_bools(**options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False: got {value!r}")


def _check_sizes(batch_size: int, least: int, mesh: DeviceMesh | None) -> None:
    if not 1 <= least <= batch_size:
        raise ConfigError(
            f"1 <= min_batch_size <= batch_size is needed: got {least} and {batch_size}",
            hint="batch_size counts the rows of the global batch",
        )
    if mesh is not None and batch_size < mesh.dp:
        raise ConfigError(
            f"a global batch of {batch_size} leaves some of {mesh.dp} data-parallel ranks idle",
            hint=f"batch_size={mesh.dp} or more: it counts the rows of all ranks",
        )
