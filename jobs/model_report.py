"""`report.json` of a model directory: its size, perplexity and speed, or why one of them is not known.

    {"bytes":        {"total", "dense_total", ...},
     "perplexity":   {"dense", "compressed", "protocol", "windows", "text_sha256"},
     "tokens_per_s": {"1", "8", "conditions"}}

A value that was not measured is null, and `reason` of its block says why, by its name. The file is not
among the digests of the manifest: figures come after the model, and may be measured again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from axicon.errors import AxiconError
from axicon.evaluate.card import PARTS, Kind
from axicon.model import safety
from axicon.model.artefact import write_atomically

if TYPE_CHECKING:
    from axicon.evaluate import Perplexity
    from axicon.evaluate.serving import Serving

FILE = "report.json"
NOT_MEASURED = "not measured"


class Block(BaseModel):
    """Figures that belong together."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True)
    figures: ClassVar[tuple[str, ...]]
    """Names, in the file, of the values that need a reason when they are null."""
    reason: dict[str, str] = {}
    """Why a value is null, by its name."""

    @model_validator(mode="before")
    @classmethod
    def _reasons(cls, values: Any) -> Any:
        """A reason for every null and for nothing else."""
        if not isinstance(values, Mapping):
            return values
        given = values.get("reason") or {}
        if not isinstance(given, str | Mapping):
            return values  # its type is refused next
        names = {name: cls._field(name) for name in cls.figures}
        known = {name: values.get(name, values.get(field)) for name, field in names.items()}
        reasons = {
            name: given if isinstance(given, str) else given.get(name, NOT_MEASURED)
            for name, value in known.items()
            if value is None
        }
        return {**values, "reason": reasons}

    @classmethod
    def _field(cls, name: str) -> str:
        return next(key for key, info in cls.model_fields.items() if name in (key, info.alias))

    def get(self, name: str) -> float | None:
        """The value under its name in the file."""
        return getattr(self, self._field(name))

    def why(self, name: str) -> str:
        return self.reason.get(name, NOT_MEASURED)


class Bytes(Block):
    """Sizes of weights in bytes. Further parts may stand beside them."""

    model_config = ConfigDict(frozen=True, extra="allow")
    figures = ("total", "dense_total")
    total: int | None = Field(None, ge=0)
    """All weight files of this directory."""
    dense_total: int | None = Field(None, ge=0)
    """The same of the dense model it was made from."""


class PerplexityFigures(Block):
    """Two figures that may be compared: one text, one protocol."""

    figures = ("dense", "compressed")
    dense: float | None = None
    """Of the model before it was compressed."""
    compressed: float | None = None
    """Of the model in this directory, if it is a compressed one."""
    protocol: str | None = None
    windows: int | None = None
    text_sha256: str | None = None

    @classmethod
    def of(cls, measured: Perplexity, dtype: str, kind: Kind) -> Self:
        """One figure, the other one null."""
        values: dict[str, Any] = {kind: measured.value}
        if kind == "dense":
            values["reason"] = {"compressed": "the model is a dense one"}
        return cls(
            **values,
            protocol=protocol(measured.protocol, measured.window, dtype),
            windows=measured.windows,
            text_sha256=measured.text_sha256,
        )

    def basis(self) -> tuple[str | None, int | None, str | None]:
        """What two figures must share to be compared."""
        return self.protocol, self.windows, self.text_sha256

    def joined(self, new: Self) -> Self:
        """`new`, with the other figure kept where it was measured in the same way."""
        if self.basis() != new.basis():
            return new
        kept = {name: new.get(name) if new.get(name) is not None else self.get(name) for name in self.figures}
        return type(self)(**new.model_dump() | kept | {"reason": self.reason | new.reason})


class Speed(Block):
    """Generated tokens per second over all streams."""

    figures = ("1", "8")
    one: float | None = Field(None, alias="1", ge=0)
    eight: float | None = Field(None, alias="8", ge=0)
    conditions: str | None = None
    """Processor, threads, numbers and lengths: what two speeds must share to be compared."""

    @classmethod
    def of(cls, served: Serving) -> Self:
        reason = dict.fromkeys(cls.figures, served.reason.get("tokens_per_s", NOT_MEASURED))
        return cls.model_validate({**served.tokens_per_s, "conditions": served.conditions, "reason": reason})


class ModelReport(BaseModel):
    """The whole of `report.json`. Frozen: `updated` gives another."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    bytes: Bytes = Bytes()
    perplexity: PerplexityFigures = PerplexityFigures()
    tokens_per_s: Speed = Speed()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The report of a model directory; all values null if it has none. Raises AxiconError."""
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            return cls.model_validate(safety.read_json(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise AxiconError(
                f"{path}: {where}: {first['msg'].lower()}; remove the file and measure again"
            ) from None

    def updated(
        self,
        *,
        bytes: Bytes | None = None,
        perplexity: PerplexityFigures | None = None,
        tokens_per_s: Speed | None = None,
    ) -> Self:
        """With new blocks. A perplexity block is joined with the old one only if both were measured alike."""
        new = {"bytes": bytes, "tokens_per_s": tokens_per_s}
        if perplexity is not None:
            new["perplexity"] = self.perplexity.joined(perplexity)  # type: ignore[assignment]
        return self.model_copy(update={key: block for key, block in new.items() if block is not None})

    def write(self, folder: Path) -> None:
        """Replace `report.json`; a reader sees the old one or the new. Raises OSError."""
        content = self.model_dump(mode="json", by_alias=True)
        for block in ("bytes", "perplexity", "tokens_per_s"):
            content[block]["reason"] = content[block].pop("reason")  # after the figures it explains
            if not content[block]["reason"]:
                del content[block]["reason"]
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / FILE, text + "\n")


def protocol(name: str, window: int, dtype: str) -> str:
    """All of a perplexity's protocol in words, such as "gptq, window 2048, float32"."""
    return f"{name}, window {window}, {dtype}"


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model directory. Raises AxiconError."""
    from axicon.model.shards import weight_files

    return sum((folder / name).stat().st_size for name in weight_files(folder))


def part_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the tensors of embedding, blocks and head. Raises AxiconError."""
    from axicon.model.shards import open_weights

    parts = dict.fromkeys(PARTS, 0)
    for name, stored in open_weights(folder, {}).items():
        parts[_part(name)] += stored.entry.end - stored.entry.begin
    return parts


def _part(name: str) -> str:
    if "layers." in name or name.startswith("blocks."):
        return "blocks"
    return "embedding" if "embed" in name or "project_in" in name else "head"
