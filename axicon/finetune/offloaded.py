"""Models whose blocks are elsewhere: read, looked at and written one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from axicon.finetune.blockstore import Store
from axicon.finetune.offload import Offload, ring_of
from axicon.model import checkpoint
from axicon.model.decoder import Decoder
from axicon.model.weights import stored_tensors, tensor_at, weight_map


def load_offloaded(
    path: str | Path,
    store: Store,
    *,
    dtype: torch.dtype = torch.float32,
    buffers: int = 3,
    write_every: int = 1,
    overlap: bool = True,
    device: torch.device | None = None,
) -> Decoder:
    """Read a model that memory does not hold: its blocks pass through one by one into the store.

    Nothing of it trains yet. Raises AxiconError as `checkpoint.load` does.
    """
    layers = checkpoint.shape_of(path).layers
    model = checkpoint.load(path, dtype=dtype, blocks=range(1)).requires_grad_(False)
    ring = Offload(model, store, buffers=buffers, write_every=write_every, overlap=overlap, device=device)
    ring.take(0)
    for index in range(1, layers):
        part = checkpoint.load(path, dtype=dtype, blocks=range(index, index + 1)).requires_grad_(False)
        model.blocks.append(part.blocks[0])
        ring.take(index)
        if part.has_head:
            _add_head(model, part)
    if device is not None:
        model.to(device)
    ring.ready()
    return model


def _add_head(model: Decoder, part: Decoder) -> None:
    """What a last stage has behind its blocks, and the head tied again."""
    model.last, model.has_head = part.last, True
    model.final_norm, model.project_out, model.lm_head = part.final_norm, part.project_out, part.lm_head
    if model.shape.tie_head and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.embed_tokens.weight


def trained_elements(model: Decoder) -> int:
    """How many numbers train, whether they are in memory or not."""
    ring = ring_of(model)
    away = 0 if ring is None else ring.trained_elements
    return away + sum(p.numel() for p in model.parameters() if p.requires_grad)


class Streamed(Mapping[str, Tensor]):
    """Parameters of an offloaded model by name, each brought when it is asked for."""

    def __init__(self, model: Decoder, names: Iterable[str]) -> None:
        self._model, self._names = model, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        with at_hand(self._model, name):
            return self._model.get_parameter(name).detach().clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def at_hand(model: Decoder, name: str) -> AbstractContextManager[object]:
    """Within, what is named has its values, whether the model is offloaded or not."""
    ring, parts = ring_of(model), name.split(".")
    return nullcontext() if ring is None or parts[0] != "blocks" else ring.visit(int(parts[1]))


def stored_one_by_one(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """`stored_tensors` of a model that may be offloaded; a tensor is there until the next is asked for."""
    if ring_of(model) is None:
        yield from stored_tensors(model)
        return
    for name, place in sorted(weight_map(model).items()):
        with at_hand(model, place.parameter):
            yield name, tensor_at(model, place)
