"""The other rank of `test_transport.py`, in a process of its own."""

from __future__ import annotations

from multiprocessing.synchronize import Event

import psutil
import torch

from actors.transport import Meeting, Op, RankFailed, Transport
from axicon.step import StepInput


def listening() -> set[str]:
    """Addresses at which this process accepts TCP connections."""
    sockets = psutil.Process().net_connections(kind="tcp")
    return {f"{s.laddr.ip}:{s.laddr.port}" for s in sockets if s.status == psutil.CONN_LISTEN}


def follow(meeting: Meeting, ready: Event) -> None:
    """Send every step back as it was read, then a frame of bfloat16 doubled, or its failure passed on."""
    torch.set_num_threads(1)
    ready.set()
    link = Transport(meeting, 1)
    outside = sum(not address.startswith("127.0.0.1:") for address in listening())
    while True:
        op, payload = link.listen()
        if op is Op.STOP:
            return
        if op is Op.IDLE:
            link.send(0, torch.tensor([outside, len(payload)]))
            continue
        step = StepInput.unpack(payload)
        link.send(0, step.pack())
        x = torch.zeros(len(step), 3, dtype=torch.bfloat16)
        try:
            x = link.receive(0, (len(step), 3), torch.bfloat16)
            link.send(0, x * 2)
        except RankFailed as error:
            link.send(0, x, error.rank)
