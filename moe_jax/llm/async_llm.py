"""The engine on a thread of its own, for programs that serve many users with asyncio."""

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

Message = StreamEvent | Exception
"""An exception if the engine failed."""


class _Listener:
    """Takes what a job comes to from the engine's thread to the event loop of whoever asked."""

    def __init__(self, group: RequestGroup) -> None:
        self.group = group
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def broadcast(self, message: Message) -> None:
        with suppress(RuntimeError):  # the loop was closed, so nobody waits
            self._loop.call_soon_threadsafe(self.messages.put_nowait, message)


class AsyncLLM:
    """Requests from any number of coroutines, decoded together.

    `async with AsyncLLM(LLM(...)) as llm:`; the `LLM` must not be used otherwise meanwhile.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._listeners: dict[Hashable, _Listener] = {}
        """Of the requests that somebody waits for; the event loop's thread alone uses it."""
        self._running: dict[Generation, _Listener] = {}
        self._queue = OutputQueue()
        """These two, the engine's thread alone uses."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """What that thread is to do before its next step; `None` ends it."""
        self._numbers = count()
        self._is_open = True
        self._door = threading.Lock()
        """Held while a request comes in, or the last has come."""
        self._thread = threading.Thread(target=self._work, name="moe_jax engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: Hashable = None
    ) -> RequestOutput:
        """Continue one prompt, text or token ids. If the coroutine is cancelled, so is the request.

        Raises:
          RequestError: a prompt or parameters that cannot be served, or an id that is in use.
        """
        (group,) = self._llm.request_groups([prompt], params)
        async for _ in self._events(group, request_id):
            pass
        return group.output()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: Hashable = None
    ) -> AsyncIterator[StreamEvent]:
        """The tokens of one prompt as they come, from when somebody listens. Who stops listening cancels the request.

        Raises:
          RequestError: as `generate`; that the id is in use, when the first token is asked for.
        """
        (group,) = self._llm.request_groups([prompt], params)
        return self._events(group, request_id)

    def cancel(self, request_id: Hashable) -> None:
        """End a request: its pages are free before the next step is planned, and whoever waits for it gets what there
        is, with `cancelled` as the reason.

        Raises:
          RequestError: nobody waits for a request of this id.
        """
        if request_id not in self._listeners:
            raise RequestError(f"there is no request {request_id!r} to cancel: it has ended, or never was")
        group = self._listeners[request_id].group
        self._commands.put(lambda: self._cancel(group))

    def stats(self) -> Stats:
        """As `LLM.stats`."""
        return self._llm.stats()

    async def close(self) -> None:
        """Cancel what has not ended, and end the thread."""
        with self._door:
            self._is_open = False
            self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _listen(self, key: Hashable, group: RequestGroup) -> _Listener:
        if key in self._listeners:
            raise RequestError(f"there is a request {key!r} already: give each its own id")
        listener = _Listener(group)
        with self._door:
            if not self._is_open:
                raise RequestError("this AsyncLLM was closed, or its engine failed: make a new one")
            self._commands.put(lambda: self._begin(listener))
        self._listeners[key] = listener
        return listener

    async def _events(self, group: RequestGroup, id: Hashable) -> AsyncIterator[StreamEvent]:
        key = ("unnamed", next(self._numbers)) if id is None else id
        listener, ended = self._listen(key, group), 0
        try:
            for event in group.unasked:
                yield event
            while ended < group.samples:
                message = await listener.messages.get()
                if isinstance(message, Exception):
                    raise message
                ended += message.finish_reason is not None
                yield message
        finally:
            del self._listeners[key]
            self._commands.put(lambda: self._cancel(group))

    def _work(self) -> None:
        engine = self._llm.engine
        try:
            while self._run_commands(wait=not engine.has_work):
                engine.step()
                self._report()
        except Exception as error:  # whatever it is, those who wait must be told
            with self._door:  # after which nobody else comes
                self._is_open = False
                self._run_commands(wait=False)
            for listener in set(self._running.values()):
                listener.broadcast(error)
            return
        for generation in list(self._running):
            engine.cancel(generation)
        self._report()

    def _run_commands(self, *, wait: bool) -> bool:
        """Do what was asked since the last step. Whether to go on."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _begin(self, listener: _Listener) -> None:
        for generation in listener.group.begin(self._llm.ends, self._queue):
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
            listener.broadcast(listener.group.event(generation))
