"""`axicon serve` as a person runs it: from a command to an answer, and back to a machine without a trace.

Two servers run beside each other, one without keys and one with, and end in two ways.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import cluster, reaper
from jobs.address import is_loopback

pytestmark = [pytest.mark.ray, pytest.mark.slow]

AXICON = Path(sysconfig.get_path("scripts")) / "axicon"
READY_S = 200.0


class Server:
    """One `axicon serve` in a session and a temporary folder of its own."""

    def __init__(self, *words: str, **env: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="axt"))
        [self.port] = cluster.free_ports(1)
        command = [str(AXICON), "serve", "demo", f"port={self.port}", "threads=1", "kv_gib=0.25", *words]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST"))}
        with (self.folder / "said").open("w") as said:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
                env=kept | {"TMPDIR": str(self.folder)} | env,
            )
        self.line = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.line = self.line or line

    def wait(self) -> str:
        """The ready line."""
        deadline = time.monotonic() + READY_S
        while not self.line:
            assert self.process.poll() is None, (self.folder / "said").read_text()
            assert time.monotonic() < deadline, "not ready"
            time.sleep(0.1)
        return self.line

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def ask(self, key: str | None = None) -> dict[str, object]:
        body = {"prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def remove(self) -> None:
        with contextlib.suppress(psutil.Error):
            reaper.end(self.processes())
        self.process.wait()
        self.reader.join()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    made: list[Server] = []
    try:
        made.append(Server())
        made.append(Server("api_keys_env=KEYS", KEYS="secret"))
        for server in made:
            server.wait()
        yield made[0], made[1]
    finally:
        for server in made:
            server.remove()


@pytest.mark.timeout(300)
def test_both_answer_and_the_keyed_one_only_with_its_key(servers: tuple[Server, Server]) -> None:
    free, keyed = servers
    assert free.wait().startswith("SmolLM2-135M-Instruct is ready after ")
    text = free.ask()["choices"][0]["text"]  # type: ignore[index]
    assert "four" in text
    with pytest.raises(urllib.error.HTTPError) as caught:
        keyed.ask()
    with caught.value:
        assert caught.value.code == 401
    assert keyed.ask("secret")["choices"][0]["text"] == text  # type: ignore[index]


def test_nothing_they_started_can_be_reached_from_other_machines(servers: tuple[Server, Server]) -> None:
    ours = {process.pid for server in servers for process in server.processes()}
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in ours]
    assert {server.port for server in servers} <= {c.laddr.port for c in listening}
    assert [str(c.laddr) for c in listening if not is_loopback(c.laddr.ip)] == []


def test_the_token_and_the_folder_are_for_this_user_alone(servers: tuple[Server, Server]) -> None:
    for server in servers:
        [folder] = server.folder.glob("ax-*")
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "token").stat().st_mode & 0o077 == 0
    tokens = {(next(server.folder.glob("ax-*")) / "token").read_text() for server in servers}
    assert len(tokens) == 2


def test_sigint_ends_all_of_it_with_exit_code_0(servers: tuple[Server, Server]) -> None:
    server, other = servers
    processes = server.processes()
    assert len(processes) > 5
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0
    assert [p for p in processes if p.is_running()] == []
    assert list(server.folder.glob("ax-*")) == []
    assert (server.folder / "said").read_text().splitlines()[-1] == "stopped"
    assert other.ask("secret")["choices"], "the other server was hit"


def test_even_a_killed_command_takes_all_of_it_along(servers: tuple[Server, Server]) -> None:
    _, server = servers
    processes = server.processes()
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    assert list(server.folder.glob("ax-*")) == []
