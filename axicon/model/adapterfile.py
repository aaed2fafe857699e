"""Low-rank adapters beside a base: read as the library PEFT stores them, and added to rows of a step.

Adapters change no weight, so requests of one step may have different ones. What a row gets added depends on
that row and its adapter alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model import checkpoint, safety
from axicon.model.adapters import adapted
from axicon.model.artefact import read_manifest
from axicon.model.decoder import Block, Decoder
from axicon.model.intact import changed_files
from axicon.model.lowrank import LoraLinear, parts_of, products
from axicon.model.shape import ModelShape
from axicon.model.tensorfile import TensorFile
from axicon.model.weights import BLOCK_NAMES, LAYERS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "use_rslora", "auto_mapping", "init_lora_weights", "peft_version",
})  # fmt: skip
"""Keys of `adapter_config.json` that are read, or decide nothing once the adapter is trained."""


@dataclass(frozen=True, slots=True)
class Pair:
    """y[rows] += B A x."""

    rows: slice
    """Of the product's outputs."""
    a_RI: Tensor
    """float32."""
    b_OR: Tensor
    """float32, with alpha / r in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What it adds, by block and by the attribute of the product."""

    pairs: Mapping[tuple[int, str], tuple[Pair, ...]]
    digest: str
    """sha256 over config and weights."""
    base: str | None
    """Digest of the model it was trained on; None where nobody wrote it down."""

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        return max(len(pair.a_RI) for pairs in self.pairs.values() for pair in pairs)

    @property
    def bytes(self) -> int:
        return sum(p.a_RI.nbytes + p.b_OR.nbytes for pairs in self.pairs.values() for p in pairs)


class Located(NamedTuple):
    """Where a model is that may be an adapter beside another one."""

    base: Path
    adapter: Path | None

    @property
    def folder(self) -> Path:
        """What was named."""
        return self.adapter or self.base

    @property
    def digest(self) -> str:
        """Of all that it is made of."""
        base = checkpoint.digest(self.base)
        return base if self.adapter is None else f"{base} {digest(self.adapter)}"


def locate(name: str | Path, *, offline: bool | None = None, revision: str | None = None) -> Located:
    """As `checkpoint.resolve`, of a name that may also be the directory of an adapter."""
    folder = Path(name).expanduser()
    if is_adapter(folder):
        return Located(base_of(folder.resolve()), folder.resolve())
    return Located(checkpoint.resolve(name, offline=offline, revision=revision), None)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(folder: Path) -> Path:
    """The directory of the model beneath an adapter.

    Raises AxiconError where it is not there, or is another one than the adapter was trained on.
    """
    config = safety.read_json(folder / CONFIG)
    said, source = _parent(folder), config.get("base_model_name_or_path")
    if not isinstance(source, str) or not source:
        raise AxiconError(f"{folder / CONFIG}: names no base_model_name_or_path; write its base there")
    try:
        base = checkpoint.resolve(source)
    except AxiconError as e:
        raise AxiconError(f"{folder}: the model beneath this adapter is not there: {e}") from e
    if said is not None and (found := checkpoint.digest(base)) != said:
        raise AxiconError(
            f"{folder}: trained on a model with digest {said[:12]}, and {source} has {found[:12]} now; an "
            "adapter fits its own base alone"
        )
    return base


def read_adapter(folder: Path, shape: ModelShape, most_rank: int = 256) -> Adapter:
    """Raises AxiconError for what is no LoRA adapter of a model of this shape, or was changed."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise AxiconError(f"{folder / name}: a link that leads out of the folder; copy the file into it")
    problems = changed_files(folder) if read_manifest(folder) is not None else []
    if problems:
        raise AxiconError(f"{folder}: {problems[0].file} {problems[0].what}; {problems[0].do}")
    scale, rank = _checked(folder, safety.read_json(folder / CONFIG), most_rank)
    file = TensorFile(folder / WEIGHTS)
    with torch.device("meta"):
        model = Decoder(shape)
    names = dict(_names(model))
    unknown = sorted(file.entries.keys() - {f"{name}.{half}" for name in names for half in _HALVES})
    if unknown:
        raise AxiconError(f"{file.path}: {unknown[0]!r} is no product of this model that an adapter adds to")
    found: dict[tuple[int, str], list[Pair]] = {}
    for name, (place, rows, outputs, inputs) in names.items():
        given = [f"{name}.{half}" in file.entries for half in _HALVES]
        if not any(given):
            continue
        if not all(given):
            raise AxiconError(f"{file.path}: {name} has only one of lora_A and lora_B; fetch it again")
        a, b = (_tensor(file, f"{name}.{half}") for half in _HALVES)
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise AxiconError(
                f"{file.path}: {name} has shapes {list(a.shape)} and {list(b.shape)}, this model needs "
                f"{[rank, inputs]} and {[outputs, rank]}; it is an adapter of another model"
            )
        found.setdefault(place, []).append(Pair(rows, a, b * scale))
    if not found:
        raise AxiconError(f"{file.path}: holds no tensor of an adapter")
    pairs = {place: tuple(some) for place, some in found.items()}
    return Adapter(pairs, digest(folder), _parent(folder))


def taken_from(model: Decoder, digest: str, base: str) -> Adapter:
    """A copy of the adapters that a finetuning has put beside a model, whose products need no values.

    Raises AxiconError where some are NaN or infinite.
    """
    pairs: dict[tuple[int, str], tuple[Pair, ...]] = {}
    for index, name, product in adapted(model):
        found = []
        for part, rows in product.parts.items():
            a, b = (half.detach() for half in product.pair(part))
            if not (a.isfinite().all() and b.isfinite().all()):
                raise AxiconError(f"adapters of block {index} are NaN or infinite: this run diverged")
            found.append(Pair(rows, a.clone(), b * product.scale))
        pairs[index, name] = tuple(found)
    return Adapter(pairs, digest, base)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        total.update(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


_HALVES = ("lora_A.weight", "lora_B.weight")


def _names(model: Decoder) -> Iterable[tuple[str, tuple[tuple[int, str], slice, int, int]]]:
    """PEFT's name of each part of each product, with its place, rows, outputs and inputs."""
    theirs = BLOCK_NAMES[model.shape.family]
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name, product in products(block):
            assert isinstance(product, nn.Linear)
            for part, rows in parts_of(block, name).items():
                if part in theirs:
                    outputs = len(range(product.out_features)[rows])
                    layer = f"base_model.model.{LAYERS[model.shape.family]}.{i}.{theirs[part]}"
                    yield layer, ((i, name), rows, outputs, product.in_features)


