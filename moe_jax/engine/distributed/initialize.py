"""Join processes: JAX's own connection first, then a socket from the driver to each worker."""

from __future__ import annotations

import secrets

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from moe_jax.engine.distributed.addresses import interface_of, outward, split_address, with_port
from moe_jax.engine.distributed.driver import Driver
from moe_jax.engine.distributed.messages import Invitation, decode, encode
from moe_jax.engine.distributed.process_group import ProcessGroup, SingleProcess
from moe_jax.engine.distributed.rendezvous import accept_workers, connect, listening
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
    bind, address = None, None
    if coordinator is not None and process == 0:
        host, port = split_address(coordinator)
        address = interface_of(host)
        bind = with_port(address, port)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            coordinator_bind_address=bind,
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
    return _become_driver(address or outward()) if jax.process_index() == 0 else _become_worker()


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    is_given = [value is not None for value in (coordinator, processes, process)]
    if any(is_given) and not all(is_given):
        raise ProcessGroupError(
            "give the coordinator, the number of processes and the number of this process together, or none of them"
        )
    if coordinator is None or processes is None or process is None:
        return
    split_address(coordinator)
    if not 0 <= process < processes:
        raise ProcessGroupError(
            f"the number of this process must be from 0 to {processes - 1} for {processes} processes, got {process}"
        )


def _become_driver(host: str) -> Driver:
    key = secrets.token_bytes(32)
    with listening(host) as server:
        _broadcast(Invitation(host, server.getsockname()[1], key))
        return Driver(accept_workers(server, key, jax.process_count() - 1))


def _become_worker() -> Worker:
    invitation = _broadcast(None)
    return Worker(jax.process_index(), connect(invitation, jax.process_index()))


def _broadcast(invitation: Invitation | None) -> Invitation:
    """Return the invitation that process 0 gives, in every process. A collective."""
    encoded = np.frombuffer(encode(invitation), np.uint8)
    size = broadcast_one_to_all(np.int32(encoded.size))
    return decode(broadcast_one_to_all(np.resize(encoded, int(size))).tobytes())
