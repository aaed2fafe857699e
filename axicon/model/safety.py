"""The gate every model directory passes before a byte of it is used.

A model folder is data from strangers. axicon reads safetensors and JSON and nothing that can run: no
pickles, no Python files, no libraries, no remote code. What is only lying beside the weights and is never
opened (a `.bin` next to safetensors, a picture) is left alone.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError

PICKLES = frozenset({
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".pt2", ".nemo", ".mar",
    ".h5", ".keras", ".msgpack", ".onnx", ".tflite", ".pb",
})
"""Weight formats that are pickles, may hold pickles or code, or have no reader here. Never opened."""

CODE = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".ipynb", ".sh", ".exe", ".jar"})

CODE_KEYS = frozenset({"auto_map", "custom_code", "custom_pipelines", "trust_remote_code"})
"""Config keys that ask for Python code of the model's author."""

JSON_LIMIT = 64 << 20
TEMPLATE_LIMIT = 256 << 10

WAY_OUT = (
    "convert it on a machine you trust: load it there with transformers and call "
    "save_pretrained(folder, safe_serialization=True), or take a repository that offers safetensors"
)


def check_folder(folder: Path) -> None:
    """Refuse a model folder that holds code, leads out of itself, or offers its weights only as pickles.

    Raises AxiconError naming the file and the way out. Reads `config.json` and `tokenizer_config.json` only.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise AxiconError(
                f"{folder}: an adapter beside a model, which can be served and evaluated and nothing else; "
                "finetune with output=merged for a model"
            )
        raise AxiconError(
            f"{folder}: no config.json in it; a model directory holds config.json and safetensors")
    root = _link_root(folder)
    names = []
    for path in _files(folder):
        name = str(path.relative_to(folder))
        if path.is_symlink() and not _inside(path, root):
            raise AxiconError(
                f"{path}: a link that leads out of the model folder; copy the file into the folder")
        if path.suffix.lower() in CODE:
            raise AxiconError(
                f"{path}: a model folder must not hold code, and axicon never runs a model's own code; "
                "remove the file if the model needs none")
        names.append(name)
    check_names(str(folder), names)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            check_no_remote_code(folder / name, read_json(folder / name))


def check_names(where: str, names: list[str]) -> None:
    """Refuse a list of files that has no safetensors, naming the pickles if there are any."""
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if Path(name).suffix.lower() in PICKLES)
    if pickles:
        raise AxiconError(
            f"{where}: its weights ({pickles[0]}) are only in a format that can run code when it is "
            f"opened; {WAY_OUT}")
    raise AxiconError(f"{where}: no .safetensors files in it; {WAY_OUT}")


def check_no_remote_code(path: Path, config: Mapping[str, Any]) -> None:
    for key in CODE_KEYS & config.keys():
        if config[key]:
            raise AxiconError(
                f"{path}: {key!r} asks to run Python code that comes with the model, and axicon never does; "
                "choose a model that transformers itself knows, or remove the key if the model needs no "
                "own code")


def refuse_file(path: Path) -> AxiconError:
    """The reason why a single file is not a model, by its suffix."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return AxiconError(f"{path}: {suffix} files can run code when they are opened; {WAY_OUT}")
    if suffix == ".safetensors":
        return AxiconError(f"{path}: give the directory that holds it, with config.json and the tokenizer")
    return AxiconError(
        f"{path}: not a model; give a directory with safetensors and config.json, or a .gguf file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Raises AxiconError if it is missing, too large, or something else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise AxiconError(f"{path}: not a regular file")
        if status.st_size > JSON_LIMIT:
            raise AxiconError(f"{path}: {status.st_size} bytes, more than the {JSON_LIMIT} that are read")
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise AxiconError(f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise AxiconError(f"{path}: not valid JSON ({e}); fetch it again") from e
    if not isinstance(content, dict):
        raise AxiconError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return content


def check_chat_template(template: str, where: str) -> None:
    """Refuse a Jinja template that reaches for Python internals or for other files.

    transformers renders templates in Jinja's immutable sandbox; this static check is the line before it.
    Raises AxiconError.
    """
    from jinja2 import Environment, TemplateError, nodes

    if len(template) > TEMPLATE_LIMIT:
        raise AxiconError(
            f"{where}: the chat template has {len(template)} characters, more than {TEMPLATE_LIMIT}")
    try:
        # The extensions that transformers renders with.
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation_tags(template))
    except (TemplateError, RecursionError) as e:
        raise AxiconError(f"{where}: the chat template is not valid Jinja ({e}); remove or repair it") from e
    for node in tree.find_all(nodes.Node):
        if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise AxiconError(f"{where}: the chat template loads other templates, which is not allowed")
        if isinstance(node, nodes.Filter) and node.name == "attr":
            raise AxiconError(f"{where}: the chat template uses the filter 'attr', which is not allowed")
        reached = (
            node.attr if isinstance(node, nodes.Getattr)
            else node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const)
            else None
        )
        if isinstance(reached, str) and reached.startswith("_"):
            raise AxiconError(f"{where}: the chat template reaches for {reached!r}, which is not allowed")


def _without_generation_tags(template: str) -> str:
    """transformers adds {% generation %} blocks to Jinja; they only mark text."""
    import re

    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)


def _files(folder: Path) -> Iterator[Path]:
    """All files. Linked directories count as files; hidden ones (.git, .cache) hold nothing that is read."""
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (path := Path(place, name)).is_symlink():
                yield path
        for name in files:
            yield Path(place, name)


def _link_root(folder: Path) -> Path:
    """How far links may lead: the folder, or the hub's cache of this one repository, with its blobs."""
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return repository
    return real


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root)
