"""What a finetuning run leaves: a model directory with what was trained inside, or an adapter beside the
base."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from axicon import __version__
from axicon.compress.directory import COMPANIONS
from axicon.errors import AxiconError
from axicon.finetune.offload import ring_of
from axicon.finetune.offloaded import stored_one_by_one
from axicon.model import checkpoint, safety, variant
from axicon.model.adapters import Lora, Prefix, SoftPrompt, peft_config, peft_tensors
from axicon.model.artefact import atomic_directory, read_manifest, write_bytes, write_json, write_manifest
from axicon.model.decoder import Decoder
from axicon.model.formats import as_config, packing_of
from axicon.model.masks import kept
from axicon.model.packed import PackedLinear
from axicon.model.perp import Perp
from axicon.model.tensorwriter import DENSE, PACKED, TensorWriter, write_weights
from jobs.compress import source_of
from jobs.finetune_work import Trainee

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model"


def kind_of(job: Trainee, model: Decoder) -> str:
    """`adapter` or `merged`. Raises AxiconError where what was asked for cannot be."""
    asked, is_lora = job.recipe.output, isinstance(job.scheme, Lora)
    is_beside = isinstance(job.scheme, Prefix | SoftPrompt)
    packed = any(isinstance(m, PackedLinear) for m in model.modules())
    pruned = any(kept(m) is not None for m in model.modules())
    if asked == "merged" and is_beside:
        raise AxiconError(f"output=merged: {job.recipe.scheme.method} is no weight; take output=adapter")
    if asked == "adapter" and not is_lora and not is_beside:
        raise AxiconError(f"output=adapter: scheme={job.recipe.scheme.method} has none; take output=merged")
    if asked == "merged" and is_lora and packed:
        raise AxiconError("output=merged: the base is packed and would be rounded again; take output=adapter")
    if asked == "merged" and is_lora and pruned:
        raise AxiconError(
            "output=merged: adapters would fill what was pruned; take scheme=perp, which keeps the masks, or "
            "output=adapter"
        )
    if asked == "merged" and is_lora and ring_of(model) is not None:
        raise AxiconError(
            "output=merged: zo2 has no weights in memory to put adapters into; take output=adapter, and "
            "output=merged with rule.method=zo_sgd on the log of this run where the model fits"
        )
    if asked == "auto":
        beside = packed or pruned or ring_of(model) is not None
        return "adapter" if is_beside or (is_lora and beside) else "merged"
    return asked


def write(job: Trainee, model: Decoder, step: int, data: str, target: Path) -> str:
    """Write the model as it is behind `step`; the kind of what was written. `model` is used up by it."""
    kind = kind_of(job, model)
    with atomic_directory(target) as folder:
        if kind == "adapter":
            _write_adapter(job, model, folder)
        else:
            _write_merged(job, model, folder)
        write_manifest(folder, **_facts(job, kind, step, data))
    return kind


def _write_adapter(job: Trainee, model: Decoder, folder: Path) -> None:
    assert isinstance(job.scheme, Lora | Prefix | SoftPrompt)
    tensors = sorted(peft_tensors(model).items())
    write_weights(folder, tensors)
    (folder / f"{DENSE}.safetensors").rename(folder / f"{ADAPTER_WEIGHTS}.safetensors")
    base = source_of(job.recipe.model, job.source)
    write_json(folder / ADAPTER_CONFIG, peft_config(job.scheme, model, base))


def _write_merged(job: Trainee, model: Decoder, folder: Path) -> None:
    job.scheme.merge(model)
    packing = packing_of(model)
    with TensorWriter(folder) as weights:
        weights.stem = PACKED if packing or model.shape.only_here else DENSE
        for name, tensor in stored_one_by_one(model):
            if name not in weights.names:
                weights.add(name, tensor)
    config = safety.read_json(job.source / "config.json")
    config.pop("torch_dtype", None)
    config |= {"dtype": job.recipe.dtype, "tie_word_embeddings": model.shape.tie_head}
    if packing:
        config["quantization_config"] = as_config(packing)
    if (varied := variant.as_config(model.shape)) is not None:
        config[variant.KEY] = varied
    write_json(folder / "config.json", config)
    for pattern in COMPANIONS:
        for path in sorted(job.source.glob(pattern)):
            if path.is_file():
                write_bytes(folder / path.name, path.read_bytes())
    checkpoint.check_headers(folder)


def _facts(job: Trainee, kind: str, step: int, data: str) -> dict[str, Any]:
    """What the manifest says beside the files."""
    recipe, above = job.recipe, read_manifest(job.source) or {}
    settings = {
        "rule": recipe.rule.method,
        **_settings("rule", job.rule),
        "scheme": recipe.scheme.method,
        **_settings("scheme", job.scheme),
        "steps": step,
        "data": data,
    }
    if job.earlier:
        settings["start_from"] = job.earlier[-1].facts["log"]
    compressed = recipe.compressor
    chain = [] if compressed is None else [_link(compressed.method, compressed.model_extra or {})]
    method = "perp" if isinstance(job.scheme, Perp) else "finetune"
    return {
        "kind": kind if kind == "adapter" else "model",
        "name": f"{checkpoint.model_id(recipe.model)}-{recipe.rule.method}",
        "chain": [*above.get("chain", ()), *chain, _link(method, settings)],
        "parents": [
            {
                "name": checkpoint.model_id(recipe.model),
                "sha256": job.base,
                "source": source_of(recipe.model, job.source),
            }
        ],
        "licence": above.get("licence"),
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "versions": {
            "axicon": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"isa": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
    }


def _link(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {"method": method, "settings": plain, "axicon": __version__}


def _settings(key: str, method: Any) -> dict[str, Any]:
    found = dataclasses.asdict(method)
    return {f"{key}.{name}": str(v) if isinstance(v, Path) else v for name, v in found.items()}
