"""Connections from the driver to the workers: mutual proof of a shared key, then a greeting with versions.

Anybody may connect to the driver's port. Each connection is served by a thread of its own, so that one that says
nothing, or speaks slowly, delays nobody; and it must prove the key before anything it says is read.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from queue import Empty, SimpleQueue

from moe_jax.engine.distributed.addresses import with_port
from moe_jax.engine.distributed.messages import Greeting, Invitation, Shutdown, Welcome, decode, encode
from moe_jax.errors import ProcessGroupError

TIMEOUT = 60.0
"""Seconds for all workers to connect."""
MAX_GREETING_BYTES = 4096
Newcomers = SimpleQueue[tuple[Connection, Greeting]]


@contextmanager
def listening(host: str) -> Iterator[socket.socket]:
    """Listen on one interface, on a free port."""
    with socket.create_server((host, 0), family=_family(host)) as server:
        try:
            yield server
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def accept_workers(
    server: socket.socket, key: bytes, others: int, timeout: float = TIMEOUT
) -> Mapping[Connection, int]:
    """Wait until all workers have connected; return the connection of each and its number.

    Raises:
      ProcessGroupError: a worker has other versions, or does not connect in time.
    """
    newcomers: Newcomers = SimpleQueue()
    threading.Thread(target=_accept, args=(server, key, newcomers), daemon=True).start()
    workers: dict[Connection, int] = {}
    expected, until = Greeting.of(0).versions, time.monotonic() + timeout
    while len(workers) < others:
        try:
            connection, greeting = newcomers.get(timeout=max(until - time.monotonic(), 0.001))
        except Empty:
            missing = sorted(set(range(1, others + 1)) - set(workers.values()))
            raise ProcessGroupError(
                f"processes {', '.join(map(str, missing))} did not connect to process 0 at "
                f"{with_port(*server.getsockname()[:2])} within {timeout:.0f} s: check that no firewall is between the "
                "machines"
            ) from None
        if greeting.versions != expected:
            error = f"process {greeting.process} runs {greeting.versions}, process 0 {expected}: install the same"
            connection.send_bytes(encode(Shutdown(error)))
            raise ProcessGroupError(error)
        if 0 < greeting.process <= others and greeting.process not in workers.values():
            connection.send_bytes(encode(Welcome()))
            workers[connection] = greeting.process
    return workers


def connect(invitation: Invitation, process: int) -> Connection:
    """Connect a worker to the driver.

    Raises:
      ProcessGroupError: the driver is not reached, does not know the key, or refuses the worker.
    """
    where = with_port(invitation.host, invitation.port)
    try:
        family = _family(invitation.host).name
        connection = Client((invitation.host, invitation.port), family, invitation.key)
        connection.send_bytes(encode(Greeting.of(process)))
        if not connection.poll(TIMEOUT):
            raise TimeoutError(f"no answer within {TIMEOUT:.0f} s")
        answer = decode(connection.recv_bytes(MAX_GREETING_BYTES))
    except (AuthenticationError, EOFError, OSError) as error:
        raise ProcessGroupError(
            f"process {process} cannot connect to process 0 at {where} ({error or type(error).__name__}): check that "
            "no firewall is between the machines"
        ) from error
    if not isinstance(answer, Welcome):
        raise ProcessGroupError(answer.reason if isinstance(answer, Shutdown) else f"unknown answer {answer!r}")
    return connection


def _accept(server: socket.socket, key: bytes, newcomers: Newcomers) -> None:
    """Serve each connection by a thread, until the server is closed."""
    with suppress(OSError):
        while True:
            accepted, _ = server.accept()
            connection = Connection(accepted.detach())
            threading.Thread(target=_greet, args=(connection, key, newcomers), daemon=True).start()


def _greet(connection: Connection, key: bytes, newcomers: Newcomers) -> None:
    """Read the greeting of a worker; close the connection of a stranger."""
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        greeting = decode(connection.recv_bytes(MAX_GREETING_BYTES))
        if not isinstance(greeting, Greeting):
            raise ProcessGroupError("no greeting")
        newcomers.put((connection, greeting))
    except (AuthenticationError, EOFError, OSError, ProcessGroupError):
        connection.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]
