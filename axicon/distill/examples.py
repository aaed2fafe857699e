"""Labelled examples: images or vectors of one shape, standardised, cut into what is trained and tested on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from axicon.data.table import Placed
from axicon.errors import AxiconError

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS = "digits"
EXTRA = "pip install 'axicon[distill]'"


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """N examples with what is needed to show them again."""

    x: Tensor
    """float32 (N, C, H, W) or (N, F), standardised: (raw - mean) / std."""
    y: Tensor
    """int64 (N,): index into `classes`."""
    classes: tuple[str, ...]
    mean: Tensor
    """float32, of one example's shape with 1 where it does not vary: (C, 1, 1) or (F,)."""
    std: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.x.shape[1:])

    @property
    def images(self) -> bool:
        return self.x.ndim == 4

    def of(self, chosen: Tensor) -> Examples:
        return replace(self, x=self.x[chosen], y=self.y[chosen])

    def raw(self) -> Tensor:
        """As they were before they were standardised."""
        return self.x * self.std + self.mean

    def sha256(self) -> str:
        """Of everything that a network sees."""
        total = hashlib.sha256(repr((self.classes, tuple(self.x.shape))).encode())
        for tensor in (self.x, self.y):
            total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def standardised(raw: Tensor, y: Tensor, classes: Sequence[str], like: Examples | None = None) -> Examples:
    """Examples from raw values, by mean and deviation of their own, per channel or feature, or of `like`."""
    if like is None:
        over = (0, 2, 3) if raw.ndim == 4 else (0,)
        mean = raw.mean(dim=over, keepdim=True)[0]
        std = raw.std(dim=over, keepdim=True)[0]
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
    else:
        mean, std = like.mean, like.std
    return Examples(x=(raw - mean) / std, y=y, classes=tuple(classes), mean=mean, std=std)


def split(y: Tensor, share: float, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices to train and to test on: `share` of each class is held out, chosen by `chance`."""
    train, test = [], []
    for label in range(int(y.max()) + 1):
        mine = (y == label).nonzero()[:, 0]
        mine = mine[torch.randperm(len(mine), generator=chance)]
        count = round(share * len(mine))
        test.append(mine[:count])
        train.append(mine[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def digits() -> tuple[Tensor, Tensor, tuple[str, ...], Path]:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: float32 (N, 1, 8, 8) within
    0 .. 1, labels, names of classes, and the file. Raises AxiconError where scikit-learn is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError:
        raise AxiconError(f"data.source={DIGITS} comes with scikit-learn: {EXTRA}") from None
    found = sklearn.datasets.load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    file = Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"
    return images, torch.from_numpy(found.target).long(), tuple(map(str, found.target_names)), file


def images_of(table: Sequence[Placed], column: str, size: int | None) -> Tensor:
    """float32 (N, C, H, W) within 0 .. 1. An image is what `datasets` keeps: bytes, {"bytes": ...}, a picture
    of Pillow, or nested lists of grey values up to 255.

    Raises AxiconError for what is none, and where they differ in size or channels and `size` is None.
    """
    arrays: list[Tensor] = []
    for one in table:
        image = _image(one, column, size)
        if arrays and image.shape != arrays[0].shape:
            one.refuse(
                f"{column!r} is an image of {_size(image)}, the first one of {_size(arrays[0])}; "
                "data.size=N brings all to N x N pixels and the same channels"
            )
        arrays.append(image)
    return torch.stack(arrays)


def _size(image: Tensor) -> str:
    channels, height, width = image.shape
    return f"{height} x {width} pixels with {channels} channel{'s' if channels > 1 else ''}"


def _image(one: Placed, column: str, size: int | None) -> Tensor:
    value = one.record.get(column)
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, list):
        try:
            grey = torch.tensor(value, dtype=torch.float32) / 255
        except (TypeError, ValueError):
            one.refuse(f"{column!r} is a list, but no image of numbers in rows of equal length")
        if grey.ndim != 2:
            one.refuse(f"{column!r} is a list with {grey.ndim} dimensions; grey values have 2")
        return grey[None] if size is None else _resized(grey[None], size)
    try:
        import PIL.Image
    except ImportError:
        raise AxiconError(f"images are decoded by Pillow: {EXTRA}") from None
    if isinstance(value, bytes):
        try:
            value = PIL.Image.open(io.BytesIO(value))
            value.load()
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            one.refuse(f"{column!r} cannot be decoded as an image ({error})")
    if not isinstance(value, PIL.Image.Image):
        one.refuse(f"no image in field {column!r}; its fields are {', '.join(one.record)}")
    return _decoded(value, size)


def _decoded(image: Image, size: int | None) -> Tensor:
    grey = image.mode in ("1", "L", "I", "I;16", "F") and size is None
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        image = image.resize((size, size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1).float() / 255


def _resized(image: Tensor, size: int) -> Tensor:
    found: Tensor = torch.nn.functional.interpolate(
        image[None], (size, size), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return found.expand(3, -1, -1)


def labels_of(
    table: Sequence[Placed], column: str, known: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """(N,) int64 and the names of the classes: all that occur, in order, or `known` ones.

    Raises AxiconError for a record without a label, and for a label that is not known.
    """
    values: list[str] = []
    for one in table:
        value: Any = one.record.get(column)
        if not isinstance(value, str | int) or isinstance(value, bool):
            one.refuse(f"no label in field {column!r}; its fields are {', '.join(one.record)}")
        if isinstance(value, int) and value < 0:
            one.refuse(f"{column!r} is {value}, which marks a record without a label; leave it out")
        values.append(str(value))
    if known is None:
        numbers = all(value.isdigit() for value in values)
        known = sorted(set(values), key=lambda v: (int(v), v) if numbers else (0, v))
    places = {name: i for i, name in enumerate(known)}
    for one, value in zip(table, values, strict=True):
        if value not in places:
            one.refuse(
                f"{column!r} is {value!r}, which no record to train on has; those have {', '.join(known)}"
            )
    return torch.tensor([places[value] for value in values]), tuple(known)


def check_enough(y: Tensor, classes: Sequence[str], ipc: int) -> None:
    """Raises AxiconError for a class with fewer examples than are to be made of it."""
    if len(classes) < 2:
        raise AxiconError(f"all examples have the label {', '.join(classes)}: there is nothing to tell apart")
    for label, name in enumerate(classes):
        count = int((y == label).sum())
        if count < ipc:
            raise AxiconError(
                f"class {name} has {count} examples to train on, ipc={ipc} asks for more; "
                f"take ipc={count} or less"
            )
