"""GenerationServer: one engine, and everything about it that HTTP does not need to know.

All torch work, loading included, happens in the engine's own thread. The event loop tokenizes, hands requests
over and hands deltas out; it never calls torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from axicon.errors import AxiconError
from axicon.generate.request import (
    Delta,
    KVSettings,
    Limits,
    Overloaded,
    Request,
    RequestError,
    Speculation,
)
from axicon.model.presence import living, present
from axicon.recipe import ServeRecipe
from services.adapters import Adapters
from services.auth import Access
from services.errors import ApiError
from services.metrics import Metrics
from services.plan import Served
from services.stream import Mailbox, Stream
from services.text import Text

if TYPE_CHECKING:
    from axicon.generate.engine import Engine
    from axicon.generate.thread import EngineThread

log = logging.getLogger("axicon")

WATCH_S = 0.5
"""How often the event loop's lag is measured and lost readers are looked for."""
READER_S = 60.0
"""A client that takes nothing for so long while there is something to take is given up."""
RECENT = 64
"""Finished choices that the estimate for `Retry-After` looks back on."""
LONGEST_WAIT_S = 30
"""The most that `Retry-After` says."""


def engine_thread(recipe: ServeRecipe) -> EngineThread:
    """The engine that a recipe asks for, not started."""
    # Here, so that whoever only deploys this class does not load torch.
    from axicon.compress.walk import Compress
    from axicon.generate.build import build_engine
    from axicon.generate.retention import check_kv
    from axicon.generate.speculate import read
    from axicon.generate.thread import EngineThread
    from axicon.model import checkpoint
    from axicon.model.adapterfile import locate

    # What is wrong shows before the thread is started.
    recipe.build_compressor()
    limits = Limits(
        max_queue=recipe.max_queue,
        max_model_len=recipe.max_model_len,
        max_logprobs=recipe.limits.logprobs,
        max_stops=recipe.limits.stops,
        max_logit_bias=recipe.limits.logit_bias,
        kv_floor=recipe.kv_floor,
        prefix_cache=recipe.prefix_cache,
    )
    try:
        check_kv(KVSettings(**recipe.kv.model_dump()), limits, blocks=1)
    except RequestError as error:
        raise AxiconError(f"kv: {error}") from None
    if recipe.speculation.method != "none":
        try:
            read(Speculation(**recipe.speculation.model_dump()), recipe.draft_nodes, recipe.draft is not None)
        except RequestError as error:
            raise AxiconError(f"speculation: {error}") from None

    def build() -> Engine:
        where = locate(recipe.model, offline=recipe.offline, revision=recipe.revision)
        base = where.base
        compressor = recipe.build_compressor(checkpoint.packed_formats(base), checkpoint.shape_of(base))
        return build_engine(
            str(where.folder),
            dtype=recipe.dtype,
            threads=recipe.threads,
            kv_gib=recipe.kv_gib,
            max_rows=recipe.max_rows,
            prefill_chunk=recipe.prefill_chunk,
            limits=limits,
            transform=None if compressor is None else Compress(compressor),
            draft=recipe.draft,
            draft_nodes=recipe.draft_nodes,
            device=recipe.device,
        )

    return EngineThread(build)


