"""Strangers at the driver's port delay no worker; workers and driver get errors in words."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest

from moe_jax.engine.distributed import messages
from moe_jax.engine.distributed.addresses import interface_of, split_address
from moe_jax.engine.distributed.messages import Greeting, Invitation
from moe_jax.engine.distributed.rendezvous import accept_workers, connect, listening
from moe_jax.errors import ProcessGroupError

KEY = bytes(range(32))
Stranger = Callable[[Invitation, threading.Event], None]
"""Connects, and holds the connection until the event if it can."""


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listening("127.0.0.1") as server:
        yield server


def invitation(server: socket.socket, key: bytes = KEY) -> Invitation:
    return Invitation("127.0.0.1", server.getsockname()[1], key)


def dial(where: Invitation) -> socket.socket:
    return socket.create_connection((where.host, where.port), timeout=10)


def says_nothing(where: Invitation, leave: threading.Event) -> None:
    with dial(where) as connection, suppress(OSError):
        connection.recv(1000)
        leave.wait()


def speaks_slowly(where: Invitation, leave: threading.Event) -> None:
    with dial(where) as connection, suppress(OSError):
        connection.send(struct.pack("!i", 200))
        while not leave.wait(0.05):
            connection.send(b"x")


def says(data: bytes) -> Stranger:
    def stranger(where: Invitation, _: threading.Event) -> None:
        with dial(where) as connection, suppress(OSError):
            connection.sendall(data)
            connection.recv(1000)

    return stranger


def has_a_wrong_key(where: Invitation, _: threading.Event) -> None:
    with pytest.raises(ProcessGroupError, match=r"cannot connect to process 0 at 127\.0\.0\.1:\d+ \(digest"):
        connect(replace(where, key=bytes(32)), 1)


STRANGERS: dict[str, Stranger] = {
    "silent": says_nothing,
    "slow": speaks_slowly,
    "http": says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "huge length": says(struct.pack("!i", 2**31 - 1)),
    "huge length of 64 bits": says(struct.pack("!iQ", -1, 2**63)),
    "breaks off": says(struct.pack("!i", 100) + b"x"),
    "wrong key": has_a_wrong_key,
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=list(STRANGERS))
def test_strangers_delay_no_worker(server: socket.socket, stranger: Stranger) -> None:
    where, leave = invitation(server), threading.Event()
    with ThreadPoolExecutor(8) as pool:
        try:
            accepted = pool.submit(accept_workers, server, KEY, 2, 30.0)
            strangers = [pool.submit(stranger, where, leave) for _ in range(3)]
            time.sleep(0.05)
            workers = [pool.submit(connect, where, process) for process in (2, 1)]
            assert sorted(accepted.result().values()) == [1, 2]
            assert [worker.result() is not None for worker in workers] == [True, True]
        finally:
            leave.set()
        for each in strangers:
            each.result()


def test_workers_that_do_not_come_are_named(server: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_workers, server, KEY, 3, 0.5)
        connect(invitation(server), 2)
        with pytest.raises(ProcessGroupError, match=r"processes 1, 3 did not connect to process 0 at 127\.0\.0\.1:\d+"):
            accepted.result()


def test_other_versions_are_refused_on_both_sides(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_workers, server, KEY, 1, 10.0)
        time.sleep(0.1)  # the driver has made its own greeting
        monkeypatch.setattr(Greeting, "of", lambda process: Greeting(process, "moe_jax 9 with JAX 9"))
        words = r"process 1 runs moe_jax 9 with JAX 9, process 0 moe_jax .* with JAX .*: install the same"
        with pytest.raises(ProcessGroupError, match=words):
            connect(invitation(server), 1)
        with pytest.raises(ProcessGroupError, match=words):
            accepted.result()


def test_the_port_is_closed_afterwards() -> None:
    with listening("127.0.0.1") as server:
        where, before = invitation(server), threading.active_count()
        with pytest.raises(ProcessGroupError, match="did not connect"):
            accept_workers(server, KEY, 1, 0.1)
    with pytest.raises(OSError):  # noqa: PT011
        dial(where)
    with pytest.raises(ProcessGroupError, match=r"process 1 cannot connect to process 0 at 127\.0\.0\.1"):
        connect(where, 1)
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.02)
    raise AssertionError("the accepting thread has not ended")


@pytest.mark.parametrize(
    ("host", "resolved", "expected"),
    [
        ("node7", "10.1.2.3", "10.1.2.3"),
        ("node7", "127.0.1.1", "192.168.0.5"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "::1"),
        ("node7", "fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_the_driver_listens_where_others_reach_it(
    monkeypatch: pytest.MonkeyPatch, host: str, resolved: str, expected: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", (resolved, 0))])
    monkeypatch.setattr("moe_jax.engine.distributed.addresses.outward", lambda: "192.168.0.5")
    assert interface_of(host) == expected


def test_addresses_with_brackets_and_unknown_names() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    with pytest.raises(ProcessGroupError, match=r"no machine is known as 'no\.such\.machine\.invalid'"):
        interface_of("no.such.machine.invalid")
    assert messages.MAX_BYTES <= 2**31
