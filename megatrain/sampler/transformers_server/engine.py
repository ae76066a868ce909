"""The loop: requests come in, prompts are read together, all sequences grow a token at a time."""

import logging
import queue
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatrain.errors import DataError, MegatrainError, SamplerError
from megatrain.sampler.codec import pack_piece, pack_result, unpack_request
from megatrain.sampler.transformers_server.adapters import Adapters
from megatrain.sampler.transformers_server.batch import Batch, shaping, take
from megatrain.sampler.transformers_server.network import Network
from megatrain.sampler.transformers_server.score import Scores, first_position, is_asked
from megatrain.sampler.transformers_server.sequence import Job, Sequence
from megatrain.sampler.transformers_server.stops import Stops
from megatrain.sampler.types import SampleRequest, SampleResult

logger = logging.getLogger(__name__)

Answer = Callable[[dict[str, Any]], None]
MAX_PREFILL = 8192
"""Tokens, with padding, of prompts that are read together; a longer prompt is read alone."""
MAX_LOGITS = 1 << 25
"""Numbers of the logits of prompts that are in memory at once."""


class Engine:
    """One model's requests.  `run` works on one thread; `submit` is called from any."""

    def __init__(self, network: Network, adapters: Adapters, *, max_batch: int) -> None:
        """`max_batch`: sequences that are drawn together."""
        self._network, self._adapters, self._max_batch = network, adapters, max_batch
        self._inbox: queue.SimpleQueue[tuple[dict[str, Any], Answer] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._ready: deque[Job] = deque()
        """Prompts that are read, and have sequences that have not begun."""
        self._batches: dict[str | None, Batch] = {}
        """By adapter where it does not go together with others, else one, None."""

    def submit(self, message: dict[str, Any] | None, answer: Answer) -> None:
        """Take a message: load, unload, sample, stream or cancel; None ends `run`."""
        self._inbox.put(None if message is None else (message, answer))

    @torch.no_grad()
    def run(self) -> None:
        """Work until the end."""
        while self._receive():
            self._drop_cancelled()
            self._admit()
            for key, batch in list(self._batches.items()):
                self._advance(key, batch)

    @property
    def _running(self) -> int:
        return sum(len(batch.sequences) for batch in self._batches.values())

    def _receive(self) -> bool:
        """Take what came; wait if there is nothing else to do.  False: it is over."""
        wait = not (self._batches or self._waiting or self._ready)
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            wait = False
            self._take(*message)

    def _take(self, message: dict[str, Any], answer: Answer) -> None:
        try:
            match message["op"]:
                case "load":
                    folder = Path(message["folder"])
                    self._adapters.add(message["name"], folder, self._in_use())
                    self._regroup()
                    answer({"done": True})
                case "unload":
                    self._adapters.remove(message["name"])
                    answer({"done": True})
                case "cancel":
                    if (job := self._jobs.pop(message["of"], None)) is not None:
                        job.cancelled = True
                case "sample" | "stream":
                    self._add(message, answer)
                case other:
                    raise SamplerError(f"the engine knows no message {other!r}")
        except Exception as error:  # noqa: BLE001 - told to who asked
            answer(told(error))

    def _add(self, message: dict[str, Any], answer: Answer) -> None:
        request = unpack_request(message["request"])
        self._check(request)
        job = Job(request, answer, message["op"] == "stream")
        network = self._network
        job.sequences = [
            Sequence(
                job,
                index,
                Stops(request.stop, request.prompt, eos=network.eos, tokenizer=network.tokenizer),
            )
            for index in range(request.num_samples)
        ]
        self._jobs[message["id"]] = job
        self._waiting.append(job)

    def _check(self, request: SampleRequest) -> None:
        vocabulary = self._network.config.get_text_config().vocab_size
        if not request.prompt or not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
            raise DataError(f"a prompt is ids from 0 to {vocabulary - 1}, at least one")
        targets = request.target_prompt_tokens
        if targets is not None and targets.size and targets.max() >= vocabulary:
            raise DataError(f"target tokens are below {vocabulary}: {targets.max()}")
        if request.adapter is not None and not self._adapters.knows(request.adapter):
            raise DataError(f"the sampler has no adapter {request.adapter!r}")

    def _in_use(self) -> set[str | None]:
        return {each.job.request.adapter for b in self._batches.values() for each in b.sequences}

    def _key(self, name: str | None) -> str | None:
        return None if self._adapters.mixes else name

    def _regroup(self) -> None:
        """Part rows that an adapter which was loaded just now does not go together with."""
        mixed = self._batches.get(None)
        if not self._adapters.mixes and mixed is not None:
            for key, part in mixed.split().items():
                self._batches[key] = part
            if all(sequence.job.request.adapter for sequence in mixed.sequences):
                del self._batches[None]

    def _drop_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._ready = deque(job for job in self._ready if not job.cancelled)
        for key, batch in list(self._batches.items()):
            batch.prune()
            if not batch.sequences:
                del self._batches[key]

    def _admit(self) -> None:
        """Let sequences begin while there is room."""
        while (room := self._max_batch - self._running) > 0:
            if self._ready:
                self._begin(self._ready[0], room)
            elif self._waiting:
                self._prefill(self._next_prompts(room))
            else:
                return

    def _next_prompts(self, room: int) -> list[Job]:
        """Take prompts that are read together: of one batch, within the size, for the room."""
        chosen: list[Job] = []
        longest = 0
        while self._waiting and sum(len(job.sequences) for job in chosen) < room:
            job = self._waiting[0]
            longest = max(longest, len(job.request.prompt))
            names = {each.request.adapter for each in [*chosen, job]}
            alone = len(names) > 1 and not self._adapters.mixes
            if chosen and (alone or longest * (len(chosen) + 1) > MAX_PREFILL):
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _prefill(self, jobs: list[Job]) -> None:
        try:
            names = [job.request.adapter for job in jobs]
            for name in filter(None, names):
                self._adapters.require(name, {*self._in_use(), *names})
            self._regroup()
            if not self._adapters.mixes and len(set(names)) > 1:
                self._waiting.extendleft(reversed(jobs))  # one of them changed what goes together
                return
            self._adapters.use(names)
            rows, logits, output = self._network.prefill([job.request.prompt for job in jobs])
            self._score(jobs, output)
            for number, job in enumerate(jobs):
                job.rows = rows.select([number], self._network.config)
                job.logits = logits[number]
        except Exception as error:  # noqa: BLE001 - these requests fail, the engine goes on
            self._fail(jobs, error)
        else:
            self._ready.extend(jobs)

    def _score(self, jobs: list[Job], output: Any) -> None:
        asked = [
            (row, Scores(job.request)) for row, job in enumerate(jobs) if is_asked(job.request)
        ]
        if not asked:
            return
        columns = max(len(job.request.prompt) for job in jobs)
        pads = [columns - len(job.request.prompt) for job in jobs]
        first = min(pads[row] + first_position(jobs[row].request) for row, _ in asked)
        vocabulary = self._network.config.get_text_config().vocab_size
        width = max(1, MAX_LOGITS // (vocabulary * len(jobs)))
        for begin in range(first, columns - 1, width):
            end = min(begin + width, columns - 1)
            logits = self._network.head(output, torch.arange(begin, end).to(self._network.device))
            for row, scores in asked:
                skip = max(0, pads[row] - begin)
                if skip < end - begin:
                    scores.take(begin + skip - pads[row], logits[row, skip:])
        for row, scores in asked:
            jobs[row].scores = scores.result()

    def _begin(self, job: Job, room: int) -> None:
        """Draw the first tokens of a prompt's sequences, as many as there is room for."""
        assert job.rows is not None
        assert job.logits is not None
        new = job.sequences[job.begun : job.begun + room]
        take(new, job.logits.expand(len(new), -1), shaping(new, self._network.device))
        job.begun += len(new)
        going = [sequence for sequence in new if sequence.stop_reason is None]
        if going:
            key = self._key(job.request.adapter)
            batch = self._batches.setdefault(key, Batch(self._network, self._adapters))
            batch.add([job.rows.select([0] * len(going), self._network.config)], going)
        if job.begun == len(job.sequences):
            self._ready.popleft()
            job.rows = job.logits = None
        self._tell({job})

    def _advance(self, key: str | None, batch: Batch) -> None:
        jobs = {sequence.job for sequence in batch.sequences}
        try:
            batch.step()
            batch.prune()
        except Exception as error:  # noqa: BLE001 - these requests fail, the engine goes on
            self._fail(list(jobs), error)
            batch.prune()
        self._tell(jobs)
        if not batch.sequences:
            self._batches.pop(key, None)

    def _tell(self, jobs: set[Job]) -> None:
        """Tell streams their new tokens, and results of what is done."""
        for job in jobs:
            if job.cancelled:
                continue
            if job.streams:
                pieces = [piece for each in job.sequences if (piece := each.piece())]
                job.answer({"pieces": [pack_piece(piece) for piece in pieces]})
            if job.is_done:
                job.cancelled = True  # nothing more is to be done
                sequences = [each.sampled() for each in job.sequences]
                result = SampleResult([] if job.streams else sequences, **job.scores)
                job.answer({"result": pack_result(result)})
                self._jobs = {key: each for key, each in self._jobs.items() if each is not job}

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            job.cancelled = True
            job.answer(told(error))
        self._jobs = {key: each for key, each in self._jobs.items() if each not in jobs}


def told(error: Exception) -> dict[str, Any]:
    """Return an error as it travels; what nobody foresaw is logged with its traceback."""
    if isinstance(error, MegatrainError):
        return {"error": [type(error).__name__, error.message, error.hint]}
    logger.error("a request failed", exc_info=error)
    return {"error": ["SamplerError", f"{type(error).__name__}: {error}", None]}
