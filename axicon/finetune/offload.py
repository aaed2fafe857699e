"""A decoder of which three blocks at most are in memory: ZO2's ring (arXiv:2503.12668).

Blocks lie in a store and come into a ring of buffers in the order in which they are computed, the next ones
while one is computed. Updates are kept as what they are functions of, and are done to a block when it comes
by: so it moves once per step, for both perturbed passes, and goes back once in `write_every` steps. What is
not in a block (embeddings, final norm, head) stays, and so do adapters that train while the weights beneath
them do not.

A decoder that is offloaded still computes as ever: its blocks bring their weights when they are called, up to
date. Outside of that they have none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from axicon.errors import RunFailed
from axicon.finetune.blockstore import HostStore, Layout, Store, together
from axicon.finetune.carry import Carrier, StreamCarrier, ThreadCarrier, Traffic
from axicon.model.decoder import Decoder
from axicon.model.packed import PackedLinear

Update = Callable[[Mapping[str, nn.Parameter]], None]
"""Change parameters, by their names in the model, in place."""


_RINGS: WeakKeyDictionary[Decoder, Offload] = WeakKeyDictionary()


def ring_of(model: nn.Module) -> Offload | None:
    """The ring that a model's blocks go through; None if they stay."""
    return _RINGS.get(model) if isinstance(model, Decoder) else None


