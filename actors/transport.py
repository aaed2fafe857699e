"""The process group of a model in stages: what is broadcast, what goes from one to the next, and time-outs.

Rank 0 *announces* a message to everyone, a flat int64 tensor of a fixed length that begins with version,
operation and size; what does not fit follows in a second broadcast. Hidden states and logits travel in
*frames* from one rank to the next, whose sizes both ends know from the step; a frame says too whether a rank
failed to compute, so that nobody waits for what does not come.

Nothing here waits longer than the group's time-out, and rank 0 must announce something more often than that.
gloo reports a peer whose process ended at once, but for one announcement in about a thousand, which it begins
as the peer goes and never ends (docs/log.md); so rank 0 asks for itself while an announcement takes long.
After a failure the group is of no use: leave it, which ends what the others wait for. Only this file knows
torch.distributed. Neither its store nor its sockets ask who calls, so they are bound to one given address.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from axicon.errors import RunFailed

Store = Any
_c10d: Any = dist  # its stores and groups are compiled, and typed in part

VERSION = 1
HEADER = 3
"""Numbers: version, operation, size of the payload."""
INLINE = 509
"""Numbers of a payload that travel with the header. A step of 64 decoding requests fits."""
LOOK_S = 0.5
"""An announcement takes microseconds; one that takes this long is reason to look whether all ranks live."""
_FINE = -1
_STATUS_BYTES = 8


class Op(enum.IntEnum):
    IDLE = 0
    """Nothing to do; shows that rank 0 is there."""
    STEP = 1
    """A packed `StepInput`."""
    STOP = 2


class Lost(RunFailed):
    """A rank went away or did not answer in time. The group is of no use any more."""


class RankFailed(Exception):
    """A rank could not compute a step; the group goes on."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed to compute")
        self.rank = rank


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a group find each other. Plain data, for the ranks in other processes."""

    host: str
    port: int
    world: int
    timeout_s: float
    """The longest anyone waits for anything, and the most that may lie between two announcements."""


def open_meeting(world: int, host: str, timeout_s: float) -> tuple[Meeting, Store]:
    """Open the place where a group meets, at a free port of `host`. Rank 0 keeps the store."""
    with socket.socket() as listening:
        listening.bind((host, 0))
        listening.listen()
        port = int(listening.getsockname()[1])
        # Given a port alone, the store would listen on every interface.
        store = _c10d.TCPStore(
            host, port, world, True, timedelta(seconds=timeout_s), wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )  # fmt: skip
    return Meeting(host, port, world, timeout_s), store


class Transport:
    """One rank's end of a group.

    Construction waits until all ranks are there. Raises Lost when they are not within the time-out. Rank 0
    passes the store of `open_meeting`, and `missing`, which says what ails a rank that is gone, or nothing.
    """

    def __init__(
        self, meeting: Meeting, rank: int, store: Store | None = None, missing: Callable[[], str] = lambda: ""
    ) -> None:
        self.rank, self.world = rank, meeting.world
        self._missing = missing
        self._timeout_s = meeting.timeout_s
        timeout = timedelta(seconds=meeting.timeout_s)
        try:
            self._store = store or _c10d.TCPStore(
                meeting.host, meeting.port, meeting.world, False, timeout, wait_for_workers=False
            )
            gloo = _c10d.ProcessGroupGloo
            # Built directly: the default group is one per process and takes its address from the environment.
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=_own_address(meeting))]
            options._timeout = timeout
            group = gloo(self._store, rank, meeting.world, options)
        except RuntimeError as error:
            raise Lost(f"rank {rank} of {meeting.world} found no group: {self._reason(error)}") from error
        self._group = group

    def announce(self, op: Op, payload: Tensor | None = None) -> None:
        """Rank 0: tell everyone. `payload` is int64 (n,). Raises Lost."""
        message = torch.zeros(HEADER + INLINE, dtype=torch.int64)
        size = 0 if payload is None else len(payload)
        message[:HEADER] = torch.tensor([VERSION, op, size])
        if payload is not None:
            message[HEADER : HEADER + min(size, INLINE)] = payload[:INLINE]
        self._broadcast(message)
        if payload is not None and size > INLINE:
            self._broadcast(payload[INLINE:].contiguous())

    def listen(self) -> tuple[Op, Tensor]:
        """The other ranks: the next announcement and its payload.

        Raises Lost, or ValueError for another version.
        """
        message = torch.zeros(HEADER + INLINE, dtype=torch.int64)
        self._broadcast(message)
        version, op, size = message[:HEADER].tolist()
        if version != VERSION:
            raise ValueError(f"message version {version}, this process speaks {VERSION}")
        payload = message[HEADER : HEADER + size]
        if size > INLINE:
            rest = torch.zeros(size - INLINE, dtype=torch.int64)
            self._broadcast(rest)
            payload = torch.cat([payload, rest])
        return Op(op), payload

    def send(self, to: int, x: Tensor, failed: int | None = None) -> None:
        """Send a frame: `x`, or that rank `failed` could not make it, in the size of `x`. Raises Lost."""
        frame = torch.empty(_STATUS_BYTES + x.nbytes, dtype=torch.uint8)
        frame[:_STATUS_BYTES].view(torch.int64)[0] = _FINE if failed is None else failed
        if failed is None:
            frame[_STATUS_BYTES:] = x.contiguous().view(-1).view(torch.uint8)
        self._wait(lambda group: group.send([frame], to, 0))

    def receive(self, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The frame that `source` sends. Raises Lost, or RankFailed when the frame says so."""
        frame = torch.empty(_STATUS_BYTES + prod(shape) * dtype.itemsize, dtype=torch.uint8)
        self._wait(lambda group: group.recv([frame], source, 0))
        failed = int(frame[:_STATUS_BYTES].view(torch.int64)[0])
        if failed != _FINE:
            raise RankFailed(failed)
        return frame[_STATUS_BYTES:].view(dtype).view(shape)

    def leave(self) -> None:
        """Close every connection, so that the others stop waiting. This rank waits for nothing then."""
        self._group = None

    def _broadcast(self, numbers: Tensor) -> None:
        self._wait(lambda group: self._watched(group.broadcast(numbers, 0)))

    def _watched(self, work: Any) -> Any:
        """`work`, once it ended or while no rank is missing. Only collectives can be waited for in slices."""
        while self.rank == 0 and not work.is_completed():
            with contextlib.suppress(RuntimeError):  # of this slice, or of the work, which says it again
                work.wait(timedelta(seconds=LOOK_S))
            if not work.is_completed() and (what := self._missing()):
                raise Lost(f"rank 0 lost the group: {what}")
        return work

    def _wait(self, start: Callable[[Any], Any]) -> None:
        group = self._group
        if group is None:
            raise Lost(f"rank {self.rank} has left the group")
        try:
            start(group).wait()
        except RuntimeError as error:
            raise Lost(f"rank {self.rank} lost the group: {self._reason(error)}") from error

    def _reason(self, error: RuntimeError) -> str:
        text = str(error).partition("\n")[0]
        if "timed out" in text.lower() or "timeout" in text.lower():
            return f"no answer within {self._timeout_s:g} s"
        if "closed" in text.lower() or "reset" in text.lower() or "broken pipe" in text.lower():
            return "a connection was closed"
        return text


def _own_address(meeting: Meeting) -> str:
    """The address from which this machine reaches the meeting: there the others reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting.host, meeting.port))  # sends nothing
        return str(probe.getsockname()[0])
