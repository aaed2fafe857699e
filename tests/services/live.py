"""A server on a loopback port, in a thread, without Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from axicon.recipe import ServeRecipe
from services.generation import GenerationServer
from services.ingress import make_api
from tests.services.fake_engine import FakeThread


class Live:
    """A running server, its address, and a client."""

    def __init__(self, server: GenerationServer, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    @property
    def fake(self) -> FakeThread:
        assert isinstance(self.server.thread, FakeThread)
        return self.server.thread

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> bool:
        """Whether `condition` came true in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.005)
        return condition()


@contextmanager
def serving(
    recipe: ServeRecipe | None = None,
    make_thread: Callable[[ServeRecipe], Any] = FakeThread,
    *,
    load: bool = True,
) -> Iterator[Live]:
    """Serve `recipe` until the block ends. With `load=False` the model never gets ready."""
    server = GenerationServer(recipe or ServeRecipe(), make_thread)
    # The protocol is named because asyncio sets TCP_NODELAY only where it is; without it every answer on a
    # kept connection waits 40 ms for an acknowledgement.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(make_api(lambda: server), log_config=None, lifespan="off", access_log=False)
    http = uvicorn.Server(config)

    async def main() -> None:
        if load:
            await server.start()
        try:
            await http.serve([sock])
        finally:
            if load:
                await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    live = Live(server, sock.getsockname()[1])
    try:
        assert live.wait_until(lambda: http.started, 60), "the server did not start"
        yield live
    finally:
        live.client.close()
        http.should_exit = True
        thread.join(10)
        sock.close()
    assert not thread.is_alive()
