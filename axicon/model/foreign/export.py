"""Writes a packed model directory as a compressed-tensors checkpoint, which other programs read.

`group_int` products keep codes, scales and zeros bit for bit. Codes of fewer than 8 bits become
`pack-quantized`, codes of 8 bits `int-quantized`; so do codes of products with zeros, a byte each, unless
packed zeros are asked for: compressed-tensors 0.20 writes packed zeros and does not accept them from a file.
`int8` products keep their codes, with absmax / 127 as the scale, and lose the rounding of activations: the
other program multiplies by the dequantised weight. A packed copy of a tied head is left out: the embedding is
the head there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model import checkpoint, safety
from axicon.model.artefact import write_json
from axicon.model.decoder import Decoder
from axicon.model.foreign.compressed_tensors import PACKED, PLAIN
from axicon.model.group_int import GroupIntLinear, pack
from axicon.model.int8 import Int8Linear
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape
from axicon.model.tensorwriter import TensorWriter
from axicon.model.weights import product_names, stored_tensors

Settings = tuple[str, int, int, bool]
"""Format, bits, group (0: the row), symmetric."""


def compressed_tensors(source: Path, folder: Path, *, packed_zeros: bool = False) -> list[str]:
    """Fill the empty `folder` with weights and config. Returns what a user should know of it, in words.

    `packed_zeros` packs products with zeros too, for programs that read that.
    Raises AxiconError for a model that is not packed here, and for a product that the format cannot hold.
    """
    config = safety.read_json(source / "config.json")
    if not checkpoint.packed_formats(source):
        raise AxiconError(f"{source} is not compressed; make it smaller first: axicon compress group_int4")
    if config["quantization_config"].get("quant_method") != "axicon":
        raise AxiconError(f"{source} is in another tool's format already; export what axicon compress made")
    shape, notes = checkpoint.shape_of(source), []
    if shape.only_here:
        raise AxiconError(f"{source}: the model {shape.only_here}, which compressed-tensors cannot say")
    groups: dict[Settings, list[str]] = {}
    dense: list[str] = []
    written: set[str] = set()
    rounding = False
    with TensorWriter(folder) as weights:
        for i in range(shape.layers):
            part = checkpoint.load(source, dtype=None, blocks=range(i, i + 1))
            if part.has_head and isinstance(part.lm_head, PackedLinear) and shape.tie_head:
                notes.append("the head is the embedding itself; its packed copy is left out")
                dense += product_names(shape, "lm_head")[0]
            rounding |= any(
                isinstance(module, Int8Linear) and not (path == "lm_head" and shape.tie_head)
                for path, module in part.named_modules())
            for name, tensor in _tensors(part, shape, groups, dense, packed_zeros):
                if name not in written:
                    written.add(name)
                    weights.add(name, tensor)
    if rounding:
        notes.append("activations of int8 products are not rounded by programs that read this")
    if any(form == PLAIN and bits < 8 for form, bits, *_ in groups):
        notes.append("codes with zeros take a byte each, which transformers reads; zeros=packed packs them")
    if any(form == PACKED and not symmetric for form, _, _, symmetric in groups):
        notes.append("transformers with compressed-tensors up to 0.20 does not read packed zeros")
    if "embed_out" in dense:
        dense.append("lm_head")  # what transformers calls the module whose weight the file calls embed_out
    config["quantization_config"] = _config(groups, dense)
    write_json(folder / "config.json", config)
    return notes


def _tensors(
    part: Decoder, shape: ModelShape, groups: dict[Settings, list[str]], dense: list[str], packed_zeros: bool
) -> Iterator[tuple[str, Tensor]]:
    packed = {}
    for path, module in part.named_modules():
        local = path if not path.startswith("blocks.") else f"blocks.{part.first}.{path.split('.', 2)[-1]}"
        if isinstance(module, PackedLinear):
            packed[local] = module
        elif isinstance(module, nn.Linear):
            dense += [name for name in product_names(shape, local)[0] if name not in dense]
    tied = shape.tie_head and "lm_head" in packed
    if tied:
        del packed["lm_head"]
    own = tuple(f"{module}." for module in [*packed, *(["lm_head"] if tied else [])])
    # Wide dtypes first, so that each tensor lies at a multiple of its item size.
    found = [(name, tensor) for name, tensor in stored_tensors(part) if not name.startswith(own)]
    for module, linear in packed.items():
        found += _product(shape, module, linear, groups, packed_zeros)
    yield from sorted(found, key=lambda item: (-item[1].dtype.itemsize, item[0]))


def _product(
    shape: ModelShape, module: str, linear: PackedLinear, groups: dict[Settings, list[str]],
    packed_zeros: bool,
) -> Iterator[tuple[str, Tensor]]:
    names, heads = product_names(shape, module)
    if isinstance(linear, Int8Linear):
        bits, group, codes, zero = 8, 0, linear.qweight.to(torch.int16) + 128, None
        scale = (linear.absmax / 127.0)[:, None]
    elif isinstance(linear, GroupIntLinear) and linear.order is None:
        bits, group, codes, zero, scale = (
            linear.bits, linear.group, linear.codes(), linear.zero, linear.scale)
    else:
        raise AxiconError(
            f"{module} is stored as {linear.format}"
            f"{' with its columns in another order' if isinstance(linear, GroupIntLinear) else ''}, "
            "which compressed-tensors cannot hold; compress with other settings")
    form = PLAIN if (bits == 8 if zero is None else not packed_zeros) else PACKED
    groups.setdefault((form, bits, group, zero is None), []).extend(names)
    rows = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero, "bias": linear.bias}
    sizes = row_counts(shape, module, len(codes))
    for key, value in rows.items():
        if value is None:
            continue
        if heads is not None:
            value = value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        for name, piece in zip(names, value.split(sizes), strict=True):
            if key in ("weight", "weight_zero_point") and form == PLAIN:
                yield f"{name}.{key}", (piece.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
            elif key == "weight":
                yield f"{name}.weight_packed", words(piece, bits)
                yield f"{name}.weight_shape", torch.tensor(piece.shape)
            elif key == "weight_zero_point":
                yield f"{name}.{key}", words(piece.T, bits).T.contiguous()
            else:
                yield f"{name}.{key}", piece.contiguous()


def row_counts(shape: ModelShape, module: str, outputs: int) -> list[int]:
    """Rows of each stored product in a fused one."""
    names, _ = product_names(shape, module)
    if len(names) == 1:
        return [outputs]
    _, index, name = module.split(".")
    return [rows.stop - rows.start for rows in shape.blocks[int(index)].parts(name).values()]


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (R, C) to int32 (R, ceil(C * bits / 32)): a string of bits a row, padded with zeros."""
    octets = pack(codes, bits)
    return F.pad(octets, (0, -octets.shape[1] % 4)).contiguous().view(torch.int32)


def _config(groups: dict[Settings, list[str]], dense: list[str]) -> dict[str, Any]:
    forms = {form for form, *_ in groups}
    made = {}
    for i, ((form, bits, group, symmetric), names) in enumerate(groups.items()):
        made[f"group_{i}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names, "format": form,
            "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                "strategy": "group" if group else "channel", "group_size": group or None,
            },
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": dense,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision", "config_groups": made,
    }  # fmt: skip
