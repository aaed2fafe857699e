"""Where `axicon serve` may and can listen."""

from __future__ import annotations

import os
import socket

import pytest

from axicon.errors import AxiconError
from axicon.recipe import LocalServeRecipe
from jobs import address


def recipe(**values: object) -> LocalServeRecipe:
    return LocalServeRecipe.model_validate(values)


def test_a_free_loopback_port_is_fine(free_port: int) -> None:
    address.check_address(recipe(port=free_port))
    address.check_address(recipe(port=free_port, host="localhost"))


def test_a_port_in_use_names_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            AxiconError, match=rf"port={port} is in use by .*process {os.getpid()}.*another port"
        ):
            address.check_address(recipe(port=port))


def test_a_port_that_was_just_closed_is_not_in_use(free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)) as server:
        client = socket.create_connection(("127.0.0.1", free_port))
        accepted, _ = server.accept()
        accepted.close()  # this side waits out its time now
        client.close()
    address.check_address(recipe(port=free_port))


def test_an_address_of_another_machine_is_refused(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "secret")
    with pytest.raises(AxiconError, match=r"host=198\.51\.100\.1: cannot listen there"):
        address.check_address(recipe(host="198.51.100.1", port=free_port, api_keys_env="KEYS"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_let_in_only_with_keys(host: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AxiconError, match="no API keys are configured"):
        address.check_address(recipe(host=host, port=free_port))
    monkeypatch.setenv("KEYS", "secret")
    address.check_address(recipe(host=host, port=free_port, api_keys_env="KEYS"))


def test_a_name_that_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(AxiconError, match="host=nowhere: no such address"):
        address.check_address(recipe(host="nowhere"))


def test_the_dashboard_needs_a_free_port_of_its_own(free_port: int) -> None:
    with pytest.raises(AxiconError, match=f"dashboard_port={free_port} is the endpoint's own port"):
        address.check_address(recipe(port=free_port, dashboard_port=free_port))
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(AxiconError, match=f"dashboard_port={taken} is in use"):
            address.check_address(recipe(port=free_port, dashboard_port=taken))


@pytest.mark.parametrize(
    ("ip", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
     ("fe80::1%lo", False), ("0.0.0.0", False),
     ("::", False), ("192.0.2.1", False), ("::ffff:192.0.2.1", False)],
)  # fmt: skip
def test_what_is_loopback(ip: str, loopback: bool) -> None:
    assert address.is_loopback(ip) is loopback
