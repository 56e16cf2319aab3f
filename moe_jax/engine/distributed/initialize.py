"""Join processes: JAX's own connection first, then a socket from the driver to each worker."""

from __future__ import annotations

import pickle
import secrets
import socket
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from moe_jax.engine.distributed.driver import Driver
from moe_jax.engine.distributed.process_group import ProcessGroup, SingleProcess
from moe_jax.engine.distributed.worker import Worker
from moe_jax.errors import ProcessGroupError

HEARTBEAT_TIMEOUT = 30
"""Seconds without a heartbeat after which JAX ends all processes: a machine that is lost closes no socket."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> ProcessGroup:
    """Join the processes that hold one mesh. Call it in each of them, before JAX is used.

    Without arguments, JAX detects the processes: SLURM, Open MPI, Kubernetes or a TPU pod.

    Args:
      coordinator: "HOST:PORT" at which the other processes reach process 0; any free port.
      processes: number of processes.
      process: number of this process, from 0.

    Raises:
      ProcessGroupError: only some of the three arguments were given, a number is out of range, JAX detects no
        processes, or JAX is in use already.
    """
    _check(coordinator, processes, process)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
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
    is_given = [value is not None for value in (coordinator, processes, process)]
    if any(is_given) and not all(is_given):
        raise ProcessGroupError(
            "give the coordinator, the number of processes and the number of this process together, or none of them"
        )
    if coordinator is None or processes is None or process is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ProcessGroupError(
            f"the coordinator must be the HOST:PORT of process 0, such as 10.0.0.1:1234, got {coordinator!r}"
        )
    if not 0 <= process < processes:
        raise ProcessGroupError(
            f"the number of this process must be from 0 to {processes - 1} for {processes} processes, got {process}"
        )


def _become_driver(host: str) -> Driver:
    key, others = secrets.token_bytes(32), jax.process_count() - 1
    family = socket.getaddrinfo(host, None)[0][0].name
    with Listener((host, 0), family, others, key) as listener:
        _broadcast(((host, listener.address[1]), family, key))
        workers: dict[Connection, int] = {}
        while len(workers) < others:
            with suppress(AuthenticationError, EOFError, OSError):  # a stranger's connection
                connection = listener.accept()
                workers[connection] = connection.recv()
    return Driver(workers)


def _become_worker() -> Worker:
    connection = Client(*_broadcast(None))
    connection.send(jax.process_index())
    return Worker(jax.process_index(), connection)


def _broadcast(content: Any) -> Any:
    """Return the content that process 0 gives, in every process. A collective."""
    pickled = np.frombuffer(pickle.dumps(content), np.uint8)
    size = broadcast_one_to_all(np.int32(pickled.size))
    return pickle.loads(broadcast_one_to_all(np.resize(pickled, int(size))).tobytes())


def _outward_address() -> str:
    """Return the address of this machine on the way to others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
