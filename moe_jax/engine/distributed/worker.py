"""Worker: a process that runs the driver's steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from moe_jax.engine.distributed.member import Member, end
from moe_jax.engine.distributed.messages import MAX_BYTES, Shutdown, decode, encode
from moe_jax.errors import ProcessGroupError


class Worker(Member):
    """Any of several processes but process 0."""

    is_driver = False

    def __init__(self, process: int, driver: Connection) -> None:
        super().__init__(process)
        self._driver = driver
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def broadcast(self, message: Any) -> None:
        raise ProcessGroupError(
            f"process {self.process} is a worker: call run_worker in this process, and everything else in process 0"
        )

    def messages(self) -> Iterator[Any]:
        yield from iter(self._inbox.get, None)
        self._inbox.put(None)

    def check_agreement(self, settings: Mapping[str, object]) -> None:
        expected = self._inbox.get()
        for name, value in settings.items():
            if value != expected[name]:
                raise ProcessGroupError(
                    f"process {self.process} was given {name} {value}, process 0 {expected[name]}: give all processes "
                    "the same arguments"
                )

    def _receive(self) -> None:
        """Put the driver's messages into the inbox, until the driver leaves or dies."""
        message: Any = Shutdown.death(0)
        with suppress(EOFError, OSError):
            while (message := self._read()) is not None and not isinstance(message, Shutdown):
                self._inbox.put(message)
                message = Shutdown.death(0)
        self._inbox.put(None) if message is None else end(message)

    def _read(self) -> Any:
        try:
            return decode(self._driver.recv_bytes(MAX_BYTES))
        except ProcessGroupError as error:
            return Shutdown(str(error))

    def _leave(self) -> ProcessGroupError | None:
        if self._inbox.get() is not None:
            return ProcessGroupError(
                f"process {self.process} left while process 0 was still running: call run_worker before leaving"
            )

    def _send_shutdown(self, shutdown: Shutdown) -> None:
        with suppress(OSError):
            self._driver.send_bytes(encode(shutdown))
