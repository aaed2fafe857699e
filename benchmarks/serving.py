"""A server of axicon for the time of a block, as a user starts it, for the benchmarks that need one."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from measure import ROOT

from axicon.errors import AxiconError

MARK = "AXICON_BENCHMARK"
"""Environment variable that the server's processes inherit, which is how they are found."""


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    said: IO[str]
    port: int
    dashboard_port: int | None
    mark: str
    ready_s: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def output(self) -> str:
        """What it has said so far."""
        self.said.seek(0)
        return self.said.read()

    def token(self, limit_s: float = 10) -> str:
        """The file with the token of its Ray, which it names a moment after it answers."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            if found := re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", self.output()):
                return found[1]
            time.sleep(0.05)
        raise AxiconError("the server did not say where its token is")

    def processes(self) -> list[int]:
        """Ids of everything it started that still runs."""
        return marked(self.mark)

    def stop(self) -> float:
        """End it as Ctrl-C does. Returns the seconds it took."""
        begin = time.perf_counter()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(timeout=60)
        return time.perf_counter() - begin


def marked(mark: str) -> list[int]:
    """Processes whose environment holds the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # another user's, or just ended
    return found


@contextmanager
def serving(
    model: str, words: Sequence[str] = (), *, dashboard: bool = False, limit_s: float = 300
) -> Iterator[Serving]:
    """`axicon serve MODEL WORDS...` on a free port, from its first 200 on. Raises AxiconError if it does not
    come up.
    """
    mark, port = secrets.token_hex(8), free_port()
    dashboard_port = free_port() if dashboard else None
    command = [sys.executable, "-m", "jobs", "serve", model, f"port={port}", *words]
    if dashboard_port:
        command.append(f"dashboard_port={dashboard_port}")
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env={**os.environ, MARK: mark}, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT
        )
        server = Serving(process, said, port, dashboard_port, mark)
        try:
            _wait(server, began + limit_s)
            server.ready_s = time.perf_counter() - began
            yield server
        finally:
            server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: Serving, until: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.perf_counter() < until:
        if server.process.poll() is not None:
            raise AxiconError(f"the server ended: {server.output().strip()[-500:]}")
        try:
            with opener.open(f"{server.url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise AxiconError("the server did not answer in time; raise limit_s")
