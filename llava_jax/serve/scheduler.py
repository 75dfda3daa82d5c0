"""Schedules answers in the slots of one engine. One thread owns the device."""

import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.inference.slots import PromptChunk, SlotEngine, SlotRequest, Written
from llava_jax.serve.caches import FeatureCache, SlotTokens
from llava_jax.serve.errors import ApiError
from llava_jax.serve.jobs import Finished, Job, Piece, PreparedImage, Reason, TokenLogprob
from llava_jax.serve.limits import Limits
from llava_jax.serve.stats import Stats

log = logging.getLogger(__name__)

MIN_SHARED_TOKENS = 32
"""Minimum number of prompt tokens that another slot must save for its prefix to be copied, or waited for."""

STOP_SECONDS = 20.0
"""Number of seconds that the end of the thread gets, after a drain, for the step in progress."""

MAX_FAILURES = 3
"""Number of exceptions of the engine, without a step between them, after which the device counts as lost."""


class _TowerError(Exception):
    """Raised if the vision tower fails. The state of the slots is not touched."""


class _RunningJob:
    """A job with the state of its answer."""

    def __init__(self, job: Job, context: int, make_detokenizer: Callable[[Sequence[str], int], Detokenizer]):
        self.job, self.submitted = job, time.monotonic()
        self.max_new_tokens = min(job.max_new_tokens, context - len(job.tokens))
        if self.max_new_tokens < 1:
            raise ValueError(f"a prompt of {len(job.tokens)} tokens leaves no room in a context of {context}")
        self.detokenizer = make_detokenizer(job.stop, self.max_new_tokens)
        self.content = SlotTokens(job, context)
        self.image_bytes = sum(image.tiles.nbytes for image in job.images)
        self.slot: _Slot | None = None
        self.is_started = False  # a chunk was computed, or a prefix copied
        self.dispatched = 0  # number of tokens that the device has been asked for
        self.cached_tokens = 0
        self.last_token = 0.0  # when the newest token came
        self.features: tuple[int, np.ndarray] | None = None  # index and features of the image whose tokens come next
        self.logprobs: list[TokenLogprob] = []  # of the tokens since the last piece
        self.is_finished = False


class _Slot:
    """A slot, and the tokens whose keys and values it has."""

    def __init__(self, index: int):
        self.index = index
        self.content: SlotTokens | None = None
        self.computed = 0  # number of tokens of `content` whose keys and values the slot has
        self.running: _RunningJob | None = None
        self.last_used = 0.0


@dataclass(frozen=True)
class _Dispatched:
    """A call of the device whose tokens have not been read."""

    written: Written
    jobs: Sequence[tuple[int, _RunningJob]]  # row and job
    started: float
    is_decode: bool


