"""From a name to a model: find the directory, pass the gate, map the weights, fill a Decoder.

    resolve("demo" | directory | file.gguf | org/name[@revision]) -> directory
    load(directory) -> Decoder
    load_tokenizer(directory) -> tokenizer
    digest(directory) -> sha256
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from axicon.errors import AxiconError
from axicon.model import hub, interchange, safety
from axicon.model.artefact import read_manifest
from axicon.model.cachedir import cache_dir, file_digest, hold
from axicon.model.decoder import Decoder
from axicon.model.foreign import SCHEMES, translate
from axicon.model.formats import Packing, global_name, install, read_packing
from axicon.model.machine import available_memory
from axicon.model.masks import MASK
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape
from axicon.model.shards import Stored, open_weights, weight_files
from axicon.model.weights import (
    Place,
    as_placed,
    head_name,
    ignorable,
    install_masks,
    set_tensor,
    tensor_at,
    weight_map,
    whole_map,
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "cache_dir", "check", "check_headers", "digest", "load", "load_tokenizer", "model_id", "packed_formats",
    "resolve", "shape_of",
]  # fmt: skip


def resolve(name: str | Path, *, offline: bool | None = None, revision: str | None = None) -> Path:
    """The directory of a model, made or fetched if need be.

    `demo` and GGUF files are converted once into the cache. Hub ids (`org/name`, `org/name@revision`) are
    fetched into the hub's own cache, where interrupted downloads go on; `offline` (default: HF_HUB_OFFLINE)
    uses only what is there. Raises AxiconError, and writes nothing half, for everything else.
    """
    kind = hub.what_is(name)
    if kind == "demo":
        return hold(interchange.demo())
    if kind == "hub":
        return hub.fetch(os.fspath(name), offline=offline, revision=revision)
    path = Path(name).expanduser()
    return hold(path.resolve() if kind == "folder" else interchange.convert_gguf(path))


def model_id(name: str | Path) -> str:
    """The name a model is served under: the hub's id, or the directory's name."""
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text == "demo":
        return interchange.DEMO_NAME
    if path.exists():
        return hub.repository_of(path.resolve()) or path.resolve().name.removesuffix(".gguf")
    return text.partition("@")[0]


def shape_of(path: str | Path) -> ModelShape:
    """The shape of the model in a directory (or behind a name), without its weights."""
    folder = resolve(path)
    config = safety.read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    try:
        return ModelShape.from_config(config, safety.read_json(generation) if generation.exists() else None)
    except AxiconError as e:
        raise AxiconError(f"{folder}: {e}") from e


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    blocks: range | None = None,
    masks: bool = False,
) -> Decoder:
    """Read a model, or some of its blocks, into memory once. Products that are stored packed stay packed.

    `dtype` is that of everything dense; None keeps the stored one. With `masks`, pruned products have theirs
    (`axicon.model.masks`), which only what changes weights needs. Files are mapped and copied tensor by
    tensor into the decoder's own memory, so there is never a second copy of the model. Raises AxiconError for
    a missing, unexpected, misshapen or non-finite tensor, for digests that differ from the manifest, and when
    memory would not suffice.
    """
    plan = _plan(path, dtype, blocks, masks)
    _fill(plan)
    _check_tied(plan)
    return plan.decoder.eval()


def check(path: str | Path, *, dtype: torch.dtype | None = torch.bfloat16) -> ModelShape:
    """Raise what `load` would, as far as headers tell: names, shapes, digests, memory. No weight is read."""
    return _plan(path, dtype, None, True).decoder.shape


def check_headers(folder: Path) -> None:
    """Raise what `load` would of names, shapes and formats, whatever the digests are and on any machine."""
    _read(folder, {}, None, True)


def packed_formats(path: str | Path) -> tuple[str, ...]:
    """Names of the packed formats a model is stored in; none for a dense model. Reads its config, and headers
    of another tool's weights."""
    folder = resolve(path)
    stored: Mapping[str, Stored] = {}
    if _is_foreign(safety.read_json(folder / "config.json")):
        stored = open_weights(folder, {})
    return tuple(sorted({one.format for one in _packing(folder, shape_of(folder), stored)[0].values()}))


