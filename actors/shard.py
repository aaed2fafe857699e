"""Shard: one stage of a model, computed in a process of its own at the word of rank 0.

All torch work of a shard, loading included, is done by one thread, which then waits for announcements; so the
methods below answer while it computes. Their results are plain data.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from actors import transport
from actors.transport import Lost, Meeting, Op, RankFailed, Transport
from axicon import __version__
from axicon.generate.build import Dtype
from axicon.generate.runner import LocalRunner
from axicon.model import checkpoint
from axicon.step import STEP_VERSION, StepInput

log = logging.getLogger("axicon")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """What a stage is made of. Plain data: each process reads the weights itself."""

    model: str
    """A directory, or a name that every machine resolves by itself."""
    first: int
    last: int
    """Blocks first .. last - 1."""
    dtype: Dtype = "bfloat16"
    threads: int = 1
    kv_bytes: int | None = None
    max_rows: int = 64
    prefill_chunk: int = 256

    def runner(self) -> LocalRunner:
        """Load the stage, in the thread that will compute it. Raises AxiconError."""
        torch.set_num_threads(self.threads)
        decoder = checkpoint.load(
            self.model, dtype=getattr(torch, self.dtype), blocks=range(self.first, self.last)
        )
        return LocalRunner(
            decoder, kv_bytes=self.kv_bytes, max_rows=self.max_rows, prefill_chunk=self.prefill_chunk,
            model_digest=checkpoint.digest(self.model),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a stage tells of itself."""

    facts: dict[str, object]
    """`LocalRunner.describe`."""
    slots: int
    bytes_per_slot: int


def loaded(runner: LocalRunner) -> Loaded:
    return Loaded(runner.describe(), runner.capacity.slots, runner.capacity.bytes_per_slot)


def versions() -> dict[str, str]:
    """What must be the same in all processes of a group."""
    return {
        "axicon": __version__,
        "torch": torch.__version__,
        "steps": str(STEP_VERSION),
        "messages": str(transport.VERSION),
    }


class Shard:
    """Ranks 1 and up of a group. Call `load`, then `join`; from then on it follows rank 0."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard")
        self._runner: LocalRunner | None = None
        self._following: Future[None] | None = None
        self._failure = ""

    def versions(self) -> dict[str, str]:
        return versions()

    def load(self, settings: StageSettings) -> Loaded:
        """Raises AxiconError for what cannot be loaded."""
        self._runner = self._thread.submit(settings.runner).result()
        return loaded(self._runner)

    def join(self, meeting: Meeting, rank: int) -> None:
        """Become a rank of the group and begin to follow. Raises Lost when it does not come together."""
        if self._runner is None:
            raise RuntimeError("join before load")
        link = self._thread.submit(Transport, meeting, rank).result()
        self._following = self._thread.submit(self._follow, self._runner, link)

    def ping(self) -> str:
        """Empty while all is well; otherwise what went wrong last."""
        return self._failure

    def _follow(self, runner: LocalRunner, link: Transport) -> None:
        """Compute what is announced, until the group is stopped or falls apart."""
        try:
            while True:
                op, payload = link.listen()
                if op is Op.STOP:
                    return
                if op is Op.STEP:
                    self._step(runner, link, StepInput.unpack(payload))
        except Lost as error:
            # Somebody else is at fault, and rank 0 knows who.
            log.warning("shard %d leaves: %s", link.rank, error)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            log.exception("shard %d leaves its group", link.rank)
        finally:
            link.leave()

    def _step(self, runner: LocalRunner, link: Transport, step: StepInput) -> None:
        # Rank 0 has checked the step. Should it fail here, the caches differ and this rank must not go on.
        checked = runner.check(step)
        runner.apply(checked)
        if not len(step):
            return
        failed, out = None, runner.out(int(step.wanted_N.sum()) if runner.decoder.has_head else len(step))
        try:
            shape = (len(step), runner.decoder.shape.blocks[runner.decoder.first].width_in)
            hidden_ND = link.receive(link.rank - 1, shape, runner.decoder.dtype)
            out = runner.compute(checked, hidden_ND)
        except Lost:
            raise
        except RankFailed as error:
            failed = error.rank
        except Exception as error:
            self._failure, failed = f"{type(error).__name__}: {error}", link.rank
            log.exception("shard %d failed to compute a step of %d nodes", link.rank, len(step))
        link.send((link.rank + 1) % link.world, out, failed)
