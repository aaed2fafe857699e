"""Checkpoints of rules that are not scalar: what trains and what the rule keeps, as safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.finetune.estimate import trained
from axicon.model.artefact import write_all
from axicon.protocols import UpdateRule


@runtime_checkable
class Stateful(Protocol):
    def state(self) -> dict[str, Tensor]:
        """What the rule keeps between steps, by names without spaces."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class TensorCheckpoints:
    """`checkpoint.safetensors` of the newest, `best.safetensors` of parameters that are worth keeping."""

    folder: Path
    every: int
    writes: bool = True

    @property
    def newest(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        return self.folder / "best.safetensors"

    def keep(self, model: nn.Module, rule: UpdateRule, steps: int, last: bool) -> None:
        if not self.writes or (steps % self.every and not last):
            return
        state = rule.state() if isinstance(rule, Stateful) else {}
        tensors = {f"parameter {name}": p for name, p in trained(model).items()}
        self._write(self.newest, tensors | {f"state {name}": value for name, value in state.items()}, steps)

    def keep_parameters(self, model: nn.Module, step: int) -> None:
        self._write(self.best, {f"parameter {name}": p for name, p in trained(model).items()}, step)

    def restore(self, model: nn.Module, rule: UpdateRule) -> int:
        if not self.newest.exists():
            return 0
        step, tensors = _read(self.newest)
        _fill(model, tensors, self.newest)
        if isinstance(rule, Stateful):
            found = {n.removeprefix("state "): t for n, t in tensors.items() if n.startswith("state ")}
            rule.restore(found)
        return step

    @property
    def steps(self) -> int:
        """Behind how many steps the newest was kept; 0 where there is none."""
        return _step(self.newest) if self.newest.exists() else 0

    def restore_parameters(self, model: nn.Module, step: int) -> None:
        """Those of a step that was kept. Raises AxiconError for another."""
        kept = []
        for path in (self.best, self.newest):
            if path.exists():
                found, tensors = _read(path)
                if found == step:
                    _fill(model, tensors, path)
                    return
                kept.append(str(found))
        raise AxiconError(f"step {step} was not kept; kept are {', '.join(kept) or 'none'}")

    def _write(self, path: Path, tensors: dict[str, Tensor], step: int) -> None:
        """A reader sees the old file or the new one, also after a crash of the machine."""
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(descriptor, save(plain, {"step": str(step)}))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise AxiconError(
                f"{path}: {e.strerror}; the checkpoint before it is kept, mend that and run the same command"
            ) from e


def _step(path: Path) -> int:
    return _opened(path, lambda file: {})[0]


def _read(path: Path) -> tuple[int, dict[str, Tensor]]:
    return _opened(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _opened(path: Path, tensors: Callable[[safe_open], dict[str, Tensor]]) -> tuple[int, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"]), tensors(file)
    except (OSError, KeyError, ValueError) as e:
        raise AxiconError(f"{path}: no checkpoint of a run ({e}); remove it to begin again") from None
    except Exception as e:  # safetensors raises a class of its own for a damaged header
        raise AxiconError(f"{path}: damaged ({e}); remove it to begin again") from None


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    for name, p in trained(model).items():
        value = tensors.get(f"parameter {name}")
        if value is None or value.shape != p.shape:
            raise AxiconError(f"{path} is of another model: {name} does not fit; remove it to begin again")
        p.copy_(value)