def is_pruned(path: str | Path) -> bool:
    """Whether products of a model have masks. Reads headers."""
    decoder = _read(resolve(path), {}, None, True)[0]
    return any(MASK in module._buffers for module in decoder.modules())


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that is known before the first weight is read."""

    folder: Path
    decoder: Decoder
    """Without memory yet."""
    stored: Mapping[str, Stored]
    places: Mapping[str, Place]
    dtype: torch.dtype
    non_finite: frozenset[str]
    """Tensors whose manifest declares NaN or infinite values."""


def _plan(path: str | Path, dtype: torch.dtype | None, blocks: range | None, masks: bool) -> _Plan:
    folder = resolve(path)
    manifest = read_manifest(folder) or {}
    decoder, stored, places = _read(folder, manifest, blocks, masks)
    if dtype is None:
        dense = (stored[name].entry.dtype for name, place in places.items() if place.dtype is None)
        dtype = next(dense, torch.bfloat16)
    _check_memory(folder, decoder, places, dtype)
    return _Plan(folder, decoder, stored, places, dtype, frozenset(manifest.get("non_finite", ())))


def _read(
    folder: Path, manifest: Mapping[str, Any], blocks: range | None, masks: bool
) -> tuple[Decoder, Mapping[str, Stored], Mapping[str, Place]]:
    """A decoder without memory, what the files hold, and what goes where; names, shapes, dtypes are checked.
    """
    shape = shape_of(folder)
    packing, stored = _packing(folder, shape, open_weights(folder, manifest))
    with torch.device("meta"):
        decoder = Decoder(shape, blocks)
    try:
        install(decoder, packing)
        if masks:
            install_masks(decoder, stored)
        whole = whole_map(shape, packing, stored)
    except AxiconError as e:
        raise AxiconError(f"{folder}: {e}") from e
    places = weight_map(decoder)
    _check_names(folder, set(stored), places, whole, shape)
    _check_tensors(decoder, stored, places)
    return decoder, stored, places


def _packing(
    folder: Path, shape: ModelShape, stored: Mapping[str, Stored]
) -> tuple[dict[str, Packing], Mapping[str, Stored]]:
    """Packed products, and the tensors under axicon's names for them."""
    config = safety.read_json(folder / "config.json")
    try:
        if _is_foreign(config):
            return translate(config["quantization_config"], shape, stored)
        return read_packing(config), stored
    except AxiconError as e:
        raise AxiconError(f"{folder}: {e}") from e


def _is_foreign(config: Mapping[str, Any]) -> bool:
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") in SCHEMES


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a directory (or name), read from data files alone.

    Raises AxiconError when there is none, or when its chat template reaches beyond its messages.
    """
    folder = resolve(path)
    files = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).exists()}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise AxiconError(
            f"{folder}: no tokenizer.json in it; make one with transformers' "
            "AutoTokenizer.from_pretrained(original).save_pretrained(folder)")
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as e:  # the library raises many kinds; tokenizers a bare Exception for malformed files
        raise AxiconError(
            f"{folder}: the tokenizer cannot be read ({type(e).__name__}: {e}); fetch it again") from e
    if not tokenizer.is_fast:
        raise AxiconError(f"{folder}: only a slow tokenizer; save it again with a tokenizer.json")
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if template is not None:
            safety.check_chat_template(template, str(folder))
    return tokenizer


def digest(path: str | Path) -> str:
    """sha256 over config and weights, in hex. Remembered in the cache until a file's size or time changes."""
    folder = resolve(path)
    total = hashlib.sha256()
    for name in ["config.json", *weight_files(folder)]:
        total.update(f"{name} {file_digest(folder / name)}\n".encode())
    return total.hexdigest()


