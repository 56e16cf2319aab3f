"""Addresses of the processes, and the options that name them."""

from __future__ import annotations

import ipaddress
import socket

from moe_jax.errors import ProcessGroupError


def split_address(coordinator: str) -> tuple[str, int]:
    """Split "HOST:PORT", where an IPv6 host is in brackets.

    Raises:
      ProcessGroupError: the text has another form.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ProcessGroupError(
            f"the coordinator must be the HOST:PORT of process 0, such as 10.0.0.1:1234, got {coordinator!r}"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def interface_of(host: str) -> str:
    """Return the address of this machine by which others reach `host`, its name or address.

    Many machines give their own name an address such as 127.0.1.1, which no other machine reaches. The address on the
    way to other machines replaces it, unless `host` says loopback itself.

    Raises:
      ProcessGroupError: the name is not known.
    """
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ProcessGroupError(f"no machine is known as {host!r} ({error}): give the address of process 0") from error
    says_loopback = host == "localhost" or host == address
    return address if says_loopback or not ipaddress.ip_address(address.partition("%")[0]).is_loopback else outward()


def outward() -> str:
    """Return the address of this machine on the way to others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def with_port(host: str, port: int) -> str:
    """Join a host and a port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
