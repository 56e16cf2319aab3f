"""Engine on a thread of its own, for all callers.

The thread runs while there is work: it takes no memory of a model that nobody uses. Callers on any thread submit jobs
and receive what they ask for; an interrupt of a caller never interrupts a step. This is what vLLM's `EngineCore` does
in a process of its own.
"""

from __future__ import annotations

import atexit
import heapq
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakSet

from moe_jax.engine import Engine, Generation, OutputQueue
from moe_jax.errors import RequestError
from moe_jax.llm.request_group import RequestGroup

T = TypeVar("T")
Command = Callable[[], None]


class Job:
    """Request groups of one call, and the functions that receive their output. The engine's thread calls both."""

    def __init__(
        self,
        groups: Iterable[RequestGroup],
        report: Callable[[RequestGroup, Generation], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """
        Args:
          groups: groups that have samples.
          report: receives a sample whenever it has new output, or ends.
          fail: receives the error that ended the job.
        """
        self.report, self.fail = report, fail
        self.running: dict[Generation, RequestGroup] = {}
        """Samples that have begun and not ended."""
        in_order = sorted(groups, key=lambda group: -group.params.priority)
        self._waiting = deque((group, sample) for group in in_order for sample in range(group.samples))

    @property
    def has_waiting(self) -> bool:
        """True if samples have not begun."""
        return bool(self._waiting)

    @property
    def priority(self) -> int:
        """Priority of the next sample."""
        return self._waiting[0][0].params.priority

    def begin(self, queue: OutputQueue) -> Generation:
        """Make the generation of the next sample, which reports to `queue`."""
        group, sample = self._waiting.popleft()
        generation = group.begin(sample, queue)
        self.running[generation] = group
        return generation


class EngineLoop:
    """Run an engine for callers on many threads.

    Before each step, samples of all jobs begin one at a time: those of the highest priority first, and those of one
    priority from each job in turn.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._is_closed = False
        self._pid = os.getpid()
        self._lock = threading.RLock()
        """Held while the thread starts or ends, and while commands are added. The garbage collector may close a
        generator of `run` at any place, which adds a command."""
        self._commands: deque[Command] = deque()
        self._thread: threading.Thread | None = None
        self._queue = OutputQueue()
        self._jobs: dict[Generation, Job] = {}
        """Jobs of the running samples. Only the thread uses this attribute and the next."""
        self._beginning: list[tuple[int, int, Job]] = []
        """Heap of the jobs with samples that have not begun."""
        self._turns = count()
        _OPEN.add(self)

    @property
    def engine(self) -> Engine:
        """The engine. Other threads may read its statistics; `paused` gives it to them for more.

        Raises:
          RequestError: the loop is closed, or belongs to another process.
        """
        if os.getpid() != self._pid:
            raise RequestError(
                "this LLM belongs to the process that made it, and its devices do not follow a fork: make an LLM in "
                "the new process, and start processes with the method 'spawn'"
            )
        if self._is_closed or self._engine is None:
            raise RequestError("this LLM was closed: make a new one")
        return self._engine

    def run(
        self, groups: Sequence[RequestGroup], convert: Callable[[RequestGroup, Generation], T | None]
    ) -> Generator[T, None, None]:
        """Run request groups; yield `convert(group, sample)`, unless it is None, whenever a sample has new output.

        The engine's thread calls `convert`, since a sample that runs may change at any time. Closing the generator
        cancels the unfinished samples.
        """
        outputs: SimpleQueue[tuple[T | None, bool] | BaseException] = SimpleQueue()

        def report(group: RequestGroup, generation: Generation) -> None:
            converted, has_ended = convert(group, generation), generation.finish_reason is not None
            if has_ended or converted is not None:
                outputs.put((converted, has_ended))

        job, unfinished = Job(groups, report, outputs.put), sum(group.samples for group in groups)
        try:
            self.submit(job)
            while unfinished:
                output = outputs.get()
                if isinstance(output, BaseException):
                    raise output
                converted, has_ended = output
                unfinished -= has_ended
                if converted is not None:
                    yield converted
        finally:
            if unfinished:
                self.cancel(job)

    def finished(self, groups: Sequence[RequestGroup]) -> Iterator[RequestGroup]:
        """Run request groups; yield each group when all its samples have ended."""
        yield from (group for group in groups if not group.samples)
        unfinished = {group: group.samples for group in groups}
        for group in self.run(groups, _if_ended):
            unfinished[group] -= 1
            if not unfinished[group]:
                yield group

    def submit(self, job: Job) -> None:
        """Run a job.

        Raises:
          RequestError: see `engine`.
        """
        self._post(lambda: self._queue_job(job))

    def cancel(self, job: Job) -> None:
        """End the samples of a job before the next step. Do nothing if the loop is closed."""
        if not self._is_closed:  # at the end of the interpreter, nothing else may be touched
            with suppress(RequestError):
                self._post(lambda: self._cancel(job))

    @contextmanager
    def paused(self) -> Iterator[Engine]:
        """Give the engine to the caller between two steps.

        Raises:
          RequestError: see `engine`.
        """
        ready, done = threading.Event(), threading.Event()

        def pause() -> None:
            ready.set()
            done.wait()

        self._post(pause)
        try:
            ready.wait()
            yield self.engine
        finally:
            done.set()

    def close(self) -> None:
        """Cancel all requests, end the thread, and forget the engine. Closing again does nothing."""
        if os.getpid() != self._pid:  # the thread and its lock stay behind in the other process
            return
        with self._lock:
            self._is_closed, thread = True, self._thread
            if thread is not None:
                self._commands.append(self._close_all)
        if thread is not None:
            thread.join()
        self._engine = None

    def _post(self, command: Command) -> None:
        """Add a command for the thread, and start the thread if it does not run."""
        with self._lock:
            engine = self.engine
            self._commands.append(command)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(engine,), name="moe_jax engine", daemon=True)
                self._thread.start()

    def _run(self, engine: Engine) -> None:
        while self._run_commands(engine):
            try:
                self._begin_samples(engine)
                engine.step()
            except BaseException as error:  # the engine has reset itself; the callers must learn of any failure
                self._fail_all(error)
            self._report()

    def _run_commands(self, engine: Engine) -> bool:
        """Run all commands. Return False if there is no work left: the thread ends."""
        while True:
            with self._lock:
                if not self._commands:
                    has_work = bool(self._beginning) or engine.has_work
                    self._thread = self._thread if has_work else None
                    return has_work
                command = self._commands.popleft()
            command()

    def _queue_job(self, job: Job) -> None:
        if job.has_waiting:
            heapq.heappush(self._beginning, (-job.priority, next(self._turns), job))

    def _begin_samples(self, engine: Engine) -> None:
        """Begin as many samples as one plan of the scheduler can admit."""
        while self._beginning and engine.waiting < engine.max_admitted:
            *_, job = heapq.heappop(self._beginning)
            if job.has_waiting:
                generation = self._begin(job)
                try:
                    engine.add(generation)
                except RequestError as error:
                    job.fail(error)
                    self._cancel(job)
            self._queue_job(job)

    def _begin(self, job: Job) -> Generation:
        generation = job.begin(self._queue)
        self._jobs[generation] = job
        return generation

    def _report(self) -> None:
        """Give new output to the jobs."""
        for generation in self._queue.read():
            job = self._jobs[generation]
            group = job.running[generation]
            if generation.finish_reason is not None:
                del self._jobs[generation], job.running[generation]
            job.report(group, generation)

    def _cancel(self, job: Job) -> None:
        for generation in list(job.running):
            if self._engine is not None:
                self._engine.cancel(generation)
        while job.has_waiting:
            generation = self._begin(job)
            generation.finish("cancelled")
            generation.report()
        self._report()

    def _close_all(self) -> None:
        self._fail_all(RequestError("this LLM was closed while the request ran"))

    def _fail_all(self, error: BaseException) -> None:
        for job in dict.fromkeys([*self._jobs.values(), *(job for *_, job in self._beginning)]):
            job.fail(error)
            self._cancel(job)
        self._beginning.clear()


def _if_ended(group: RequestGroup, generation: Generation) -> RequestGroup | None:
    return group if generation.finish_reason is not None else None


_OPEN: WeakSet[EngineLoop] = WeakSet()


@atexit.register
def _close_all_loops() -> None:
    """End the threads before the interpreter does, which would stop them inside XLA and so abort the process."""
    for loop in list(_OPEN):
        loop.close()