def _check_names(
    folder: Path, found: set[str], places: Mapping[str, Place], whole: Mapping[str, Place], shape: ModelShape
) -> None:
    missing = sorted(places.keys() - found)
    if missing:
        raise AxiconError(
            f"{folder}: {_some(missing)} missing from the weights; the model is incomplete, fetch it again")
    unexpected = sorted(n for n in found - whole.keys() if not ignorable(n, shape))
    if unexpected:
        raise AxiconError(
            f"{folder}: {_some(unexpected)} in the weights, which {shape.architecture} with this "
            "config.json has not; the model is of another kind than it says")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _check_tensors(decoder: Decoder, stored: Mapping[str, Stored], places: Mapping[str, Place]) -> None:
    for name, place in places.items():
        expected = list(tensor_at(decoder, place).shape)
        where, entry = f"{stored[name].file.path}: {stored[name].name}", stored[name].entry
        if list(entry.shape) != expected:
            raise AxiconError(f"{where} has shape {list(entry.shape)}, config.json asks for {expected}")
        if place.dtype is not None:
            if entry.dtype != place.dtype:
                raise AxiconError(
                    f"{where} is stored as {entry.dtype}, its format asks for {place.dtype}; "
                    "make the model again")
        elif not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise AxiconError(
                f"{where} is stored as {entry.dtype}, axicon reads dense float weights; "
                "take the model it was made from")


def _check_memory(folder: Path, decoder: Decoder, places: Mapping[str, Place], dtype: torch.dtype) -> None:
    needed = sum(
        tensor_at(decoder, place).numel() * (place.dtype or dtype).itemsize for place in places.values())
    available = available_memory()
    if available is not None and needed > available:
        raise AxiconError(
            f"{folder}: {needed / 2**30:.1f} GiB of memory needed for the weights, "
            f"{available / 2**30:.1f} GiB available; stop other programs, take a smaller model, "
            "or use dtype=bfloat16")


def _fill(plan: _Plan) -> None:
    """Copy every tensor into place, file by file, and look for NaN and Inf in what was copied."""
    values: dict[str, torch.Tensor] = {}
    for name in sorted(plan.places, key=lambda name: plan.stored[name].place):
        place, source = plan.places[name], plan.stored[name]
        if place.parameter not in values:
            shape = tensor_at(plan.decoder, Place(place.parameter)).shape
            values[place.parameter] = torch.empty(shape, dtype=place.dtype or plan.dtype)
        target = values[place.parameter]
        if place.rows is not None:
            target = target[place.rows]
        target.copy_(as_placed(place, source.tensor()))
        source.file.forget()
        # Smallest and largest are NaN if any element is: one pass, nothing allocated.
        floating = target.is_floating_point() and name not in plan.non_finite
        if floating and not all(x.isfinite() for x in target.aminmax()):
            raise AxiconError(
                f"{source.file.path}: {source.name} holds NaN or infinite values as "
                f"{str(target.dtype).removeprefix('torch.')}; the file is damaged, or the model needs "
                "float32")
    for parameter, value in values.items():
        set_tensor(plan.decoder, parameter, value)
    for path, module in plan.decoder.named_modules():
        if isinstance(module, PackedLinear):
            try:
                module.check()
            except ValueError as e:
                name = global_name(plan.decoder, path)
                raise AxiconError(f"{plan.folder}: {name}: {e}; make the model again") from e


def _check_tied(plan: _Plan) -> None:
    """A head stored although it is tied must be the embedding, or the config is wrong about the model."""
    decoder, stored = plan.decoder, plan.stored
    name = head_name(decoder.shape)
    if not (decoder.shape.tie_head and decoder.has_head and name in stored):
        return
    if isinstance(decoder.lm_head, PackedLinear):
        raise AxiconError(
            f"{plan.folder}: {name} beside the packed head, which the config does not know; "
            "make the model again")
    ours, theirs = decoder.lm_head.weight, stored[name].tensor()
    if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.dtype)):
        raise AxiconError(
            f"{plan.folder}: {name} differs from the embedding although config.json ties them; "
            "set tie_word_embeddings to false if the head is the model's own")
