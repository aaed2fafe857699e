"""What runs on the same sample have in common, computed once: the dense model's hidden states, and what is
added up over them.

    SHARED/
        sample-0123456789abcdef/      calibration tokens
        set-0123456789abcdef/         of one model, sample, dtype, thread count, processor and version
            manifest.json             what of, in full
            states-00001/             hidden states before block 1
            00001-down-hessian/       a statistic of what the product `down` of block 1 multiplies

Everything has the digest of all that decides its bits in its name, so a run that finds it ends with the same
bytes as one that does not. An entry is a folder by the one writer of artefacts, with sizes and digests; a
damaged one is removed and computed again. Of several processes the first to ask computes and the others wait.
What is kept is what dense blocks say of dense hidden states: under `inputs: sequential` what a block is shown
depends on all settings of the recipe, so the sample alone is shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from axicon.compress.calibration import States, Store, observe
from axicon.compress.moments import Statistic
from axicon.errors import AxiconError
from axicon.model.artefact import MANIFEST, atomic_directory, exclusive, write_manifest
from axicon.model.decoder import Block
from axicon.model.intact import changed_files
from axicon.model.tensorfile import TensorFile
from axicon.model.tensorwriter import write_weights

SET, SAMPLE = "set", "sample"
FORMAT_VERSION = 1
"""Of the entries, and of how statistics are added up: another one is another set."""
GIB = 2**30


def gather(block: Block, inputs: States, statistics: Mapping[str, Sequence[Statistic]]) -> None:
    """Fill the statistics of what the products of these names multiply, (N, I), for all inputs of a block.

    What another run has left is read. The rest takes one pass of the inputs through the block.
    """
    if isinstance(inputs, SharedStates) and inputs.owner.is_dense(block):
        inputs.owner.gather(block, inputs, statistics)
    else:
        _observe(block, inputs, statistics)


def _observe(block: Block, inputs: States, statistics: Mapping[str, Sequence[Statistic]]) -> None:
    def visit(some: Sequence[Statistic]) -> Callable[[Tensor], None]:
        def add(x_NI: Tensor) -> None:
            for one in some:
                one.add(x_NI)

        return add

    observe(block, inputs, {name: visit(some) for name, some in statistics.items() if some})


def key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class SharedFolder:
    """Entries by name, in a folder of at most `most` bytes. An entry of a set is named `SET/NAME`."""

    def __init__(self, path: Path, most: int) -> None:
        """Raises AxiconError for a folder that cannot be written."""
        self.path, self.most = path.expanduser().absolute(), most
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise AxiconError(
                f"calibration.shared={path}: cannot be written ({e.strerror}); choose another folder, or none"
            ) from None

    def read(self, name: str, *, mend: bool = False) -> Entry | None:
        """What is there under a name, once every byte was checked. With `mend`, for who holds the lock of the
        name, damage is removed.
        """
        place = self.path / name
        if not place.exists():
            return None
        with contextlib.suppress(AxiconError):  # a manifest that cannot be read is damage too
            if not changed_files(place):
                return Entry(place)
        if mend:
            shutil.rmtree(place, ignore_errors=True)
        return None

    def write(self, name: str, tensors: Iterable[tuple[str, Tensor]], size: int, **facts: Any) -> None:
        """Tensors of `size` bytes. Raises AxiconError where there is no room, and what making one raises."""
        self.make_room(size)
        with atomic_directory(self.path / name) as made:
            write_weights(made, tensors)
            write_manifest(made, kind="calibration", **facts)

    @contextlib.contextmanager
    def locked(self, *names: str) -> Iterator[None]:
        """Be the only one who computes these. Taken in one order, so no two wait for each other."""
        with contextlib.ExitStack() as held:
            for place in (self.path / name for name in sorted(names)):
                held.enter_context(exclusive(place.with_name(f".{place.name}.lock")))
            yield

    def entry(
        self, name: str, make: Callable[[], Iterable[tuple[str, Tensor]]], size: int, **facts: Any
    ) -> Entry:
        """What is there under a name. Where nothing is, the first to ask makes it and others wait."""
        if (found := self.read(name)) is not None:
            return found
        with self.locked(name):
            if (found := self.read(name, mend=True)) is None:
                self.write(name, make(), size, **facts)
        return found or Entry(self.path / name)

    def make_room(self, size: int) -> None:
        """For so many bytes more: sets go that nobody has open, the longest unused ones first. Raises
        AxiconError where that is not enough.
        """
        over, free = _bytes(self.path) + size - self.most, shutil.disk_usage(self.path).free
        for place in sorted(self.path.glob(f"{SET}-*"), key=_used):
            if over > 0 or size > free:
                removed = _removed(place)
                over, free = over - removed, free + removed
        if size > free:
            raise AxiconError(
                f"calibration.shared={self.path}: {size / GIB:.2f} GiB more are needed, {free / GIB:.2f} GiB "
                "are free on that disk; free some or choose another folder"
            )
        if over > 0:
            raise AxiconError(
                f"calibration.shared={self.path}: {size / GIB:.2f} GiB more would be {over / GIB:.2f} above "
                f"calibration.shared_gib={self.most / GIB:g}; allow more, take a smaller sample, or leave "
                "calibration.shared out"
            )


def _bytes(folder: Path) -> int:
    """Of all files in it, of which other processes add and rename some meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over a folder that has just gone
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _used(place: Path) -> float:
    """When a set was last opened."""
    try:
        return (place / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def _removed(place: Path) -> int:
    """The bytes that removing a set has freed; 0 for one that is open."""
    try:
        descriptor = os.open(place / MANIFEST, os.O_RDONLY)
    except OSError:
        return 0  # being made, or being removed by another process
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = _bytes(place)
        shutil.rmtree(place, ignore_errors=True)
        return size
    except BlockingIOError:
        return 0
    finally:
        os.close(descriptor)


class Entry(Sequence[Tensor]):
    """The tensors of an entry, in the order in which they were written; copied when they are asked for."""

    def __init__(self, place: Path) -> None:
        self._places: list[tuple[TensorFile, str]] = []
        for path in sorted(place.glob("*.safetensors")):
            file = TensorFile(path)
            names = sorted(file.entries.items(), key=lambda item: item[1].begin)
            self._places += [(file, name) for name, _ in names]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, name = self._places[index]
        tensor = file.tensor(name).clone()
        file.forget()
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        return {name: self[i] for i, (_, name) in enumerate(self._places)}


class Shared:
    """A set: what is kept of one sample in one model. Nobody removes it while this object is open."""

    def __init__(self, folder: SharedFolder, facts: Mapping[str, Any], state_bytes: int, layers: int) -> None:
        """`facts` decide the bits; `state_bytes` are those of the hidden states before one of the model's
        `layers` blocks. Raises AxiconError where there will be no room for them all.
        """
        self.folder, self.name, self.state_bytes = folder, f"{SET}-{key(facts)}", state_bytes
        place, self._dense = folder.path / self.name, ""
        with folder.locked(self.name):
            if not (place / MANIFEST).exists():
                shutil.rmtree(place, ignore_errors=True)
                with atomic_directory(place) as made:
                    write_manifest(made, kind="calibration", facts=facts)
            self._held = os.open(place / MANIFEST, os.O_RDONLY)
            fcntl.flock(self._held, fcntl.LOCK_SH)
            os.utime(place / MANIFEST)
        missing = layers - 1 - len(list(place.glob("states-*")))
        folder.make_room(missing * state_bytes)

    def close(self) -> None:
        os.close(self._held)

    def enter(self, block: Block) -> None:
        """The block whose statistics come next, while it is dense."""
        self._dense = _content(block)

    def is_dense(self, block: Block) -> bool:
        """Whether a block is what it was when it was entered."""
        return _content(block) == self._dense

    def states(self, items: States) -> SharedStates:
        """Those before the first block, which cost too little to be kept."""
        return SharedStates(self, items)

    def keep(self, index: int) -> Store:
        """For the hidden states before the block of that number: computed only where they are not there."""
        name = f"{self.name}/states-{index:05d}"

        def store(items: Iterable[Tensor]) -> States:
            numbered = ((f"{number:06d}", item) for number, item in enumerate(items))
            return self.states(self.folder.entry(name, lambda: numbered, self.state_bytes))

        return store

    def gather(self, block: Block, inputs: States, statistics: Mapping[str, Sequence[Statistic]]) -> None:
        """As the function does, for a dense block."""
        missing = self._fill(block, statistics)
        if not missing:
            return
        kinds = {one.name for some in missing.values() for one in some}
        with self.folder.locked(*(f"{self.name}/{block.index:05d}-{kind}" for kind in kinds)):
            missing = self._fill(block, missing, mend=True)
            if not missing:
                return
            _observe(block, inputs, missing)
            for product, some in missing.items():
                for one in some:
                    found = one.tensors()
                    size = sum(tensor.nbytes for tensor in found.values())
                    self.folder.write(self._name_of(block, product, one), found.items(), size)

    def _fill(
        self, block: Block, statistics: Mapping[str, Sequence[Statistic]], *, mend: bool = False
    ) -> dict[str, list[Statistic]]:
        """Restore what is there. Returns the others."""
        missing: dict[str, list[Statistic]] = {}
        for product, some in statistics.items():
            for one in some:
                found = self.folder.read(self._name_of(block, product, one), mend=mend)
                if found is None:
                    missing.setdefault(product, []).append(one)
                else:
                    one.restore(found.tensors())
        return missing

    def _name_of(self, block: Block, product: str, one: Statistic) -> str:
        return f"{self.name}/{block.index:05d}-{product}-{one.name}"


class SharedStates(Sequence[Tensor]):
    """Hidden states of the dense model, by which what is known of them is found."""

    def __init__(self, owner: Shared, items: States) -> None:
        self.owner, self.items = owner, items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self.items[index]


def _content(block: Block) -> str:
    """Of all values that a block computes with. What is packed has other names than what is dense."""
    total = hashlib.sha256()
    for name, value in block.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
