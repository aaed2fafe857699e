"""Talking to a cluster: which one, with which token, and what is said when it does not answer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from axicon.errors import AxiconError, RunFailed
from jobs import dashboard


class Handler(BaseHTTPRequestHandler):
    """Wants the token `right`; `/broken` fails, `/text` is no JSON."""

    def do_GET(self) -> None:
        code = 200 if self.headers.get("Authorization") == "Bearer right" else 401
        code = {"/broken": 500, "/nothing": 404}.get(self.path, code)
        body = b"<html>" if self.path == "/text" else json.dumps({"path": self.path}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_token_is_taken_from_where_ray_takes_it(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("usual\n")
    (tmp_path / "named").write_text("named\n")
    assert dashboard.find(address=url).token == "usual"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert dashboard.find(address=url).token == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    target = dashboard.find(address=url)
    assert target.get("/x") == {"path": "/x"}
    assert "right" not in repr(target)


@pytest.mark.parametrize(
    ("token", "says"),
    [("wrong", "the token from RAY_AUTH_TOKEN; unset RAY_AUTH_TOKEN and"), (None, "without a token;")],
)
def test_a_wrong_token_is_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch, token: str | None, says: str
) -> None:
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(AxiconError, match=f"refuses .*{says} name the file with its own"):
        dashboard.find(address=url).get("/x")


def test_nobody_there_is_one_line_with_the_way_out(free_port: int) -> None:
    with pytest.raises(AxiconError, match=r"no cluster answers at .*refused.*`axicon up`") as caught:
        dashboard.find(address=f"http://127.0.0.1:{free_port}").get("/x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/text", "/nothing"])
def test_someone_else_there_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with pytest.raises(AxiconError, match="is no dashboard of Ray"):
        dashboard.find(address=url).get(path)


def test_an_error_of_the_cluster_is_a_failure_of_the_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with pytest.raises(RunFailed, match="answers with an error \\(500"):
        dashboard.find(address=url).get("/broken")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "http://"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(AxiconError, match="give the URL of the dashboard"):
        dashboard.find(address=address)


def test_a_name_and_an_address_are_two_clusters() -> None:
    with pytest.raises(AxiconError, match="two clusters"):
        dashboard.find("one", "http://127.0.0.1:1")


def test_the_environment_is_that_of_one_cluster_and_is_restored(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    target = dashboard.find(address=url)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    before = dict(os.environ)
    with target.in_environment():
        assert "RAY_ADDRESS" not in os.environ
        assert os.environ["RAY_API_SERVER_ADDRESS"] == url
        assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("token", "right")
    assert dict(os.environ) == before
