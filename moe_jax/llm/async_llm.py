"""Engine on its own thread, for programs that serve many users with asyncio."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import suppress
from itertools import count
from typing import Any, Self

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, OutputQueue, Stats
from moe_jax.engine.outputs import RequestOutput, StreamEvent
from moe_jax.errors import RequestError
from moe_jax.llm.llm import LLM, Prompt
from moe_jax.llm.request_group import RequestGroup


class _Listener:
    """Carries the events of a request group from the engine's thread to the caller's event loop."""

    def __init__(self, group: RequestGroup) -> None:
        self.group = group
        self.events: asyncio.Queue[StreamEvent | Exception] = asyncio.Queue()
        """Events of the group; an exception if the engine failed."""
        self._loop = asyncio.get_running_loop()

    def send(self, event: StreamEvent | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class AsyncLLM:
    """Decode the requests of many coroutines together.

    Use it as `async with AsyncLLM(LLM(...)) as llm:`, and do not use the `LLM` directly meanwhile.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._listeners: dict[Hashable, _Listener] = {}
        """Listeners by request id; only the event loop's thread uses them."""
        self._running: dict[Generation, _Listener] = {}
        """Listeners of running samples; only the engine's thread uses them."""
        self._queue = OutputQueue()
        """Samples with new output; only the engine's thread uses the queue."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Functions that the engine's thread calls before its next step; None ends the thread."""
        self._numbers = count()
        self._is_open = True
        self._lock = threading.Lock()
        """Held while a request is accepted, and while the engine closes."""
        self._thread = threading.Thread(target=self._work, name="moe_jax engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: Hashable = None
    ) -> RequestOutput:
        """Continue one prompt. Cancelling the coroutine cancels the request.

        Args:
          prompt: text or token ids.
          params: sampling parameters.
          request_id: name of the request for `cancel`.

        Raises:
          RequestError: the prompt or the parameters cannot be served, or the id is in use.
        """
        (group,) = self._llm.request_groups([prompt], params)
        async for _ in self._events(group, request_id):
            pass
        return group.output()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: Hashable = None
    ) -> AsyncIterator[StreamEvent]:
        """Yield the tokens of one prompt as they are generated.

        The request begins when the iterator is first advanced. Closing the iterator cancels the request.

        Raises:
          RequestError: as for `generate`. An id in use is reported when the iterator is first advanced.
        """
        (group,) = self._llm.request_groups([prompt], params)
        return self._events(group, request_id)

    def cancel(self, request_id: Hashable) -> None:
        """Cancel a request: free its pages before the next step, and return its output so far to its caller, with the
        finish reason `cancelled`.

        Raises:
          RequestError: there is no running request of this id.
        """
        if request_id not in self._listeners:
            raise RequestError(f"there is no request {request_id!r} to cancel: it has ended, or never began")
        group = self._listeners[request_id].group
        self._commands.put(lambda: self._cancel(group))

    def stats(self) -> Stats:
        """Return the statistics of the engine, as `LLM.stats`."""
        return self._llm.stats()

    async def close(self) -> None:
        """Cancel the unfinished requests, and end the engine's thread."""
        with self._lock:
            self._is_open = False
            self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _listen(self, key: Hashable, group: RequestGroup) -> _Listener:
        if key in self._listeners:
            raise RequestError(f"there is a request {key!r} already: give each its own id")
        listener = _Listener(group)
        with self._lock:
            if not self._is_open:
                raise RequestError("this AsyncLLM was closed, or its engine failed: make a new AsyncLLM")
            self._commands.put(lambda: self._begin(listener))
        self._listeners[key] = listener
        return listener

    async def _events(self, group: RequestGroup, request_id: Hashable) -> AsyncIterator[StreamEvent]:
        key = ("unnamed", next(self._numbers)) if request_id is None else request_id
        listener, ended = self._listen(key, group), 0
        try:
            for event in group.empty_events:
                yield event
            while ended < group.samples:
                event = await listener.events.get()
                if isinstance(event, Exception):
                    raise event
                ended += event.finish_reason is not None
                yield event
        finally:
            del self._listeners[key]
            self._commands.put(lambda: self._cancel(group))

    def _work(self) -> None:
        engine = self._llm.engine
        try:
            while self._run_commands(wait=not engine.has_work):
                engine.step()
                self._report()
        except Exception as error:  # the callers must learn of any failure
            with self._lock:  # no request is accepted afterwards
                self._is_open = False
                self._run_commands(wait=False)
            for listener in set(self._running.values()):
                listener.send(error)
            return
        for generation in list(self._running):
            engine.cancel(generation)
        self._report()

    def _run_commands(self, *, wait: bool) -> bool:
        """Run the commands since the last step. Return False if the thread is to end."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _begin(self, listener: _Listener) -> None:
        for generation in listener.group.begin(self._queue):
            self._running[generation] = listener
            self._llm.engine.add(generation)

    def _cancel(self, group: RequestGroup) -> None:
        for generation in group.generations:
            self._llm.engine.cancel(generation)
        self._report()

    def _report(self) -> None:
        for generation in self._queue.read():
            has_ended = generation.finish_reason is not None
            listener = self._running.pop(generation) if has_ended else self._running[generation]
            listener.send(listener.group.event(generation))
