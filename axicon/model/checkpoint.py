"""From a name to a model: find the directory, pass the gate, map the weights, fill a Decoder.

    resolve("demo" | directory | file.gguf | hub id[@revision]) -> directory with safetensors, config and tokenizer
    load(directory) -> Decoder        load_tokenizer(directory) -> tokenizer        digest(directory) -> sha256
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from axicon.errors import AxiconError
from axicon.model import hub, safety
from axicon.model.artefact import FORMAT_VERSION
from axicon.model.cachedir import cache_dir, file_digest
from axicon.model.decoder import Decoder
from axicon.model.machine import available_memory
from axicon.model.shape import ModelShape
from axicon.model.tensorfile import TensorFile
from axicon.model.weights import PREFIX, Place, ignorable, set_parameter, weight_map, whole_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["cache_dir", "digest", "load", "load_tokenizer", "model_id", "resolve", "shape_of"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve(name: str | Path, *, offline: bool | None = None, revision: str | None = None) -> Path:
    """The directory of a model, made or fetched if need be.

    `demo` and GGUF files are converted once into the cache. Hub ids (`org/name`, `org/name@revision`) are fetched
    into the hub's own cache, where interrupted downloads go on; `offline` (default: HF_HUB_OFFLINE) uses only what is
    there. Raises AxiconError, and writes nothing half, for everything else.
    """
    from axicon.model import interchange

    text = os.fspath(name)
    path = Path(text).expanduser()
    if text == "demo":
        return interchange.demo()
    if path.is_dir():
        safety.check_folder(path)
        return path.resolve()
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return interchange.convert_gguf(path)
        raise safety.refuse_file(path)
    if isinstance(name, Path) or path.suffix.lower() == ".gguf" or not hub.is_hub_id(text):
        raise AxiconError(f"{text}: no such file or directory, nor a hub id like org/name; `demo` is always there")
    return hub.fetch(text, offline=offline, revision=revision)


def model_id(name: str | Path) -> str:
    """The name a model is served under: the hub's id, or the directory's name."""
    from axicon.model import interchange

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
    generation = folder / "generation_config.json"
    try:
        return ModelShape.from_config(
            safety.read_json(folder / "config.json"), safety.read_json(generation) if generation.exists() else None)
    except AxiconError as e:
        raise AxiconError(f"{folder}: {e}") from e


def load(path: str | Path, *, dtype: torch.dtype | None = torch.bfloat16, blocks: range | None = None) -> Decoder:
    """Read a model, or some of its blocks, into memory once.

    `dtype` None keeps the stored one. Files are mapped and copied tensor by tensor into the decoder's own memory, so
    there is never a second copy of the model. Raises AxiconError for a missing, unexpected, misshapen or non-finite
    tensor, for digests that differ from the manifest, and when memory would not suffice.
    """
    folder = resolve(path)
    shape = shape_of(folder)
    manifest = _manifest(folder)
    files = _open(folder)
    _verify(folder, files, manifest)
    located = {_normal(name, shape, files): (file, name) for file in files for name in file.entries}
    with torch.device("meta"):
        decoder = Decoder(shape, blocks)
    places = weight_map(decoder)
    _check_names(folder, located.keys(), places, shape)
    _check_shapes(decoder, located, places)
    if dtype is None:
        dtype = _stored_dtype(located, places)
    _check_memory(folder, decoder, dtype)
    _fill(decoder, located, places, dtype, non_finite=frozenset(manifest.get("non_finite", ())))
    _check_tied(folder, decoder, located, shape)
    return decoder.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a directory (or name), read from data files alone.

    Raises AxiconError when there is none, or when its chat template reaches beyond its messages.
    """
    folder = resolve(path)
    has_fast = (folder / "tokenizer.json").exists()
    if not has_fast and not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise AxiconError(
            f"{folder}: no tokenizer.json in it; make one with transformers' "
            "AutoTokenizer.from_pretrained(original).save_pretrained(folder)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as e:  # the library raises many kinds, and a bare Exception for a malformed tokenizer.json
        raise AxiconError(f"{folder}: the tokenizer cannot be read ({type(e).__name__}: {e}); fetch it again") from e
    if not tokenizer.is_fast:
        raise AxiconError(f"{folder}: only a slow tokenizer; save it again with a tokenizer.json")
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if template is not None:
            safety.check_chat_template(template, str(folder))
    return tokenizer


def digest(path: str | Path) -> str:
    """sha256 over config and weights, in hex. Remembered in the cache until a file's size or time changes."""
    import hashlib

    folder = resolve(path)
    total = hashlib.sha256()
    for name in ["config.json", *_weight_files(folder)]:
        total.update(f"{name} {file_digest(folder / name)}\n".encode())
    return total.hexdigest()


def _weight_files(folder: Path) -> list[str]:
    """Names of the weight files: the single one, or those the index names. Raises AxiconError."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    if not (folder / INDEX).exists():
        found = sorted(p.name for p in folder.glob("*.safetensors"))
        raise AxiconError(f"{folder}: neither {SINGLE} nor {INDEX}, only {', '.join(found[:5])}; fetch the rest")
    index = safety.read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise AxiconError(f"{folder / INDEX}: weight_map is not an object of file names; fetch it again")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise AxiconError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file in this directory")
        if not (folder / name).exists():
            raise AxiconError(f"{folder}: the index names {name}, which is missing; fetch it")
    return names


def _open(folder: Path) -> list[TensorFile]:
    """All weight files with their headers checked. Raises AxiconError if the index and the files disagree."""
    files = [TensorFile(folder / name) for name in _weight_files(folder)]
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.entries:
            if name in seen:
                raise AxiconError(f"{folder}: tensor {name} is in {seen[name].name} and in {file.path.name}")
            seen[name] = file.path
    if not (folder / SINGLE).exists():
        index = safety.read_json(folder / INDEX)["weight_map"]
        for name, file_name in index.items():
            if name not in seen or seen[name].name != file_name:
                raise AxiconError(f"{folder}: the index puts tensor {name} in {file_name}, and it is not there")
    return files


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    manifest = safety.read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise AxiconError(f"{path}: format version {version!r}, this axicon reads {FORMAT_VERSION}; update axicon")
    return manifest


def _verify(folder: Path, files: list[TensorFile], manifest: Mapping[str, Any]) -> None:
    """Compare sha256 of what is about to be read with the manifest, where there is one."""
    listed = manifest.get("files", {})
    for name in ["config.json", *(file.path.name for file in files)]:
        expected = listed.get(name, {}).get("sha256")
        if expected is not None and file_digest(folder / name) != expected:
            raise AxiconError(
                f"{folder / name}: sha256 differs from manifest.json; the file was changed or damaged, make it again")


def _normal(name: str, shape: ModelShape, files: list[TensorFile]) -> str:
    """The name as the whole model's checkpoint has it; the bare base model leaves out the first part."""
    bare = not any(n.startswith((PREFIX, "lm_head")) for file in files for n in file.entries)
    return PREFIX + name if bare else name


def _check_names(folder: Path, found: Any, places: Mapping[str, Place], shape: ModelShape) -> None:
    missing = sorted(places.keys() - found)
    if missing:
        raise AxiconError(f"{folder}: {_some(missing)} missing from the weights; the model is incomplete, fetch it again")
    unexpected = sorted(n for n in found - whole_map(shape).keys() if not ignorable(n, shape))
    if unexpected:
        raise AxiconError(
            f"{folder}: {_some(unexpected)} in the weights, which {shape.architecture} with this config.json has not; "
            "the model is of another kind than it says")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _check_shapes(
    decoder: Decoder, located: Mapping[str, tuple[TensorFile, str]], places: Mapping[str, Place]
) -> None:
    for name, place in places.items():
        file, stored = located[name]
        expected = list(decoder.get_parameter(place.parameter).shape)
        if place.rows is not None:
            expected[0] = place.rows.stop - place.rows.start
        entry = file.entries[stored]
        if list(entry.shape) != expected:
            raise AxiconError(f"{file.path}: {stored} has shape {list(entry.shape)}, config.json asks for {expected}")
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise AxiconError(
                f"{file.path}: {stored} is stored as {entry.dtype}, axicon reads dense float weights; "
                "take the model it was made from")


def _stored_dtype(located: Mapping[str, tuple[TensorFile, str]], places: Mapping[str, Place]) -> torch.dtype:
    file, name = located[next(iter(places))]
    dtype = file.entries[name].dtype
    return torch.float32 if dtype == torch.float64 else dtype


def _check_memory(folder: Path, decoder: Decoder, dtype: torch.dtype) -> None:
    needed = sum(p.numel() for p in decoder.parameters()) * dtype.itemsize
    available = available_memory()
    if available is not None and needed > available:
        raise AxiconError(
            f"{folder}: {needed / 2**30:.1f} GiB of memory needed for the weights, {available / 2**30:.1f} GiB "
            "available; stop other programs, take a smaller model, or use dtype=bfloat16")


def _fill(
    decoder: Decoder, located: Mapping[str, tuple[TensorFile, str]], places: Mapping[str, Place],
    dtype: torch.dtype, non_finite: frozenset[str],
) -> None:
    """Copy every tensor into place, file by file, and look for NaN and Inf in what was copied."""
    values: dict[str, torch.Tensor] = {}
    for name in sorted(places, key=lambda n: (str(located[n][0].path), located[n][0].entries[located[n][1]].begin)):
        place, (file, stored) = places[name], located[name]
        if place.parameter not in values:
            values[place.parameter] = torch.empty(decoder.get_parameter(place.parameter).shape, dtype=dtype)
        target = values[place.parameter]
        if place.rows is not None:
            target = target[place.rows]
        target.copy_(file.tensor(stored))
        # Smallest and largest are NaN if any element is: one pass, nothing allocated.
        if target.numel() and not all(x.isfinite() for x in target.aminmax()) and name not in non_finite:
            raise AxiconError(
                f"{file.path}: {stored} holds NaN or infinite values in {str(dtype).removeprefix('torch.')}; "
                "the file is damaged or was trained badly, or the model needs float32")
        file.forget()
    for parameter, value in values.items():
        set_parameter(decoder, parameter, nn.Parameter(value, requires_grad=False))


def _check_tied(
    folder: Path, decoder: Decoder, located: Mapping[str, tuple[TensorFile, str]], shape: ModelShape
) -> None:
    """A head stored although it is tied must be the embedding, or the config is wrong about the model."""
    if not (shape.tie_head and decoder.has_head and "lm_head.weight" in located):
        return
    file, name = located["lm_head.weight"]
    head = file.tensor(name)
    if head.shape != decoder.lm_head.weight.shape or not torch.equal(head.to(decoder.dtype), decoder.lm_head.weight):
        raise AxiconError(
            f"{folder}: lm_head.weight differs from the embedding although config.json ties them; "
            "set tie_word_embeddings to false if the head is the model's own")
