"""An adapter that is made from the log of a zeroth-order run, while that goes on.

A log is read beside the event loop; tensors are touched in the engine's thread, a slice of steps at a time
between two steps of generation.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from axicon.errors import AxiconError

if TYPE_CHECKING:
    from axicon.finetune.follow import Follower, LoraRun
    from axicon.generate.engine import Engine
    from axicon.generate.thread import EngineThread
    from axicon.model.adapterfile import Adapter
    from axicon.model.shape import ModelShape

SLICE_S = 0.01
"""The most that a step of generation waits for a slice, but for a slice of one step."""
ROUND_S = 2.0
"""What is behind for longer than that is served on the way."""


class Followed:
    """One run. Lives in the event loop, and is used by one task of it at a time."""

    def __init__(self, run: LoraRun) -> None:
        self.run = run
        self.trouble: str | None = None
        """Why what is served is not the newest, if that is not a matter of time."""
        self._follower: Follower | None = None

    @property
    def digest(self) -> str:
        """Of which run it is, however far that got."""
        return self.run.digest

    @property
    def base(self) -> str:
        return self.run.base

    @property
    def steps(self) -> int:
        """Taken so far; not all of them need be served yet."""
        return 0 if self._follower is None else self._follower.steps

    @property
    def known(self) -> int:
        """Steps of the log, when it was last looked at."""
        return self.run.log.steps

    async def begin(self, thread: EngineThread, shape: ModelShape) -> None:
        """Once, before all else. Raises AxiconError for a run that this model cannot follow."""
        self._follower = await asyncio.to_thread(thread.ask, lambda engine: self.run.follower(shape))
        await self.catch_up(thread)

    async def catch_up(self, thread: EngineThread) -> None:
        """Take the steps that are new, as far as that goes in one round. Raises AxiconError for a log that
        cannot be read, or is none of this run any more."""
        follower = self._follower
        assert follower is not None
        until = time.monotonic() + ROUND_S
        await asyncio.to_thread(follower.look)
        while follower.behind and time.monotonic() < until:
            await asyncio.to_thread(thread.ask, lambda engine: follower.advance(SLICE_S))

    async def hold(self, thread: EngineThread, number: int) -> tuple[int, Adapter]:
        """Let the engine have what it has come to under a number: the step, and that. Raises AxiconError
        where it is not finite, or adapters cannot be."""

        def do(engine: Engine) -> tuple[int, Adapter]:
            from axicon.finetune.follow import adapters_of

            assert self._follower is not None
            adapter = adapters_of(self._follower, self.run.base)
            engine.hold(number, adapter)
            return self._follower.steps, adapter

        return await asyncio.to_thread(thread.ask, do)


def open_run(place: Path, most_rank: int) -> Followed:
    """The run in a folder, of which nothing is taken yet. Raises AxiconError for one that cannot be
    followed."""
    from axicon.finetune.follow import LoraRun

    run = LoraRun.of(place)
    if run.scheme.r > most_rank:
        raise AxiconError(f"{place}: scheme.r is {run.scheme.r}, it must be a number from 1 to {most_rank}")
    return Followed(run)
