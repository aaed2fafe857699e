"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them (arXiv:2210.17323).

    qweight int32 (I * bits / 32, O), codes along the inputs, least significant bits first
    qzeros  int32 (G, O * bits / 32), along the outputs
    scales  float (G, O)
    g_idx   int32 (I,), the group of each input

`checkpoint_format` "gptq" (version 1, and what is meant where nothing is said) stores each zero less one,
"gptq_v2" as it is. Programs disagree on a stored zero of all ones in version 1, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.foreign.layout import AUTO_ROUND, FLOATS, Layout, Tensors, bit_string, expect, only, refuse

KEYS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("gptq",), "bits": (2, 4, 8), "group_size": None, "desc_act": (True, False),
    "sym": (True, False), "checkpoint_format": ("gptq", "gptq_v2"), "pack_dtype": ("int32", None),
    # What the weights were made with, and what only other programs read.
    "damp_percent": None, "damp_auto_increment": None, "static_groups": None, "true_sequential": None,
    "model_name_or_path": None, "model_file_base_name": None, "meta": None, "dataset": None,
    "tokenizer": None, "model_seqlen": None, "batch_size": None, "cache_block_outputs": None,
    "use_cuda_fp16": None, "use_exllama": None, "disable_exllama": None, "exllama_config": None,
    "max_input_length": None, "block_name_to_quantize": None, "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None, "pad_token_id": None, "backend": None, "act_group_aware": None,
    "lm_head": (True, False), "format": ("gptq", "gptq_v2"), "method": ("gptq",),
    **AUTO_ROUND,
}  # fmt: skip


@dataclass(frozen=True)
class GPTQ:
    bits: int
    group: int
    """0 for the whole row."""
    version: int
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GPTQ:
        only(config, KEYS)
        bits, group = config.get("bits"), config.get("group_size")
        if type(bits) is not int or type(group) is not int or not (group == -1 or group > 0):
            refuse("bits and group_size are missing or no numbers")
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        return cls(bits, max(group, 0), 2 if version == "gptq_v2" else 1)

    def layout(self, name: str, tensors: Tensors) -> Layout | None:
        if "qweight" not in tensors:
            return None
        missing = {"qweight", "qzeros", "scales"} - tensors.keys()
        if missing:
            raise AxiconError(f"{name}.{', '.join(sorted(missing))} missing from the weights; fetch it again")
        weight, zeros, scales = (tensors[key] for key in ("qweight", "qzeros", "scales"))
        per = 32 // self.bits
        rows, outputs = (*weight.entry.shape, 0, 0)[:2]
        inputs = rows * per
        group = self.group if self.group < inputs else 0
        if outputs % per or (group and inputs % group):
            refuse(f"{name} has {inputs} inputs and {outputs} outputs, which groups and words do not divide")
        groups = inputs // group if group else 1
        expect(weight, (torch.int32,), (inputs // per, outputs))
        expect(zeros, (torch.int32,), (groups, outputs // per))
        expect(scales, FLOATS, (groups, outputs))
        group_of = None
        if "g_idx" in tensors:
            expect(tensors["g_idx"], (torch.int32, torch.int64), (inputs,))
            found = tensors["g_idx"].tensor().long()
            if not torch.equal(found, torch.arange(inputs) // (group or inputs)):
                group_of = found.clone
        return Layout(
            outputs=outputs, inputs=inputs, bits=self.bits, group=group, scale_dtype=scales.entry.dtype,
            codes=lambda: bit_string(weight.tensor().T, self.bits, inputs),
            scale=lambda: scales.tensor().T,
            zero=lambda: self._zeros(name, bit_string(zeros.tensor(), self.bits, outputs)).T,
            group_of=group_of,
        )  # fmt: skip

    def _zeros(self, name: str, stored: Tensor) -> Tensor:
        if self.version == 2:
            return stored
        if bool((stored == 2**self.bits - 1).any()):
            raise AxiconError(
                f"{name}.qzeros holds a zero of all ones, which programs read differently; convert it to "
                "checkpoint_format gptq_v2")
        return stored + 1
