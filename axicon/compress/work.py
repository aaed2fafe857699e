"""The work folder of a calibrated compression: what is finished, so that a killed run goes on.

    .NAME.work/
        plan.json           what decides the bytes; a folder of another plan is cleared
        sample.safetensors  the calibration tokens
        block-00000/        a finished block: its tensors, block.json, and with activations on disk the hidden
                            states behind it, until the next block is finished

It lies beside the directory to be made. A block's folder appears whole or not at all, by the one writer of
artefacts, and the result is put together from the blocks; so every run ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axicon.compress.calibration import OnDisk, States
from axicon.errors import AxiconError
from axicon.model import safety, slicing
from axicon.model.artefact import atomic_directory, write_json
from axicon.model.decoder import Decoder
from axicon.model.formats import Packing, install, packing_of
from axicon.model.tensorfile import TensorFile
from axicon.model.tensorwriter import TensorWriter, write_weights
from axicon.model.weights import as_placed, install_masks, set_tensor, stored_tensors, tensor_at, weight_map

STATES, CARRIED = "states", "carried"


def work_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.work")


class Work:
    """Blocks `0 .. done - 1` are finished."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Opens the folder, or makes it. Raises AxiconError where it cannot be written."""
        self.folder = folder
        other = folder.exists() and self._plan() != plan
        self.cleared = other and self._block(0).exists()
        """Whether blocks of another plan were removed."""
        if other:
            shutil.rmtree(folder)
        if not folder.exists():
            with atomic_directory(folder) as made:
                write_json(made / "plan.json", plan)
        self.done = 0
        while self._block(self.done).exists():
            self.done += 1

    def _plan(self) -> Any:
        try:
            return safety.read_json(self.folder / "plan.json")
        except AxiconError:
            return None

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}"

    def sample(self) -> Tensor | None:
        """The calibration tokens (W, T), once they are kept."""
        path = self.folder / "sample" / "model.safetensors"
        return TensorFile(path).tensor("tokens").clone() if path.exists() else None

    def keep_sample(self, tokens_WT: Tensor) -> None:
        with self._kept(), atomic_directory(self.folder / "sample") as made:
            write_weights(made, [("tokens", tokens_WT)])

    @contextmanager
    def block(self) -> Iterator[Path]:
        """The folder of the next block to be; it counts as finished once this ends without an exception."""
        with self._kept(), atomic_directory(self._block(self.done)) as made:
            yield made
        if self.done:
            (self._block(self.done - 1) / STATES).unlink(missing_ok=True)
        self.done += 1

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """A failure of the disk, with what is kept nevertheless."""
        try:
            yield
        except AxiconError as e:
            if not isinstance(e.__cause__, OSError):
                raise
            why = e.__cause__.strerror or str(e.__cause__)
            raise AxiconError(
                f"cannot write in {self.folder}: {why}; finished blocks kept there: {self.done}; mend "
                "that and run the same command again, or remove the folder") from e

    def write(self, made: Path, part: Decoder, **facts: Any) -> None:
        """The tensors of a part and how they are packed, into the folder of its block."""
        write_weights(made, stored_tensors(part))
        packing = {name: [one.format, dict(one.settings)] for name, one in packing_of(part).items()}
        sliced = slicing.as_config(part.shape)
        write_json(made / "block.json", {"packing": packing, "slicing": sliced, **facts})

    def carry(self, made: Path, tensors: Mapping[str, Tensor]) -> None:
        """Into the folder of a block: what the compressor of the next one needs to know."""
        (made / CARRIED).mkdir()
        write_weights(made / CARRIED, tensors.items())

    def carried(self) -> dict[str, Tensor]:
        """What was carried from the last finished block; empty if nothing was."""
        path = self._block(self.done - 1) / CARRIED / "model.safetensors"
        if not path.exists():
            return {}
        file = TensorFile(path)
        return {name: file.tensor(name).clone() for name in file.entries}

    def facts(self, index: int) -> dict[str, Any]:
        return safety.read_json(self._block(index) / "block.json")

    def errors(self) -> list[float | None]:
        """Of the finished blocks; see `axicon.compress.walk.step`."""
        return [self.facts(index)["error"] for index in range(self.done)]

    def packing(self, index: int) -> dict[str, Packing]:
        return {name: Packing(*one) for name, one in self.facts(index)["packing"].items()}

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """In the order in which they were written, as views into mapped files."""
        for path in sorted(self._block(index).glob("*.safetensors")):
            file = TensorFile(path)
            for name in sorted(file.entries, key=lambda name: file.entries[name].begin):
                yield name, file.tensor(name)
                file.forget()

    def restore(self, part: Decoder) -> Decoder:
        """The finished part, made of the dense one, which is one block's."""
        if sliced := self.facts(part.first)["slicing"]:
            with torch.device("meta"):
                narrow = Decoder(slicing.read(part.shape, sliced), range(part.first, part.last))
            part = narrow.to(part.dtype).to_empty(device=part.device).requires_grad_(False)
        install(part, self.packing(part.first))
        install_masks(part, {name for name, _ in self.tensors(part.first)})
        places = weight_map(part)
        for name, tensor in self.tensors(part.first):
            place = places[name]
            if place.rows is None:
                set_tensor(part, place.parameter, as_placed(place, tensor).clone())
            else:
                tensor_at(part, place).copy_(tensor)
        return part

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> States | None:
        """The hidden states behind the last finished block, if they were kept on disk."""
        path = self._block(self.done - 1) / STATES
        try:
            return OnDisk(path, shape, dtype) if path.exists() else None
        except ValueError:
            return None

    def assemble(self, weights: TensorWriter, layers: int) -> dict[str, Packing]:
        """All blocks into one model. Returns what is packed how."""
        packing: dict[str, Packing] = {}
        for index in range(layers):
            for name, tensor in self.tensors(index):
                if name not in weights.names:  # a tied head left dense is the embedding once more
                    weights.add(name, tensor)
            packing |= self.packing(index)
        return packing

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