class Scheduler:
    """Answers jobs in the order of their arrival, as many at once as the engine has slots.

    A thread repeats rounds. Each ends jobs that were cancelled or whose time is over, gives free slots to waiting jobs,
    computes some prompt tokens, and decodes one step in all active slots. It reads the tokens of a round while the
    device computes the next one. A job starts with the longest prefix of its prompt that any slot has.

    Attributes:
      failed: True once the engine cannot go on. All jobs have ended then, and the process should exit.
    """

    def __init__(self, engine: SlotEngine, detokenizer: Callable[[Sequence[str], int], Detokenizer], limits: Limits,
                 image_cache_bytes: int = 2**30, report: Callable[[int, int, str], None] = lambda *_: None,
                 on_failure: Callable[[], None] = lambda: None):
        """Prepares the slots; `start` starts the thread.

        Args:
          engine: from now on only the scheduler's thread calls it.
          detokenizer: returns the detokenizer of an answer with these stop strings and this number of tokens
            (`Llava.detokenizer`).
          image_cache_bytes: maximum number of bytes of cached image features, on the host.
          report: gets the progress of the engine's `warm_up`.
          on_failure: called once, from the scheduler's thread, after `failed` became True.
        """
        self.failed = False
        self._engine, self._detokenizer, self._limits = engine, detokenizer, limits
        self._report, self._on_failure = report, on_failure
        self._slots = [_Slot(index) for index in range(engine.slots)]
        self._features = FeatureCache(self._encode_image, image_cache_bytes)
        self._stats = Stats(slots=engine.slots)
        self._waiting: deque[_RunningJob] = deque()
        self._changed = threading.Condition()  # guards the queue and the three flags
        self._is_warm = self._is_draining = self._is_stopped = False
        self._prompts: list[_RunningJob] = []  # jobs whose prompt is not computed, in the order of their arrival
        self._in_flight: list[_Dispatched] = []
        self._last_read = 0.0
        self._failures = 0
        self._ends: deque[float] = deque(maxlen=64)  # when the last answers ended
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread. It warms up the engine first; jobs may be submitted meanwhile."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether new jobs are answered: the engine is warm and works, and the server is not draining."""
        return self._is_warm and not self._is_draining and not self.failed

    def submit(self, *jobs: Job) -> None:
        """Adds jobs to the queue, all or none.

        Raises ApiError: 429 if the queue is full, with the seconds after which it may have room, 503 while draining.
        Raises ValueError for a prompt that leaves no room for an answer.
        """
        added = [_RunningJob(job, self._engine.context, self._detokenizer) for job in jobs]
        with self._changed:
            if self._is_draining or self.failed:
                raise ApiError(503, "The server is shutting down.", retry_after=5)
            free = sum(slot.running is None for slot in self._slots)
            queued_bytes = sum(running.image_bytes for running in (*self._waiting, *added))
            if len(self._waiting) + len(jobs) > self._limits.queue + free or queued_bytes > self._limits.queue_bytes:
                self._stats.rejected += len(jobs)
                raise ApiError(429, "Too many requests are waiting; try again later.", code="rate_limit_exceeded",
                               retry_after=self._retry_after())
            self._waiting.extend(added)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job whose client has left. Its slot is free within one step."""
        job.cancelled.set()

    def drain(self, seconds: float) -> None:
        """Refuses new jobs, waits up to `seconds` for those that it has, ends the remaining ones, stops the thread."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(seconds)
        with self._changed:
            self._is_stopped = True
        self._thread.join(STOP_SECONDS)

    def stats(self) -> Stats:
        """Returns a copy of the figures since the start."""
        stats = copy.deepcopy(self._stats)  # without a lock: values may differ by the step that is being counted
        stats.waiting = len(self._waiting)
        stats.busy_slots = sum(slot.running is not None for slot in self._slots)
        stats.image_cache_bytes = self._features.bytes
        return stats

    def _retry_after(self) -> int:
        """Returns the seconds until the queue is answered at the rate of the last answers, 1 to 60."""
        if len(self._ends) < 2:
            return 1
        seconds = (time.monotonic() - self._ends[0]) / len(self._ends) * len(self._waiting)
        return min(max(math.ceil(seconds), 1), 60)

    def _run(self) -> None:
        """Runs rounds until the server has drained or the device is lost."""
        try:
            self._engine.warm_up(self._report)
            self._is_warm = True
            while self._wait_for_work():
                try:
                    self._round()
                except Exception:
                    self._recover()
        except Exception:
            log.exception("the engine failed for good")
            self.failed = True
        with self._changed:
            self._is_draining = True
        for running in [*(slot.running for slot in self._slots if slot.running), *self._waiting]:
            self._finish(running, "error" if self.failed else "cancelled")
        self._waiting.clear()
        if self.failed:
            self._on_failure()

    def _wait_for_work(self) -> bool:
        """Waits for jobs. Returns False when the thread should end."""
        with self._changed:
            while True:
                if self._is_stopped:
                    return False
                if self._waiting or any(slot.running for slot in self._slots):
                    return True
                if self._is_draining:
                    return False
                self._changed.wait()

    def _round(self) -> None:
        self._end_cancelled()
        self._admit()
        dispatched = [*self._write_prompts(), *self._decode()]
        previous, self._in_flight = self._in_flight, dispatched
        for call in previous:
            self._read(call)

    def _recover(self) -> None:
        """Ends all jobs in slots after an exception of the engine, whose state is lost, and starts with a new state."""
        log.exception("the engine failed")
        self._failures += 1
        self._stats.failures += 1
        self._in_flight = []
        for slot in self._slots:
            if slot.running:
                self._finish(slot.running, "error")
            slot.content, slot.computed = None, 0
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(f"{MAX_FAILURES} failures without a step between them")
        self._engine.reset()

    def _end_cancelled(self) -> None:
        """Ends jobs whose client has left or whose time is over."""
        now = time.monotonic()

        def reason(running: _RunningJob) -> Reason | None:
            if running.job.cancelled.is_set():
                return "cancelled"
            return "deadline" if now >= running.job.deadline else None

        with self._changed:
            ended = [(running, why) for running in self._waiting if (why := reason(running))]
            for running, _ in ended:
                self._waiting.remove(running)
        ended += [(slot.running, why) for slot in self._slots if slot.running and (why := reason(slot.running))]
        for running, why in ended:
            self._finish(running, why)

    def _admit(self) -> None:
        """Gives free slots to waiting jobs.

        A job continues in the free slot with its longest prefix, unless that would overwrite more tokens than it
        saves. Otherwise it gets the slot that was used least recently.
        """
        free = [slot for slot in self._slots if slot.running is None]
        while free:
            with self._changed:
                if not self._waiting:
                    return
                running = self._waiting.popleft()
            saved = {slot: _computed_prefix(slot, running.content) for slot in free}
            slot = max(free, key=lambda slot: (saved[slot], -slot.last_used))
            if saved[slot] < slot.computed - saved[slot]:
                slot = min(free, key=lambda slot: slot.last_used)
            free.remove(slot)
            slot.content, slot.computed, slot.running = running.content, saved[slot], running
            running.slot = slot
            self._prompts.append(running)
            self._stats.queue_seconds.add(time.monotonic() - running.submitted)

    def _write_prompts(self) -> Iterator[_Dispatched]:
        """Computes next tokens of the oldest prompts, about `max_chunk` of them and as many of images.

        Answers in progress wait for no more than that. Up to four prompts share it, so that short ones soon end.
        """
        ready = [running for running in list(self._prompts) if running.is_started or self._start(running)]
        length = self._engine.max_chunk // (1, 1, 2, 4)[min(len(ready), 3)]
        chunks, jobs, budget, self._image_budget = [], [], self._engine.max_chunk, self._engine.max_chunk
        for running in ready:
            if min(budget, self._image_budget) <= 0:
                break
            try:
                chunks.append(self._chunk(running, length))
                jobs.append(running)
                budget -= len(chunks[-1].tokens)
            except _TowerError:  # the slots are as before
                log.exception("an image could not be encoded")
                self._finish(running, "error")
        if not chunks:
            return
        started = time.monotonic()
        written = self._engine.write(chunks, [running.job.adapter for running in jobs], _want_logprobs(jobs))
        for running, chunk in zip(jobs, chunks, strict=True):
            running.slot.computed += len(chunk.tokens)
            if chunk.request:
                running.dispatched, running.features = 1, None
                self._prompts.remove(running)
        rows = [(row, jobs[row]) for row, chunk in enumerate(chunks) if chunk.request]
        yield _Dispatched(written, rows, started, is_decode=False)

    def _start(self, running: _RunningJob) -> bool:
        """Copies the longest prefix that another slot has. Returns False if an earlier prompt should be waited for.

        That is one that will soon have computed half of this prompt's remaining tokens, or a chunk.
        """
        slot, content = running.slot, running.content
        others = [other for other in self._slots if other is not slot and other.content]
        source = max(others, key=lambda other: _computed_prefix(other, content), default=None)
        saved = _computed_prefix(source, content) if source else 0
        remaining = len(running.job.tokens) - slot.computed
        worth = max(MIN_SHARED_TOKENS, min(remaining // 2, self._engine.max_chunk))
        for earlier in self._prompts[: self._prompts.index(running)]:
            planned = min(earlier.content.common_prefix(content), content.length - 1)
            if planned > saved and planned >= slot.computed + worth:
                return False
        if saved >= slot.computed + MIN_SHARED_TOKENS:
            self._engine.copy(source.index, slot.index, saved)
            slot.computed = saved
        running.is_started, running.cached_tokens = True, slot.computed
        self._stats.prompt_tokens += len(running.job.tokens)
        self._stats.cached_tokens += slot.computed
        self._stats.image_hits += sum(start + len(image.layout.index) <= slot.computed for (start, _), image
                                      in zip(content.images, running.job.images, strict=True))
        return True

    def _chunk(self, running: _RunningJob, length: int) -> PromptChunk:
        """Returns up to `length` next tokens of a prompt, with the features of its visual tokens."""
        job, slot = running.job, running.slot
        start, stop = slot.computed, min(slot.computed + length, len(job.tokens))
        visual = []
        for index, (first, _) in enumerate(running.content.images):
            last = first + len(job.images[index].layout.index)
            if first < stop and start < last:
                visual.append(self._image_features(running, index)[max(start - first, 0) : stop - first])
        request = None
        if stop == len(job.tokens):
            request = SlotRequest(running.max_new_tokens, job.temperature, job.top_p, job.seed)
        return PromptChunk(slot.index, start, job.tokens[start:stop], np.concatenate(visual) if visual else None,
                           request)

    def _image_features(self, running: _RunningJob, index: int) -> np.ndarray:
        """Returns the features of a job's image, kept with the job until its next image."""
        if running.features is None or running.features[0] != index:
            image, adapter = running.job.images[index], running.job.adapter
            if (image, adapter) in self._features:
                self._stats.image_hits += 1
            else:
                self._stats.image_misses += 1
                self._image_budget -= len(image.layout.index)
            running.features = index, self._features.get(image, adapter)
        return running.features[1]

    def _encode_image(self, image: PreparedImage, adapter: int) -> np.ndarray:
        calls, self._in_flight = self._in_flight, []
        for call in calls:  # their tokens need not wait for the tower
            self._read(call)
        try:
            return self._engine.encode_image(image.tiles, image.layout, adapter)
        except Exception as error:
            raise _TowerError from error

    def _decode(self) -> Iterator[_Dispatched]:
        """Decodes one step in all slots whose answers have tokens left."""
        jobs = [slot.running for slot in self._slots
                if slot.running and 0 < slot.running.dispatched < slot.running.max_new_tokens]
        if not jobs:
            return
        active = np.zeros(len(self._slots), bool)
        for running in jobs:
            running.dispatched += 1
            active[running.slot.index] = True
        self._stats.steps += 1
        started = time.monotonic()
        written = self._engine.decode(active, 1, _want_logprobs(jobs))
        yield _Dispatched(written, [(running.slot.index, running) for running in jobs], started, is_decode=True)

    def _read(self, call: _Dispatched) -> None:
        """Waits for a call's tokens and passes them on."""
        jobs = [(row, running) for row, running in call.jobs if not running.is_finished]  # some may have ended since
        if not jobs:
            return
        tokens, now = call.written.tokens.tolist(), time.monotonic()
        self._failures = 0
        if call.is_decode:
            self._stats.decode_seconds += now - max(call.started, self._last_read)
        self._last_read = now
        for row, running in jobs:
            count = running.job.logprobs
            logprob = None if count is None else _token_logprob(call.written, row, count)
            self._add(running, tokens[row][0], logprob, now)

    def _add(self, running: _RunningJob, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """Adds a token to an answer, and sends the text that is certain now."""
        if token == NO_TOKEN:
            log.error("slot %d ended its answer before the detokenizer", running.slot.index)
            return self._finish(running, "error")
        slot, stats = running.slot, self._stats
        if not running.detokenizer.tokens:
            stats.first_token_seconds.add(now - running.submitted)
        else:
            stats.token_seconds.add(now - running.last_token)
            slot.computed += 1  # the token before it
        running.last_token = now
        running.content.append(token)
        stats.completion_tokens += 1
        text = running.detokenizer.add((token,))
        reason = running.detokenizer.finish_reason
        if logprob and reason != "stop":  # OpenAI reports none for the end
            running.logprobs.append(logprob)
        if text or (reason and running.logprobs):
            piece = Piece(text, tuple(running.logprobs))
            running.logprobs = []
            if not self._emit(running, piece):
                reason = "cancelled"
        if reason:
            self._finish(running, reason)

    def _finish(self, running: _RunningJob, reason: Reason) -> None:
        """Ends a job and frees its slot."""
        job, slot, now = running.job, running.slot, time.monotonic()
        running.is_finished = True
        if slot:
            slot.running, slot.last_used = None, now
            if running in self._prompts:
                self._prompts.remove(running)
        self._ends.append(now)
        self._stats.finished[reason] += 1
        image_tokens = sum(len(image.layout.index) for image in job.images)
        self._emit(running, Finished(reason, len(job.tokens), image_tokens, len(running.detokenizer.tokens),
                                     running.cached_tokens))

    def _emit(self, running: _RunningJob, event: Piece | Finished) -> bool:
        """Passes an event to the web side. Returns False if that fails, because nobody listens then."""
        try:
            running.job.emit(event)
        except Exception:
            log.exception("an answer could not be passed on")
            return False
        return True


def _computed_prefix(slot: _Slot, content: SlotTokens) -> int:
    """Returns how many tokens of a prompt a slot has computed. A prompt's last token is computed for its answer."""
    return min(slot.content.common_prefix(content), slot.computed, content.length - 1) if slot.content else 0


def _want_logprobs(jobs: Iterable[_RunningJob]) -> bool:
    return any(running.job.logprobs is not None for running in jobs)


def _token_logprob(written: Written, row: int, count: int) -> TokenLogprob:
    """Returns the log-probability of a row's token, and the `count` most likely tokens."""
    top = zip(written.top_tokens[row][0].tolist(), written.top_logprobs[row][0].tolist(), strict=True)
    return TokenLogprob(int(written.tokens[row][0]), float(written.logprobs[row][0]), tuple(top)[:count])
