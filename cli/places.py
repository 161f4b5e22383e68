"""Addresses of machines that run a plan together: which of this machine's is the one the others see."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys

from ..errors import LaunchError

_ADDRESS_OF = 0x8915
"""Linux: the ioctl SIOCGIFADDR, IPv4 address of an interface."""


def split_endpoint(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, brackets of an IPv6 address removed; raises LaunchError."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"--rdzv-endpoint {text}: expected HOST:PORT, such as node0:29500")
    return host.removeprefix("[").removesuffix("]"), int(port)


def local_address(endpoint: str) -> str | None:
    """This machine's address on the way to HOST:PORT; None where there is no way, or it stays inside this machine.

    The name of a machine often resolves to a loopback address on the machine itself, and is then of no use to others. Nothing is
    sent: a datagram socket only looks up the route.
    """
    host, port = split_endpoint(endpoint)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            found = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if ipaddress.ip_address(found.partition("%")[0]).is_loopback else found


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where there is none, or the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
