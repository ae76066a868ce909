"""One row of a global batch: its sizes are known, its tokens are read when they are needed."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any, Self


class Stopwatch:
    """Adds up the seconds spent in its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds += time.perf_counter() - self._start


class Row(Mapping[str, Any]):
    """A datum as a mapping (megatrain.types.LazyRow), read once, on first access to its content.

    `length`, `num_labels` and the names in `numbers` are known without reading.
    """

    __slots__ = (
        "_content",
        "_lock",
        "_read",
        "_stopwatch",
        "key",
        "num_labels",
        "num_tokens",
        "numbers",
    )

    def __init__(
        self,
        read: Callable[[], Mapping[str, Any]],
        *,
        key: str,
        num_tokens: int,
        num_labels: int,
        numbers: Collection[str] = (),
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.key, self.num_tokens, self.num_labels = key, num_tokens, num_labels
        self.numbers = numbers
        self._read = read
        self._stopwatch = stopwatch or Stopwatch()
        self._content: Mapping[str, Any] | None = None
        self._lock = threading.Lock()

    @property
    def is_read(self) -> bool:
        """Whether its content is in memory."""
        return self._content is not None

    def __getitem__(self, name: str) -> Any:
        if name == "length":
            return self.num_tokens
        if name == "num_labels":
            return self.num_labels
        return self._whole()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def __repr__(self) -> str:
        sizes = f"key={self.key!r}, num_tokens={self.num_tokens}, num_labels={self.num_labels}"
        content = "" if self._content is None else f", content={dict(self._content)!r}"
        return f"Row({sizes}{content})"

    def _whole(self) -> Mapping[str, Any]:
        if self._content is None:
            with self._stopwatch:
                self._load()
        assert self._content is not None
        return self._content

    def read_ahead(self) -> None:
        """Read the content in a thread, while nobody waits; an error is left to who needs it."""
        with contextlib.suppress(Exception):  # it comes up again when the row is used
            self._load()

    def _load(self) -> None:
        with self._lock:
            if self._content is None:
                self._content = self._read()
