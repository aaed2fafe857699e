"""From a model's name to an engine."""

from __future__ import annotations

import logging
from typing import Literal, Protocol

import torch

from axicon.generate.engine import Engine
from axicon.generate.request import Limits
from axicon.generate.runner import Kernels, LocalRunner
from axicon.model import checkpoint
from axicon.model.decoder import Decoder
from axicon.model.machine import cores, return_freed_memory

log = logging.getLogger("axicon")

Dtype = Literal["bfloat16", "float32"]


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
) -> Engine:
    """Find, load and probe a model, in the thread that will step it.

    threads: compute threads of this thread, None for one per core. kv_gib: memory for keys and values, None
    for what `LocalRunner` takes. `limits` overrides max_queue and max_model_len. `transform` changes the
    loaded model before it is packed for the kernels. Raises AxiconError for what cannot be served.
    """
    torch.set_num_threads(threads or cores())
    folder = checkpoint.resolve(model, offline=offline, revision=revision)
    decoder = checkpoint.load(folder, dtype=getattr(torch, dtype))
    digest = checkpoint.digest(folder)
    if transform is not None:
        decoder = transform(decoder)
        digest += f" {transform}"
    runner = LocalRunner(
        decoder, kv_bytes=None if kv_gib is None else int(kv_gib * 2**30), max_rows=max_rows,
        prefill_chunk=prefill_chunk, model_digest=digest, kernels=kernels,
    )  # fmt: skip
    return_freed_memory()
    engine = Engine(
        runner, checkpoint.load_tokenizer(folder), eos_ids=decoder.shape.eos_ids,
        limits=limits or Limits(max_queue=max_queue, max_model_len=max_model_len),
        model_name=checkpoint.model_id(model),
    )  # fmt: skip
    log.info(
        "%s in %s on %d threads, %d cache slots, %s", engine.model_name, dtype, torch.get_num_threads(),
        runner.capacity.slots, runner.fingerprint,
    )  # fmt: skip
    return engine
