"""`LLM` for programs that serve many users with asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from contextlib import suppress
from itertools import count
from typing import Any, Self

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, Stats
from moe_jax.engine.outputs import RequestOutput, StreamEvent
from moe_jax.errors import RequestError
from moe_jax.llm.engine_loop import Job
from moe_jax.llm.llm import LLM
from moe_jax.llm.prompts import Prompt, as_prompts
from moe_jax.llm.request_group import RequestGroup


class _Listener:
    """Carries the events of a request group from the engine's thread to the caller's event loop."""

    def __init__(self, group: RequestGroup) -> None:
        self.job = Job([group], self._report, self._send)
        self.events: asyncio.Queue[StreamEvent | BaseException] = asyncio.Queue()
        """Events of the group; an exception if the engine failed."""
        self._loop = asyncio.get_running_loop()

    def _report(self, group: RequestGroup, generation: Generation) -> None:
        self._send(group.event(generation))

    def _send(self, event: StreamEvent | BaseException) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class AsyncLLM:
    """Decode the requests of many coroutines together.

    Use it as `async with AsyncLLM(LLM(...)) as llm:`. Other threads may use the `LLM` meanwhile.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._listeners: dict[Hashable, _Listener] = {}
        """Listeners by request id; only the event loop's thread uses them."""
        self._numbers = count()
        self._is_open = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: Hashable = None
    ) -> RequestOutput:
        """Continue one prompt. Cancelling the coroutine cancels the request.

        Args:
          prompt: one prompt, as for `LLM.generate`.
          params: sampling parameters.
          request_id: name of the request for `cancel`.

        Raises:
          RequestError: the prompt or the parameters cannot be served, or the id is in use.
        """
        group = await self._group(prompt, params)
        async for _ in self._events(group, request_id):
            pass
        return group.output()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: Hashable = None
    ) -> AsyncIterator[StreamEvent]:
        """Yield the tokens of one prompt as they are generated.

        The request is checked, and begins, when the iterator is first advanced. Closing the iterator cancels the
        request.

        Raises:
          RequestError: as for `generate`.
        """
        events = self._events(await self._group(prompt, params), request_id)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    def cancel(self, request_id: Hashable) -> None:
        """Cancel a request: free its pages before the next step, and return its output so far to its caller, with the
        finish reason `cancelled`.

        Raises:
          RequestError: there is no running request of this id.
        """
        if request_id not in self._listeners:
            raise RequestError(f"there is no request {request_id!r} to cancel: it has ended, or never began")
        self._llm.engine_loop.cancel(self._listeners[request_id].job)

    def stats(self) -> Stats:
        """Return the statistics of the engine, as `LLM.stats`."""
        return self._llm.stats()

    async def close(self) -> None:
        """Cancel the unfinished requests. The `LLM` stays open."""
        self._is_open = False
        for listener in self._listeners.values():
            self._llm.engine_loop.cancel(listener.job)

    async def _group(self, prompt: Prompt, params: SamplingParams | None) -> RequestGroup:
        """Check a request on another thread: a long prompt takes seconds to tokenize."""
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise RequestError(f"AsyncLLM takes one prompt a call, got {len(prompts)}: gather a call for each")
        (group,) = await asyncio.to_thread(self._llm.request_groups, prompts, params)
        return group

    async def _events(self, group: RequestGroup, request_id: Hashable) -> AsyncGenerator[StreamEvent, None]:
        key = ("unnamed", next(self._numbers)) if request_id is None else request_id
        if key in self._listeners:
            raise RequestError(f"there is a request {key!r} already: give each its own id")
        if not self._is_open:
            raise RequestError("this AsyncLLM was closed: make a new AsyncLLM of the same LLM")
        listener, unfinished = _Listener(group), group.samples
        self._listeners[key] = listener
        try:
            for event in group.empty_events:
                yield event
            self._llm.engine_loop.submit(listener.job)
            while unfinished:
                event = await listener.events.get()
                if isinstance(event, BaseException):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            del self._listeners[key]
            if unfinished:
                self._llm.engine_loop.cancel(listener.job)
