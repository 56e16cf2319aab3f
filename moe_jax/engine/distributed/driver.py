"""Driver: process 0, which takes the requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from moe_jax.engine.distributed.member import GRACE, Member, end
from moe_jax.engine.distributed.messages import MAX_BYTES, Shutdown, decode, encode
from moe_jax.errors import ProcessGroupError


class Driver(Member):
    """Process 0 of several."""

    is_driver = True

    def __init__(self, workers: Mapping[Connection, int]) -> None:
        """`workers` maps the connection of each worker to the worker's number."""
        super().__init__(0)
        self._workers = workers
        self._send_lock = threading.Lock()
        self._is_over = False
        threading.Thread(target=self._watch, daemon=True).start()

    def broadcast(self, message: Any) -> None:
        encoded = encode(message)
        with self._send_lock:
            for connection in self._workers:
                connection.send_bytes(encoded)

    def messages(self) -> Iterator[Any]:
        raise ProcessGroupError(
            "process 0 is the driver: call generate in process 0, and run_worker in the other processes"
        )

    def check_agreement(self, settings: Mapping[str, object]) -> None:
        self.broadcast(settings)

    def _watch(self) -> None:
        """Wait until a worker reports a shutdown, or dies."""
        connection = wait(self._workers)[0]
        assert isinstance(connection, Connection)
        shutdown = Shutdown.death(self._workers[connection])
        with suppress(EOFError, OSError, ProcessGroupError):
            received = decode(connection.recv_bytes(MAX_BYTES))
            shutdown = received if isinstance(received, Shutdown) else shutdown
        if not self._is_over:
            self._send_shutdown(shutdown)
            end(shutdown)

    def _leave(self) -> ProcessGroupError | None:
        self._is_over = True
        self.broadcast(None)

    def _send_shutdown(self, shutdown: Shutdown) -> None:
        """Send the shutdown, and wait until the workers are gone or `GRACE` is over.

        The end of process 0 ends JAX's coordination service, and JAX's clients in the workers then print long messages.
        """
        self._is_over = True
        until = time.monotonic() + GRACE
        if self._send_lock.acquire(timeout=GRACE):
            for connection in self._workers:
                with suppress(OSError):
                    connection.send_bytes(encode(shutdown))
        for connection in self._workers:
            with suppress(EOFError, OSError):
                while connection.poll(max(until - time.monotonic(), 0)):
                    connection.recv_bytes(MAX_BYTES)
