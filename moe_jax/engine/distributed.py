"""Several processes, on one machine or many, that hold one mesh: process 0 leads, the others do what they are told.

Before any of them has its devices do something, process 0 tells the others, over a socket to each. The sockets also say
who has died: the kernel closes those of a process that is killed, and a thread in each of the others waits for that, as
the main thread may be waiting for a collective that will never end.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, Self

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from moe_jax.errors import MoEJaxError, ProcessGroupError

SILENCE = 30
"""Seconds after which JAX ends all processes if one gives no sign of life: a machine lost, which closes no socket."""
GRACE = 5
"""Seconds in which a death is told of before its consequences are: a collective that fails, a socket that is closed."""


@dataclass(frozen=True)
class Shutdown:
    """Why a process ends before its time, and so all do."""

    reason: str
    status: int = 1

    def end(self) -> NoReturn:
        """End this process at once: JAX's own way to end waits for all processes, and the main thread may be stuck."""
        print(f"moe-jax: {self.reason}", file=sys.stderr, flush=True)
        os._exit(self.status)


class ProcessGroup(ABC):
    """What one process knows of the others. A context manager: those who leave it normally wait for each other, and an
    error that leaves it is printed and ends all processes."""

    is_driver: bool
    """Whether requests are given to this process."""

    @abstractmethod
    def broadcast(self, order: Any) -> None:
        """Have all others get it from their `orders`."""

    @abstractmethod
    def orders(self) -> Iterator[Any]:
        """What is told to this process, until there is nothing left to do."""

    @abstractmethod
    def check_agreement(self, facts: Mapping[str, object]) -> None:
        """Raise `ProcessGroupError` in a process where they read otherwise than in process 0."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SingleProcess(ProcessGroup):
    """A process without others."""

    is_driver = True

    def broadcast(self, order: Any) -> None:
        pass

    def orders(self) -> Iterator[Any]:
        raise ProcessGroupError("this process is the only one, there is nobody to follow: call generate")

    def check_agreement(self, facts: Mapping[str, object]) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _MultiProcess(ProcessGroup):
    """One of several processes."""

    def __init__(self, process: int) -> None:
        self.process = process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        error = error or self._leave()
        if error is not None:
            self._fail(error)
        jax.distributed.shutdown()  # waits for all

    @abstractmethod
    def _leave(self) -> ProcessGroupError | None:
        """All is done, or should be."""

    @abstractmethod
    def _part(self, farewell: Shutdown) -> None:
        """Say it to the others, as far as they can hear it."""

    def _fail(self, error: BaseException) -> NoReturn:
        if not isinstance(error, MoEJaxError):
            time.sleep(GRACE)  # perhaps somebody has died, and the watching thread ends this process
        mistake = isinstance(error, MoEJaxError | OSError)
        if not mistake:
            traceback.print_exception(error)
        sys.stdout.flush()
        status = 2 if mistake else 1
        self._part(Shutdown(f"process {self.process} has ended: {type(error).__name__}: {error}", status))
        Shutdown(str(error) or type(error).__name__, status).end()


class Driver(_MultiProcess):
    """Process 0."""

    is_driver = True

    def __init__(self, followers: Mapping[Connection, int]) -> None:
        """`followers` are the processes at the other ends."""
        super().__init__(0)
        self._followers = followers
        self._sending = threading.Lock()
        self._over = False
        threading.Thread(target=self._watch, daemon=True).start()

    def broadcast(self, order: Any) -> None:
        told = pickle.dumps(order)
        with self._sending:
            for connection in self._followers:
                connection.send_bytes(told)

    def orders(self) -> Iterator[Any]:
        raise ProcessGroupError("process 0 leads and the others follow: call generate here, and follow there")

    def check_agreement(self, facts: Mapping[str, object]) -> None:
        self.broadcast(facts)

    def _watch(self) -> None:
        """Wait until a follower says farewell, or dies."""
        connection = wait(self._followers)[0]
        assert isinstance(connection, Connection)
        farewell = _death(self._followers[connection])
        with suppress(EOFError, OSError):
            farewell = connection.recv()
        if not self._over:
            self._part(farewell)
            farewell.end()

    def _leave(self) -> ProcessGroupError | None:
        self._over = True
        self.broadcast(None)

    def _part(self, farewell: Shutdown) -> None:
        """The others are given time to hear it before JAX finds this process gone, of which it speaks at length."""
        self._over = True
        until = time.monotonic() + GRACE
        if self._sending.acquire(timeout=GRACE):
            for connection in self._followers:
                with suppress(OSError):
                    connection.send(farewell)
        for connection in self._followers:
            with suppress(EOFError, OSError):
                while connection.poll(max(until - time.monotonic(), 0)):
                    connection.recv()


class Worker(_MultiProcess):
    """Any process but 0."""

    is_driver = False

    def __init__(self, process: int, leader: Connection) -> None:
        super().__init__(process)
        self._leader = leader
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def broadcast(self, order: Any) -> None:
        raise ProcessGroupError(
            f"process {self.process} does what process 0 tells it: call follow here, and all else there"
        )

    def orders(self) -> Iterator[Any]:
        yield from iter(self._inbox.get, None)
        self._inbox.put(None)

    def check_agreement(self, facts: Mapping[str, object]) -> None:
        theirs = self._inbox.get()
        for name, here in facts.items():
            if here != theirs[name]:
                raise ProcessGroupError(f"process {self.process} was given {name} {here}, process 0 {theirs[name]}")

    def _listen(self) -> None:
        """Hear what process 0 says, until it is done or dies."""
        told: Any = _death(0)
        with suppress(EOFError, OSError):
            while (told := self._leader.recv()) is not None and not isinstance(told, Shutdown):
                self._inbox.put(told)
                told = _death(0)
        self._inbox.put(None) if told is None else told.end()

    def _leave(self) -> ProcessGroupError | None:
        if self._inbox.get() is not None:
            return ProcessGroupError(f"process {self.process} left while process 0 went on: call follow before")

    def _part(self, farewell: Shutdown) -> None:
        with suppress(OSError):
            self._leader.send(farewell)


def _death(process: int) -> Shutdown:
    return Shutdown(f"process {process} has died, so all end: start them again; what is written is kept")


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> ProcessGroup:
    """Join the processes that hold one mesh; to be called in each of them, before JAX is used.

    Args:
      coordinator: "HOST:PORT" of process 0, at which the others reach it; any free port. By default, with the two
        below, what JAX detects: SLURM, Open MPI, Kubernetes, a TPU pod.
      processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      ProcessGroupError: only some of the three are given, a number out of range, no cluster detected, or JAX in use.
    """
    _check(coordinator, processes, process)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessGroupError(
            f"the processes cannot be joined ({error}): give coordinator, processes and process where JAX detects no "
            "cluster, and join before JAX is used"
        ) from error
    if jax.process_count() == 1:
        return SingleProcess()
    host = coordinator.rpartition(":")[0].strip("[]") if coordinator else _outward_address()
    return _become_driver(host) if jax.process_index() == 0 else _become_worker()


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    counts = [value is not None for value in (coordinator, processes, process)]
    if any(counts) and not all(counts):
        raise ProcessGroupError(
            "give the coordinator, the number of processes and the number of this one together, or none"
        )
    if coordinator is None or processes is None or process is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ProcessGroupError(f"the coordinator is the HOST:PORT of process 0, got {coordinator!r}")
    if not 0 <= process < processes:
        raise ProcessGroupError(f"of {processes} processes the numbers go from 0 to {processes - 1}, got {process}")


def _become_driver(host: str) -> Driver:
    key, others = secrets.token_bytes(32), jax.process_count() - 1
    family = socket.getaddrinfo(host, None)[0][0].name
    with Listener((host, 0), family, others, key) as listener:
        _broadcast(((host, listener.address[1]), family, key))
        followers: dict[Connection, int] = {}
        while len(followers) < others:
            with suppress(AuthenticationError, EOFError, OSError):  # a stranger's
                connection = listener.accept()
                followers[connection] = connection.recv()
    return Driver(followers)


def _become_worker() -> Worker:
    connection = Client(*_broadcast(None))
    connection.send(jax.process_index())
    return Worker(jax.process_index(), connection)


def _broadcast(content: Any) -> Any:
    """What process 0 gives, on all."""
    written = np.frombuffer(pickle.dumps(content), np.uint8)
    size = broadcast_one_to_all(np.int32(written.size))
    return pickle.loads(broadcast_one_to_all(np.resize(written, int(size))).tobytes())


def _outward_address() -> str:
    """The address of this machine on the way to others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
