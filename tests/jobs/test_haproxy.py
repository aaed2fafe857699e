"""HAProxy's pages for operators stay on this machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from jobs import cluster, haproxy

CONFIG = """global
    stats socket /x/admin.sock mode 666
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 0.0.0.0:8000
frontend grpc_frontend
    bind *:9000 proto h2
backend default_backend
    server a 10.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""


def test_pages_move_to_loopback_and_users_keep_their_frontend() -> None:
    binds = re.findall(r"bind (\S+)", haproxy.close_pages(CONFIG))
    assert binds == ["127.0.0.1:9101", "0.0.0.0:8000", "*:9000", "127.0.0.1:8404"]


def test_nothing_else_changes_and_twice_is_once() -> None:
    closed = haproxy.close_pages(CONFIG)
    assert haproxy.close_pages(closed) == closed
    assert [line for line in closed.splitlines() if "bind" not in line] == [
        line for line in CONFIG.splitlines() if "bind" not in line
    ]


def test_rays_own_template_holds_no_other_open_page() -> None:
    """If a new Ray binds something else to every interface, this fails."""
    from ray.serve._private import haproxy_templates

    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    for variable, port in {"config.metrics_port": "9101", "config.stats_port": "8404"}.items():
        template = template.replace(f"{{{{ {variable} }}}}", port)
    binds = [
        line.split("bind ")[1]
        for line in haproxy.close_pages(template).splitlines()
        if re.match(r"\s+bind ", line)
    ]
    assert [bind for bind in binds if not bind.startswith(("127.0.0.1:", "{{ config.", "{{config."))] == []
    assert {"127.0.0.1:9101", "127.0.0.1:8404"} <= set(binds)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Ray ships HAProxy for Linux")
def test_the_program_rewrites_the_file_and_becomes_haproxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)
    calls = []
    monkeypatch.setattr(haproxy, "end_with_parent", lambda: None)
    monkeypatch.setattr(haproxy.os, "execv", lambda binary, arguments: calls.append((binary, arguments)))
    monkeypatch.setattr(sys, "argv", ["axicon-haproxy", "-db", "-f", str(config), "-sf", "1"])
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere")
    haproxy.main()
    [(binary, arguments)] = calls
    assert Path(binary).name == "haproxy"
    assert arguments == [binary, "-db", "-f", str(config), "-sf", "1"]
    assert config.read_text() == haproxy.close_pages(CONFIG)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Ray ships HAProxy for Linux")
def test_it_is_installed_where_the_local_cluster_looks() -> None:
    found = cluster.proxy()
    assert found is not None
    assert found.name == "axicon-haproxy"
