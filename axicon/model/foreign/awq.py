"""AWQ checkpoints in the `gemm` layout, as AutoAWQ writes them (arXiv:2306.00978).

    qweight int32 (I, O / 8), eight outputs a word in the order 0 2 4 6 1 3 5 7, least significant bits first
    qzeros  int32 (G, O / 8), likewise
    scales  float16 (G, O)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.foreign.layout import AUTO_ROUND, FLOATS, Layout, Tensors, bit_string, expect, only, refuse

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output held by each half byte of a word."""
KEYS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("awq",), "bits": (4,), "w_bit": (4,), "group_size": None, "q_group_size": None,
    "zero_point": (True,), "version": ("gemm", "GEMM"), "modules_to_not_convert": None, "backend": None,
    "do_fuse": (False, None), "fuse_max_seq_len": None, "modules_to_fuse": (None,), "exllama_config": None,
    **AUTO_ROUND, "sym": (False,),
}  # fmt: skip


@dataclass(frozen=True)
class AWQ:
    group: int
    suffixes = ("qweight", "qzeros", "scales")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> AWQ:
        only(config, KEYS)
        bits, group = (config.get(a, config.get(b)) for a, b in (("bits", "w_bit"),
                                                                ("group_size", "q_group_size")))
        if bits != 4 or type(group) is not int or not (group == -1 or group > 0):
            refuse("bits and group_size are missing or no numbers")
        return cls(max(group, 0))

    def layout(self, name: str, tensors: Tensors) -> Layout | None:
        if "qweight" not in tensors:
            return None
        if missing := set(self.suffixes) - tensors.keys():
            raise AxiconError(f"{name}.{', '.join(sorted(missing))} missing from the weights; fetch it again")
        weight, zeros, scales = (tensors[key] for key in self.suffixes)
        inputs, words = (*weight.entry.shape, 0, 0)[:2]
        outputs, group = words * 8, self.group if self.group < inputs else 0
        if group and inputs % group:
            refuse(f"{name} has {inputs} inputs, which groups of {group} do not divide")
        groups = inputs // group if group else 1
        expect(weight, (torch.int32,), (inputs, words))
        expect(zeros, (torch.int32,), (groups, words))
        expect(scales, FLOATS, (groups, outputs))
        return Layout(
            outputs=outputs, inputs=inputs, bits=4, group=group, scale_dtype=scales.entry.dtype,
            codes=lambda: _ordered(weight.tensor()).T,
            scale=lambda: scales.tensor().T,
            zero=lambda: _ordered(zeros.tensor()).T,
        )  # fmt: skip


def _ordered(words: Tensor) -> Tensor:
    """(R, O / 8) words to (R, O) codes in the order of the outputs."""
    codes = bit_string(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return codes[..., torch.tensor(ORDER).argsort()].flatten(1)
