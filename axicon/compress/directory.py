"""From a model directory to a compressed one, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from axicon.compress.calibration import Calibration, OnDisk, States, Store, embedded, through
from axicon.compress.shared import Shared
from axicon.compress.walk import reshaped, step, walk
from axicon.compress.work import STATES, Work
from axicon.model import checkpoint, safety, slicing
from axicon.model.artefact import write_bytes, write_json
from axicon.model.decoder import Block, Decoder
from axicon.model.formats import Packing, as_config, packing_of
from axicon.model.machine import only_new_garbage, return_freed_memory
from axicon.model.tensorwriter import DENSE, PACKED, TensorWriter
from axicon.model.weights import stored_tensors
from axicon.protocols import Compressor, Reshaping

Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks to do, and what can be said of the last one."""
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What is copied as it is. Nothing else is: what lies in a folder by chance is not the model."""


@only_new_garbage()
def write_compressed(
    compressor: Compressor,
    source: Path,
    folder: Path,
    *,
    dtype: torch.dtype,
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Fill the empty `folder` with weights, config and tokenizer of the compressed model, without data.

    Dense tensors are stored as `dtype`, in which the model is compressed too. `progress` gets blocks done and
    blocks to do. Raises AxiconError for a source that cannot be read and for a result that could not be, and
    OSError for a folder that cannot be written.
    """
    layers = checkpoint.shape_of(source).layers
    packing: dict[str, Packing] = {}
    with TensorWriter(folder) as weights:

        def keep(part: Decoder) -> None:
            for name, tensor in stored_tensors(part):
                if name not in weights.names:  # a tied head left dense is the embedding once more
                    weights.add(name, tensor)
            packing.update(packing_of(part))
            weights.stem = PACKED if packing or part.shape.only_here else DENSE
            return_freed_memory()
            progress(part.last, layers, "")

        walk(compressor, blocks_of(source, layers, dtype), keep=keep)
    _write_rest(source, folder, dtype, packing)


def write_calibrated(source: Path, folder: Path, work: Work, *, dtype: torch.dtype) -> None:
    """The same from the finished blocks of `work`."""
    shape = checkpoint.shape_of(source)
    with TensorWriter(folder) as weights:
        packing, sliced = work.assemble(weights, shape.layers), work.facts(0)["slicing"]
        weights.stem = PACKED if packing or sliced or shape.only_here else DENSE
    _write_rest(source, folder, dtype, packing, sliced)


@torch.no_grad()
@only_new_garbage()
def compress_blocks(
    compressor: Compressor,
    source: Path,
    work: Work,
    calibration: Calibration,
    *,
    dtype: torch.dtype,
    on_disk: bool,
    shared: Shared | None = None,
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Finish the blocks that `work` still lacks, one at a time beside the hidden states of the sample.

    `on_disk` keeps hidden states in the work folder instead of memory, `shared`, for a dense calibration, in
    a set that other runs read. `progress` also gets each block's error. Raises AxiconError; finished blocks
    are kept.
    """
    shape = checkpoint.shape_of(source)
    states: States = ()
    if 0 < work.done < shape.layers:
        width = reshaped(compressor, shape).blocks[work.done].width_in
        states = _states_behind(work, source, calibration, dtype, on_disk, width, shared)
        if isinstance(compressor, Reshaping) and (carried := work.carried()):
            compressor.carry(carried)
    while work.done < shape.layers:
        index = work.done
        [part] = [checkpoint.load(source, dtype=dtype, blocks=range(index, index + 1), masks=True)]
        with work.block() as made:
            store = _to_file(made / STATES) if on_disk else list
            if shared is not None:
                block, store = part.blocks[0], shared.keep(index + 1)
                assert isinstance(block, Block)
                shared.enter(block)
                if index == 0:
                    states = shared.states(embedded(part, calibration.tokens_WT))
            states, errors = step(compressor, part, states, calibration, store)
            work.write(made, part, error=errors[0] if errors else None)
            if isinstance(compressor, Reshaping) and (tensors := compressor.carried()):
                work.carry(made, tensors)
        part = None  # type: ignore[assignment] # before the next one is read
        return_freed_memory()
        progress(work.done, shape.layers, f"error {errors[0]:.4f}" if errors else "")


def _states_behind(
    work: Work, source: Path, calibration: Calibration, dtype: torch.dtype, on_disk: bool, width: int,
    shared: Shared | None,
) -> States:
    """Hidden states of that width behind the last finished block; computed again where they were not kept."""
    windows, length = calibration.tokens_WT.shape
    found = work.states((1, length, width), dtype)
    if found is not None and len(found) == windows and shared is None:
        return found
    states: States = ()
    for index in range(work.done):
        part = checkpoint.load(source, dtype=dtype, blocks=range(index, index + 1), masks=True)
        if not calibration.dense:
            part = work.restore(part)
        if part.has_embedding:
            states = embedded(part, calibration.tokens_WT)
        block = part.blocks[0]
        assert isinstance(block, Block)
        store = _to_file(work.folder / f"again-{index % 2}") if on_disk else list
        if shared is not None:
            store = shared.keep(index + 1)
        states = store(through(block, states))
    for path in work.folder.glob("again-*"):
        path.unlink()
    return states


def _to_file(path: Path) -> Store:
    return lambda items: OnDisk.write(path, items)


def blocks_of(source: Path, layers: int, dtype: torch.dtype) -> Iterator[Decoder]:
    """The model block by block; the embedding is with the first one, the head with the last."""
    for i in range(layers):
        yield checkpoint.load(source, dtype=dtype, blocks=range(i, i + 1), masks=True)


def _write_rest(
    source: Path, folder: Path, dtype: torch.dtype, packing: dict[str, Packing], sliced: Any = None
) -> None:
    """Config and tokenizer beside the weights."""
    _write_config(source, folder, dtype, packing, sliced)
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                write_bytes(folder / path.name, path.read_bytes())
    checkpoint.check_headers(folder)


def _write_config(
    source: Path, folder: Path, dtype: torch.dtype, packing: dict[str, Packing], sliced: Any
) -> None:
    config = safety.read_json(source / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if sliced:
        config[slicing.KEY] = sliced
    if packing:
        config["quantization_config"] = as_config(packing)
    write_json(folder / "config.json", config)
