"""From a model directory to a compressed one, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from axicon.compress.calibration import Calibration, OnDisk, States, Store, embedded, through
from axicon.compress.walk import step, walk
from axicon.compress.work import STATES, Work
from axicon.model import checkpoint, safety
from axicon.model.artefact import write_bytes, write_json
from axicon.model.decoder import Block, Decoder
from axicon.model.formats import Packing, as_config, packing_of
from axicon.model.machine import return_freed_memory
from axicon.model.tensorwriter import DENSE, PACKED, TensorWriter
from axicon.model.weights import stored_tensors
from axicon.protocols import Compressor

Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks to do, and what can be said of the last one."""
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What is copied as it is. Nothing else is: what lies in a folder by chance is not the model."""


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
            weights.stem = PACKED if packing else DENSE
            return_freed_memory()
            progress(part.last, layers, "")

        walk(compressor, blocks_of(source, layers, dtype), keep=keep)
    _write_rest(source, folder, dtype, packing)


def write_calibrated(source: Path, folder: Path, work: Work, *, dtype: torch.dtype) -> None:
    """The same from the finished blocks of `work`."""
    layers = checkpoint.shape_of(source).layers
    with TensorWriter(folder) as weights:
        packing = work.assemble(weights, layers)
        weights.stem = PACKED if packing else DENSE
    _write_rest(source, folder, dtype, packing)


@torch.no_grad()
def compress_blocks(
    compressor: Compressor,
    source: Path,
    work: Work,
    calibration: Calibration,
    *,
    dtype: torch.dtype,
    on_disk: bool,
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Finish the blocks that `work` still lacks, one at a time beside the hidden states of the sample.

    `on_disk` keeps hidden states in the work folder instead of memory. `progress` also gets each block's
    error. Raises AxiconError; finished blocks are kept.
    """
    shape = checkpoint.shape_of(source)
    states = _states_behind(work, source, calibration, dtype, on_disk) if work.done < shape.layers else ()
    while work.done < shape.layers:
        index = work.done
        [part] = [checkpoint.load(source, dtype=dtype, blocks=range(index, index + 1))]
        with work.block() as made:
            store = _to_file(made / STATES) if on_disk else list
            states, errors = step(compressor, part, states, calibration, store)
            work.write(made, part, error=errors[0] if errors else None)
        part = None  # type: ignore[assignment] # before the next one is read
        return_freed_memory()
        progress(work.done, shape.layers, f"error {errors[0]:.4f}" if errors else "")


def _states_behind(
    work: Work, source: Path, calibration: Calibration, dtype: torch.dtype, on_disk: bool
) -> States:
    """Hidden states before the first block that is not finished; computed again where they were not kept."""
    if not work.done:
        return ()
    windows, length = calibration.tokens_WT.shape
    width = checkpoint.shape_of(source).blocks[work.done].width_in
    found = work.states((1, length, width), dtype)
    if found is not None and len(found) == windows:
        return found
    states: States = ()
    for index in range(work.done):
        part = checkpoint.load(source, dtype=dtype, blocks=range(index, index + 1))
        if not calibration.dense:
            work.restore(part)
        if part.has_embedding:
            states = embedded(part, calibration.tokens_WT)
        block = part.blocks[0]
        assert isinstance(block, Block)
        path = work.folder / f"again-{index % 2}"
        states = (_to_file(path) if on_disk else list)(through(block, states))
    for path in work.folder.glob("again-*"):
        path.unlink()
    return states


def _to_file(path: Path) -> Store:
    return lambda items: OnDisk.write(path, items)


def blocks_of(source: Path, layers: int, dtype: torch.dtype) -> Iterator[Decoder]:
    """The model block by block; the embedding is with the first one, the head with the last."""
    for i in range(layers):
        yield checkpoint.load(source, dtype=dtype, blocks=range(i, i + 1))


def _write_rest(source: Path, folder: Path, dtype: torch.dtype, packing: dict[str, Packing]) -> None:
    """Config and tokenizer beside the weights."""
    _write_config(source, folder, dtype, packing)
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                write_bytes(folder / path.name, path.read_bytes())
    checkpoint.check_headers(folder)


def _write_config(source: Path, folder: Path, dtype: torch.dtype, packing: dict[str, Packing]) -> None:
    config = safety.read_json(source / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if packing:
        config["quantization_config"] = as_config(packing)
    write_json(folder / "config.json", config)
