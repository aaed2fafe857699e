"""What a reader of another tool's format says of one product, whatever its bytes look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.shards import Stored

Tensors = Mapping[str, Stored]
"""The stored tensors of one product by the last part of their names."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One product of a checkpoint. Its values are read only when they are asked for."""

    outputs: int
    inputs: int
    bits: int
    group: int
    """Columns that share a scale; 0 is the whole row."""
    scale_dtype: torch.dtype
    codes: Callable[[], Tensor]
    """Integers (O, I) from 0 to 2^bits - 1, in the order of the inputs."""
    scale: Callable[[], Tensor]
    """(O, G) of `scale_dtype`."""
    zero: Callable[[], Tensor] | None = None
    """Integers (O, G); None for 2^(bits - 1) everywhere."""
    group_of: Callable[[], Tensor] | None = None
    """(I,), the group of each input; None for neighbours. Read with the headers: it decides the layout."""
    integer_rows: bool = False
    """Activations are rounded to 8 bits, row by row, as `Int8Linear` does."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What parts of a fused product have to have in common."""
        return (self.inputs, self.bits, self.group, self.zero is None, self.group_of is None,
                self.scale_dtype, self.integer_rows)


AUTO_ROUND: dict[str, tuple[Any, ...] | None] = {
    "provider": ("auto-round",), "autoround_version": None, "data_type": ("int",), "iters": None, "lr": None,
    "minmax_lr": None, "nsamples": None, "seqlen": None, "enable_quanted_input": None,
    "enable_minmax_tuning": None, "low_gpu_mem_usage": None, "gradient_accumulate_steps": None,
    "to_quant_block_names": None,
}  # fmt: skip
"""What AutoRound adds to the config of the GPTQ and AWQ checkpoints that it writes: how they were made."""


class Scheme(Protocol):
    """A `quantization_config` that was understood. `suffixes` are the tensors that a packed product has."""

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def layout(self, name: str, tensors: Tensors) -> Layout | None:
        """None for a product that is stored dense. Raises AxiconError for what cannot be read."""


def refuse(what: str) -> NoReturn:
    raise AxiconError(f"config.json: quantization_config: {what}; take the dense model it was made from")


def only(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], where: str = "") -> None:
    """Refuse every key that is set and not in `known`, or set to something else than its values.

    Values of None allow anything.
    """
    for key, value in config.items():
        if key not in known:
            if value not in (None, False, 0, "", [], {}):
                refuse(f"{where}{key} is not understood")
            continue
        allowed = known[key]
        # bool is an int in Python and 4 == 4.0: kinds have to agree too.
        if allowed is not None and not any(type(v) is type(value) and v == value for v in allowed):
            refuse(f"{where}{key} {str(value)[:60]!r} is not read here")


def bit_string(words: Tensor, bits: int, count: int) -> Tensor:
    """int64 (R, count) of rows of 32-bit words (R, W), each a string of codes, least significant first."""
    from axicon.model.group_int import row_bytes, unpack

    octets = words.contiguous().view(torch.uint8).view(len(words), -1)
    return unpack(octets[:, : row_bytes(count, bits)], bits, count).long()


def expect(stored: Stored, dtype: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    entry = stored.entry
    if entry.dtype not in dtype or tuple(entry.shape) != shape:
        raise AxiconError(
            f"{stored.file.path}: {stored.name} is {entry.dtype} {list(entry.shape)}, its format asks for "
            f"{dtype[0]} {list(shape)}; fetch the model again")


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
