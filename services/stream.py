"""From the engine thread to the event loop: at most one wake-up per step, whatever the number of streams.

The engine thread calls `Mailbox.post` for every delta. The first one schedules a delivery on the loop, the
others of the same step ride along, so a step costs one `call_soon_threadsafe`. With many streams, tokens of a
few milliseconds travel together: every event takes time of the cores that also compute the next step. A
stream's first token and its end never wait. A `Stream` is the loop's end: what all choices of one HTTP
request have received and not yet sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from axicon.generate.request import Delta

GATHER_S = 0.0025
"""For each open stream, tokens may wait so long for those of the next step: 8 streams send every 20 ms, which
no reader sees, and one stream sends every token at once."""
LONGEST_GATHER_S = 0.03


class Stream:
    """The deltas of one HTTP request, read by one coroutine. Belongs to the event loop."""

    def __init__(self, ids: Sequence[str], on_close: Callable[[Stream], None]) -> None:
        self.ids = tuple(ids)
        self.opened = time.monotonic()
        self.last_read = self.opened
        """When the reader last came for more; a reader that went away without a word is found by this."""
        self.last_token: dict[str, float] = {}
        """When each choice last received a token."""
        self.unfinished = set(ids)
        self._waiting: list[Delta] = []
        self._arrived = asyncio.Event()
        self._failure: Exception | None = None
        self._on_close = on_close
        self._closed = False

    @property
    def pending(self) -> int:
        """Events nobody has read yet."""
        return len(self._waiting)

    def put(self, delta: Delta) -> None:
        if self._closed:
            return
        if delta.finish_reason is not None:
            self.unfinished.discard(delta.request_id)
        last = self._waiting[-1] if self._waiting else None
        # An end keeps an event of its own: it may be an error, which takes the place of text.
        if last is not None and last.request_id == delta.request_id and delta.finish_reason is None:
            self._waiting[-1] = last.followed_by(delta)
        else:
            self._waiting.append(delta)
        self._arrived.set()

    def fail(self, failure: Exception) -> None:
        """End the stream with an error, which `read` raises once what came before is read."""
        self._failure = failure
        self._arrived.set()

    async def read(self) -> list[Delta]:
        """Everything that has arrived, waiting for at least one delta; empty once all choices are
        finished."""
        self.last_read = time.monotonic()
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            if not self.unfinished:
                return []
            self._arrived.clear()
            await self._arrived.wait()
        deltas, self._waiting = self._waiting, []
        self.last_read = time.monotonic()
        return deltas

    def close(self) -> None:
        """Give up what is unfinished. Must be called exactly when the answer ends, for whatever reason."""
        if not self._closed:
            self._closed = True
            self._on_close(self)


class Mailbox:
    """Carries deltas from the engine thread to the streams of one event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, observe: Callable[[Stream, Delta], None] = lambda *_: None
    ) -> None:
        """`observe` sees every delta on the loop, just before its stream gets it."""
        self._loop = loop
        self._observe = observe
        self._lock = threading.Lock()
        self._posted: list[Delta] = []
        self._scheduled = False
        self._delivered = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._streams: dict[str, Stream] = {}
        self.wakeups = 0

    def attach(self, stream: Stream) -> None:
        for name in stream.ids:
            self._streams[name] = stream

    def detach(self, stream: Stream) -> None:
        for name in stream.ids:
            self._streams.pop(name, None)

    @property
    def streams(self) -> set[Stream]:
        return set(self._streams.values())

    def post(self, delta: Delta) -> None:
        """Called by the engine thread. Never blocks on the loop."""
        with self._lock:
            self._posted.append(delta)
            if self._scheduled or not self._is_due(delta):
                return
            self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return  # The loop is closed: nobody is left to read.

    def _is_due(self, delta: Delta) -> bool:
        first = delta.completion_tokens <= len(delta.tokens)
        return first or delta.finish_reason is not None or self._rested >= self._gather

    @property
    def _gather(self) -> float:
        """Seconds that deltas may wait for others."""
        return min(GATHER_S * len(self._streams), LONGEST_GATHER_S)

    @property
    def _rested(self) -> float:
        """Seconds since the last delivery."""
        return time.monotonic() - self._delivered

    def _deliver(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            posted, self._posted = self._posted, []
            self._scheduled = False
            self._delivered = time.monotonic()
        if not posted:
            return
        # Deliveries follow the steps, so as not to fall into the next one; but a step can take long.
        self._timer = self._loop.call_later(2 * self._gather, self._deliver)
        self.wakeups += 1
        for delta in posted:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                self._observe(stream, delta)
                stream.put(delta)


class EventStream(StreamingResponse):
    """Server-sent events whose end, however it comes, closes the stream: a client that leaves before the
    first byte never starts the generator, so its own `finally` would not run."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stream: Stream) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
