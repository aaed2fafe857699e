"""`manifest.json` of a model directory, as its readers see it: where a model came from."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from axicon.errors import AxiconError
from axicon.model.artefact import MANIFEST, read_manifest


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Link(_Part):
    """One method that was applied, with all its settings."""

    method: str
    settings: dict[str, Any] = {}
    axicon: str = ""
    """Version that applied it."""
    calibration: dict[str, Any] | None = None
    """Of a method that looks at data: where its sample comes from."""

    def __str__(self) -> str:
        """The method and those settings that differ from its defaults (all, for a method not known here)."""
        defaults = self._defaults()
        changed = [
            f"{key}={_short(value)}"
            for key, value in self.settings.items()
            if key not in defaults or _plain(defaults[key]) != _plain(value)
        ]
        return " ".join([self.method, *changed])

    def _defaults(self) -> dict[str, Any]:
        """Of finetuning, the defaults of its rule and its scheme, as `rule.lr`."""
        if self.method in ("finetune", "perp"):
            from axicon.finetune.updates import UPDATE_RULES
            from axicon.model.adapters import SCHEMES

            rule, scheme = (str(self.settings.get(key)) for key in ("rule", "scheme"))
            return _of_class(UPDATE_RULES.get(rule), "rule.") | _of_class(SCHEMES.get(scheme), "scheme.")
        if self.method == "distill":
            from jobs.distill_recipe import DistillRecipe, flat

            return flat(DistillRecipe().deciding())
        from axicon.compress import COMPRESSORS

        return _of_class(COMPRESSORS.get(self.method))


class Parent(_Part):
    name: str
    sha256: str
    """Of a file, or of config and weights of a directory (`axicon.model.checkpoint.digest`)."""
    source: str
    """What was typed or found: `demo`, a directory, a GGUF file, or an id of the hub."""


class Stored(_Part):
    bytes: int
    sha256: str


class Manifest(_Part):
    name: str = ""
    chain: tuple[Link, ...] = ()
    """Methods in the order in which they were applied; empty for a dense model."""
    parents: tuple[Parent, ...] = ()
    licence: str | None = None
    files: dict[str, Stored] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The manifest of a model directory; None without one.

        Raises AxiconError for one that cannot be read and for one of a newer axicon.
        """
        content = read_manifest(folder)
        if content is None:
            return None
        # The first conversions name their GGUF file in `source` only, without its folder.
        source = content.get("source")
        if not content.get("parents") and isinstance(source, dict) and source.get("format") == "gguf":
            file = str(source.get("file"))
            content["parents"] = [{"name": file, "sha256": str(source.get("sha256")), "source": file}]
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise AxiconError(
                f"{folder / MANIFEST}: {where}: {first['msg'].lower()}; it was not written by axicon, "
                "or was changed"
            ) from None

    def method_chain(self) -> str:
        """`dense`, or the methods with what is not a default, in order."""
        return ", then ".join(map(str, self.chain)) or "dense"


def _of_class(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Defaults of a method's fields; none for a method not known here."""
    return {
        prefix + field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in (dataclasses.fields(cls) if cls else ())
    }


def _plain(value: Any) -> Any:
    """As JSON would have it."""
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    """A list with commas between, a digest by its beginning."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
