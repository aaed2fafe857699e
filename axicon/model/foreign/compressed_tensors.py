"""compressed-tensors checkpoints of whole numbers: `int-quantized` and `pack-quantized`.

    int-quantized   weight int8 (O, I)
    pack-quantized  weight_packed int32 (O, ceil(I * bits / 32)): codes with 2^(bits - 1) added, one string of
                    bits a row; weight_shape int64 (2,)
    weight_scale float (O, G); asymmetric: weight_zero_point int8 (O, G), packed along the outputs where the
    weights are packed; with act-order weight_g_idx int32 (I,)

The tensors themselves say which group of the config a product belongs to. Where the config asks for
activations of 8 bits, rounded row by row, the product is an `Int8Linear`, which does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.foreign.layout import FLOATS, Layout, Tensors, bit_string, expect, only, refuse

PACKED, PLAIN = "pack-quantized", "int-quantized"
ROOT: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("compressed-tensors",), "format": (PACKED, PLAIN, "mixed-precision"),
    "config_groups": None, "ignore": None, "quantization_status": ("compressed", "frozen"),
    "global_compression_ratio": None, "version": None, "run_compressed": None,
}  # fmt: skip
GROUP: dict[str, tuple[Any, ...] | None] = {
    "targets": None, "weights": None, "input_activations": None, "format": (PACKED, PLAIN, None),
}
WEIGHTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": tuple(range(2, 9)), "type": ("int",), "symmetric": (True, False),
    "strategy": ("channel", "group"), "group_size": None, "dynamic": (False,),
    "actorder": (None, False, "group", "weight", "static"), "observer": None, "observer_kwargs": None,
    "zp_dtype": None, "scale_dtype": None,
}  # fmt: skip
ACTIVATIONS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": (8,), "type": ("int",), "symmetric": (True,), "strategy": ("token",), "dynamic": (True,),
    "group_size": (None,), "actorder": (None,), "observer": None, "observer_kwargs": None, "zp_dtype": None,
    "scale_dtype": None,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One of the config's groups."""

    packed: bool
    bits: int
    group: int
    symmetric: bool
    integer_rows: bool


@dataclass(frozen=True)
class CompressedTensors:
    kinds: tuple[Kind, ...]
    suffixes = (
        "weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx",
    )  # fmt: skip

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> CompressedTensors:
        sparsity = config.get("sparsity_config") or {}
        if sparsity and sparsity.get("format") not in (None, "dense"):
            refuse(f"sparsity_config {sparsity.get('format')!r} is not read here")
        rest = {key: value for key, value in config.items() if key != "sparsity_config"}
        only(rest, ROOT)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            refuse("config_groups is missing")
        return cls(tuple(_kind(group, config.get("format")) for group in groups.values()))

    def layout(self, name: str, tensors: Tensors) -> Layout | None:
        if "weight_scale" not in tensors:
            return None
        packed = "weight_packed" in tensors
        weight, scale = tensors.get("weight_packed", tensors.get("weight")), tensors["weight_scale"]
        if weight is None:
            raise AxiconError(f"{name}.weight_packed missing from the weights; fetch it again")
        outputs = weight.entry.shape[0] if weight.entry.shape else 0
        inputs = _inputs(name, tensors) if packed else weight.entry.shape[-1]
        shape = scale.entry.shape
        groups = shape[1] if len(shape) == 2 else 1
        group = inputs // groups if groups > 1 else 0
        symmetric = "weight_zero_point" not in tensors
        words = weight.entry.shape[-1]
        kind = next((
            k for k in self.kinds
            if (k.packed, k.symmetric) == (packed, symmetric)
            and (k.group if k.group < inputs else 0) == group
            and (not packed or -(-inputs * k.bits // 32) == words)
        ), None)  # fmt: skip
        if kind is None:
            refuse(f"no group of config_groups describes {name} as it is stored")
        expect(scale, FLOATS, (outputs, groups))
        expect(weight, (torch.int32 if packed else torch.int8,), (outputs, words))
        zero = None
        if not symmetric:
            zeros, rows = tensors["weight_zero_point"], -(-outputs * kind.bits // 32)
            expect(zeros, (torch.int32 if packed else torch.int8,), (rows if packed else outputs, groups))

            def zero() -> Tensor:
                if packed:
                    return bit_string(zeros.tensor().T, kind.bits, outputs).T
                return zeros.tensor().long() + (1 << (kind.bits - 1))

        def codes() -> Tensor:
            if packed:
                return bit_string(weight.tensor(), kind.bits, inputs)
            return weight.tensor().to(torch.int16) + (1 << (kind.bits - 1))

        group_of = None
        if "weight_g_idx" in tensors:
            expect(tensors["weight_g_idx"], (torch.int32, torch.int64), (inputs,))
            found = tensors["weight_g_idx"].tensor().long()
            if not torch.equal(found, torch.arange(inputs) // (group or inputs)):
                group_of = found.clone
        return Layout(
            outputs=outputs, inputs=inputs, bits=kind.bits, group=group, scale_dtype=scale.entry.dtype,
            codes=codes, scale=scale.tensor, zero=zero, group_of=group_of, integer_rows=kind.integer_rows,
        )  # fmt: skip


def _kind(group: Any, form: Any) -> Kind:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        refuse("a group has no weights")
    only(group, GROUP)
    weights, rows = group["weights"], group.get("input_activations")
    only(weights, WEIGHTS, "weights.")
    bits, size, strategy = (weights.get(key) for key in ("num_bits", "group_size", "strategy"))
    sized = strategy == "channel" or (type(size) is int and size > 0)
    if type(bits) is not int or strategy is None or not sized:
        refuse("num_bits, strategy or group_size is missing")
    form = group.get("format") or form
    if form not in (PACKED, PLAIN):
        refuse(f"format {form!r} is not read here")
    symmetric = weights.get("symmetric", True)
    if rows is not None:
        if not isinstance(rows, Mapping):
            refuse(f"input_activations {str(rows)[:60]!r} is not read here")
        only(rows, ACTIVATIONS, "input_activations.")
        if form != PLAIN or strategy != "channel" or bits != 8 or not symmetric:
            refuse("input_activations of 8 bits beside such weights are not read here")
    return Kind(form == PACKED, bits, size if strategy == "group" else 0, symmetric, rows is not None)


def _inputs(name: str, tensors: Tensors) -> int:
    shape = tensors.get("weight_shape")
    if shape is None:
        raise AxiconError(f"{name}.weight_shape missing from the weights; fetch it again")
    expect(shape, (torch.int64, torch.int32), (2,))
    outputs, inputs = shape.tensor().tolist()
    packed = tensors["weight_packed"]
    words = packed.entry.shape[-1] if packed.entry.shape else 0
    if outputs != packed.entry.shape[0] or not 0 < inputs <= words * 16:
        raise AxiconError(
            f"{packed.file.path}: {name}.weight_shape does not fit weight_packed; fetch it again")
    return int(inputs)
