"""Packed storage formats by name, and what `config.json` says of them.

A directory whose products are packed has in its config

    "quantization_config": {"quant_method": "axicon", "version": 1, "groups": [{
        "format": "int8", "settings": {"relative": 5.0, "threshold": 6.0}, "modules": ["blocks.0.qkv", ...]}]}

so other loaders refuse it instead of misreading it. Modules bear the decoder's own names, their tensors those
names and the buffer's: `blocks.0.qkv.qweight`. Dense tensors keep their checkpoint names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from axicon.errors import AxiconError
from axicon.model.binary_code import BinaryCodeLinear
from axicon.model.decoder import Decoder
from axicon.model.group_int import GroupIntLinear
from axicon.model.int8 import Int8Linear
from axicon.model.packed import PackedLinear, Setting
from axicon.model.tiled_sparse import TiledSparseLinear

FORMATS: dict[str, type[PackedLinear]] = {
    cls.format: cls for cls in (Int8Linear, GroupIntLinear, BinaryCodeLinear, TiledSparseLinear)
}

METHOD = "axicon"
"""`quant_method` of the configs written here."""
VERSION = 1


@dataclass(frozen=True, slots=True)
class Packing:
    """How one product is stored, beside its buffers."""

    format: str
    settings: Mapping[str, Setting]


def read_packing(config: Mapping[str, Any]) -> dict[str, Packing]:
    """Packed products of a model by module name; empty for a dense one.

    Raises AxiconError for a format or version that is not known here, and for anything unexpected.
    """
    found = config.get("quantization_config")
    if not found:
        return {}
    where = "config.json: quantization_config"
    if not isinstance(found, Mapping) or found.get("quant_method") != METHOD:
        raise AxiconError(f"{where} was not written by axicon; take the model it was made from")
    if found.get("version") != VERSION:
        raise AxiconError(
            f"{where} has version {found.get('version')!r}, this axicon reads {VERSION}; update axicon")
    groups = found.get("groups")
    if not isinstance(groups, list) or not groups or found.keys() != {"quant_method", "version", "groups"}:
        raise AxiconError(f"{where} holds something else than a list of groups; make the model again")
    packing: dict[str, Packing] = {}
    for group in groups:
        one = _read_group(group, where)
        for module in group["modules"]:
            if not isinstance(module, str) or module in packing:
                raise AxiconError(f"{where} names {module!r} twice or not by a name; make the model again")
            packing[module] = one
    return packing


def _read_group(group: Any, where: str) -> Packing:
    if not isinstance(group, Mapping) or group.keys() != {"format", "settings", "modules"}:
        raise AxiconError(f"{where} has a group without format, settings and modules; make the model again")
    name, settings = group["format"], group["settings"]
    cls = FORMATS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise AxiconError(
            f"{where} names the storage format {str(name)[:40]!r}, this axicon reads "
            f"{', '.join(sorted(FORMATS))}; update axicon, or take the model it was made from")
    known = isinstance(settings, Mapping) and settings.keys() == set(cls.settings)
    if not known or not all(_is_setting(value) for value in settings.values()):
        raise AxiconError(
            f"{where} has other settings for {name} than {', '.join(cls.settings) or 'none'}; "
            "make the model again")
    if not isinstance(group["modules"], list) or not group["modules"]:
        raise AxiconError(f"{where} has a group of {name} without modules; make the model again")
    return Packing(name, dict(settings))


def _is_setting(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def packing_of(decoder: Decoder) -> dict[str, Packing]:
    """The packed products of a model, or of the part of it that this decoder holds."""
    return {
        global_name(decoder, path): Packing(m.format, {name: getattr(m, name) for name in m.settings})
        for path, m in decoder.named_modules()
        if isinstance(m, PackedLinear)
    }


def as_config(packing: Mapping[str, Packing]) -> dict[str, Any]:
    """The value of `quantization_config`; `packing` is not empty."""
    groups: dict[str, dict[str, Any]] = {}
    for module, one in packing.items():
        settings = dict(sorted(one.settings.items()))
        group = {"format": one.format, "settings": settings, "modules": []}
        groups.setdefault(json.dumps([one.format, settings]), group)["modules"].append(module)
    return {"quant_method": METHOD, "version": VERSION, "groups": list(groups.values())}


def install(decoder: Decoder, packing: Mapping[str, Packing]) -> None:
    """Put modules without values in the place of the products that are packed and lie in this decoder.

    Raises AxiconError for a name that is no product of the model.
    """
    known = {global_name(decoder, path): path for path, m in decoder.named_modules() if type(m) is nn.Linear}
    for module, one in packing.items():
        if module not in known:
            _check_elsewhere(decoder, module)
            continue
        dense = decoder.get_submodule(known[module])
        assert isinstance(dense, nn.Linear)
        bias = None if dense.bias is None else dense.bias.dtype
        try:
            with torch.device(dense.weight.device):
                packed = FORMATS[one.format].empty(dense.out_features, dense.in_features, bias, one.settings)
        except ValueError as e:
            raise AxiconError(
                f"config.json: quantization_config of {module} does not fit {one.format}: {e}; "
                "make the model again") from e
        parent, _, name = known[module].rpartition(".")
        setattr(decoder.get_submodule(parent), name, packed)


def _check_elsewhere(decoder: Decoder, module: str) -> None:
    """A module that is not in this decoder must be in another part of the model."""
    parts = module.split(".")
    if parts[0] == "blocks" and len(parts) == 3 and parts[1].isdigit():
        index = int(parts[1])
        elsewhere = index < decoder.shape.layers and not decoder.first <= index < decoder.last
    else:
        elsewhere = (module == "project_in" and not decoder.has_embedding) or (
            module in ("lm_head", "project_out") and not decoder.has_head)
    if not elsewhere:
        raise AxiconError(
            f"config.json: quantization_config names {module[:80]!r}, which is no product of this model; "
            "make the model again")


def global_name(decoder: Decoder, path: str) -> str:
    """The name that a module of this decoder has in the whole model."""
    first, _, rest = path.partition(".")
    if first != "blocks":
        return path
    local, dot, name = rest.partition(".")
    return f"blocks.{decoder.first + int(local)}{dot}{name}" if local else path
