"""Whether a server may and can listen where it is asked to, found out before anything is started."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

import psutil

from axicon.errors import AxiconError
from axicon.recipe import LocalServeRecipe


def check_address(recipe: LocalServeRecipe) -> None:
    """The endpoint's address and, if wanted, the dashboard's. Raises AxiconError."""
    keys = recipe.api_key_digests()
    try:
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(recipe.host, recipe.port, type=socket.SOCK_STREAM, flags=flags)
    except OSError:
        raise AxiconError(f"host={recipe.host}: no such address; give one of this machine") from None
    family, _, _, _, address = found[0]
    if not keys and not is_loopback(str(address[0])):
        raise AxiconError(
            f"host={recipe.host} can be reached by others, and no API keys are configured; "
            "name a variable that holds them with api_keys_env=, or serve on 127.0.0.1"
        )
    check_free("port", family, address)
    if recipe.dashboard_port == recipe.port:
        raise AxiconError(f"dashboard_port={recipe.port} is the endpoint's own port; give another")
    if recipe.dashboard_port is not None:
        check_free("dashboard_port", socket.AF_INET, ("127.0.0.1", recipe.dashboard_port))


def check_free(key: str, family: socket.AddressFamily, address: tuple[str | int | bytes, ...]) -> None:
    """Raises AxiconError, about the setting `key`, when nobody can listen at `address` now."""
    host, port = str(address[0]), int(address[1])
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
        except PermissionError:
            raise AxiconError(f"{key}={port}: only root may listen there; take one above 1023") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text = f"{key}={port} is in use{holder(port)}; stop that, or take another port"
            else:
                text = f"host={host}: cannot listen there ({error.strerror}); give an address of this machine"
            raise AxiconError(text) from None


def holder(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == "LISTEN" and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def is_loopback(address: str) -> bool:
    """Whether an IP address can be reached from this machine only."""
    return ipaddress.ip_address(address.removeprefix("::ffff:").partition("%")[0]).is_loopback


def only_this_machine(host: str) -> bool:
    """Whether a server that listens on `host`, a name or an address, is for this machine only."""
    try:
        return host == "localhost" or is_loopback(host)
    except ValueError:
        return False


def reachable(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