class Offload:
    """The ring of a decoder. `offload` makes one."""

    def __init__(
        self,
        model: Decoder,
        store: Store,
        *,
        buffers: int = 3,
        write_every: int = 1,
        overlap: bool = True,
        device: torch.device | None = None,
    ) -> None:
        if buffers < 2 or write_every < 1:
            raise ValueError("a ring has at least two buffers, and blocks go back at least once in a while")
        self.model, self.store, self.device = model, store, device or torch.device("cpu")
        self.write_every, self.size = write_every, buffers
        self._layouts: list[Layout] = []
        self._updates: list[Update] = []
        """Those that some block lacks."""
        self._forgotten = 0
        """How many were dropped from that list, because every block has them."""
        self._stored: list[int] = []
        """Updates that a block in the store has, from the start."""
        self._fresh: dict[int, int] = {}
        """The same of the blocks that are in a buffer."""
        self._buffers: list[Tensor] = []
        self._where: dict[int, int] = {}
        """Block -> buffer."""
        self._order: list[int] = []
        """Blocks that are in a buffer, in the order in which they came."""
        self._inside: list[int] = []
        """Blocks that somebody computes with, as often as they were entered."""
        self._lock = threading.Lock()
        self._tensors: list[list[Tensor]] = []
        """Of each block, what is offloaded: without values unless the block is entered."""
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._broken: str | None = None
        self._overlap = overlap
        self._carrier: Carrier | None = None
        _RINGS[model] = self

    # Giving blocks away

    def take(self, index: int) -> None:
        """Move the next block's weights into the store. Blocks come in their order."""
        tensors = dict(self._moving(index))
        layout = Layout.of(tensors)
        self.store.add(together(layout, list(tensors.values())))
        self._layouts.append(layout)
        self._stored.append(0)
        for tensor in tensors.values():
            tensor.data = self._nothing(tensor)

    def ready(self) -> None:
        """All blocks were taken: make the ring."""
        self._tensors = [[t for _, t in self._moving(i)] for i in range(len(self._layouts))]
        longest = max(layout.bytes for layout in self._layouts)
        count = min(self.size, len(self._layouts))
        self._buffers = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(count)]
        if self.device.type == "cuda":
            self._carrier = StreamCarrier(self.store, self._freshen, self._written, self.device)
        else:
            self._carrier = ThreadCarrier(self.store, self._freshen, self._written, overlap=self._overlap)
        for index, block in enumerate(self.model.blocks):
            self._hooks.append(block.register_forward_pre_hook(lambda *_, i=index: self._enter(i)))
            self._hooks.append(
                block.register_forward_hook(lambda *_, i=index: self._exit(i), always_call=True)
            )

    def restore(self) -> None:
        """Bring all weights back into memory, up to date, and end the ring."""
        for index in range(len(self._layouts)):
            with self.visit(index):
                kept = [tensor.data.clone() for tensor in self._tensors[index]]
            for tensor, value in zip(self._tensors[index], kept, strict=True):
                tensor.data = value
        self.close()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._carrier is not None:
            self._carrier.close()
        self.store.close()
        self._hooks, self._buffers = [], []
        _RINGS.pop(self.model, None)

    # Using them

    @contextmanager
    def visit(self, index: int) -> Iterator[dict[str, nn.Parameter]]:
        """Within, the block has its weights, up to date. Yields its parameters by their names in the model.

        Raises RunFailed where it could not be moved.
        """
        self._enter(index)
        try:
            yield self.parameters(index)
        finally:
            self._exit(index)

    def parameters(self, index: int) -> dict[str, nn.Parameter]:
        return {f"blocks.{index}.{name}": p for name, p in self.model.blocks[index].named_parameters()}

    def resident(self) -> dict[str, nn.Parameter]:
        """Parameters that do not move, by their names in the model."""
        moving = {id(tensor) for tensors in self._tensors for tensor in tensors}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in moving}

    def defer(self, update: Update) -> None:
        """Do this to every block, at the latest before it is used again. The resident ones are not its."""
        with self._lock:
            self._updates.append(update)
            everywhere = min(self._stored) - self._forgotten
            del self._updates[:everywhere]
            self._forgotten += everywhere

    def flush(self) -> None:
        """Do all updates now. Doing it twice changes nothing."""
        for index in range(len(self._layouts)):
            with self.visit(index):
                pass

    @property
    def traffic(self) -> Traffic:
        assert self._carrier is not None
        return self._carrier.traffic

    @property
    def ring_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)

    @property
    def stored_bytes(self) -> int:
        return sum(layout.bytes for layout in self._layouts)

    @property
    def trained_elements(self) -> int:
        """Of what is offloaded."""
        pairs = [
            (tensor, part)
            for tensors, layout in zip(self._tensors, self._layouts, strict=True)
            for tensor, part in zip(tensors, layout.parts, strict=True)
        ]
        return sum(part.shape.numel() for tensor, part in pairs if tensor.requires_grad)

    # The ring

    def _enter(self, index: int) -> None:
        if self._broken is not None:
            raise RunFailed(
                f"a block was lost ({self._broken}): run the same command, it goes on from its log"
            )
        if index not in self._inside:
            carrier, buffer = self._carrier, self._buffer_of(index)
            assert carrier is not None
            try:
                carrier.arrive(index, buffer)
            except OSError as error:
                self._broken = f"block {index}: {error}"
                raise RunFailed(
                    f"block {index} could not be moved ({error}); "
                    "run the same command, it goes on from its log"
                ) from error
            views = self._layouts[index].views(buffer)
            for tensor, (_, view) in zip(self._tensors[index], views, strict=True):
                tensor.data = view
            self._inside.append(index)
            for ahead in range(1, len(self._buffers)):
                if len(self._where) < len(self._buffers) or set(self._where) - set(self._inside):
                    self._buffer_of((index + ahead) % len(self._layouts))
        else:
            self._inside.append(index)

    def _exit(self, index: int) -> None:
        if index not in self._inside:
            return  # it could not be entered
        self._inside.remove(index)
        if index in self._inside:
            return
        for tensor in self._tensors[index]:
            tensor.data = self._nothing(tensor)
        for module in self.model.blocks[index].modules():
            if isinstance(module, PackedLinear):
                module.release()
        assert self._carrier is not None
        self._carrier.leave(index, self._slice(index))

    def _buffer_of(self, index: int) -> Tensor:
        """The buffer of a block, which begins to come if it is in none."""
        if index not in self._where:
            if len(self._where) < len(self._buffers):
                place = len(self._where)
            else:
                # The one that is needed last again: blocks come in a circle.
                oldest = next((one for one in self._order if one not in self._inside), None)
                if oldest is None:
                    raise ValueError(f"more blocks at once than {len(self._buffers)} buffers hold")
                self._order.remove(oldest)
                place = self._where.pop(oldest)
            self._where[index] = place
            self._order.append(index)
            assert self._carrier is not None
            self._carrier.fetch(index, self._slice(index))
        return self._slice(index)

    def _slice(self, index: int) -> Tensor:
        return self._buffers[self._where[index]][: self._layouts[index].bytes]

    def _freshen(self, index: int, buffer: Tensor, just_read: bool) -> int | None:
        """Do to a block what it lacks; how many updates it has then, if it should go back. In the carrier's
        thread, or in the caller's while that waits for it."""
        with self._lock:
            due = self._forgotten + len(self._updates)
            stored = self._stored[index]
            has = stored if just_read else self._fresh[index]
            todo = self._updates[has - self._forgotten :]
        trained = self._trained(index, buffer) if todo else {}
        if trained:
            _do(todo, trained)
        self._fresh[index] = due
        if todo and not trained:
            self._written(index, due)
            return None
        # Blocks take turns, so that every step writes about as much. A turn may be missed where steps are.
        lacks = due - stored
        if lacks and ((due + index) % self.write_every == 0 or lacks >= 2 * self.write_every):
            return due
        return None

    def _written(self, index: int, number: int) -> None:
        self._stored[index] = number

    def _trained(self, index: int, buffer: Tensor) -> dict[str, Tensor]:
        """Views of what trains in a block, by their names in the model."""
        names = {id(p): f"blocks.{index}.{name}" for name, p in self.model.blocks[index].named_parameters()}
        views = self._layouts[index].views(buffer)
        pairs = zip(self._tensors[index], views, strict=True)
        return {names[id(tensor)]: view for tensor, (_, view) in pairs if tensor.requires_grad}

    def _moving(self, index: int) -> list[tuple[str, Tensor]]:
        """What is offloaded of a block: all of it, or without what trains if some of it does not."""
        block = self.model.blocks[index]
        parameters = list(block.named_parameters())
        whole = all(p.requires_grad for _, p in parameters)
        kept = [(name, p) for name, p in parameters if whole or not p.requires_grad]
        return [*kept, *block.named_buffers()]

    def _nothing(self, like: Tensor) -> Tensor:
        return torch.empty(0, dtype=like.dtype, device=self.device)


def _do(updates: Sequence[Update], tensors: Mapping[str, Tensor]) -> None:
    parameters = {name: nn.Parameter(view, requires_grad=False) for name, view in tensors.items()}
    for update in updates:
        update(parameters)


def offload(
    model: Decoder,
    store: Store | None = None,
    *,
    buffers: int = 3,
    write_every: int = 1,
    overlap: bool = True,
    device: torch.device | None = None,
) -> Offload:
    """Move the blocks of a model into a store, by default host memory, and what remains to the device."""
    cuda = device is not None and device.type == "cuda"
    made = Offload(
        model, store or HostStore(pinned=cuda), buffers=buffers, write_every=write_every, overlap=overlap,
        device=device,
    )  # fmt: skip
    for index in range(len(model.blocks)):
        made.take(index)
    if device is not None:
        model.to(device)
    made.ready()
    return made
