"""RequestQueue: single requests in, batches through the segments; those that go on are batched again at every exit."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from itertools import takewhile
from queue import Full
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adaptive import AdaptiveModel, ExitOutput, Plan
from .confidence import confidence
from .openmp import release_idle_workers
from .protocol import State, sample_dimensions, select_samples

__all__ = ["QueueStatistics", "RequestQueue"]


class QueueStatistics(NamedTuple):
    """What the queue has done: per segment the batches run and the samples in them, and how requests ended."""

    batches: tuple[int, ...]
    samples: tuple[int, ...]
    answered: int
    overdue: int  # of those answered: left at their deadline, before the policy let them
    failed: int


class _Answer(NamedTuple):
    """What an exit said of a batch; ``row`` is one sample's."""

    logits: Tensor
    exit_index: int
    sure: Tensor
    row: int

    def output(self) -> ExitOutput:
        return ExitOutput(self.logits[self.row], torch.tensor(self.exit_index), self.sure[self.row])


class _Request:
    """One sample on its way."""

    __slots__ = ("answer", "deadline", "future", "plan")

    def __init__(self, plan: Plan, deadline: float) -> None:
        self.future: Future[ExitOutput] = Future()
        self.plan, self.deadline = plan, deadline
        self.answer: _Answer | None = None  # of the deepest exit so far


class _Chunk(NamedTuple):
    """Requests that wait for a segment, and their state, in the same order."""

    requests: list[_Request]
    state: State
    since: float


