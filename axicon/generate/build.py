"""From a model's name to an engine."""

from __future__ import annotations

import logging
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.generate.draftmodel import DraftModel
from axicon.generate.engine import Engine
from axicon.generate.request import Limits
from axicon.generate.runner import Kernels, LocalRunner
from axicon.generate.speculate import MOST_NODES, Speculator
from axicon.model import checkpoint
from axicon.model.adapterfile import locate, read_adapter
from axicon.model.decoder import Decoder
from axicon.model.machine import cores, return_freed_memory
from axicon.model.pages import BESIDE
from axicon.model.skip import skip_blocks

log = logging.getLogger("axicon")

Dtype = Literal["bfloat16", "float32"]
Device = Literal["cpu", "cuda"]

PROBE = (
    "When the ship came into the harbour in the morning, nobody was there to meet it. The captain, who had "
    "written twice, waited for an hour; then he sent two of his men ashore to ask what had happened. They "
    "came back with bread, a newspaper of the day before, and three questions:\n"
    "1. How many people are on board?\n2. What do you carry, and for whom?\n"
    "3. Do you know that the war is over?"
)
"""A text on which blocks show how much they do."""


class Transform(Protocol):
    """What is done to a dense model before it is served. Its `str` tells everything that decides the
    result.
    """

    def __call__(self, decoder: Decoder) -> Decoder: ...


def build_engine(
    model: str,
    *,
    dtype: Dtype = "bfloat16",
    threads: int | None = None,
    kv_gib: float | None = None,
    max_rows: int = 64,
    prefill_chunk: int = 256,
    max_queue: int = 256,
    max_model_len: int | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    limits: Limits | None = None,
    kernels: Kernels = "auto",
    transform: Transform | None = None,
    draft: str | None = None,
    draft_nodes: int = MOST_NODES,
    device: Device = "cpu",
) -> Engine:
    """Find, load and probe a model, in the thread that will step it. It may be an adapter beside its base.

    threads: compute threads of this thread, None for one per core. kv_gib: memory for keys and values, None
    for what `LocalRunner` takes. `limits` overrides max_queue and max_model_len. `transform` changes the
    loaded model before it is packed for the kernels. `draft` is a model that guesses ahead: `skip:20` for a
    copy of this one with 20 of its blocks, or a model's name; `draft_nodes` bounds a request's trees. device:
    where models and cache lie; `kernels` is for the CPU. Raises AxiconError for what cannot be served.
    """
    check_device(device)
    torch.set_num_threads(threads or cores())
    where = locate(model, offline=offline, revision=revision)
    folder, digest = where.base, where.digest
    decoder = checkpoint.load(folder, dtype=getattr(torch, dtype))
    if transform is not None:
        decoder = transform(decoder)
        digest += f" {transform}"
    tokenizer = checkpoint.load_tokenizer(folder)
    drafter = None
    if draft is not None:
        probe_T = torch.tensor(tokenizer.encode(PROBE))
        drafter = _draft_decoder(draft, decoder, getattr(torch, dtype), transform, probe_T)
    runner = _runner(
        decoder, device, kernels, kv_bytes=None if kv_gib is None else int(kv_gib * 2**30), max_rows=max_rows,
        prefill_chunk=prefill_chunk, model_digest=digest,
    )  # fmt: skip
    if where.adapter is not None:
        runner.hold(0, read_adapter(where.adapter, decoder.shape))
    speculator = Speculator(
        None if drafter is None else _draft_model(drafter, runner, device, kernels), draft_nodes
    )
    return_freed_memory()
    engine = Engine(
        runner, tokenizer, eos_ids=decoder.shape.eos_ids,
        limits=limits or Limits(max_queue=max_queue, max_model_len=max_model_len),
        speculator=speculator, model_name=checkpoint.model_id(model),
    )  # fmt: skip
    log.info(
        "%s in %s on %d threads, %d cache slots, %s", engine.model_name, dtype, torch.get_num_threads(),
        runner.capacity.slots, runner.fingerprint,
    )  # fmt: skip
    return engine


def check_device(device: Device) -> None:
    """Raises AxiconError where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise AxiconError("device=cuda: torch finds no CUDA device here; device=cpu runs on the processor")


def _draft_decoder(
    draft: str, decoder: Decoder, dtype: torch.dtype, transform: Transform | None, probe_T: Tensor
) -> Decoder:
    """The draft model, stored as the target is unless it has a storage format of its own."""
    kind, _, count = draft.partition(":")
    if kind == "skip":
        if not count.isdecimal():
            raise AxiconError(f"draft={draft}: say how many blocks to keep, as in draft=skip:20")
        return skip_blocks(decoder, int(count), probe_T)
    folder = checkpoint.resolve(draft)
    found = checkpoint.load(folder, dtype=dtype)
    if found.shape.vocab != decoder.shape.vocab:
        raise AxiconError(
            f"draft={draft}: its vocabulary has {found.shape.vocab} tokens, that of the model "
            f"{decoder.shape.vocab}; a draft model needs the same tokenizer"
        )
    if found.shape.max_positions < decoder.shape.max_positions:
        raise AxiconError(
            f"draft={draft}: it knows {found.shape.max_positions} positions, the model "
            f"{decoder.shape.max_positions}"
        )
    return found if transform is None or checkpoint.packed_formats(folder) else transform(found)


def _draft_model(drafter: Decoder, runner: LocalRunner, device: Device, kernels: Kernels) -> DraftModel:
    """With a cache for as many slots as the target has. Who finds no room there goes without guesses."""
    capacity = runner.capacity
    shapes = [(block.kv_heads, block.head_width) for block in drafter.shape.blocks]
    beside = 0 if device == "cpu" else BESIDE
    per_slot = sum(groups * (2 * width * drafter.dtype.itemsize + beside) for groups, width in shapes)
    layers = len(shapes)
    return DraftModel(
        _runner(
            drafter, device, kernels,
            kv_bytes=-(-capacity.slots * per_slot * (layers + 1) // layers) + per_slot,
            max_rows=capacity.max_rows, prefill_chunk=capacity.prefill_chunk,
        )
    )  # fmt: skip


def _runner(decoder: Decoder, device: Device, kernels: Kernels, **settings: Any) -> LocalRunner:
    """On a GPU one that has computed a step: kernels are compiled, what cannot run there is refused."""
    if device == "cpu":
        return LocalRunner(decoder, kernels=kernels, **settings)
    from axicon.generate.paged import PagedRunner

    runner = PagedRunner(decoder.to(device), **settings)
    runner.warm_up()
    return runner
