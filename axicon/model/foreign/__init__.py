"""Checkpoints that another tool has quantised, as the packed products they are.

A format is one file with a `Scheme` and one line in `SCHEMES`. `translate` gives the tensors the names and
layouts of axicon's own packed directories, so that everything behind it checks and reads them like those.
Weights keep their codes and scales: `unpack()` is the other tool's dequantisation, exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.foreign.awq import AWQ
from axicon.model.foreign.compressed_tensors import CompressedTensors
from axicon.model.foreign.gptq import GPTQ
from axicon.model.foreign.layout import Layout, Scheme, refuse
from axicon.model.formats import Packing
from axicon.model.group_int import DTYPE_NAMES, pack, row_bytes
from axicon.model.packed import Setting
from axicon.model.shape import ModelShape
from axicon.model.shards import Stored
from axicon.model.tensorfile import Entry, TensorFile
from axicon.model.weights import product_names

SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "compressed-tensors": CompressedTensors.read, "gptq": GPTQ.read, "awq": AWQ.read,
}
"""By `quant_method`; the names are also in `axicon.model.config.FOREIGN`."""


@dataclass(frozen=True)
class Derived(Stored):
    """A tensor that is made of stored ones when it is asked for."""

    made: Callable[[], Tensor] = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    shape: tuple[int, ...] = field(kw_only=True)
    begin: int = field(kw_only=True)

    @property
    def entry(self) -> Entry:
        return Entry(self.dtype, self.shape, self.begin, self.begin)

    def tensor(self) -> Tensor:
        return self.made()


def translate(
    config: Mapping[str, Any], shape: ModelShape, stored: Mapping[str, Stored]
) -> tuple[dict[str, Packing], dict[str, Stored]]:
    """Packed products by module name, and all tensors under the names of axicon's own directories.

    Raises AxiconError for a config that is not understood and for tensors that do not fit it.
    """
    scheme = SCHEMES[config["quant_method"]](config)
    packing: dict[str, Packing] = {}
    tensors = dict(stored)
    for module in _products(shape):
        names, heads = product_names(shape, module)
        parts = [_layout(scheme, name, tensors) for name in names]
        if not any(parts):
            continue
        layouts = [part for part in parts if part is not None]
        kinds = {layout.kind for layout in layouts}
        if len(layouts) != len(names) or len(kinds) != 1 or not _same_groups(layouts):
            refuse(f"{', '.join(names)} are one product here and are not quantised alike")
        used = [f"{name}.{suffix}" for name in names for suffix in scheme.suffixes]
        near = next(tensors[name] for name in used if name in tensors)
        for name in used:
            tensors.pop(name, None)
        biases = [tensors.pop(f"{name}.bias") for name in names if f"{name}.bias" in tensors]
        if biases and len(biases) != len(names):
            raise AxiconError(f"{names[0]}: only some of its parts have a bias; fetch the model again")
        packing[module], made = _packed(layouts, heads)
        for buffer, (get, dtype, size) in made.items():
            tensors[f"{module}.{buffer}"] = _derived(near, f"{module}.{buffer}", get, dtype, size)
        if biases:
            rows = sum(bias.entry.shape[0] for bias in biases)

            def bias(biases: list[Stored] = biases, heads: int | None = heads) -> Tensor:
                return _rows([one.tensor() for one in biases], heads)

            tensors[f"{module}.bias"] = _derived(
                biases[0], f"{module}.bias", bias, biases[0].entry.dtype, (rows,))
    return packing, tensors


def _derived(
    near: Stored, name: str, made: Callable[[], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> Derived:
    file: TensorFile = near.file
    return Derived(file, name, made=made, dtype=dtype, shape=shape, begin=near.entry.begin)


def _products(shape: ModelShape) -> Iterator[str]:
    with torch.device("meta"):
        decoder = Decoder(shape)
    yield from (path for path, module in decoder.named_modules() if isinstance(module, nn.Linear))


def _layout(scheme: Scheme, name: str, tensors: Mapping[str, Stored]) -> Layout | None:
    mine = {s: tensors[f"{name}.{s}"] for s in scheme.suffixes if f"{name}.{s}" in tensors}
    return scheme.layout(name, mine)


def _same_groups(layouts: list[Layout]) -> bool:
    if layouts[0].group_of is None:
        return True
    found = [layout.group_of() for layout in layouts if layout.group_of is not None]
    return all(torch.equal(found[0], other) for other in found)


def _rows(parts: list[Tensor], heads: int | None) -> Tensor:
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]
    return rows if heads is None else rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


Made = dict[str, tuple[Callable[[], Tensor], torch.dtype, tuple[int, ...]]]


def _packed(layouts: list[Layout], heads: int | None) -> tuple[Packing, Made]:
    first = layouts[0]
    outputs, inputs, bits = sum(layout.outputs for layout in layouts), first.inputs, first.bits
    if first.integer_rows:
        # Exact for scales of 16 bits; those of float32 are rounded once more, by a part in 2^23.
        int8: Made = {
            "qweight": (lambda: _rows([(x.codes() - 128).to(torch.int8) for x in layouts], heads), torch.int8,
                        (outputs, inputs)),
            "absmax": (lambda: _rows([x.scale()[:, 0].float() * 127.0 for x in layouts], heads),
                       torch.float32, (outputs,)),
        }
        return Packing("int8", {"threshold": 0.0, "relative": 0.0}), int8
    order = None if first.group_of is None else _order(first.group_of(), first.group)
    groups = inputs // first.group if first.group else 1

    def codes() -> Tensor:
        found = _rows([layout.codes() for layout in layouts], heads)
        return pack(found if order is None else found[:, order], bits)

    made: Made = {
        "qweight": (codes, torch.uint8, (outputs, row_bytes(inputs, bits))),
        "scale": (lambda: _rows([x.scale() for x in layouts], heads), first.scale_dtype, (outputs, groups)),
    }
    if first.zero is not None:
        made["zero"] = (
            lambda: _rows([x.zero() for x in layouts if x.zero is not None], heads).to(torch.uint8),
            torch.uint8, (outputs, groups))
    if order is not None:
        places = order.to(torch.int32)
        made["order"] = (lambda: places, torch.int32, (inputs,))
    settings: dict[str, Setting] = {
        "bits": bits, "group": first.group, "asymmetric": first.zero is not None,
        "permuted": order is not None, "scale_dtype": DTYPE_NAMES[first.scale_dtype],
    }  # fmt: skip
    return Packing("group_int", settings), made


def _order(group_of: Tensor, group: int) -> Tensor:
    """Inputs sorted by their group. Raises AxiconError where groups differ in size."""
    count = len(group_of) // group if group else 1
    inside = bool((group_of >= 0).all() and (group_of < count).all())
    if not inside or bool((group_of.bincount(minlength=count) != len(group_of) // count).any()):
        refuse("g_idx gives the groups different numbers of inputs, which is not read here")
    return group_of.argsort(stable=True)
