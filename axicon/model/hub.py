"""Models from the Hugging Face hub, through its own library and cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from axicon.errors import AxiconError
from axicon.model import safety
from axicon.model.shape import ModelShape

PATTERNS = [
    "config.json", "generation_config.json", "manifest.json",
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "packed.safetensors", "packed-*.safetensors", "packed.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "report.json", "card.json", "LICENSE*", "NOTICE*",
]
"""All that is ever fetched: no pickles, no code."""

_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `name`, `org/name` or `org/name@revision`."""
    return _ID.fullmatch(name) is not None and ".." not in name


def what_is(name: str | Path) -> Literal["demo", "folder", "gguf", "hub"]:
    """What a model's name stands for. Nothing is fetched, made or read of it.

    Raises AxiconError for a name that can stand for no model: nothing is there, or something else.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text == "demo":
        return "demo"
    if path.is_dir():
        safety.check_folder(path)
        return "folder"
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return "gguf"
        raise safety.refuse_file(path)
    if isinstance(name, Path) or path.suffix.lower() == ".gguf" or not is_hub_id(text):
        raise AxiconError(
            f"{text}: no such file or directory, nor a hub id like org/name; `demo` is always there")
    return "hub"


def fetch(name: str, *, offline: bool | None = None, revision: str | None = None) -> Path:
    """The snapshot directory of a repository, named by the commit: a revision stays pinned once fetched.

    The config comes first: an unknown architecture is refused before gigabytes are fetched.
    """
    repository, _, written = name.partition("@")
    revision = revision or written or None
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    config = _snapshot(repository, revision, offline, ["config.json"]) / "config.json"
    if not config.exists():
        raise AxiconError(f"{name}: no config.json in the repository; it holds no model that axicon reads")
    content = safety.read_json(config)
    safety.check_no_remote_code(config, content)
    try:
        ModelShape.from_config(content)
    except AxiconError as e:
        raise AxiconError(f"{name}: {e}") from e
    # The rest from the same commit, even if the branch moves between the two calls.
    folder = _snapshot(repository, config.parent.name, offline, PATTERNS)
    if not any(folder.glob("*.safetensors")):
        where = "the hub's cache" if offline else "the repository"
        raise AxiconError(
            f"{name}: no safetensors in {where}; other weight formats can run code when they are opened "
            "and are "
            f"never fetched; {safety.WAY_OUT}")
    safety.check_folder(folder)
    return folder


def repository_of(folder: Path) -> str | None:
    """`org/name` of a snapshot directory in the hub's cache, else None."""
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return None
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/")


def _snapshot(repository: str, revision: str | None, offline: bool, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    shown = repository + (f"@{revision}" if revision else "")
    try:
        return Path(snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except errors.LocalEntryNotFoundError as e:
        why = "offline mode is on" if offline else "the hub cannot be reached"
        raise AxiconError(
            f"{shown}: not in the hub's cache and {why}; fetch it once while online, give a directory, "
            "or use `demo`"
        ) from e
    except errors.GatedRepoError as e:
        raise AxiconError(f"{shown}: gated; accept its terms on the hub and set HF_TOKEN") from e
    except errors.RevisionNotFoundError as e:
        raise AxiconError(f"{shown}: the repository has no such revision") from e
    except errors.RepositoryNotFoundError as e:
        raise AxiconError(f"{shown}: no such directory here and no such public model on the hub") from e
    except (errors.HfHubHTTPError, OSError) as e:
        raise AxiconError(f"{shown}: download failed ({e}); call it again to go on where it stopped") from e