class RequestQueue:
    """Answers single samples from many threads, batching anew those that wait for the same segment.

    ``AdaptiveModel`` takes a batch to its end: what goes deep goes there in ever smaller batches. Here every segment
    has a queue of its own, and those who go on are batched anew at every exit. One thread runs the model; it never
    waits while anybody does.

    That thread is as fast as the main one only while the threads that submit keep no OpenMP threads of their own. These
    are let go with every ``submit`` (``openmp.release_idle_workers``); a thread that prepares images, too, should do so
    under ``torch.set_num_threads(1)``.

    Which segment runs: one with a full batch waiting, or otherwise any, the deepest of several. So nobody waits for a
    batch to fill while the model keeps up, and once it does not, deep batches fill. Those who have waited at an exit
    for ``max_wait`` come first.

    Args:
        model: an ``AdaptiveModel``, exported ones included; its policy and mode are used. Policies may be swapped:
            every request runs under the one that held when it was submitted.
        batch_size: most samples run at once.
        capacity: most samples in the queue, waiting or running; ``submit`` refuses more.
        max_wait: seconds after which a sample that waits behind an exit goes before full batches.

    Use it as a context manager, or call ``close``. Threads may share it; after a fork the child has to make its own.

    Example::

        with RequestQueue(AdaptiveModel(model, policy)) as requests:
            answers = [requests.submit(image, deadline=0.05) for image in images]
            labels = [answer.result().logits.argmax() for answer in answers]
    """

    def __init__(
        self, model: AdaptiveModel, *, batch_size: int = 8, capacity: int = 256, max_wait: float = 0.15
    ) -> None:
        if not isinstance(model, AdaptiveModel):
            raise TypeError(f"RequestQueue runs an AdaptiveModel, got {type(model).__name__}: wrap it with its policy.")
        if not 1 <= batch_size <= capacity or not max_wait >= 0:
            raise ValueError(
                f"expected 1 <= batch_size <= capacity and max_wait >= 0, got batch_size={batch_size}, "
                f"capacity={capacity}, max_wait={max_wait}."
            )
        self.model, self.batch_size, self.capacity, self.max_wait = model, batch_size, capacity, max_wait
        count = model.model.num_exits
        self._waiting: list[deque[_Chunk]] = [deque() for _ in range(count)]
        self._seconds = [0.0] * count  # of a batch lately, per segment
        self._batches, self._samples = [0] * count, [0] * count
        self._inside = self._answered = self._overdue = self._failed = 0
        self._closing = False
        # Guards all of the above; told whenever something of it changes that somebody may wait for.
        self._changed = threading.Condition()
        # Its own number, whatever others are told later.
        self._threads = torch.get_num_threads()
        release_idle_workers()
        self._thread = threading.Thread(target=self._work, name="exit_plugins.RequestQueue", daemon=True)
        self._thread.start()

    def submit(
        self, sample: Tensor, *, deadline: float | None = None, timeout: float | None = 0.0
    ) -> "Future[ExitOutput]":
        """Queue one sample and return the Future of its answer.

        Args:
            sample: an image (C, H, W) or clip (T, C, H, W), preprocessed, floating point. It is copied when it is run:
                leave it as it is until then.
            deadline: seconds from now after which the sample leaves with the deepest exit's answer there is. The first
                exit is always run. A segment that would end too late, judged by its last batches, is not begun.
            timeout: seconds to wait for a place in a full queue; None waits for as long as it takes.

        Returns:
            Future of an ``ExitOutput`` of one sample: logits (C,), exit_index () and confidence (). A cancelled one
            leaves the queue at its next exit; an error in the model is the Future's, and no other request's.

        Raises:
            ValueError: not a sample of the model, or a deadline that is not positive.
            queue.Full: there was no place within ``timeout``.
            RuntimeError: the queue is closed.
        """
        dimensions = sample_dimensions(self.model.model)
        if sample.ndim != len(dimensions):
            raise ValueError(f"submit takes one sample ({', '.join(dimensions)}), got shape {tuple(sample.shape)}.")
        if not sample.is_floating_point():
            raise ValueError(f"expected a sample normalised to floating point numbers, got {sample.dtype}.")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"a deadline is a positive number of seconds from now, got {deadline}.")
        until = float("inf") if deadline is None else time.monotonic() + deadline
        with self._changed:
            free = self._changed.wait_for(lambda: self._closing or self._inside < self.capacity, timeout)
            if self._closing:
                raise RuntimeError("this RequestQueue is closed.")
            if not free:
                raise Full(f"{self.capacity} requests are in the queue; try again later, or give it more capacity.")
            request = _Request(self.model.plan, until)
            self._waiting[0].append(_Chunk([request], sample.unsqueeze(0), time.monotonic()))
            self._inside += 1
            self._changed.notify_all()
        release_idle_workers()
        return request.future

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, finish those inside (with ``cancel`` only the batch that runs) and stop the thread."""
        with self._changed:
            self._closing = True
            if cancel:
                for queue in self._waiting:
                    for chunk in queue:
                        for request in chunk.requests:
                            request.future.cancel()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "RequestQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Samples inside, waiting or running."""
        return self._inside

    @property
    def statistics(self) -> QueueStatistics:
        with self._changed:
            done = (self._answered, self._overdue, self._failed)
            return QueueStatistics(tuple(self._batches), tuple(self._samples), *done)

    # Below runs in the queue's own thread.

    def _work(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            self._work_on()
        except BaseException as error:  # nobody shall wait for a thread that is gone
            with self._changed:
                self._closing = True
                left = [request for queue in self._waiting for chunk in queue for request in chunk.requests]
                self._waiting = [deque() for _ in self._waiting]
            for request in left:
                self._fail(request, RuntimeError(f"the RequestQueue stopped: {error!r}"))
            raise

    def _work_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or any(self._waiting))
                if not any(self._waiting):
                    return
                gone = self._remove_gone()
                index = self._choose()
                chunks = [] if index is None else self._take(index)
            for request in gone:
                self._answer(request)
            if index is not None and chunks:
                requests = [request for chunk in chunks for request in chunk.requests]
                with torch.inference_mode():
                    self._run(index, requests, _joined([chunk.state for chunk in chunks]))

    def _remove_gone(self) -> list[_Request]:
        """Take out those that were cancelled, and those whose next segment would end after their deadline."""
        now, gone = time.monotonic(), []
        for index, queue in enumerate(self._waiting):
            for place, chunk in enumerate(queue):
                leaves = [
                    r.future.cancelled() or (r.answer is not None and now + self._seconds[index] > r.deadline)
                    for r in chunk.requests
                ]
                if any(leaves):
                    gone += [request for request, leave in zip(chunk.requests, leaves, strict=True) if leave]
                    queue[place] = _rows(chunk, [row for row, leave in enumerate(leaves) if not leave])
            self._waiting[index] = deque(chunk for chunk in queue if chunk.requests)
        return gone

    def _choose(self) -> int | None:
        """The segment to run next, if anybody waits."""
        waiting = [index for index, queue in enumerate(self._waiting) if queue]
        if not waiting:
            return None
        now = time.monotonic()
        late = [index for index in waiting if index and now - self._waiting[index][0].since >= self.max_wait]
        full = [index for index in waiting if self._together(index) >= self.batch_size]
        return max(late or full or waiting)

    def _together(self, index: int) -> int:
        """How many of those who wait for a segment could run with the first of them."""
        queue = self._waiting[index]
        return sum(len(chunk.requests) for chunk in takewhile(partial(_alike, queue[0]), queue))

    def _take(self, index: int) -> list[_Chunk]:
        """The first waiting chunks that can run together: up to ``batch_size`` samples of one shape and policy."""
        queue, room = self._waiting[index], self.batch_size
        taken: list[_Chunk] = []
        while queue and room and (not taken or _alike(taken[0], queue[0])):
            chunk = queue.popleft()
            rows = range(len(chunk.requests))
            if len(rows) > room:
                queue.appendleft(_rows(chunk, rows[room:]))
                chunk = _rows(chunk, rows[:room])
            taken.append(chunk)
            room -= len(chunk.requests)
        return taken

    def _run(self, index: int, requests: list[_Request], state: State) -> None:
        """Run a segment; answer those that leave after it, and let the others wait for the next."""
        plan, started = requests[0].plan, time.monotonic()
        threshold, temperature = plan.exits[index]
        try:
            with self.model.running(_device(state)):
                begun = state if index else self.model.runner.begin_exits(self.model.checked(state))
                logits, after = self.model.runner.forward_exit(index, begun)
                sure = confidence(logits, plan.measure, temperature).float()
                stays = ~(sure >= threshold) if index < plan.last else torch.zeros_like(sure, dtype=torch.bool)
                keep = stays.nonzero()[:, 0]
                # The runner may write the next batch where this one's answers lie.
                logits, sure = self.model.result(logits), sure.clone()
                if len(keep):
                    after = select_samples(after, keep)
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
            else:  # whose fault it is fails alone
                for row, request in enumerate(requests):
                    self._run(index, [request], select_samples(state, torch.tensor([row], device=_device(state))))
            return
        if index == plan.last:
            self.model.report_nan(sure)
        now = time.monotonic()
        for row, request in enumerate(requests):
            request.answer = _Answer(logits, index, sure, row)
        staying = keep.tolist()
        with self._changed:
            seconds = now - started
            self._seconds[index] = 0.8 * self._seconds[index] + 0.2 * seconds if self._batches[index] else seconds
            self._batches[index] += 1
            self._samples[index] += len(requests)
            if staying:
                self._waiting[index + 1].append(_Chunk([requests[row] for row in staying], after, now))
        for request in (requests[row] for row in set(range(len(requests))).difference(staying)):
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        """The request leaves with the answer it has, or as cancelled."""
        # Only who was cancelled may have none: the first exit is always run.
        answer = None if request.future.cancelled() else request.answer
        with self._changed:
            self._inside -= 1
            if answer is not None:
                self._answered += 1
                self._overdue += answer.exit_index < request.plan.last and not (
                    float(answer.sure[answer.row]) >= request.plan.exits[answer.exit_index][0]
                )
            self._changed.notify_all()
        if answer is None:
            request.future.set_running_or_notify_cancel()
        else:
            with suppress(InvalidStateError):  # cancelled this very moment
                request.future.set_result(answer.output())

    def _fail(self, request: _Request, error: Exception) -> None:
        with self._changed:
            self._inside -= 1
            self._failed += 1
            self._changed.notify_all()
        with suppress(InvalidStateError):
            request.future.set_exception(error)


def _leaves(state: State) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def _device(state: State) -> torch.device:
    return _leaves(state)[0].device


def _rows(chunk: _Chunk, rows: Sequence[int]) -> _Chunk:
    """Some rows of a chunk."""
    index = torch.tensor(list(rows), dtype=torch.int64, device=_device(chunk.state))
    return _Chunk([chunk.requests[row] for row in rows], select_samples(chunk.state, index), chunk.since)


def _alike(one: _Chunk, other: _Chunk) -> bool:
    """Whether two chunks can be one batch: the same policy, and states that differ in the number of samples alone."""
    kinds = [[(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in _leaves(chunk.state)] for chunk in (one, other)]
    return one.requests[0].plan is other.requests[0].plan and kinds[0] == kinds[1]


def _joined(states: list[State]) -> State:
    """One state of several, in order."""
    if len(states) == 1:
        return states[0]
    specs = [pytree.tree_flatten(state) for state in states]
    leaves = [
        torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*(leaves for leaves, _ in specs), strict=True)
    ]
    return pytree.tree_unflatten(leaves, specs[0][1])