class GenerationServer:
    """Answers generation requests with one engine. Lives in one event loop, from `start` to `close`."""

    def __init__(
        self, recipe: ServeRecipe, make_thread: Callable[[ServeRecipe], EngineThread] = engine_thread
    ) -> None:
        self.recipe = recipe
        self.access = Access(recipe.api_key_digests(), recipe.allowed_hosts, recipe.admin_key_digests())
        self.thread = make_thread(recipe)
        self.adapters = Adapters(recipe, self.thread)
        self._served: Served | None = None
        self._metrics: Metrics | None = None
        self._mailbox: Mailbox | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._signs = contextlib.ExitStack()

    async def start(self) -> None:
        """Load the model and begin to answer. Raises AxiconError when it cannot be served."""
        await asyncio.to_thread(self.thread.start)
        self._signs.enter_context(present("server"))
        self._mailbox = Mailbox(asyncio.get_running_loop(), self._observe)
        served = await asyncio.to_thread(self._describe)
        await self.adapters.start(served.name)
        self._served = served
        self._metrics = Metrics(served.name, self.thread.stats, lambda: self.adapters.loaded.values())
        self._watcher = asyncio.create_task(self._watch())
        how = f"{served.format} by {served.kernels}"
        log.info("serving %s in %s, context %d tokens", served.name, how, served.max_len)

    async def close(self) -> None:
        """End every request and the engine thread."""
        self._signs.close()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self.adapters.close()
        await asyncio.to_thread(self.thread.close)

    @property
    def served(self) -> Served:
        """The model. Raises ApiError 503 while it is loading."""
        if self._served is None:
            raise ApiError(503, "The model is still loading.", code="loading")
        if self._served.fingerprint != self.thread.fingerprint:
            # The engine went on with fewer threads, which may change the bits of later answers.
            self._served = replace(self._served, fingerprint=self.thread.fingerprint)
        return self._served

    @property
    def metrics(self) -> Metrics:
        """The figures. Raises ApiError 503 while the model is loading."""
        if self._metrics is None:
            raise ApiError(503, "The model is still loading.", code="loading")
        return self._metrics

    @property
    def unfinished(self) -> int:
        """Choices that were accepted and have not ended."""
        return 0 if self._mailbox is None else sum(len(s.unfinished) for s in self._mailbox.streams)

    def trouble(self) -> str | None:
        """Why the server should get no requests now, or None."""
        if self.thread.error is not None:
            return "The engine has stopped; the log has the reason."
        if self._served is None:
            return "The model is still loading."
        if not self.thread.healthy(self.recipe.stall_s):
            return f"The decode loop has made no step for {self.recipe.stall_s:g} s."
        return None

    async def check_health(self) -> None:
        """Asked by Serve, which replaces the replica after repeated failures. Raises only when the decode
        loop is dead or stuck; what passes by itself is reported by `/health` alone."""
        trouble = self.trouble()
        if trouble is not None and self._served is not None:
            raise RuntimeError(trouble) from self.thread.error

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Hand requests to the engine. The caller must close the stream, which gives up what is unfinished.

        Raises ApiError 503 while loading, Overloaded when there is no room for all of them.
        """
        metrics, mailbox = self.metrics, self._mailbox
        assert mailbox is not None
        stream = Stream([request.id for request in requests], self._release)
        try:
            if self.unfinished + len(requests) > self.recipe.max_rows + self.recipe.max_queue:
                raise Overloaded(f"The server is full, with {self.unfinished} choices in work.")
            mailbox.attach(stream)
            self.thread.submit_all(requests, mailbox.post)
        except Overloaded as full:
            stream.close()
            metrics.overload.inc()
            raise Overloaded(str(full), max(full.retry_after, self._retry_after())) from None
        except BaseException:
            stream.close()
            raise
        return stream

    def _release(self, stream: Stream) -> None:
        """A stream was closed: the engine drops what it still computes for it, within one step."""
        assert self._mailbox is not None
        self._mailbox.detach(stream)
        for name in stream.unfinished:
            self.thread.cancel(name)

    def _observe(self, stream: Stream, delta: Delta) -> None:
        """Measure one delta as it reaches the event loop."""
        assert self._metrics is not None
        now = time.monotonic()
        if delta.tokens:
            last = stream.last_token.get(delta.request_id)
            if last is None:
                self._metrics.first_token.observe(now - stream.opened)
            else:
                self._metrics.between.observe(now - last)
            stream.last_token[delta.request_id] = now
        if delta.finish_reason is not None:
            self._metrics.ended(delta, now - stream.opened)
            self._durations.append(now - stream.opened)

    def _retry_after(self) -> int:
        """Seconds until a place should be free: what the queue holds, at the pace of the last choices."""
        if not self._durations:
            return 1
        mean = sum(self._durations) / len(self._durations)
        rounds = max(1.0, self.recipe.max_queue / self.recipe.max_rows)
        return max(1, min(LONGEST_WAIT_S, round(mean * rounds / 2)))

    async def _watch(self) -> None:
        """Measure the event loop's lag, look for jobs beside us, and give up streams that nobody reads."""
        assert self._metrics is not None
        assert self._mailbox is not None
        while True:
            begin = time.monotonic()
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            self.thread.share(bool(living("job")))
            if self.thread.error is not None:
                for stream in self._mailbox.streams:
                    stream.fail(ApiError(500, "The engine has stopped.", code="engine_error"))
            self._metrics.loop_lag.observe(max(0.0, now - begin - WATCH_S))
            for stream in self._mailbox.streams:
                if stream.pending and now - stream.last_read > READER_S:
                    stream.fail(ApiError(408, "Nothing was read for too long.", code="reader_gone"))
                    stream.close()

    def _describe(self) -> Served:
        """What the loaded engine serves."""
        from axicon.generate.refused import refused

        engine = self.thread.engine
        text = Text(engine.tokenizer)
        about = engine.runner.describe()
        return Served(
            name=self.recipe.served_name or engine.model_name,
            text=text,
            vocab=engine.runner.capacity.vocab,
            max_len=engine.max_model_len,
            created=int(time.time()),
            fingerprint=self.thread.fingerprint,
            format="+".join(cast(list[str], about["format"])),
            kernels=str(about["kernels"]),
            refused=tuple(refused(engine.check, engine.max_model_len, engine.limits)),
            adapters=self.adapters.loaded,
        )