def _checked(folder: Path, config: Mapping[str, Any], most_rank: int) -> tuple[float, int]:
    """Scale and rank. Raises AxiconError for a config that asks for something else than plain LoRA."""
    where = folder / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AxiconError(
            f"{where}: peft_type is {kind!r}; served are low-rank adapters (LORA); others put tokens before "
            "a text, which the cache does not hold yet"
        )
    for key, value in config.items():
        if key not in PLAIN and value and not (key == "bias" and value == "none"):
            raise AxiconError(f"{where}: {key} is {value!r}, and is not known here; plain LoRA has none")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most_rank:
        raise AxiconError(f"{where}: r is {rank!r}, it must be a number from 1 to {most_rank}")
    if not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
        raise AxiconError(f"{where}: lora_alpha is {alpha!r}, it must be a number above 0")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _tensor(file: TensorFile, name: str) -> Tensor:
    entry = file.entries[name]
    if not entry.dtype.is_floating_point or len(entry.shape) != 2 or 0 in entry.shape:
        raise AxiconError(f"{file.path}: {name} is no matrix of floats")
    value = file.tensor(name).float().clone()
    if not value.isfinite().all():
        raise AxiconError(f"{file.path}: {name} holds NaN or infinite values; the file is damaged")
    return value


def _parent(folder: Path) -> str | None:
    """Digest of the base, from the manifest."""
    parents = (read_manifest(folder) or {}).get("parents")
    try:
        return str(parents[0]["sha256"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError):
        return None


class Added:
    """The adapters that a decoder in torch holds, and which rows of a pass have which.

    Puts itself beside the decoder's products when the first one is held.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.held: dict[int, Adapter] = {}
        self.rows: list[tuple[slice, Adapter]] = []
        """Of the pass that is computed now."""
        self._decoder: Decoder | None = decoder

    def hold(self, number: int, adapter: Adapter | None) -> None:
        """Have it by this number; None gives it up."""
        if adapter is None:
            self.held.pop(number, None)
            return
        self.held[number] = adapter
        decoder, self._decoder = self._decoder, None
        for i, block in enumerate([] if decoder is None else decoder.blocks):
            for name, product in list(products(block)):
                setattr(block, name, _Beside(product, self, (decoder.first + i, name)))  # type: ignore[union-attr]

    def choose(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """(first row, row behind the last, adapter) of the pass that comes. Each span is added to by itself,
        so that nobody's bits depend on who else has the same adapter."""
        self.rows = [
            (slice(start, stop), self.held[number]) for start, stop, number in spans if number in self.held
        ]


class _Beside(nn.Module):
    """A product, and what adapters add to rows of it."""

    def __init__(self, base: nn.Module, added: Added, place: tuple[int, str]) -> None:
        super().__init__()
        self.base, self.added, self.place = base, added, place

    def forward(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = self.base(x_NI)
        for span, adapter in self.added.rows:
            for pair in adapter.pairs.get(self.place, ()):
                low = F.linear(F.linear(x_NI[span].float(), pair.a_RI), pair.b_OR)
                y_NO[span, pair.rows] += low.to(y_NO.dtype)
        return y_NO


def install(model: Decoder, adapter: Adapter) -> None:
    """Make an adapter a part of what a decoder in torch computes, for every row."""
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name, product in list(products(block)):
            pairs = adapter.pairs.get((model.first + i, name), ())
            parts = {
                part: rows
                for part, rows in parts_of(block, name).items()
                if any(pair.rows == rows for pair in pairs)
            }
            if not parts:
                continue
            beside = LoraLinear(product, parts, len(pairs[0].a_RI), float(len(pairs[0].a_RI)), 0, "")
            for part, rows in parts.items():
                pair = next(pair for pair in pairs if pair.rows == rows)
                for mine, theirs in zip(beside.pair(part), (pair.a_RI, pair.b_OR), strict=True):
                    mine.data.copy_(theirs)
            setattr(block, name, beside.requires_grad_(False))
