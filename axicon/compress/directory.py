"""From a model directory to a compressed one, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from axicon.compress.walk import walk
from axicon.model import checkpoint, safety
from axicon.model.artefact import write_bytes, write_json
from axicon.model.decoder import Decoder
from axicon.model.formats import Packing, as_config, packing_of
from axicon.model.tensorwriter import PACKED, TensorWriter
from axicon.model.weights import stored_tensors
from axicon.protocols import Compressor

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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill the empty `folder` with weights, config and tokenizer of the compressed model.

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
            if packing:
                weights.stem = PACKED
            progress(part.last, layers)

        walk(compressor, blocks_of(source, layers, dtype), keep=keep)
    _write_config(source, folder, dtype, packing)
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                write_bytes(folder / path.name, path.read_bytes())
    checkpoint.check_headers(folder)


def blocks_of(source: Path, layers: int, dtype: torch.dtype) -> Iterator[Decoder]:
    """The model block by block; the embedding is with the first one, the head with the last."""
    for i in range(layers):
        yield checkpoint.load(source, dtype=dtype, blocks=range(i, i + 1))


def _write_config(source: Path, folder: Path, dtype: torch.dtype, packing: dict[str, Packing]) -> None:
    config = safety.read_json(source / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if packing:
        config["quantization_config"] = as_config(packing)
    write_json(folder / "config.json", config)
